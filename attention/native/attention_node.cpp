#include "attention_node.h"

#include <cstdio>

namespace {

bool kv_type_of(const GgmlTensor* t, int64_t size, KvType& type) {
    switch (t->type) {
        case kGgmlTypeF16: type = KvType::f16; return t->nb[0] == 2;
        case kGgmlTypeQ8_0: type = KvType::q8_0; return size % 32 == 0;
        case kGgmlTypeQ4_0: type = KvType::q4_0; return size % 32 == 0;
        default: return false;
    }
}

bool known_head_size(int64_t size) { return size > 0 && size <= kMaxHeadSize && size % 16 == 0; }

}  // namespace

int AttentionNode::layer_of(const GgmlTensor* node) {
    const GgmlTensor* k = node->src[1];
    if (k == nullptr) return -1;
    while (k->view_src != nullptr) k = k->view_src;
    int layer = -1;
    if (std::sscanf(k->name, "cache_k_l%d", &layer) != 1 || layer < 0 || layer >= kMaxLayers) return -1;
    return layer;
}

bool AttentionNode::read(const GgmlTensor* node) {
    const GgmlTensor *q = node->src[0], *k = node->src[1], *v = node->src[2], *mask = node->src[3], *sinks = node->src[4];
    if (q == nullptr || k == nullptr || v == nullptr || mask == nullptr) return false;
    const int64_t key_size = q->ne[0], value_size = v->ne[0], rows = q->ne[1], heads = q->ne[2], streams = q->ne[3];
    const int64_t keys = k->ne[1], kv_heads = k->ne[2];
    const bool shapes = rows > 0 && keys > 0 && k->ne[0] == key_size && v->ne[1] == keys && v->ne[2] == kv_heads && kv_heads > 0 &&
                        heads % kv_heads == 0 && known_head_size(key_size) && known_head_size(value_size) &&
                        mask->ne[0] >= keys && mask->ne[1] >= rows && mask->ne[2] == 1 && node->ne[0] == value_size &&
                        node->ne[1] == heads && node->ne[2] == rows;
    const bool stream_shapes = streams > 0 && k->ne[3] == streams && v->ne[3] == streams && node->ne[3] == streams &&
                               (mask->ne[3] == streams || mask->ne[3] == 1);
    AttentionProblem& p = first_;
    const bool types = q->type == kGgmlTypeF32 && q->nb[0] == 4 && mask->type == kGgmlTypeF16 && mask->nb[0] == 2 &&
                       node->type == kGgmlTypeF32 && node->nb[0] == 4 && kv_type_of(k, key_size, p.k_type) &&
                       kv_type_of(v, value_size, p.v_type);
    const bool known_sinks = sinks == nullptr || (sinks->type == kGgmlTypeF32 && sinks->nb[0] == 4 && sinks->ne[0] == heads);
    if (!shapes || !stream_shapes || !types || !known_sinks) return false;
    p.q = static_cast<const char*>(q->data), p.q_row_stride = q->nb[1], p.q_head_stride = q->nb[2];
    p.k = static_cast<const char*>(k->data), p.k_key_stride = k->nb[1], p.k_head_stride = k->nb[2];
    p.v = static_cast<const char*>(v->data), p.v_key_stride = v->nb[1], p.v_head_stride = v->nb[2];
    p.mask = static_cast<const char*>(mask->data), p.mask_row_stride = mask->nb[1];
    p.out = static_cast<char*>(node->data), p.out_row_stride = node->nb[2], p.out_head_stride = node->nb[1];
    p.num_rows = int(rows), p.num_heads = int(heads), p.num_kv_heads = int(kv_heads), p.num_keys = int(keys);
    p.key_size = int(key_size), p.value_size = int(value_size);
    p.sinks = sinks == nullptr ? nullptr : static_cast<const float*>(sinks->data);
    num_streams_ = int(streams);
    q_stride_ = q->nb[3], k_stride_ = k->nb[3], v_stride_ = v->nb[3], out_stride_ = node->nb[3];
    mask_stride_ = mask->ne[3] == 1 ? 0 : mask->nb[3];
    return true;
}

AttentionProblem AttentionNode::problem(int stream) const {
    AttentionProblem p = first_;
    p.q += stream * q_stride_, p.k += stream * k_stride_, p.v += stream * v_stride_;
    p.mask += stream * mask_stride_, p.out += stream * out_stride_;
    return p;
}
