"""Fetches GGUF files from the Hugging Face hub into its shared cache.

Knows no model. `huggingface_hub` is an optional dependency and is imported only here, only when used.
"""

from __future__ import annotations

import re
from pathlib import Path

from lowtide.models.errors import DownloadError, ModelNotFound

DEFAULT_QUANTISATION = "Q4_K_M"
_REFERENCE = re.compile(r"^(?P<repo>[\w.-]+/[\w.-]+?)(?::(?P<quant>[\w.-]+))?$")
_SPLIT_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def fetch(reference: str, *, offline: bool) -> Path:
    """Return the local path of "user/repo[:quant]", downloading what the hub's cache does not have.

    `quant` is matched whatever its case and defaults to Q4_K_M, or to the only file there is. With
    `offline` nothing leaves the machine. Raises `ModelNotFound` or `DownloadError`.
    """
    match = _REFERENCE.match(reference)
    if match is None:
        raise ModelNotFound(
            f"hf:{reference} is no reference: write hf:user/repo or hf:user/repo:Q4_K_M"
        )
    repo, quant = match["repo"], match["quant"]
    try:
        import huggingface_hub
    except ImportError:
        raise ModelNotFound(
            "hf: references need huggingface_hub: pip install 'lowtide[hub]'"
        ) from None
    if offline:
        return _cached(repo, quant, Path(huggingface_hub.constants.HF_HUB_CACHE))
    try:
        names = [n for n in huggingface_hub.list_repo_files(repo) if n.endswith(".gguf")]
        chosen = choose(names, quant, repo)
        paths = [Path(huggingface_hub.hf_hub_download(repo, name)) for name in chosen]
    except ModelNotFound:
        raise
    except Exception as error:  # the client raises its own, its transport's and plain OSErrors
        first_line = str(error).strip().partition("\n")[0]
        raise DownloadError(
            f"hf:{reference} could not be fetched ({type(error).__name__}: {first_line}): check the "
            "name and the connection, or use --offline with what is cached"
        ) from None
    return paths[0]


def choose(names: list[str], quant: str | None, repo: str) -> list[str]:
    """Return the file to fetch out of a repository's GGUF names: all parts, where it is split."""
    wanted = (quant or DEFAULT_QUANTISATION).lower()
    firsts = sorted(n for n in names if (m := _SPLIT_PART.search(n)) is None or m[1] == "00001")
    matching = [n for n in firsts if _has_quantisation(n.lower(), wanted)]
    if not matching and quant is None and len(firsts) == 1:
        matching = firsts
    if not matching:
        offered = ", ".join(firsts) or "no .gguf file at all"
        raise ModelNotFound(f"hf:{repo} has no file of {wanted.upper()}: it offers {offered}")
    first = matching[0]
    split = _SPLIT_PART.search(first)
    if split is None:
        return [first]
    stem = first[: split.start()]
    return [f"{stem}-{part:05}-of-{split[2]}.gguf" for part in range(1, int(split[2]) + 1)]


def _has_quantisation(name: str, wanted: str) -> bool:
    return re.search(rf"(^|[^a-z0-9]){re.escape(wanted)}([^a-z0-9_]|$)", name) is not None


def _cached(repo: str, quant: str | None, cache: Path) -> Path:
    snapshots = cache / f"models--{repo.replace('/', '--')}" / "snapshots"
    for snapshot in sorted(snapshots.glob("*"), key=lambda p: p.stat().st_mtime, reverse=True):
        names = [str(p.relative_to(snapshot)) for p in snapshot.rglob("*.gguf")]
        if names:
            return snapshot / choose(names, quant, repo)[0]
    raise ModelNotFound(
        f"hf:{repo} is not in the hub's cache and --offline forbids fetching it: run once without"
    )
