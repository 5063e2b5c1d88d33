"""PieceSession: a piece in onnxruntime, and what is bound to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowtide.models.errors import ModelError, UnsupportedModel
from lowtide.models.onnx.cut.piece_models import ValueType
from lowtide.models.onnx.cut.pieces import Piece
from lowtide.models.onnx.libraries import onnx_library
from lowtide.models.onnx.options import session_options

PROVIDER = "CPUExecutionProvider"
_FOLDER = "session.model_external_initializers_file_folder_path"


class PieceSession:
    """One piece; raises `UnsupportedModel` where onnxruntime refuses it."""

    def __init__(self, piece: Piece, model: bytes, folder: Path, threads: int) -> None:
        library = onnx_library("onnxruntime")
        options = session_options(threads)
        options.add_session_config_entry(_FOLDER, str(folder))
        try:
            self._session = library.InferenceSession(model, options, providers=[PROVIDER])
        except MemoryError:
            raise ModelError(
                f"{folder} cannot be loaded: the system has no memory for it"
            ) from None
        except Exception as error:  # onnxruntime has no class of its own for it
            raise UnsupportedModel(
                f"onnxruntime {library.__version__} cannot run a piece of the graph in {folder} "
                f"({error}): leave attention out"
            ) from None
        self.piece = piece
        self._binding = self._session.io_binding()
        self._order: dict[str, int] = {}
        self.new_outputs: tuple[str, ...] = ()

    def output_types(self) -> dict[str, ValueType]:
        """Return the types of what the piece makes."""
        return {
            port.name: ValueType(port.type, tuple(port.shape))
            for port in self._session.get_outputs()
        }

    def bind_input(self, name: str, array: Any) -> None:
        """Read an input from an array, of which a part in one piece may be given."""
        self._binding.bind_input(name, "cpu", 0, array.dtype, list(array.shape), array.ctypes.data)

    def bind_output(self, name: str, array: Any) -> None:
        """Write an output into an array of its very shape."""
        self._order.setdefault(name, len(self._order))
        self._binding.bind_output(name, "cpu", 0, array.dtype, list(array.shape), array.ctypes.data)

    def bind_new_output(self, name: str) -> None:
        """Let onnxruntime make the output: its shape is known after the pass alone."""
        self._order.setdefault(name, len(self._order))
        self._binding.bind_output(name, "cpu")

    def bind_value(self, name: str, value: Any) -> None:
        """Read an input from what another piece has made."""
        self._binding.bind_ortvalue_input(name, value)

    def made(self, name: str) -> Any:
        """Return what the last run has made as an output that was bound anew."""
        return self._binding.get_outputs()[self._order[name]]

    def run(self) -> None:
        """Compute."""
        self._session.run_with_iobinding(self._binding)
