"""What a file is that somebody named as a model, by its first bytes: the sentence of an error that helps."""

from __future__ import annotations

from pathlib import Path

START_BYTES = 64
"""How much of a file `wrong_file` looks at."""

_KINDS: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs",
        "is a Git LFS pointer, not the model itself: fetch the file with `git lfs pull`, or download it again",
    ),
    (
        b"PK\x03\x04",
        "is a ZIP archive, such as a PyTorch checkpoint: convert it to GGUF, or download a GGUF file of the model",
    ),
    (
        b"\x80\x02",
        "is a Python pickle, such as a PyTorch checkpoint: download a GGUF file of the model",
    ),
    (b"\x1f\x8b", "is compressed with gzip: decompress it first"),
    (b"\xfd7zXZ\x00", "is compressed with xz: decompress it first"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd: decompress it first"),
    (b"BZh", "is compressed with bzip2: decompress it first"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive: unpack it first"),
    (b"Rar!", "is a RAR archive: unpack it first"),
    (b"\x89HDF", "is an HDF5 file, such as a Keras model: download a GGUF file of the model"),
    (b"%PDF", "is a PDF document: name a .gguf file"),
    (b"\x7fELF", "is a program: name a .gguf file"),
    *(
        (magic, "is in a format from before GGUF (2023): download a GGUF file of the model")
        for magic in (b"lmgg", b"fmgg", b"tjgg", b"algg")
    ),
)
_PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<body")


def wrong_file(path: Path, start: bytes) -> str:
    """Return a sentence that says what the file is instead of a model, by its first `START_BYTES` bytes."""
    for magic, what in _KINDS:
        if start.startswith(magic):
            return f"{path} {what}"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(_PAGES):
        return f"{path} is a web page, not a model: the download failed; download the file itself"
    if text[:1] in (b"{", b"["):
        return f"{path} is a JSON text, such as a model's configuration or an error of a server: name the model's file"
    if start[8:9] == b"{" and start[7:8] == b"\x00":  # the length of a JSON header, then the header
        return f"{path} is a safetensors file: convert it to GGUF, or download a GGUF file of the model"
    if start and not start.strip(b"\x00"):
        return f"{path} begins with zeros: its download was interrupted; download it again"
    return (
        f"{path} is not a GGUF file: it begins with {start[:4]!r} instead of b'GGUF'; "
        "name a .gguf file or an ONNX folder"
    )
