"""The base of the error tree, and the errors of models; the whole tree is drawn in `lowtide.runtime.errors`."""

from __future__ import annotations


class LowtideError(Exception):
    """Something a user can act on: one sentence with what was requested, what is available, what to change."""

    exit_code = 1


class LowtideWarning(UserWarning):
    """Something goes on in another way than usual; one sentence says why. The command line prints it on stderr."""


class BadOption(LowtideError, ValueError):
    """An option has an impossible value: names the option, the value and what is allowed."""

    exit_code = 2


class ModelError(LowtideError):
    """A model cannot be found, read or run."""

    exit_code = 2


class ModelNotFound(ModelError):
    """The reference names no model on this machine."""


class BadModelFile(ModelError):
    """The file cannot be read as a model: another format, truncated, or with impossible numbers."""


class UnsupportedModel(ModelError):
    """The file is a valid model, but what is installed here cannot run it."""


class TemplateError(ModelError):
    """The model's chat template is missing, broken, or does something that is not allowed."""


class DownloadError(ModelError):
    """A model could not be fetched from the hub."""

    exit_code = 1


class NoGpu(LowtideError):
    """Layers were requested on a GPU, but llama.cpp finds none here."""

    exit_code = 2


class ForwardError(LowtideError):
    """A forward pass failed in native code; the runtime stays usable."""


class SnapshotError(LowtideError):
    """A KV cache could not be saved, loaded or copied; the runtime stays usable."""
