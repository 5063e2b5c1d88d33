"""`lowtide convert`: writes a GGUF model as an ONNX folder."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command("convert")
@click.argument("model")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--rows",
    type=click.Choice(["int8", "float32"]),
    default="int8",
    show_default=True,
    help="What products take activations as: rounded to 8 bits in blocks, as llama.cpp does, or as they "
    "are, which is nearer to the weights and slower.",
)
@click.option("--force", is_flag=True, help="Replace FOLDER where it exists.")
@click.option("--offline", is_flag=True, help="Never reach for the network.")
def command(model: str, folder: Path, rows: str, force: bool, offline: bool) -> None:
    """Write the GGUF model MODEL as the ONNX folder FOLDER, for onnxruntime-genai and for lowtide itself.

    Quantised weights stay quantised, with the values that they have; floating-point ones are rounded to 8
    bits, and it says so. FOLDER appears whole, with checksums, or not at all.
    """
    from lowtide.cli.output import note
    from lowtide.models.convert.convert import convert
    from lowtide.runtime.planning.plan import find_spec

    spec = find_spec(model, offline=offline)
    with click.progressbar(length=spec.weight_bytes, label=spec.name, file=sys.stderr) as bar:
        made = convert(spec, folder, rows=rows, replace=force, advance=bar.update)
    for type_name, count in sorted(made.use_bf16.items()):
        note(f"{count} matrices of {type_name} were rounded to 8 bits in blocks of 32")
    if not made.use_bf16:
        note("all weights have the values that they had")
    click.echo(made.folder)
