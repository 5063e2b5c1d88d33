"""`lowtide convert`: converts a GGUF model into an ONNX folder."""

from __future__ import annotations

import sys
from pathlib import Path

import click


@click.command("convert", short_help="Convert a GGUF model into an ONNX folder.")
@click.argument("model")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--activations",
    "activations",
    type=click.Choice(["int8", "float32"]),
    default="int8",
    show_default=True,
    help="Precision of the activations in matrix multiplications: int8 in blocks, like llama.cpp, or "
    "float32, which is more exact and slower.",
)
@click.option("--force", is_flag=True, help="Replace FOLDER if it exists.")
@click.option("--offline", is_flag=True, help="Never use the network.")
def command(model: str, folder: Path, activations: str, force: bool, offline: bool) -> None:
    """Convert the GGUF model MODEL into the ONNX folder FOLDER, for onnxruntime-genai and lowtide.

    Quantised weights keep their values. Floating-point weights are quantised to 8 bits, which the command
    reports. FOLDER is written completely, with checksums, or not at all.
    """
    from lowtide.cli.common.output import note
    from lowtide.models.convert.convert import convert
    from lowtide.runtime.planning.plan import find_spec

    spec = find_spec(model, offline=offline)
    with click.progressbar(length=spec.weight_bytes, label=spec.name, file=sys.stderr) as bar:
        made = convert(spec, folder, rows=activations, replace=force, advance=bar.update)
    for type_name, count in sorted(made.rounded.items()):
        note(f"{count} matrices of type {type_name} were quantised to 8 bits in blocks of 32")
    if not made.rounded:
        note("All weights keep their values.")
    click.echo(made.folder)
