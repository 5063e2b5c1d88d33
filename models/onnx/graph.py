"""OnnxGraph: the nodes, inputs and weights of an ONNX file, without the weights' data.

`Wire` reads protocol buffers field by field without trusting the file; a field of bytes is represented by its
place, so that nothing else is copied. Field numbers are those of onnx.proto3.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from lowtide.models.arguments.values import shown
from lowtide.models.errors import BadModelFile, ModelNotFound, UnsupportedModel

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
_FIXED = {FIXED64: 8, FIXED32: 4}


@dataclass(frozen=True, slots=True)
class Field:
    """Field `number` of a message: its `value` if it is a number, else its bytes from `start` to `end`."""

    number: int
    kind: int
    value: int
    start: int
    end: int


class Wire:
    """The bytes of one protocol buffer file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data = data
        self.path = path

    def fields(self, start: int, end: int) -> Iterator[Field]:
        """Yield the fields of the message in [start, end); raise `BadModelFile` where it is not a message."""
        position = start
        while position < end:
            key, position = self._varint(position, end)
            number, kind = key >> 3, key & 7
            if kind == VARINT:
                value, after = self._varint(position, end)
                yield Field(number, kind, value, position, after)
                position = after
                continue
            if kind == BYTES:
                length, position = self._varint(position, end)
            elif kind in _FIXED:
                length = _FIXED[kind]
            else:
                raise self.broken(position, f"a field has the unknown wire type {kind}")
            if length > end - position:
                raise self.broken(position, f"a field claims {length} bytes beyond its message")
            yield Field(number, kind, 0, position, position + length)
            position += length

    def text(self, field: Field) -> str:
        """Return the text of a field."""
        return self.data[field.start : field.end].decode("utf-8", errors="replace")

    def numbers(self, field: Field) -> list[int]:
        """Return the integers of a repeated field, packed or one by one."""
        if field.kind == VARINT:
            return [_signed(field.value)]
        numbers, position = [], field.start
        while position < field.end:
            value, position = self._varint(position, field.end)
            numbers.append(_signed(value))
        return numbers

    def _varint(self, position: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while position < end and shift < 70:
            byte = self.data[position]
            value |= (byte & 0x7F) << shift
            position += 1
            if byte < 0x80:
                return value & ((1 << 64) - 1), position
            shift += 7
        raise self.broken(position, "a number has no end")

    def broken(self, position: int, reason: str) -> BadModelFile:
        """Return an error that says where and why the file cannot be read."""
        return BadModelFile(
            f"{self.path} is not a valid ONNX file: {reason} (near byte {position}); "
            "fetch or export it again"
        )


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


MAX_NODES = 1 << 20
KNOWN_DOMAINS = ("", "ai.onnx", "com.microsoft")
ELEMENT_BITS = {
    1: ("float32", 32),
    2: ("uint8", 8),
    3: ("int8", 8),
    4: ("uint16", 16),
    5: ("int16", 16),
    6: ("int32", 32),
    7: ("int64", 64),
    9: ("bool", 8),
    10: ("float16", 16),
    11: ("double", 64),
    12: ("uint32", 32),
    13: ("uint64", 64),
    16: ("bfloat16", 16),
    21: ("uint4", 4),
    22: ("int4", 4),
}
"""By onnx's number of an element type: its name and its bits."""
_EXTERNAL = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """A tensor of the file; `location` is the file beside it with the data, None where the data is inside."""

    name: str
    shape: tuple[int, ...]
    element_type: str
    num_bytes: int
    location: str | None
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """An operator; `numbers` are its numeric attributes."""

    name: str
    kind: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    numbers: dict[str, float]

    def input(self, index: int) -> str:
        """Return the name of an input, "" where the node does not have it."""
        return self.inputs[index] if index < len(self.inputs) else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """An input or output of the graph; a dimension that is not fixed is None."""

    name: str
    element_type: str
    shape: tuple[int | None, ...]


@dataclass(slots=True, kw_only=True)
class OnnxGraph:
    """The content of one .onnx file of `num_bytes` bytes; `metadata` are its writer's notes."""

    path: Path
    num_bytes: int
    nodes: list[Node] = field(default_factory=list)
    weights: dict[str, Weight] = field(default_factory=dict)
    inputs: dict[str, Port] = field(default_factory=dict)
    outputs: dict[str, Port] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)


def read_graph(path: Path) -> OnnxGraph:
    """Read the graph at `path`; of weights only their place is read, inside it or in files beside it.

    Raises `ModelNotFound` where there is no file, `BadModelFile` where it is not ONNX or data is missing,
    `UnsupportedModel` for an operator of a domain that onnxruntime does not have.
    """
    try:
        num_bytes = path.stat().st_size
        with path.open("rb") as file:
            if num_bytes == 0:
                raise BadModelFile(f"{path} is empty: fetch the file again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                graph = _Reader(Wire(data, path)).graph(num_bytes)
    except FileNotFoundError:
        raise ModelNotFound(f"no file at {path}: name an .onnx file or its folder") from None
    except OSError as error:
        raise ModelNotFound(f"{path} cannot be read: {error.strerror or error}") from None
    _check_domains(graph)
    _check_external(graph)
    return graph


class _Reader:
    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def graph(self, num_bytes: int) -> OnnxGraph:
        graph = OnnxGraph(path=self._wire.path, num_bytes=num_bytes)
        body = None
        for part in self._wire.fields(0, num_bytes):
            body = part if part.number == 7 else body
            if part.number == 14:
                key, value = self._pair(part)
                graph.metadata[key] = value
        if body is None:
            raise self._wire.broken(0, "it has no graph")
        for part in self._wire.fields(body.start, body.end):
            if part.number == 1:
                graph.nodes.append(self._node(part))
            elif part.number == 5:
                weight = self._weight(part)
                graph.weights[weight.name] = weight
            elif part.number in (11, 12):
                port = self._port(part)
                (graph.inputs if part.number == 11 else graph.outputs)[port.name] = port
        if not graph.nodes or len(graph.nodes) > MAX_NODES:
            raise self._wire.broken(body.start, f"its graph has {len(graph.nodes)} nodes")
        for name in graph.weights:  # old files list weights as inputs, too
            graph.inputs.pop(name, None)
        return graph

    def _node(self, part: Field) -> Node:
        texts: dict[int, list[str]] = {1: [], 2: [], 3: [""], 4: [""], 7: [""]}
        numbers: dict[str, float] = {}
        for inner in self._wire.fields(part.start, part.end):
            if inner.number in texts:
                texts[inner.number].append(self._wire.text(inner))
            elif inner.number == 5:
                name, number = self._attribute(inner)
                if number is not None:
                    numbers[name] = number
        return Node(
            name=texts[3][-1],
            kind=texts[4][-1],
            domain=texts[7][-1],
            inputs=tuple(texts[1]),
            outputs=tuple(texts[2]),
            numbers=numbers,
        )

    def _attribute(self, part: Field) -> tuple[str, float | None]:
        name, number = "", None
        for inner in self._wire.fields(part.start, part.end):
            if inner.number == 1:
                name = self._wire.text(inner)
            elif inner.number == 2 and inner.kind == FIXED32:
                (number,) = struct.unpack("<f", self._wire.data[inner.start : inner.end])
            elif inner.number == 3:
                number = self._wire.numbers(inner)[0]
        return name, number

    def _weight(self, part: Field) -> Weight:
        shape: list[int] = []
        external: dict[str, str] = {}
        name, kind, is_external, offset = "", 0, False, part.start
        for inner in self._wire.fields(part.start, part.end):
            if inner.number == 1:
                shape += self._wire.numbers(inner)
            elif inner.number == 2:
                kind = inner.value
            elif inner.number == 8:
                name = self._wire.text(inner)
            elif inner.number == 9:
                offset = inner.start
            elif inner.number == 13:
                key, value = self._pair(inner)
                external[key] = value
            elif inner.number == 14:
                is_external = inner.value == _EXTERNAL
        if kind not in ELEMENT_BITS or any(extent < 0 for extent in shape):
            raise self._wire.broken(
                part.start, f"tensor {shown(name)} has type {kind}, shape {shape}"
            )
        element_type, bits = ELEMENT_BITS[kind]
        return Weight(
            name=name,
            shape=tuple(shape),
            element_type=element_type,
            num_bytes=-(-prod(shape) * bits // 8),
            location=external.get("location", "") if is_external else None,
            offset=self._offset(external, part) if is_external else offset,
        )

    def _offset(self, external: dict[str, str], part: Field) -> int:
        text = external.get("offset", "0")
        if not text.isdecimal():
            raise self._wire.broken(part.start, f"a tensor's data begins at {shown(text)}")
        return int(text)

    def _pair(self, part: Field) -> tuple[str, str]:
        texts = {1: "", 2: ""}
        for inner in self._wire.fields(part.start, part.end):
            texts[inner.number] = self._wire.text(inner)
        return texts[1], texts[2]

    def _port(self, part: Field) -> Port:
        name, kind, shape = "", 0, list[int | None]()
        for inner in self._wire.fields(part.start, part.end):
            if inner.number == 1:
                name = self._wire.text(inner)
            elif inner.number == 2:
                kind, shape = self._tensor_type(inner)
        return Port(
            name=name,
            element_type=ELEMENT_BITS.get(kind, ("unknown", 0))[0],
            shape=tuple(shape),
        )

    def _tensor_type(self, part: Field) -> tuple[int, list[int | None]]:
        kind, shape = 0, list[int | None]()
        for tensor in self._wire.fields(part.start, part.end):
            for inner in self._wire.fields(tensor.start, tensor.end) if tensor.number == 1 else ():
                if inner.number == 1:
                    kind = inner.value
                elif inner.number == 2:
                    dimensions = self._wire.fields(inner.start, inner.end)
                    shape += [self._extent(dimension) for dimension in dimensions]
        return kind, shape

    def _extent(self, part: Field) -> int | None:
        fields = self._wire.fields(part.start, part.end)
        return next((inner.value for inner in fields if inner.number == 1), None)


def _check_domains(graph: OnnxGraph) -> None:
    for node in graph.nodes:
        if node.domain not in KNOWN_DOMAINS:
            raise UnsupportedModel(
                f"{graph.path} has the operator {node.domain}.{node.kind}, which onnxruntime does not have: "
                "export the model with standard and com.microsoft operators"
            )


def _check_external(graph: OnnxGraph) -> None:
    """Refuse data that lies outside the folder, is missing, or is truncated."""
    sizes: dict[str, int] = {}
    for weight in graph.weights.values():
        location = weight.location
        if location is None:
            continue
        if location not in sizes:
            sizes[location] = _external_bytes(graph.path, location)
        end = weight.offset + weight.num_bytes
        if end > sizes[location]:
            raise BadModelFile(
                f"{location} beside {graph.path} is truncated: tensor {shown(weight.name)} ends at byte {end}, but "
                f"the file has {sizes[location]}; fetch it again"
            )


def _external_bytes(path: Path, location: str) -> int:
    relative = Path(location)
    if not location or relative.is_absolute() or ".." in relative.parts:
        raise BadModelFile(
            f"{path} has weights in {shown(location)}, outside its folder, which is not allowed: export it with its "
            "data beside it"
        )
    try:
        return (path.parent / relative).stat().st_size
    except OSError:
        raise BadModelFile(
            f"{location}, which has the weights, is missing beside {path}: fetch it into the same folder"
        ) from None
