"""Write small ONNX decoders of random weights, with each form of attention that exporters write.

The same seed gives every form the same weights, so that all of them answer the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx_folders import Shape, write_genai_config, write_optimum_config, write_tokenizer

MICROSOFT = "com.microsoft"
FORMS = ("gqa", "gqa packed", "gqa rotary outside", "mha", "standard", "decomposed")
EPSILON = 1e-5


@dataclass
class _Graph:
    element: np.dtype
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, NDArray[np.generic]] = field(default_factory=dict)

    def add(self, kind: str, *inputs: str, domain: str = "", outputs: int = 1, **attributes):  # type: ignore[no-untyped-def]
        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, domain=domain, **attributes))
        return names[0] if outputs == 1 else names

    def keep(self, name: str, value: object, dtype: type = np.int64) -> str:
        self.weights[name] = np.asarray(value, self.element if dtype is np.float32 else dtype)
        return name


def write_decoder(
    folder: Path,
    form: str = "gqa",
    shape: Shape | None = None,
    *,
    layout: str = "genai",
    external: bool = True,
    element: str = "float32",
    bits: int | None = None,
    last_row: bool = False,
    accuracy_level: int = 4,
    block_size: int = 32,
    symmetric: bool = True,
    chat_template: str | None = None,
    attributes: dict[str, object] | None = None,
    changed: Callable[[str, np.ndarray], np.ndarray] = lambda _name, values: values,
) -> Path:
    """Write a folder as exporters do: graph, weights, configuration and tokenizer.

    With `last_row` logits are of a pass's last row alone. `changed` returns the values of a weight in place of its
    random ones, by its name.
    `attributes` of attention are interleaved, window, softcap and scale, where the form has them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shape = shape or Shape()
    requested = _attributes(attributes or {})
    model = _model(form, shape, np.dtype(element), requested, last_row=last_row)
    for weight in model.graph.initializer:
        values = changed(weight.name, numpy_helper.to_array(weight).copy())
        weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    if bits is not None:
        model = _quantised(model, bits, accuracy_level, block_size, symmetric=symmetric)
    onnx.save_model(
        model,
        folder / "model.onnx",
        save_as_external_data=external,
        location="model.onnx.data",
        size_threshold=256,
    )
    if layout == "genai":
        write_genai_config(folder, shape)
    else:
        write_optimum_config(folder, shape)
    write_tokenizer(folder, shape.vocabulary, chat_template)
    return folder


def _quantised(
    model: onnx.ModelProto, bits: int, accuracy_level: int, block_size: int, *, symmetric: bool
) -> onnx.ModelProto:
    """The matrices as MatMulNBits; those that are not `symmetric` have zero points."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantiser = MatMulNBitsQuantizer(
        model,
        bits=bits,
        block_size=block_size,
        is_symmetric=symmetric,
        accuracy_level=accuracy_level,
    )
    quantiser.process()
    made: onnx.ModelProto = quantiser.model.model
    return made


def _attributes(requested: dict[str, object]) -> dict[str, object]:
    names = {"interleaved": "rotary_interleaved", "window": "local_window_size"}
    return {
        names.get(name, name): int(value) if name in names else value  # type: ignore[call-overload]
        for name, value in requested.items()
    }


def _model(
    form: str,
    shape: Shape,
    element: np.dtype,
    attributes: dict[str, object],
    *,
    last_row: bool,
) -> onnx.ModelProto:
    graph, random = _Graph(element), np.random.default_rng(11)
    width, head_size = shape.width, shape.head_size
    kv_width = shape.kv_heads * head_size

    def matrix(name: str, rows: int, columns: int) -> str:
        value = random.standard_normal((rows, columns)) / np.sqrt(rows)
        return graph.keep(name, value, np.float32)

    def norm(x: str, name: str) -> str:
        graph.keep(name, np.ones(width), np.float32)
        kind = "SimplifiedLayerNormalization"
        return graph.add(kind, x, name, axis=-1, epsilon=EPSILON, stash_type=1)

    hidden = graph.add("Gather", matrix("embedding", shape.vocabulary, width), "input_ids")
    positions = _positions(graph, form, shape)
    outputs = []
    for layer in range(shape.layers):
        x = norm(hidden, f"l{layer}.norm")
        names = "qkv" if form != "gqa packed" else ""
        matrices = {
            n: matrix(f"l{layer}.{n}", width, width if n == "q" else kv_width) for n in "qkv"
        }
        if names:
            projected = [graph.add("MatMul", x, matrices[n]) for n in "qkv"]
        else:
            packed = np.concatenate([graph.weights.pop(matrices[n]) for n in "qkv"], axis=1)
            projected = [graph.add("MatMul", x, graph.keep(f"l{layer}.qkv", packed, np.float32))]
        attended, present = _attention(graph, form, shape, layer, projected, positions, attributes)
        outputs += present
        mixed = graph.add("MatMul", attended, matrix(f"l{layer}.out", width, width))
        hidden = graph.add("Add", hidden, mixed)
        x = norm(hidden, f"l{layer}.norm2")
        gate = graph.add("MatMul", x, matrix(f"l{layer}.gate", width, shape.feed_forward))
        up = graph.add("MatMul", x, matrix(f"l{layer}.up", width, shape.feed_forward))
        gate = graph.add("Mul", gate, graph.add("Sigmoid", gate))
        down = graph.add("Mul", gate, up)
        down = graph.add("MatMul", down, matrix(f"l{layer}.down", shape.feed_forward, width))
        hidden = graph.add("Add", hidden, down)
    if last_row:
        cut = [graph.keep(f"last{i}", [value]) for i, value in enumerate((-1, 2**31 - 1, 1))]
        hidden = graph.add("Slice", hidden, *cut)
    x = norm(hidden, "norm")
    head = matrix("head", width, shape.vocabulary)
    graph.nodes.append(helper.make_node("MatMul", [x, head], ["logits"]))
    return _closed(graph, form, shape, outputs, last_row=last_row)


def _positions(graph: _Graph, form: str, shape: Shape) -> dict[str, str]:
    """Return the position inputs of attention, which all layers share."""
    half = shape.head_size // 2
    angles = np.outer(np.arange(shape.context), 10000.0 ** (-np.arange(half) / half))
    graph.keep("cos_cache", np.cos(angles), np.float32)
    graph.keep("sin_cache", np.sin(angles), np.float32)
    graph.keep("one", [1])
    graph.keep("axes0", [0])
    if form.startswith("gqa"):
        total = graph.add("ReduceSum", "attention_mask", "one", keepdims=0)
        last = graph.add("Cast", graph.add("Sub", total, "one"), to=TensorProto.INT32)
        length = graph.add("Gather", graph.add("Shape", "attention_mask"), graph.keep("i1", 1))
        return {"seqlens": last, "total": graph.add("Cast", length, to=TensorProto.INT32)}
    length = graph.add("Gather", graph.add("Shape", "attention_mask"), graph.keep("i1", 1))
    keys = graph.add("Range", graph.keep("i0", 0), length, graph.keep("step", 1))
    rows = graph.add("Unsqueeze", "position_ids", graph.keep("axes1", [1, 3]))
    seen = graph.add("LessOrEqual", keys, rows)
    bias = graph.add(
        "Where", seen, graph.keep("zero", 0.0, np.float32), graph.keep("hidden", -1e9, np.float32)
    )
    return {"bias": bias}


def _attention(
    graph: _Graph,
    form: str,
    shape: Shape,
    layer: int,
    projected: list[str],
    positions: dict[str, str],
    attributes: dict[str, object],
) -> tuple[str, list[str]]:
    past = [f"past_key_values.{layer}.{n}" for n in ("key", "value")]
    present = [f"present.{layer}.{n}" for n in ("key", "value")]
    heads = {"num_heads": shape.heads, "kv_num_heads": shape.kv_heads, **attributes}
    if form.startswith("gqa"):
        inside = form != "gqa rotary outside"
        if not inside:
            projected = [_rotated(graph, shape, x, i) for i, x in enumerate(projected)]
        inputs = [*projected, *[""] * (3 - len(projected)), *past]
        inputs += [positions["seqlens"], positions["total"]]
        caches = ["cos_cache", "sin_cache"] if inside else []
        made = [f"attended{layer}", *present]
        graph.nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                [*inputs, *caches],
                made,
                domain=MICROSOFT,
                do_rotary=int(inside),
                **heads,
            )
        )
        return made[0], present
    q, k, v = (_rotated(graph, shape, x, i) for i, x in enumerate(projected))
    made = [f"attended{layer}", *present]
    if form == "mha":
        inputs = [q, k, v, "", "", positions["bias"], *past]
        graph.nodes.append(
            helper.make_node(
                "MultiHeadAttention",
                inputs,
                made,
                domain=MICROSOFT,
                num_heads=shape.heads,
                **attributes,
            )
        )
        return made[0], present
    if form == "standard":
        graph.nodes.append(
            helper.make_node(
                "Attention",
                [q, k, v, positions["bias"], *past],
                made,
                q_num_heads=shape.heads,
                kv_num_heads=shape.kv_heads,
                **attributes,
            )
        )
        return made[0], present
    return _decomposed(graph, shape, (q, k, v), past, present, positions["bias"]), present


def _rotated(graph: _Graph, shape: Shape, x: str, which: int) -> str:
    if which == 2:
        return x
    inputs = (x, "position_ids", "cos_cache", "sin_cache")
    heads = shape.heads if which == 0 else shape.kv_heads
    return str(graph.add("RotaryEmbedding", *inputs, domain=MICROSOFT, num_heads=heads))


def _decomposed(
    graph: _Graph,
    shape: Shape,
    projected: tuple[str, str, str],
    past: list[str],
    present: list[str],
    bias: str,
) -> str:
    """Attention in the operators of older exports: Concat, MatMul, Softmax."""
    split = []
    for x, heads in zip(projected, (shape.heads, shape.kv_heads, shape.kv_heads), strict=True):
        target = graph.keep(f"shape{heads}", [0, 0, heads, shape.head_size])
        split.append(graph.add("Transpose", graph.add("Reshape", x, target), perm=[0, 2, 1, 3]))
    q, *new = split
    for before, after, made in zip(past, new, present, strict=True):
        graph.nodes.append(helper.make_node("Concat", [before, after], [made], axis=2))
    k, v = (_repeated(graph, shape, name) for name in present)
    scores = graph.add("MatMul", q, graph.add("Transpose", k, perm=[0, 1, 3, 2]))
    scale = graph.keep("scale", shape.head_size**-0.5, np.float32)
    shares = graph.add("Softmax", graph.add("Add", graph.add("Mul", scores, scale), bias), axis=-1)
    mixed = graph.add("Transpose", graph.add("MatMul", shares, v), perm=[0, 2, 1, 3])
    return str(graph.add("Reshape", mixed, graph.keep("flat", [0, 0, shape.width])))


def _repeated(graph: _Graph, shape: Shape, x: str) -> str:
    group = shape.heads // shape.kv_heads
    if group == 1:
        return x
    wide = graph.add("Unsqueeze", x, graph.keep("axes2", [2]))
    wide = graph.add("Expand", wide, graph.keep("group", [1, 1, group, 1, 1]))
    target = graph.keep("merged", [0, shape.heads, -1, shape.head_size])
    return str(graph.add("Reshape", wide, target))


def _closed(
    graph: _Graph, form: str, shape: Shape, outputs: list[str], *, last_row: bool
) -> onnx.ModelProto:
    """The graph with its inputs and outputs."""
    element = helper.np_dtype_to_tensor_dtype(graph.element)
    ids = [("input_ids", ["batch", "rows"]), ("attention_mask", ["batch", "total"])]
    if form not in ("gqa", "gqa packed"):
        ids.append(("position_ids", ["batch", "rows"]))
    inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, dims) for n, dims in ids]
    for layer in range(shape.layers):
        for which in ("key", "value"):
            dims = ["batch", shape.kv_heads, "past", shape.head_size]
            name = f"past_key_values.{layer}.{which}"
            inputs.append(helper.make_tensor_value_info(name, element, dims))
    dims = ["batch", 1 if last_row else "rows", shape.vocabulary]
    results = [helper.make_tensor_value_info("logits", element, dims)]
    dims = ["batch", shape.kv_heads, "total", shape.head_size]
    results += [helper.make_tensor_value_info(n, element, dims) for n in outputs]
    weights = [numpy_helper.from_array(value, name) for name, value in graph.weights.items()]
    made = helper.make_graph(graph.nodes, "decoder", inputs, results, weights)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(made, opset_imports=opsets, ir_version=10)
