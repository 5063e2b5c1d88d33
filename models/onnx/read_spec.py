"""Reads an ONNX folder into an OnnxSpec: configuration and graph must describe the same model.

Reads headers only, never the weights. `MatmulWeights` estimates what onnxruntime makes of the weights of a
graph's matmuls; `read_repack_plan` what remains for it once lowtide's kernels compute them.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from lowtide.models.arguments.values import shown
from lowtide.models.errors import BadModelFile, UnsupportedModel
from lowtide.models.onnx.config import ENGINE, OnnxConfig, read_config, read_json
from lowtide.models.onnx.graph import Node, OnnxGraph, Port, read_graph
from lowtide.models.onnx.rewrite.attention_nodes import attention_form
from lowtide.models.onnx.rewrite.matmul_nodes import MATMUL, read_matmul_nodes
from lowtide.models.onnx.rewrite.plan import CannotRewrite, RepackPlan, RewritePlan
from lowtide.models.onnx.rewrite.rewrite import plan_rewrite
from lowtide.models.onnx.spec import (
    FINGERPRINT,
    KV_TYPE_OF,
    GraphPorts,
    LayerPorts,
    OnnxSpec,
)
from lowtide.models.spec import VocabularySpec

Plan = TypeVar("Plan", RewritePlan, RepackPlan)

FLOAT_MATMULS = frozenset({"MatMul", "Gemm"})
KERNEL_BITS = (4, 8)
KERNEL_BLOCKS = (16, 32, 64, 128, 256)
INT8_ROWS = 4
"""The accuracy level for which 8-bit weights have kernels."""
BLOCK_HEADER_BYTES = 8
"""The scale and the sum, both fp32, of a block in onnxruntime's packed copy."""
COPY_PADDING_BYTES = 16384
"""Alignment of a packed copy and idle memory between copies."""
COPY_RATIO = 1.35
"""Bytes of a packed copy per byte of quantised weights, at most, where the kernels are unknown."""
CPUINFO = Path("/proc/cpuinfo")


class MatmulWeights:
    """The memory that the weights of a graph's matmuls take in onnxruntime.

    onnxruntime copies the weights of each matmul into a layout of its own (`packed_bytes` in all) and
    releases those that no other node reads (`released_bytes`); making a copy takes as much again.
    Quantised weights without a kernel are dequantised in each pass: `dequantised_bytes` is the largest.
    With `nodes`, only those nodes are counted, and only they read weights.
    """

    def __init__(self, graph: OnnxGraph, logits: str, nodes: frozenset[int] | None = None) -> None:
        self._graph = graph
        types = Counter[str]()
        self.packed_bytes = self.released_bytes = self.largest_copy_bytes = 0
        self.dequantised_bytes = self.max_width = 0
        run = [node for i, node in enumerate(graph.nodes) if nodes is None or i in nodes]
        self._num_readers = Counter(name for node in run for name in node.inputs)
        for node in run:
            if (node.domain, node.kind) == MATMUL:
                self._quantised(node, types, is_last=logits in node.outputs)
            elif node.kind in FLOAT_MATMULS:
                self._float(node, types, is_last=logits in node.outputs)
        self.quantisation = types.most_common(1)[0][0] if types else "none"
        self.max_width = self.max_width or 1

    def _quantised(self, node: Node, types: Counter[str], *, is_last: bool) -> None:
        bits = int(node.numbers.get("bits", 4))
        rows, columns = (int(node.numbers.get(name, 0)) for name in ("N", "K"))
        read = [self._graph.weights[n] for n in node.inputs[1:4] if n in self._graph.weights]
        num_bytes = sum(weight.num_bytes for weight in read)
        types[f"int{bits}"] += num_bytes
        if self._has_kernel(node, bits):
            block = int(node.numbers["block_size"])
            block_bytes = block * bits // 8 + BLOCK_HEADER_BYTES
            copy = rows * -(-columns // block) * block_bytes + COPY_PADDING_BYTES
            copy += self._fp32_scale_bytes(node)
            self.packed_bytes += copy
            self.largest_copy_bytes = max(self.largest_copy_bytes, copy)
            self.released_bytes += sum(
                weight.num_bytes
                for weight in read
                if weight.location is not None and self._num_readers[weight.name] == 1
            )
        else:
            self.packed_bytes += int(COPY_RATIO * num_bytes)
            self.dequantised_bytes = max(self.dequantised_bytes, 4 * rows * columns)
        if not is_last:
            self.max_width = max(self.max_width, rows)

    def _fp32_scale_bytes(self, node: Node) -> int:
        """Return what fp16 scales take beside the packed copy: onnxruntime also keeps them in fp32."""
        scales = self._graph.weights.get(node.input(2))
        if scales is None or scales.element_type != "float16":
            return 0
        return 2 * scales.num_bytes

    def _has_kernel(self, node: Node, bits: int) -> bool:
        """Whether onnxruntime has a kernel for these packed weights (MLAS, "qnbitgemm")."""
        zeros = self._graph.weights.get(node.input(3))
        return (
            _has_avx2()
            and node.numbers.get("block_size") in KERNEL_BLOCKS
            and bits in KERNEL_BITS
            and (bits == 4 or node.numbers.get("accuracy_level") == INT8_ROWS)
            and (not node.input(3) or (zeros is not None and zeros.element_type == "uint8"))
            and not node.input(4)
        )

    def _float(self, node: Node, types: Counter[str], *, is_last: bool) -> None:
        weight = self._graph.weights.get(node.input(1))
        if weight is None or len(weight.shape) != 2:
            return
        types[weight.element_type] += weight.num_bytes
        self.packed_bytes += weight.num_bytes * 5 // 4
        if not is_last:
            self.max_width = max(self.max_width, *weight.shape)


def _has_avx2() -> bool:
    """Whether the processor is known to have AVX2; any other is planned as if it had no kernels."""
    try:
        return re.search(r"^flags\b.*\bavx2\b", CPUINFO.read_text(), re.MULTILINE) is not None
    except OSError:
        return False


def read_repack_plan(graph: OnnxGraph, ports: GraphPorts, config: OnnxConfig) -> RepackPlan:
    """Return the plan for repacked weights; raise `CannotRewrite` where no matmul can be repacked."""
    rewrite = plan_rewrite(graph, ports, config, read_matmul_nodes(graph))
    if not rewrite.matmuls.matmuls:
        raise CannotRewrite(
            "has no matmul of 4- or 8-bit weights in blocks of 32 that can be repacked"
        )
    remaining = MatmulWeights(graph, ports.logits, rewrite.nodes)
    return RepackPlan(
        rewrite=rewrite,
        remaining_bytes=sum(graph.weights[name].num_bytes for name in rewrite.weights),
        copied_bytes=remaining.packed_bytes - remaining.released_bytes,
        copying_bytes=remaining.largest_copy_bytes,
        dequantised_bytes=remaining.dequantised_bytes,
    )


def repacked_spec(spec: OnnxSpec, plan: RepackPlan) -> OnnxSpec:
    """Return the spec of the graph with repacked weights, before the file of these weights exists."""
    return replace(
        spec,
        rewrite=plan.rewrite,
        weight_bytes=plan.remaining_bytes + plan.offsets[-1],
        file_bytes=plan.remaining_bytes + plan.offsets[-1],
        copied_bytes=plan.copied_bytes + plan.rewrite.inline_bytes,
        copying_bytes=plan.copying_bytes,
        dequantised_bytes=plan.dequantised_bytes,
        repacked_tensors=tuple(node.output for node in plan.rewrite.matmuls.matmuls),
    )


TOKENIZER = "tokenizer.json"
TEMPLATE = "chat_template.jinja"
TOKENISING_BYTES = 512
"""Memory per byte of text while `tokenizers` works on it: 219 to 383 measured, one token per byte."""
FINGERPRINT_FORM = re.compile("[0-9a-f]{32}")
SPECIAL_TEXTS = ("bos_token", "eos_token")


def read_spec(path: Path) -> OnnxSpec:
    """Read the spec of the model at `path`, a folder or an .onnx file in one.

    Raises `ModelNotFound`, `BadModelFile` or `UnsupportedModel` with what is wrong and what to change.
    """
    config = read_config(path)
    graph = read_graph(config.graph)
    ports = _ports(graph, config)
    kv_element = _checked_cache(graph, config, ports)
    _check_logits(graph, config, ports)
    form, weights = attention_form(graph, ports), MatmulWeights(graph, ports.logits)
    files = _files(graph)
    texts, template = _special_texts(config.path.parent)
    weight_bytes = sum(weight.num_bytes for weight in graph.weights.values())
    tokenizer = _tokenizer(config)
    return OnnxSpec(
        engine=ENGINE,
        paths=files,
        name=_name(config),
        architecture=config.architecture,
        quantisation=weights.quantisation,
        num_layers=config.num_layers,
        embedding_width=config.embedding_width,
        feed_forward_width=(weights.max_width,) * config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=(config.num_kv_heads,) * config.num_layers,
        key_head_dim=config.head_size,
        value_head_dim=config.head_size,
        context_length=config.context_length,
        sliding_window=config.sliding_window,
        sliding_layers=config.sliding_layers,
        recurrent_state_bytes=0,
        vocabulary=VocabularySpec(
            num_tokens=config.vocabulary,
            num_merges=0,
            text_bytes=tokenizer.stat().st_size,
        ),
        weight_bytes=weight_bytes,
        file_bytes=sum(file.stat().st_size for file in files),
        tensor_types=frozenset(weight.element_type for weight in graph.weights.values()),
        chat_template=template,
        fingerprint=_fingerprint(graph),
        tokenising_bytes=TOKENISING_BYTES,
        kv_types=(KV_TYPE_OF[kv_element],),
        cache_copies=1 if form.shares_cache else 2,
        copied_bytes=weights.packed_bytes - weights.released_bytes + _inline_bytes(graph),
        copying_bytes=weights.largest_copy_bytes,
        ports=ports,
        kv_element=kv_element,
        logits_element=graph.outputs[ports.logits].element_type,
        last_logits_only=graph.outputs[ports.logits].shape[1:2] == (1,),
        shares_cache=form.shares_cache,
        attention=form.name,
        max_matmul_width=weights.max_width,
        dequantised_bytes=weights.dequantised_bytes,
        end_ids=frozenset(config.end_ids),
        tokenizer_path=tokenizer,
        special_texts=texts,
        rewrite=_plan_or_reason(lambda: plan_rewrite(graph, ports, config)),
        repack=_plan_or_reason(lambda: read_repack_plan(graph, ports, config)),
    )


def _plan_or_reason(read: Callable[[], Plan]) -> Plan | str:
    try:
        return read()
    except CannotRewrite as reason:
        return str(reason)


def _name(config: OnnxConfig) -> str:
    folder = config.path.parent.resolve()
    return folder.name or config.architecture


def _files(graph: OnnxGraph) -> tuple[Path, ...]:
    locations = {w.location for w in graph.weights.values() if w.location is not None}
    return (graph.path, *(graph.path.parent / location for location in sorted(locations)))


def _inline_bytes(graph: OnnxGraph) -> int:
    """Return the bytes of weights inside the .onnx file: they are copied while it is read."""
    return sum(w.num_bytes for w in graph.weights.values() if w.location is None)


def _ports(graph: OnnxGraph, config: OnnxConfig) -> GraphPorts:
    def name(key: str) -> str | None:
        configured = config.input_names.get(key, key)
        return configured if configured in graph.inputs else None

    token_ids, logits = name("input_ids"), config.input_names.get("logits", "logits")
    if token_ids is None or logits not in graph.outputs:
        raise UnsupportedModel(
            f"{graph.path} has no input of token ids or no output of logits: export the model as a decoder "
            "that takes token ids"
        )
    ports = GraphPorts(
        token_ids=token_ids,
        attention_mask=name("attention_mask"),
        position_ids=name("position_ids"),
        logits=logits,
        layers=tuple(_layer_ports(graph, config, layer) for layer in range(config.num_layers)),
    )
    known = {token_ids, ports.attention_mask, ports.position_ids}
    known |= {name for layer in ports.layers for name in layer.past}
    unknown = sorted(set(graph.inputs) - known)
    if unknown:
        raise UnsupportedModel(
            f"{graph.path} has the unknown input {shown(unknown[0])}: export the model as a text decoder of "
            f"{config.num_layers} layers with past keys and values"
        )
    return ports


def _layer_ports(graph: OnnxGraph, config: OnnxConfig, layer: int) -> LayerPorts:
    past = _named(config.past_names, layer)
    present = _named(config.present_names, layer)
    missing = [n for n in past if n not in graph.inputs]
    missing += [n for n in present if n not in graph.outputs]
    if missing:
        raise BadModelFile(
            f"{graph.path} has no {missing[0]}, but {config.path} has {config.num_layers} layers: "
            "export graph and configuration together, with past keys and values"
        )
    return LayerPorts(past=past, present=present)


def _named(patterns: tuple[str, str], layer: int) -> tuple[str, str]:
    keys, values = (pattern.replace("%d", str(layer)) for pattern in patterns)
    return keys, values


def _checked_cache(graph: OnnxGraph, config: OnnxConfig, ports: GraphPorts) -> str:
    """Return the element type of keys and values; check that their shapes match the configuration."""
    names = [name for layer in ports.layers for name in layer.past]
    for name in names:
        shape = graph.inputs[name].shape
        expected = (None, config.num_kv_heads, None, config.head_size)
        if len(shape) != 4 or not _agree(shape, expected):
            raise BadModelFile(
                f"{graph.path}: {name} has the shape {_format_shape(graph.inputs[name])}, but {config.path} "
                f"has {config.num_kv_heads} heads of {config.head_size}: export both together"
            )
    elements = {graph.inputs[name].element_type for name in names}
    if len(elements) != 1 or not elements <= set(KV_TYPE_OF):
        raise UnsupportedModel(
            f"{graph.path} has keys and values of {' and '.join(sorted(elements))}; they must be "
            f"{' or '.join(KV_TYPE_OF)}: export the model for the CPU"
        )
    return elements.pop()


def _agree(shape: tuple[int | None, ...], expected: tuple[int | None, ...]) -> bool:
    pairs = zip(shape, expected, strict=True)
    return all(None in pair or pair[0] == pair[1] for pair in pairs)


def _check_logits(graph: OnnxGraph, config: OnnxConfig, ports: GraphPorts) -> None:
    port = graph.outputs[ports.logits]
    if port.element_type not in KV_TYPE_OF:
        raise UnsupportedModel(
            f"{graph.path} has logits of {port.element_type}; they must be {' or '.join(KV_TYPE_OF)}: "
            "export the model again"
        )
    last = port.shape[-1] if port.shape else None
    if last is not None and last != config.vocabulary:
        raise BadModelFile(
            f"{graph.path} has {last} logits, but {config.path} has a vocabulary of "
            f"{config.vocabulary}: export both together"
        )


def _format_shape(port: Port) -> str:
    return f"({', '.join('?' if extent is None else str(extent) for extent in port.shape)})"


def _tokenizer(config: OnnxConfig) -> Path:
    path = config.path.parent / TOKENIZER
    if not path.is_file():
        raise BadModelFile(f"{path} is missing: fetch it into the same folder")
    return path


def _special_texts(folder: Path) -> tuple[tuple[tuple[str, str], ...], str | None]:
    """Return the special tokens' texts and the chat template, None where there is none."""
    path = folder / "tokenizer_config.json"
    values = read_json(path) if path.is_file() else {}
    texts = []
    for name in SPECIAL_TEXTS:
        value = values.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        texts.append((name, value if isinstance(value, str) else ""))
    template = values.get("chat_template")
    if isinstance(template, list):  # several named templates
        named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[0].get("template") if named else None
    if (folder / TEMPLATE).is_file():
        template = (folder / TEMPLATE).read_text(encoding="utf-8", errors="replace")
    return tuple(texts), template if isinstance(template, str) else None


def _fingerprint(graph: OnnxGraph) -> str:
    """Return 32 hexadecimal digits that identify the model.

    A converted graph carries the fingerprint of its source; otherwise the digits are a digest of the names
    and shapes of all weights and of the number of nodes of each kind.
    """
    noted = graph.metadata.get(FINGERPRINT, "")
    if FINGERPRINT_FORM.fullmatch(noted):
        return noted
    digest = hashlib.sha256()
    for name, weight in sorted(graph.weights.items()):
        digest.update(f"{name} {weight.shape} {weight.element_type}\n".encode())
    for kind, count in sorted(Counter(node.kind for node in graph.nodes).items()):
        digest.update(f"{kind} {count}\n".encode())
    return digest.hexdigest()[:32]
