// What every key weighs in the softmax of a line, once for each instruction set: what TidalDecode selects by.

#include "attention_problem.h"
#include "vectors.h"

namespace {

void add_weights(const float* scores, const float* totals, int count, float* weights) {
    for (int j = 0; j < count; j += W)
        store(weights + j, load(weights + j) + exp_nonpositive(load(scores + j) - totals[0]) * totals[1]);
}

}  // namespace
