"""onnxruntime's execution providers by short names. Loads no model."""

from __future__ import annotations

from lowtide.models.errors import BadOption
from lowtide.models.onnx.libraries import onnx_library

CPU = "cpu"
_SUFFIX = "ExecutionProvider"
NOT_ON_THIS_MACHINE = frozenset({"azure"})
"""Providers that run models elsewhere."""


def provider_name(provider: str) -> str:
    """Return onnxruntime's own name of `provider` ("cuda" is CUDAExecutionProvider).

    Raises `BadOption` with those that are installed where it is none of them.
    """
    library = onnx_library("onnxruntime")
    installed = {
        name.removesuffix(_SUFFIX).lower(): name
        for name in library.get_available_providers()
        if name.removesuffix(_SUFFIX).lower() not in NOT_ON_THIS_MACHINE
    }
    if provider.lower() not in installed:
        raise BadOption(
            f"provider is {provider!r}, and onnxruntime {library.__version__} has "
            f"{', '.join(sorted(installed))} here: choose one of these, or install a build of onnxruntime "
            "that has it"
        )
    return str(installed[provider.lower()])


def session_providers(provider: str) -> list[str]:
    """Return what a session is told: the provider, and the processor for what it does not run."""
    name, processor = provider_name(provider), provider_name(CPU)
    return [name] if name == processor else [name, processor]
