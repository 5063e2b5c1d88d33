"""Reads GGUF's key-value section and tensor directory without trusting the file.

No memory is allocated by a number from the file: every count and length is compared with the bytes that are
really there. A header is read before a plan is made, so only what a plan needs is stored, and texts and keys that it
does not need are never read. The file is not mapped: one page fault may make 2 MiB of it resident. What the keys
mean is in `models/gguf/header/spec.py`. Format: GGUF v2 and v3, little-endian (ggml docs, "GGUF").
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lowtide.models.arguments.values import shown
from lowtide.models.errors import BadModelFile, ModelNotFound, UnsupportedModel
from lowtide.models.files.file_kind import START_BYTES, wrong_file
from lowtide.models.gguf.llama_cpp import llama_library

MAX_DIMENSIONS = 4
MAX_ARRAY_VALUES = 4096
"""The values of numeric arrays up to this length are read; of longer ones only the length."""
MAX_VALUES = 1 << 18
"""Values of all arrays together that are read."""
MAX_KEYS, MAX_TENSORS = 1 << 16, 1 << 14
"""More than any model has: llama.cpp runs at most 512 layers."""
MAX_KEY_BYTES = MAX_TENSOR_NAME_BYTES = 255
"""Of a key that is stored, and of a tensor's name, of which ggml takes 63."""
MAX_STORED_TEXT_BYTES = 1 << 10
"""Longer texts are skipped, but for `LONG_TEXTS`."""
LONG_TEXTS = ("tokenizer.chat_template", "lowtide.packed.tensors")
MAX_LONG_TEXT_BYTES = (1 << 18) + 4
"""A longer text is cut. A chat template of so many bytes has more characters than any template may have."""
STORED_PREFIXES = ("general.", "tokenizer.", "split.", "lowtide.")
"""Of the keys that are stored, beside those of the architecture. Others are skipped."""
MAX_STORED_KEYS = 4096
WINDOW_BYTES = 64 << 10
"""How much of the file is in memory at once, but for a longer text that is stored."""

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
NUMBER_CHARACTERS = {0: 5, 1: 6, 2: 7, 3: 8, 4: 12, 5: 13, 6: 49, 7: 7, 10: 22, 11: 22, 12: 318}
"""The most characters of a number in a list that is written as text, by its type, with a comma and a blank."""
VOCABULARY_CHARACTERS = {"tokenizer.ggml.token_type": 4, "tokenizer.ggml.scores": 17}
"""The same for the lists that every model has: numbers of one digit, and log probabilities."""
SHORT_TEXT_BYTES = 15
"""Strings of so many bytes lie inside of C++'s own object."""
ARRAY_COPIES = 4
"""How often llama.cpp holds an array as text when it logs the header: 2.3 to 3.7 measured."""
STRING_BYTES = 32
"""C++'s object of a string, and at most what a block of memory takes beside its contents."""
ITEM_CHARACTERS = 4
"""Of a text in such a list beside its own: two quotes, a comma and a blank."""
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

    def __repr__(self) -> str:  # as errors name what a header has in a wrong place
        return f"a list of {self.length:,} values"


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

    The `num_keys` keys and their values end at byte `metadata_end`; `num_texts` strings are in their arrays,
    `num_long_texts` of them longer than `SHORT_TEXT_BYTES`. The keys
    and the strings that are no items of arrays have `copied_bytes`. The longest of these has
    `longest_text`. The largest array takes `array_bytes` for a moment, at most, while llama.cpp copies and logs it.
    """

    path: Path
    metadata: dict[str, Scalar | ArrayValue]
    tensors: tuple[TensorInfo, ...]
    file_bytes: int
    data_start: int
    num_keys: int
    metadata_end: int
    num_texts: int = 0
    num_long_texts: int = 0
    copied_bytes: int = 0
    longest_text: int = 0
    array_bytes: int = 0


def read_gguf(path: Path) -> GgufContents:
    """Read the headers of the GGUF file at `path` without touching its weights.

    Raises `ModelNotFound` where there is no such file, `BadModelFile` where it is not GGUF.
    """
    try:
        with path.open("rb", buffering=0) as file:
            size = path.stat().st_size
            if size < 24:
                raise BadModelFile(_not_gguf(path, size, file.read(START_BYTES)))
            return _Cursor(file, size, path).contents()
    except FileNotFoundError:
        raise ModelNotFound(
            f"no file at {path}: give the path of a .gguf file, a name from `lowtide models`, "
            "or hf:user/repo"
        ) from None
    except IsADirectoryError:
        raise BadModelFile(f"{path} is a folder: name the .gguf file inside it") from None
    except OSError as error:
        raise ModelNotFound(f"{path} cannot be read: {error.strerror or error}") from None


def _is_stored(key: str, stored: Mapping[str, Scalar | ArrayValue]) -> bool:
    """Whether a plan may need a key, given those before it; all of them while the architecture is not known."""
    architecture = stored.get("general.architecture")
    return (
        architecture is None
        or key.startswith(STORED_PREFIXES)
        or key.startswith(f"{architecture}.")
    )


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

    def __init__(self, file: BinaryIO, size: int, path: Path) -> None:
        self.path = path
        self.size = size
        self.position = 0
        self.num_texts = self.num_long_texts = 0
        self.copied_bytes = self.longest_text = self.array_bytes = 0
        self._file = file
        self._window, self._window_start = b"", 0
        self._values_left = MAX_VALUES

    def window(self, num_bytes: int) -> tuple[bytes, int]:
        """Return bytes of the file with those from the position on, `num_bytes` at least, and where they begin.

        Raises `BadModelFile` where the file has fewer.
        """
        offset = self.position - self._window_start
        if offset < 0 or offset + num_bytes > len(self._window):
            self._file.seek(self.position)
            self._window = b""
            self._window = self._read(max(num_bytes, WINDOW_BYTES))
            self._window_start = self.position
            if num_bytes > len(self._window):
                raise self.broken("the header runs past the end of the file")
        return self._window, self._window_start

    def _read(self, num_bytes: int) -> bytes:
        """Read so many bytes, fewer at the end of the file; a single read may return fewer anywhere."""
        data = self._file.read(num_bytes)
        while len(data) < num_bytes and (more := self._file.read(num_bytes - len(data))):
            data += more
        return data

    def contents(self) -> GgufContents:
        begin = self._read(START_BYTES)
        if not begin.startswith(b"GGUF"):
            raise BadModelFile(_not_gguf(self.path, self.size, begin))
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
        metadata = self.metadata(num_keys)
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
            self.num_long_texts,
            self.copied_bytes,
            self.longest_text,
            self.array_bytes,
        )

    def metadata(self, num_keys: int) -> dict[str, Scalar | ArrayValue]:
        """Read the keys; those of other prefixes are skipped as soon as the architecture is known."""
        stored: dict[str, Scalar | ArrayValue] = {}
        for _ in range(num_keys):
            key = self.key()
            most_bytes = MAX_LONG_TEXT_BYTES if key in LONG_TEXTS else MAX_STORED_TEXT_BYTES
            value = self.value(key, self.scalar(4), most_bytes, can_cut=key in LONG_TEXTS)
            if key is None or value is None or not _is_stored(key, stored):
                continue
            stored[key] = value
            if len(stored) > MAX_STORED_KEYS:
                raise self.broken(f"it has more than {MAX_STORED_KEYS} keys that describe a model")
        return {key: value for key, value in stored.items() if _is_stored(key, stored)}

    def key(self) -> str | None:
        """Read a key; None for one that is longer than any that is stored."""
        length = self.text_length()
        self.copied_bytes += length
        if length > MAX_KEY_BYTES:
            self.position += length
            return None
        return self.text(length)

    def _check_data_section(
        self, metadata: dict[str, Scalar | ArrayValue], tensors: Sequence[TensorInfo]
    ) -> int:
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise self.broken(f"its alignment is {shown(alignment)}; it must be a power of two")
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
        window, start = self.window(layout.size)
        (value,) = layout.unpack_from(window, self.position - start)
        self.position += layout.size
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

    def text_length(self) -> int:
        """Read the length of a text that follows, in bytes; all of it is there."""
        length = self.scalar(10)
        if length > self.size - self.position:
            raise self.broken(f"it claims a text of {length} bytes")
        return length

    def text(self, length: int, most_bytes: int | None = None) -> str:
        """Read a text of `length` bytes, of which the first `most_bytes` are returned."""
        num_bytes = length if most_bytes is None else min(length, most_bytes)
        window, start = self.window(num_bytes)
        offset = self.position - start
        self.position += length
        return window[offset : offset + num_bytes].decode("utf-8", errors="replace")

    def value(
        self, key: str | None, type_number: int, most_bytes: int, *, can_cut: bool
    ) -> Scalar | ArrayValue | None:
        """Read a value. A text of more than `most_bytes` bytes is cut, or skipped and None."""
        if type_number == _STRING:
            length = self.text_length()
            self.copied_bytes += length
            self.longest_text = max(self.longest_text, length)
            if length > most_bytes and not can_cut:
                self.position += length
                return None
            return self.text(length, most_bytes)
        if type_number == _ARRAY:
            return self.array(key)
        if type_number not in _SCALARS:
            raise self.broken(f"a value has the unknown type {type_number}")
        return self._unpack(_SCALARS[type_number])

    def array(self, key: str | None) -> ArrayValue:
        item_type = self.scalar(4)
        if item_type == _STRING:
            return self.text_array(self.count("strings", item_bytes=8))
        if item_type not in _SCALARS:
            raise self.broken(f"an array has items of the unknown type {item_type}")
        layout = _SCALARS[item_type]
        length = self.count("numbers", item_bytes=layout.size)
        characters = VOCABULARY_CHARACTERS.get(key or "", NUMBER_CHARACTERS[item_type])
        self.array_bytes = max(self.array_bytes, ARRAY_COPIES * length * characters)
        if length > min(MAX_ARRAY_VALUES, self._values_left):
            self.position += length * layout.size
            return ArrayValue(length, None)
        self._values_left -= length
        return ArrayValue(length, tuple(self._unpack(layout) for _ in range(length)))

    def text_array(self, length: int) -> ArrayValue:
        # Vocabularies have hundreds of thousands of strings, so this loop calls few functions.
        unpack, total, window, start, end = _SCALARS[10].unpack_from, 0, b"", 0, 0
        num_escaped = num_long = 0
        position, size = self.position, self.size
        for _ in range(length):
            if position + 8 > end:
                if position + 8 > size:
                    raise self.broken("an array of strings runs past the end of the file")
                self.position = position
                window, start = self.window(8)
                end = start + len(window)
                num_escaped += window.count(b'"') + window.count(b"\\")
            (num_bytes,) = unpack(window, position - start)
            position += 8 + num_bytes
            total += num_bytes
            num_long += num_bytes > SHORT_TEXT_BYTES
            if position > end:  # what lies behind the window is not read
                num_escaped += position - end
        if position > size:
            raise self.broken("an array of strings runs past the end of the file")
        self.position = position
        self.num_texts += length
        self.num_long_texts += num_long
        characters = total + ITEM_CHARACTERS * length + num_escaped
        copy_bytes = STRING_BYTES * (length + num_long) + (total if num_long else 0)
        self.array_bytes = max(self.array_bytes, ARRAY_COPIES * characters, copy_bytes)
        return ArrayValue(length, None, total)

    def tensor(self) -> TensorInfo:
        length = self.text_length()
        if length > MAX_TENSOR_NAME_BYTES:
            raise self.broken(f"the name of a tensor has {length} bytes")
        name = self.text(length)
        num_dimensions = self.scalar(4)
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise self.broken(f"tensor {shown(name)} has {num_dimensions} dimensions")
        shape = tuple(self.scalar(10) for _ in range(num_dimensions))
        type_number, offset = self.scalar(4), self.scalar(10)
        type_name, block, block_bytes = self.tensor_type(name, type_number)
        if 0 in shape or shape[0] % block:
            raise self.broken(f"tensor {shown(name)} has the shape {shape} in blocks of {block}")
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
                f"{self.path}: tensor {shown(name)} has type {type_number}, which llama.cpp "
                f"{llama_library().version} does not know: upgrade llama-cpp-python, or download another "
                "quantisation of the model"
            )
        return found
