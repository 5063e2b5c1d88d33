"""Search with libFuzzer, through atheris, for inputs of one target that end in an unexpected error.

    python tests/fuzz/run.py TARGET SECONDS

Starts from the corpus in the repository. New inputs go to build/fuzz/TARGET, what ends in an error to
build/fuzz/TARGET-*; copy those that are worth it into tests/fuzz/corpus/TARGET.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from pathlib import Path
from types import FunctionType

import atheris

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(HERE.parent / "support")]
INSTRUMENTED = ("lowtide.", "jinja2.")
MOST_BYTES = {"tokenise": 4096, "template": 4096, "options": 512}


def main(name: str, seconds: int) -> None:
    """Run one target for so many seconds."""
    import targets

    found = ROOT / "build" / "fuzz"
    (found / name).mkdir(parents=True, exist_ok=True)
    corpus = HERE / "corpus" / name
    for path in sorted(corpus.iterdir()):
        targets.TARGETS[name](path.read_bytes())  # imports what it needs
    instrument()
    atheris.Setup(
        [
            sys.argv[0],
            f"-max_total_time={seconds}",
            f"-max_len={MOST_BYTES.get(name, 1 << 15)}",
            "-timeout=20",
            "-rss_limit_mb=3000",
            "-print_final_stats=1",
            f"-artifact_prefix={found / name}-",
            str(found / name),
            str(corpus),
        ],
        targets.TARGETS[name],
    )
    atheris.Fuzz()


def instrument() -> None:
    """Have every function of lowtide and jinja2 report its branches.

    The import hook of atheris does not see a package that is installed in place.
    """
    for function in gc.get_objects():
        module = (
            getattr(function, "__module__", None) if isinstance(function, FunctionType) else None
        )
        if isinstance(module, str) and module.startswith(INSTRUMENTED):
            with contextlib.suppress(Exception):  # a kind of code that atheris does not know
                atheris.instrument_func(function)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
