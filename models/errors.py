"""The ground floor of the error tree: everything a user can be told begins here.

Knows nothing of budgets or the terminal. The whole tree is drawn in `lowtide.runtime.errors`.
"""

from __future__ import annotations


class LowtideError(Exception):
    """Something a user can act on: one sentence with what was wanted, what there is, what to change."""

    exit_code = 1


class BadOption(LowtideError, ValueError):
    """An option has a value that cannot be: names the option, the value and what is wanted."""

    exit_code = 2


class ModelError(LowtideError):
    """A model cannot be found, read or run."""

    exit_code = 2


class ModelNotFound(ModelError):
    """The reference names no model that is here."""


class BadModelFile(ModelError):
    """The file is not a model that can be read: not GGUF, cut short, or with impossible numbers."""


class UnsupportedModel(ModelError):
    """The file is a sound model, but what is installed here cannot run it."""


class TemplateError(ModelError):
    """The model's chat template is missing, broken, or does what a template must not."""


class DownloadError(ModelError):
    """A model could not be fetched from the hub."""

    exit_code = 1


class NoGpu(LowtideError):
    """Layers were wanted on a GPU, and llama.cpp reaches none here."""

    exit_code = 2


class ForwardError(LowtideError):
    """A forward pass failed in native code; the runtime stays usable."""


class SnapshotError(LowtideError):
    """A KV cache could not be written to a file or read from one; the runtime stays usable."""
