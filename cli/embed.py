"""`lowtide embed`: turns texts into vectors; they go to stdout or to a file, everything else to stderr."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from lowtide.cli.common.options import json_option

if TYPE_CHECKING:
    from lowtide.runtime.embedding.embedder import Embedder
    from lowtide.runtime.embedding.passes import Vectors
    from lowtide.runtime.embedding.plan import PlannedEmbedding

NPY = ".npy"


@click.command("embed", short_help="Turn texts into vectors.")
@click.argument("texts", nargs=-1)
@click.option(
    "-m",
    "--model",
    help="A .gguf file, a name from `lowtide models`, or hf:user/repo[:quant].  [default: smollm2]",
)
@click.option(
    "-f",
    "--file",
    type=click.Path(path_type=Path),
    help="Read one text from each line of this file; - is standard input.",
)
@click.option(
    "--memory", metavar="SIZE", help="Memory budget.  [default: 80% of the available memory]"
)
@click.option(
    "-c",
    "--context",
    type=int,
    help="Tokens of the longest text.  [default: up to 2048, as many as fit]",
)
@click.option(
    "--batch-size",
    type=int,
    help="Compute texts together up to this number of tokens.  [default: 512]",
)
@click.option("--threads", type=int, help="Number of threads.  [default: the usable cores]")
@click.option(
    "--pooling",
    type=click.Choice(["none", "mean", "cls", "last"]),
    help="How to make one vector of those of all tokens; none prints one for each token.  "
    "[default: what the model's header says, or mean]",
)
@click.option(
    "--normalize/--no-normalize",
    default=True,
    show_default=True,
    help="Scale each vector to length 1 (L2).",
)
@click.option(
    "--overflow",
    type=click.Choice(["error", "truncate"]),
    default="error",
    show_default=True,
    help="What to do with a text that is too long.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Write the vectors to this file; a name that ends in .npy makes a numpy array in fp32.",
)
@click.option("--offline", is_flag=True, help="Never use the network.")
@json_option
def command(
    texts: tuple[str, ...],
    model: str | None,
    file: Path | None,
    normalize: bool,
    output: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Turn TEXTS into vectors, one a line. Without TEXTS and --file, standard input has one text a line.

    Encoders such as BERT embed, and decoders such as Llama too. A pass computes several texts.
    """
    from lowtide.runtime.embedding.embedder import Embedder
    from lowtide.runtime.embedding.options import EmbeddingConfig
    from lowtide.runtime.embedding.plan import plan_reference

    if texts and file is not None:
        raise click.UsageError("TEXTS and --file exclude each other: use one")
    is_array = output is not None and output.suffix == NPY
    if is_array and as_json:
        raise click.UsageError(f"--json does not write {NPY} files: leave one of them out")
    if is_array and options["pooling"] == "none":
        raise click.UsageError(
            f"--pooling none gives texts of different lengths, which a {NPY} file cannot hold: use --json"
        )
    planned = plan_reference(model, EmbeddingConfig.of(**options))
    if planned.plan.budget.warning:
        click.echo(f"Warning: {planned.plan.budget.warning}", err=True)
    planned.require_fit()
    _note_plan(planned)
    source = iter(texts) if texts else _lines(file, planned.plan.context)
    with Embedder(planned) as embedder, _errors_of(output):
        vectors = embedder.stream(source, normalize=normalize)
        count = _write(output, vectors, embedder, as_json=as_json, normalize=normalize)
    _note_count(count, planned)


@contextlib.contextmanager
def _errors_of(output: Path | None) -> Iterator[None]:
    """Turn the system's refusal of the output file into a `BadOption`."""
    from lowtide.models.errors import BadOption

    try:
        yield
    except OSError as error:
        if output is None:
            raise
        raise BadOption(f"cannot write {output}: {error.strerror or error}") from None


def _note_plan(planned: PlannedEmbedding) -> None:
    from lowtide.cli.common.output import note
    from lowtide.memory.units import format_bytes

    spec, plan = planned.spec, planned.plan
    source = "" if planned.config.pooling or spec.pooling else ", because the header names none"
    note(
        f"{spec.name}, {spec.quantisation} · {spec.kind} · pooling {planned.pooling}{source} · texts of up to "
        f"{plan.context:,} tokens · planned {format_bytes(plan.total_bytes)} of "
        f"{format_bytes(plan.budget.num_bytes)} ({plan.budget.source})"
        + "".join(f" · reduced to fit: {step}" for step in plan.downgrades)
    )


def _note_count(count: int, planned: PlannedEmbedding) -> None:
    from lowtide.cli.common.output import note
    from lowtide.memory.process import read_process_memory
    from lowtide.memory.units import format_bytes

    budget = format_bytes(planned.plan.budget.num_bytes)
    peak = format_bytes(read_process_memory().peak_bytes)
    note(f"{count:,} {'text' if count == 1 else 'texts'} · peak {peak} of {budget}")


def _lines(file: Path | None, context: int) -> Iterator[str]:
    """Yield the texts of a file or of standard input, one a line, without reading all of it at once."""
    from lowtide.cli.common.input import STDIN, text_lines
    from lowtide.memory.plan.estimates import prompt_limit_bytes

    lines = text_lines(file or Path(STDIN), prompt_limit_bytes(context))
    count = 0
    for count, line in enumerate(lines, 1):  # noqa: B007
        yield line
    if not count:
        raise click.UsageError(
            "no text: pass texts, use --file, or write one text a line to standard input"
        )


def _write(
    output: Path | None,
    vectors: Iterator[Vectors],
    embedder: Embedder,
    *,
    as_json: bool,
    normalize: bool,
) -> int:
    """Write the vectors as they come and return how many texts they are of.

    A file takes the place of an older one only when it is complete.
    """
    from lowtide.models.files.atomic_file import atomic_file

    if output is None:
        lines = _json(vectors, embedder, normalize) if as_json else _plain(vectors)
        return _echo(lines)
    with atomic_file(output) as stream:
        if output.suffix == NPY:
            return _write_array(stream, vectors, embedder.width)
        lines = _json(vectors, embedder, normalize) if as_json else _plain(vectors)
        return _encode(lines, stream)


def _echo(lines: Iterable[tuple[str, int]]) -> int:
    count = 0
    for line, num_texts in lines:
        click.echo(line, nl=False)
        count += num_texts
    return count


def _encode(lines: Iterable[tuple[str, int]], stream: BinaryIO) -> int:
    count = 0
    for line, num_texts in lines:
        stream.write(line.encode())
        count += num_texts
    return count


def _plain(vectors: Iterator[Vectors]) -> Iterator[tuple[str, int]]:
    """Yield one line for each vector, each with the number of texts that it completes."""
    for computed in vectors:
        for i, vector in enumerate(computed):
            yield _numbers(vector, " ") + "\n", int(i == 0)


def _json(
    vectors: Iterator[Vectors], embedder: Embedder, normalize: bool
) -> Iterator[tuple[str, int]]:
    """Yield one JSON object in pieces: a Python object of all numbers would take ten times the memory."""
    from lowtide.cli.common.output import json_object

    planned = embedder.planned
    head = json_object(
        planned,
        plan=planned.plan.to_dict(),
        kind=planned.spec.kind,
        pooling=planned.pooling,
        normalized=normalize,
        width=embedder.width,
    )
    yield head.removesuffix("\n}") + ',\n  "embeddings": [', 0
    separator = "\n    "
    for computed in vectors:
        rows = [f"[{_numbers(vector, ', ')}]" for vector in computed]
        is_list = planned.pooling == "none"
        yield separator + (f"[{', '.join(rows)}]" if is_list else rows[0]), 1
        separator = ",\n    "
    yield "\n  ]\n}\n", 0


def _numbers(vector: Vectors, separator: str) -> str:
    """Return the numbers with nine digits, from which fp32 is read back exactly."""
    return separator.join(f"{number:.9g}" for number in vector.tolist())


def _write_array(stream: BinaryIO, vectors: Iterator[Vectors], width: int) -> int:
    """Write a .npy file as the vectors come; its header, with the number of texts, is written again last."""
    count = 0
    begin = _array_header((count, width))
    stream.write(begin)
    for computed in vectors:
        stream.write(computed.tobytes())
        count += 1
    end = _array_header((count, width))
    assert len(end) == len(begin), "numpy pads its headers"
    stream.seek(0)
    stream.write(end)
    return count


def _array_header(shape: tuple[int, int]) -> bytes:
    import io

    import numpy as np

    stream = io.BytesIO()
    fields = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, fields)
    return stream.getvalue()
