"""An ONNX folder -> OnnxSpec: configuration and graph must tell of the same model. Reads no weights.

The matrix products of a graph, and what onnxruntime makes of their weights. Reads no weights.

RepackPlan: what is left of an ONNX graph where its products are ours, too. Reads headers alone."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from lowtide.models.errors import BadModelFile, UnsupportedModel
from lowtide.models.onnx.config import OnnxConfig, read_config, read_json
from lowtide.models.onnx.graph import Node, OnnxGraph, Port, attention_form, read_graph
from lowtide.models.onnx.rewrite.attention_nodes import CannotRewrite
from lowtide.models.onnx.rewrite.matmul_nodes import read_matmul_nodes
from lowtide.models.onnx.rewrite.rewrite import RewritePlan, plan_rewrite
from lowtide.models.onnx.spec import ENGINE, FINGERPRINT, KV_TYPES, GraphPorts, LayerPorts, OnnxSpec
from lowtide.models.spec import VocabularySpec

QUANTISED = ("com.microsoft", "MatMulNBits")
PLAIN = frozenset({"MatMul", "Gemm"})
PACKED_BITS = (4, 8)
PACKED_BLOCKS = (16, 32, 64, 128, 256)
INT8_ROWS = 4
"""The accuracy level that 8-bit weights have kernels for."""
BLOCK_BYTES = 8
"""A packed block's scale and sum, both of f32."""
PACKED_PADDING = 16384
"""Of a product's copy: alignment, and what lies idle between copies."""
PACKED_SHARE = 1.35
"""Bytes of a packed copy for each byte of quantised weights at most, where the kernels are not known."""
CPUINFO = Path("/proc/cpuinfo")


class Products:
    """What is told of a graph's products.

    onnxruntime copies a product's weights into a layout of its own (`repacked_bytes` in all), and lets go of
    those that nothing else reads (`released_bytes`); making a copy takes as much again. Quantised ones
    without a kernel for that are unpacked in each pass, of which `original_bytes` is the largest.
    With `nodes`, of those alone: what else reads their weights is not run.
    """

    def __init__(self, graph: OnnxGraph, logits: str, nodes: frozenset[int] | None = None) -> None:
        self._graph = graph
        types = Counter[str]()
        self.repacked_bytes = self.released_bytes = self.largest_copy_bytes = 0
        self.original_bytes = self.widest = 0
        run = [node for i, node in enumerate(graph.nodes) if nodes is None or i in nodes]
        self._num_readers = Counter(name for node in run for name in node.inputs)
        for node in run:
            if (node.domain, node.kind) == QUANTISED:
                self._quantised(node, types, is_last=logits in node.outputs)
            elif node.kind in PLAIN:
                self._plain(node, types, is_last=logits in node.outputs)
        self.quantisation = types.most_common(1)[0][0] if types else "none"
        self.widest = self.widest or 1

    def _quantised(self, node: Node, types: Counter[str], *, is_last: bool) -> None:
        bits = int(node.numbers.get("bits", 4))
        rows, columns = (int(node.numbers.get(name, 0)) for name in ("N", "K"))
        read = [self._graph.weights[n] for n in node.inputs[1:4] if n in self._graph.weights]
        num_bytes = sum(weight.num_bytes for weight in read)
        types[f"int{bits}"] += num_bytes
        if self._has_kernel(node, bits):
            block = int(node.numbers["block_size"])
            packed_block = block * bits // 8 + BLOCK_BYTES
            copy = rows * -(-columns // block) * packed_block + PACKED_PADDING
            copy += self._widened_bytes(node)
            self.repacked_bytes += copy
            self.largest_copy_bytes = max(self.largest_copy_bytes, copy)
            self.released_bytes += sum(
                weight.num_bytes
                for weight in read
                if weight.location is not None and self._num_readers[weight.name] == 1
            )
        else:
            self.repacked_bytes += int(PACKED_SHARE * num_bytes)
            self.original_bytes = max(self.original_bytes, 4 * rows * columns)
        if not is_last:
            self.widest = max(self.widest, rows)

    def _widened_bytes(self, node: Node) -> int:
        """Return what scales of two bytes take beside the copy: they are kept as f32, too."""
        scales = self._graph.weights.get(node.input(2))
        if scales is None or scales.element_type != "float16":
            return 0
        return 2 * scales.num_bytes

    def _has_kernel(self, node: Node, bits: int) -> bool:
        """Whether onnxruntime multiplies the packed weights as they are (MLAS, "qnbitgemm")."""
        zeros = self._graph.weights.get(node.input(3))
        return (
            _has_avx2()
            and node.numbers.get("block_size") in PACKED_BLOCKS
            and bits in PACKED_BITS
            and (bits == 4 or node.numbers.get("accuracy_level") == INT8_ROWS)
            and (not node.input(3) or (zeros is not None and zeros.element_type == "uint8"))
            and not node.input(4)
        )

    def _plain(self, node: Node, types: Counter[str], *, is_last: bool) -> None:
        weight = self._graph.weights.get(node.input(1))
        if weight is None or len(weight.shape) != 2:
            return
        types[weight.element_type] += weight.num_bytes
        self.repacked_bytes += weight.num_bytes * 5 // 4
        if not is_last:
            self.widest = max(self.widest, *weight.shape)


def _has_avx2() -> bool:
    """Whether the processor is known to have what kernels want; others are planned without them."""
    try:
        return re.search(r"^flags\b.*\bavx2\b", CPUINFO.read_text(), re.MULTILINE) is not None
    except OSError:
        return False


ALIGNMENT = 64
"""Every matrix begins on such a byte of the panels' file, behind as many bytes that say what it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RepackPlan:
    """The nodes and matrices that become ours, and what onnxruntime still has of weights.

    `copied_bytes` and `copying_bytes` are as `ModelSpec` has them, of what is left to onnxruntime.
    """

    swap: RewritePlan
    left_bytes: int
    copied_bytes: int
    copying_bytes: int
    original_bytes: int

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where each matrix begins in the panels' file, and where that ends."""
        places = [ALIGNMENT]
        for matrix in self.swap.products.matrices:
            places.append(-(-(places[-1] + matrix.num_bytes) // ALIGNMENT) * ALIGNMENT)
        return tuple(places)


def read_repack_plan(graph: OnnxGraph, ports: GraphPorts, config: OnnxConfig) -> RepackPlan:
    """Return what is swapped; raises `CannotRewrite` where the graph is left whole, or has none."""
    swap = plan_rewrite(graph, ports, config, read_matmul_nodes(graph))
    if not swap.products.products:
        raise CannotRewrite(
            "has no product of 4- or 8-bit weights in blocks of 32 that can be packed"
        )
    left = Products(graph, ports.logits, swap.nodes)
    return RepackPlan(
        swap=swap,
        left_bytes=sum(graph.weights[name].num_bytes for name in swap.weights),
        copied_bytes=left.repacked_bytes - left.released_bytes,
        copying_bytes=left.largest_copy_bytes,
        original_bytes=left.original_bytes,
    )


def packed_spec(spec: OnnxSpec, form: RepackPlan) -> OnnxSpec:
    """Return the spec of the graph whose products are ours, too."""
    return replace(
        spec,
        swap=form.swap,
        weight_bytes=form.left_bytes + form.offsets[-1],
        file_bytes=form.left_bytes + form.offsets[-1],
        copied_bytes=form.copied_bytes + form.swap.inline_bytes,
        copying_bytes=form.copying_bytes,
        original_bytes=form.original_bytes,
        repacked_tensors=tuple(node.output for node in form.swap.products.products),
    )


TOKENIZER = "tokenizer.json"
TEMPLATE = "chat_template.jinja"
LONGEST_TOKEN_BYTES = 256
TOKENISING_BYTES = 512
"""Memory for each byte of text while `tokenizers` works on it: 219 to 383 measured, a token a byte."""
WRITTEN_FINGERPRINT = re.compile("[0-9a-f]{32}")
SPECIAL_TEXTS = ("bos_token", "eos_token")


def read_spec(path: Path) -> OnnxSpec:
    """Read the `OnnxSpec` of the model at `path`, a folder or an .onnx file in one.

    Raises `ModelNotFound`, `BadModelFile` or `UnsupportedModel` with what is wrong and what to change.
    """
    config = read_config(path)
    graph = read_graph(config.graph)
    ports = _ports(graph, config)
    kv_element = _checked_cache(graph, config, ports)
    _check_logits(graph, config, ports)
    form, products = attention_form(graph, ports), Products(graph, ports.logits)
    files = _files(graph)
    texts, template = _special_texts(config.path.parent)
    weight_bytes = sum(weight.num_bytes for weight in graph.weights.values())
    tokenizer = _tokenizer(config)
    return OnnxSpec(
        engine=ENGINE,
        paths=files,
        name=_name(config),
        architecture=config.architecture,
        quantisation=products.quantisation,
        num_layers=config.num_layers,
        embedding_width=config.embedding_width,
        feed_forward_width=(products.widest,) * config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=(config.num_kv_heads,) * config.num_layers,
        key_head_dim=config.head_size,
        value_head_dim=config.head_size,
        context_length=config.context_length,
        sliding_window=config.sliding_window,
        recurrent_state_bytes=0,
        vocabulary=VocabularySpec(
            num_tokens=config.vocabulary,
            num_merges=0,
            text_bytes=tokenizer.stat().st_size,
            longest_token_bytes=LONGEST_TOKEN_BYTES,
        ),
        weight_bytes=weight_bytes,
        file_bytes=sum(file.stat().st_size for file in files),
        tensor_types=frozenset(weight.element_type for weight in graph.weights.values()),
        chat_template=template,
        fingerprint=_fingerprint(graph),
        tokenising_bytes=TOKENISING_BYTES,
        kv_types=(KV_TYPES[kv_element],),
        cache_copies=1 if form.shares_cache else 2,
        copied_bytes=products.repacked_bytes - products.released_bytes + _inline_bytes(graph),
        copying_bytes=products.largest_copy_bytes,
        ports=ports,
        kv_element=kv_element,
        logits_element=graph.outputs[ports.logits].element_type,
        makes_last_row=graph.outputs[ports.logits].shape[1:2] == (1,),
        shares_cache=form.shares_cache,
        attention=form.name,
        max_matmul_width=products.widest,
        original_bytes=products.original_bytes,
        end_ids=frozenset(config.end_ids),
        tokenizer_path=tokenizer,
        special_texts=texts,
        swap=_swap(graph, ports, config),
        packed=_packed(graph, ports, config),
    )


def _packed(graph: OnnxGraph, ports: GraphPorts, config: OnnxConfig) -> RepackPlan | str:
    try:
        return read_repack_plan(graph, ports, config)
    except CannotRewrite as reason:
        return str(reason)


def _swap(graph: OnnxGraph, ports: GraphPorts, config: OnnxConfig) -> RewritePlan | str:
    try:
        return plan_rewrite(graph, ports, config)
    except CannotRewrite as reason:
        return str(reason)


def _name(config: OnnxConfig) -> str:
    folder = config.path.parent.resolve()
    return folder.name or config.architecture


def _files(graph: OnnxGraph) -> tuple[Path, ...]:
    locations = {w.location for w in graph.weights.values() if w.location is not None}
    return (graph.path, *(graph.path.parent / location for location in sorted(locations)))


def _inline_bytes(graph: OnnxGraph) -> int:
    """What lies inside the .onnx file is copied out of it while it is read."""
    return sum(w.num_bytes for w in graph.weights.values() if w.location is None)


def _ports(graph: OnnxGraph, config: OnnxConfig) -> GraphPorts:
    def name(key: str) -> str | None:
        stated = config.input_names.get(key, key)
        return stated if stated in graph.inputs else None

    token_ids, logits = name("input_ids"), config.input_names.get("logits", "logits")
    if token_ids is None or logits not in graph.outputs:
        raise UnsupportedModel(
            f"{graph.path} has no input of token ids or no output of logits: a decoder that takes "
            "token ids is wanted"
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
            f"{graph.path} has the input {unknown[0]!r}, which no decoder of text with "
            f"{config.num_layers} layers needs: export it as a decoder with past keys and values"
        )
    return ports


def _layer_ports(graph: OnnxGraph, config: OnnxConfig, layer: int) -> LayerPorts:
    past = _named(config.past_names, layer)
    present = _named(config.present_names, layer)
    missing = [n for n in past if n not in graph.inputs]
    missing += [n for n in present if n not in graph.outputs]
    if missing:
        raise BadModelFile(
            f"{graph.path} has no {missing[0]}, and {config.path} states {config.num_layers} layers: "
            "export graph and configuration together, with past keys and values"
        )
    return LayerPorts(past=past, present=present)


def _named(patterns: tuple[str, str], layer: int) -> tuple[str, str]:
    keys, values = (pattern.replace("%d", str(layer)) for pattern in patterns)
    return keys, values


def _checked_cache(graph: OnnxGraph, config: OnnxConfig, ports: GraphPorts) -> str:
    """Return the element type of keys and values; their shapes must be the configuration's."""
    names = [name for layer in ports.layers for name in layer.past]
    for name in names:
        shape = graph.inputs[name].shape
        wanted = (None, config.num_kv_heads, None, config.head_size)
        if len(shape) != 4 or not _agree(shape, wanted):
            raise BadModelFile(
                f"{graph.path}: {name} has the shape {_written(graph.inputs[name])}, {config.path} states "
                f"{config.num_kv_heads} heads of {config.head_size}: export both together"
            )
    elements = {graph.inputs[name].element_type for name in names}
    if len(elements) != 1 or not elements <= set(KV_TYPES):
        raise UnsupportedModel(
            f"{graph.path} keeps keys and values as {' and '.join(sorted(elements))}, one of "
            f"{', '.join(KV_TYPES)} is wanted: export it for the processor"
        )
    return elements.pop()


def _agree(shape: tuple[int | None, ...], wanted: tuple[int | None, ...]) -> bool:
    pairs = zip(shape, wanted, strict=True)
    return all(has is None or want is None or has == want for has, want in pairs)


def _check_logits(graph: OnnxGraph, config: OnnxConfig, ports: GraphPorts) -> None:
    port = graph.outputs[ports.logits]
    if port.element_type not in KV_TYPES:
        raise UnsupportedModel(
            f"{graph.path} makes logits of {port.element_type}, one of {', '.join(KV_TYPES)} is wanted"
        )
    last = port.shape[-1] if port.shape else None
    if last is not None and last != config.vocabulary:
        raise BadModelFile(
            f"{graph.path} makes {last} logits, {config.path} states a vocabulary of "
            f"{config.vocabulary}: export both together"
        )


def _written(port: Port) -> str:
    return f"({', '.join('?' if extent is None else str(extent) for extent in port.shape)})"


def _tokenizer(config: OnnxConfig) -> Path:
    path = config.path.parent / TOKENIZER
    if not path.is_file():
        raise BadModelFile(f"{path} is missing: fetch it into the same folder")
    return path


def _special_texts(folder: Path) -> tuple[tuple[tuple[str, str], ...], str | None]:
    """Return the texts that templates ask for, and the chat template itself, None where there is none."""
    path = folder / "tokenizer_config.json"
    values = read_json(path) if path.is_file() else {}
    texts = []
    for name in SPECIAL_TEXTS:
        value = values.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        texts.append((name, value if isinstance(value, str) else ""))
    template = values.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[0].get("template") if named else None
    if (folder / TEMPLATE).is_file():
        template = (folder / TEMPLATE).read_text(encoding="utf-8", errors="replace")
    return tuple(texts), template if isinstance(template, str) else None


def _fingerprint(graph: OnnxGraph) -> str:
    """Return 32 hexadecimal digits: of the model that the graph was converted from, where it says so.

    Else of names and shapes of all weights, and of what the nodes are.
    """
    stated = graph.metadata.get(FINGERPRINT, "")
    if WRITTEN_FINGERPRINT.fullmatch(stated):
        return stated
    digest = hashlib.sha256()
    for name, weight in sorted(graph.weights.items()):
        digest.update(f"{name} {weight.shape} {weight.element_type}\n".encode())
    for kind, count in sorted(Counter(node.kind for node in graph.nodes).items()):
        digest.update(f"{kind} {count}\n".encode())
    return digest.hexdigest()[:32]
