"""Writes the packed matrices of an ONNX graph into one file, with our kernels' packing, a slice at a time.

The file begins with `ALIGNMENT` bytes: a line that says what it is, and a digest of the data behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lowtide.attention.product_kernels import pack_rows
from lowtide.models.fingerprint import samples_digest
from lowtide.models.onnx.packed_form import ALIGNMENT, PackedForm
from lowtide.models.onnx.swapped.product_nodes import PANEL_ROWS
from lowtide.models.whole_file import whole_file

LAYOUT = b"lowtide panels 1\n"
"""Counts the ways that matrices were laid out in."""
SLICE_BYTES = 1 << 20

Progress = Callable[[int], None]
"""Told of bytes, as they are written."""


def write_panels(form: PackedForm, folder: Path, target: Path, progress: Progress) -> None:
    """Write the matrices, whose weights lie in `folder`, to `target`, which is whole or not there.

    Raises `OSError` where the system cannot write or read it, `BadModelFile` for weights that have no
    packed form.
    """
    *starts, end = form.offsets
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as out:
        for matrix, start in zip(form.swap.products.matrices, starts, strict=True):
            out.seek(start)
            row_bytes = matrix.num_bytes // matrix.num_rows
            step = max(SLICE_BYTES // row_bytes // PANEL_ROWS, 1) * PANEL_ROWS
            for rows in matrix.ggml_rows(folder, step):
                panels = bytearray(rows.nbytes)
                blocks = bytearray(rows.tobytes())
                pack_rows(matrix.type_name, blocks, len(rows), matrix.num_columns, panels)
                out.write(panels)
                progress(len(panels))
        out.truncate(end)
        out.flush()
        digest = samples_digest([(Path(out.name), ALIGNMENT)])
        out.seek(0)
        out.write(_beginning(digest))


def is_sound(path: Path, form: PackedForm) -> bool:
    """Whether the file at `path` is as it was written for such matrices; False where there is none."""
    try:
        with path.open("rb") as file:
            beginning = file.read(ALIGNMENT)
        return path.stat().st_size == form.offsets[-1] and beginning == _beginning(
            samples_digest([(path, ALIGNMENT)])
        )
    except OSError:
        return False


def _beginning(digest: str) -> bytes:
    return (LAYOUT + digest.encode()).ljust(ALIGNMENT, b"\n")
