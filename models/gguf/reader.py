"""Reads GGUF's key-value section and tensor directory without trusting the file.

No memory is allocated by a number from the file: every count and length is compared with the bytes that are
really there. What the keys mean is in `models/gguf/spec.py`. Format: GGUF v2 and v3, little-endian (ggml
docs, "GGUF").
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lowtide.models.errors import BadModelFile, ModelNotFound, UnsupportedModel
from lowtide.models.file_kind import START_BYTES, wrong_file
from lowtide.models.gguf.llama_cpp import llama_library

MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 65535
MAX_TEXT_BYTES = 4 << 20
MAX_ARRAY_VALUES = 4096
"""The values of numeric arrays up to this length are read; of longer ones only the length."""
MAX_VALUES = 1 << 18
"""Values of all arrays together that are read."""
MAX_KEYS = MAX_TENSORS = 1 << 16
"""More than any model has; each takes memory before a plan is made."""
MAX_STORED_TEXT = 1 << 10
"""Longer texts, in characters, are skipped, but for those of `STORED_PREFIXES`."""
STORED_PREFIXES = ("general.", "tokenizer.", "lowtide.")
MAX_STORED_TEXTS = 16 << 20
"""Characters of all keys and texts together."""
READ_AHEAD_BYTES = 4 << 20
"""Pages of the file behind the cursor are released when it has passed so many bytes."""

_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_STRING = 8
_ARRAY = 9

TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 36),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}
"""By ggml's type number: the name, the elements of a block, and its bytes. Headers with these types alone are read
without loading llama.cpp."""
TYPE_NUMBERS = {name: number for number, (name, _, _) in TENSOR_TYPES.items()}

Scalar = int | float | bool | str


@dataclass(frozen=True, slots=True)
class ArrayValue:
    """An array of `length` items in the header; `values` are read where they are numbers and few.

    Of strings only the total length in bytes is read.
    """

    length: int
    values: tuple[Scalar, ...] | None
    text_bytes: int = 0


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of the tensor directory; `offset` counts from the start of the data section."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    num_bytes: int
    offset: int
    type_number: int


@dataclass(frozen=True, slots=True)
class GgufContents:
    """The headers of one GGUF file of `file_bytes` bytes; its data section begins at byte `data_start`.

    The `num_keys` keys and their values end at byte `metadata_end`; `num_texts` strings are in their arrays.
    """

    path: Path
    metadata: dict[str, Scalar | ArrayValue]
    tensors: tuple[TensorInfo, ...]
    file_bytes: int
    data_start: int
    num_keys: int
    metadata_end: int
    num_texts: int = 0


def read_gguf(path: Path) -> GgufContents:
    """Read the headers of the GGUF file at `path` without touching its weights.

    Raises `ModelNotFound` where there is no such file, `BadModelFile` where it is not GGUF.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size < 24:
                raise BadModelFile(_not_gguf(path, size, file.read(START_BYTES)))
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Cursor(data, path).contents()
    except FileNotFoundError:
        raise ModelNotFound(
            f"no file at {path}: give the path of a .gguf file, a name from `lowtide models`, "
            "or hf:user/repo"
        ) from None
    except IsADirectoryError:
        raise BadModelFile(f"{path} is a folder: name the .gguf file inside it") from None
    except OSError as error:
        raise ModelNotFound(f"{path} cannot be read: {error.strerror or error}") from None


def _not_gguf(path: Path, size: int, start: bytes) -> str:
    if size == 0:
        return f"{path} is empty: fetch the file again"
    if start.startswith(b"GGUF"):
        return (
            f"{path} is truncated: {size} bytes are too few for a GGUF header; fetch the file again"
        )
    return wrong_file(path, start)


class _Cursor:
    """A position in the file; reading past its end raises `BadModelFile`."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data = data
        self.path = path
        self.size = len(data)
        self.position = 0
        self.num_texts = 0
        self._values_left = MAX_VALUES
        self._released = 0

    def contents(self) -> GgufContents:
        if self.data[:4] != b"GGUF":
            raise BadModelFile(_not_gguf(self.path, self.size, self.data[:START_BYTES]))
        self.position = 4
        version = self.scalar(4)
        if version.to_bytes(4, "little") in (b"\0\0\0\2", b"\0\0\0\3"):
            raise BadModelFile(
                f"{self.path} is a GGUF file for big-endian machines, and this one is little-endian: download the "
                "little-endian file, or convert it with llama.cpp's gguf_convert_endian.py"
            )
        if version not in (2, 3):
            raise BadModelFile(
                f"{self.path} is GGUF version {version}; only versions 2 and 3 are supported: "
                "convert it again with a current tool"
            )
        # A tensor entry takes at least 24 bytes and a key at least 13, which bounds their number.
        num_tensors = self.count("tensors", item_bytes=24, most=MAX_TENSORS)
        num_keys = self.count("keys", item_bytes=13, most=MAX_KEYS)
        metadata: dict[str, Scalar | ArrayValue] = {}
        num_stored = 0
        for _ in range(num_keys):
            key = self.text(limit=MAX_NAME_BYTES)
            value = self.value(self.scalar(4))
            self._release_read_pages()
            length = len(value) if isinstance(value, str) else 0
            if length <= MAX_STORED_TEXT or key.startswith(STORED_PREFIXES):
                metadata[key] = value
                num_stored += len(key) + length
            if num_stored > MAX_STORED_TEXTS:
                raise self.broken(
                    f"its keys and texts have more than {MAX_STORED_TEXTS} characters"
                )
        metadata_end = self.position
        directory = [self.tensor() for _ in range(num_tensors)]
        start = self._check_data_section(metadata, directory)
        return GgufContents(
            self.path,
            metadata,
            tuple(directory),
            self.size,
            start,
            num_keys,
            metadata_end,
            self.num_texts,
        )

    def _release_read_pages(self) -> None:
        """Let the system take back the pages that were read, which count as resident until then."""
        if self.position - self._released < READ_AHEAD_BYTES or not hasattr(mmap, "MADV_DONTNEED"):
            return
        end = self.position // mmap.PAGESIZE * mmap.PAGESIZE
        self.data.madvise(mmap.MADV_DONTNEED, self._released, end - self._released)
        self._released = end

    def _check_data_section(
        self, metadata: dict[str, Scalar | ArrayValue], tensors: Sequence[TensorInfo]
    ) -> int:
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise self.broken(f"its alignment is {alignment!r}; it must be a power of two")
        start = -(-self.position // alignment) * alignment
        end = max((start + tensor.offset + tensor.num_bytes for tensor in tensors), default=0)
        if end > self.size:
            raise BadModelFile(
                f"{self.path} is truncated: its tensors end at byte {end}, but the file has "
                f"{self.size}; fetch the file again"
            )
        return start

    def broken(self, reason: str) -> BadModelFile:
        return BadModelFile(
            f"{self.path} is not a valid GGUF file: {reason} (near byte {self.position}); "
            "fetch or convert it again"
        )

    def scalar(self, type_number: int) -> int:
        return int(self._unpack(_SCALARS[type_number]))

    def _unpack(self, layout: struct.Struct) -> int | float | bool:
        end = self.position + layout.size
        if end > self.size:
            raise self.broken("the header runs past the end of the file")
        (value,) = layout.unpack_from(self.data, self.position)
        self.position = end
        number: int | float | bool = value
        return number

    def count(self, what: str, item_bytes: int, most: int | None = None) -> int:
        number = self.scalar(10)
        left = self.size - self.position
        if most is not None and number > most:
            raise self.broken(f"it claims {number} {what}, and no model has more than {most}")
        if number > left // item_bytes:
            raise self.broken(f"it claims {number} {what}, but has only {left} bytes left for them")
        return number

    def text(self, limit: int) -> str:
        length = self.scalar(10)
        start = self.position
        if length > min(limit, self.size - start):
            raise self.broken(f"it claims a text of {length} bytes")
        self.position = start + length
        return self.data[start : start + length].decode("utf-8", errors="replace")

    def value(self, type_number: int) -> Scalar | ArrayValue:
        if type_number == _STRING:
            return self.text(limit=MAX_TEXT_BYTES)
        if type_number == _ARRAY:
            return self.array()
        if type_number not in _SCALARS:
            raise self.broken(f"a value has the unknown type {type_number}")
        return self._unpack(_SCALARS[type_number])

    def array(self) -> ArrayValue:
        item_type = self.scalar(4)
        if item_type == _STRING:
            return self.text_array(self.count("strings", item_bytes=8))
        if item_type not in _SCALARS:
            raise self.broken(f"an array has items of the unknown type {item_type}")
        layout = _SCALARS[item_type]
        length = self.count("numbers", item_bytes=layout.size)
        if length > min(MAX_ARRAY_VALUES, self._values_left):
            self.position += length * layout.size
            return ArrayValue(length, None)
        self._values_left -= length
        return ArrayValue(length, tuple(self._unpack(layout) for _ in range(length)))

    def text_array(self, length: int) -> ArrayValue:
        # Vocabularies have hundreds of thousands of strings, so this loop calls no functions.
        unpack, data, size = _SCALARS[10].unpack_from, self.data, self.size
        position, total = self.position, 0
        release_at = position + READ_AHEAD_BYTES
        for _ in range(length):
            if position + 8 > size:
                raise self.broken("an array of strings runs past the end of the file")
            (num_bytes,) = unpack(data, position)
            position += 8 + num_bytes
            total += num_bytes
            if position > release_at:
                self.position, release_at = min(position, size), position + READ_AHEAD_BYTES
                self._release_read_pages()
        if position > size:
            raise self.broken("an array of strings runs past the end of the file")
        self.position = position
        self.num_texts += length
        return ArrayValue(length, None, total)

    def tensor(self) -> TensorInfo:
        name = self.text(limit=MAX_NAME_BYTES)
        num_dimensions = self.scalar(4)
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise self.broken(f"tensor {name!r} has {num_dimensions} dimensions")
        shape = tuple(self.scalar(10) for _ in range(num_dimensions))
        type_number, offset = self.scalar(4), self.scalar(10)
        type_name, block, block_bytes = self.tensor_type(name, type_number)
        if 0 in shape or shape[0] % block:
            raise self.broken(f"tensor {name!r} has the shape {shape} in blocks of {block}")
        num_elements = 1
        for extent in shape:
            num_elements *= extent
        num_bytes = num_elements // block * block_bytes
        return TensorInfo(name, shape, type_name, num_bytes, offset, type_number)

    def tensor_type(self, name: str, type_number: int) -> tuple[str, int, int]:
        """Return the type as `TENSOR_TYPES` has it; the installed ggml may know newer ones."""
        found = TENSOR_TYPES.get(type_number) or llama_library().tensor_type(type_number)
        if found is None:
            raise UnsupportedModel(
                f"{self.path}: tensor {name!r} has type {type_number}, which llama.cpp {llama_library().version} does "
                "not know: upgrade llama-cpp-python, or download another quantisation of the model"
            )
        return found
