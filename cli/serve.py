"""`lowtide serve`: answers requests over HTTP, inside the memory budget."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from lowtide.cli.common.options import (
    generation_options,
    opening_options,
    plan_with,
    quality_option,
    speculate_option,
    take_generation_options,
    take_open_options,
    take_spec,
)

if TYPE_CHECKING:
    from lowtide.models.spec import ModelSpec
    from lowtide.runtime.planning.plan import LoadConfig
    from lowtide.runtime.runtime import Runtime

SEQUENCES = 4
"""Answers that are computed together where nothing is stated."""
MIN_BODY_BYTES = 256 << 10


@click.command("serve", short_help="Answer requests over HTTP (OpenAI's API).")
@opening_options
@speculate_option
@quality_option
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on. One that others can reach needs --api-key.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    help="Port to listen on; 0 takes a free one.",
)
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    metavar="KEY",
    help="A key that requests must send; repeatable.  [default: LOWTIDE_API_KEY, separated by commas]",
)
@click.option(
    "--allow-host",
    "allowed_hosts",
    multiple=True,
    metavar="NAME",
    help="A further name of this server, such as that of a proxy; repeatable.",
)
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    metavar="ORIGIN",
    help="Let web pages of this origin use the server, such as http://localhost:3000; repeatable.",
)
@click.option(
    "--sequences",
    type=click.IntRange(1, 256),
    metavar="N",
    help="Answers that are computed together.  [default: 4, or 1 where the model or its attention computes one at a "
    "time]",
)
@click.option(
    "--queue",
    "max_waiting",
    type=click.IntRange(0, 1024),
    default=16,
    show_default=True,
    help="Most requests that wait; more are answered with status 429.",
)
@click.option(
    "--max-body",
    "max_body",
    metavar="SIZE",
    help="Largest body of a request.  [default: 256KiB and 8 bytes for each token of the context]",
)
@generation_options
def command(
    host: str,
    port: int,
    api_keys: tuple[str, ...],
    allowed_hosts: tuple[str, ...],
    cors_origins: tuple[str, ...],
    sequences: int | None,
    max_waiting: int,
    max_body: str | None,
    **options: Any,
) -> None:
    """Answer requests over HTTP, inside the memory budget: OpenAI's API at /v1.

    MODEL is a .gguf file, an ONNX folder, a name from `lowtide models`, or hf:user/repo[:quant]. The options of
    sampling are for what a request leaves out. Stop with Ctrl-C or SIGTERM.
    """
    from lowtide.cli.common.output import note, plan_line, template_note
    from lowtide.cli.server.settings import ServerSettings, keys_of
    from lowtide.memory.units import parse_size

    app, run, services = _server_modules()
    name = options["model"] or options["model_option"]
    defaults = take_generation_options(options)
    spec = take_spec(options)
    most_tokens = min(options["context"] or spec.context_length, spec.context_length)
    settings = ServerSettings(
        host=host,
        port=port,
        api_keys=keys_of(api_keys),
        allowed_hosts=tuple(name.lower() for name in allowed_hosts),
        cors_origins=cors_origins,
        max_body_bytes=parse_size(max_body) if max_body else MIN_BODY_BYTES + 8 * most_tokens,
    )
    # Requests may ask for JSON at any time: its memory is in the plan where its library is installed.
    options["structured"] = importlib.util.find_spec("llguidance") is not None
    # All answers together have one context of tokens at most, and a little for each of the others.
    num_tokens = most_tokens + 1024 * ((sequences or SEQUENCES) - 1)
    config = replace(
        take_open_options(options),
        max_waiting=max_waiting,
        server_bytes=settings.memory_bytes(num_tokens),
    )
    listening = run.listening_socket(settings)
    with _loaded(spec, config, sequences) as runtime:
        note(plan_line(runtime.planned))
        template_note(runtime)
        service = services.Service(runtime, name or spec.name, defaults, settings)
        shown_host, shown_port = listening.getsockname()[:2]
        note(f"listening on http://{_in_address(shown_host)}:{shown_port} (API at /v1)")
        run.Serving(app.make_app(service), settings, listening, service.end_answers).run()


def _loaded(spec: ModelSpec, config: LoadConfig, sequences: int | None) -> Runtime:
    """Plan and load the model, for several answers together where nothing is stated and the model can."""
    from lowtide.cli.common.output import note
    from lowtide.cli.common.progress import load_runtime
    from lowtide.models.errors import BadOption
    from lowtide.runtime.errors import OverBudget

    stated = sequences or SEQUENCES
    try:
        planned = plan_with(spec, replace(config, sequences=stated))
        planned.require_fit()
        return load_runtime(planned)
    except (BadOption, OverBudget) as error:
        if sequences is not None:
            raise
        reason = str(error)
    planned = plan_with(spec, replace(config, sequences=1))
    planned.require_fit()
    runtime = load_runtime(planned)
    note(f"answers are computed one at a time, not {SEQUENCES} together: {reason}")
    return runtime


def _server_modules() -> tuple[Any, Any, Any]:
    """Import what the server is made of, before memory is measured."""
    try:
        from lowtide.cli.server import app, run, service
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("lowtide"):
            raise
        raise click.UsageError(
            f"the server needs {error.name}, which is not installed: pip install 'lowtide[server]'"
        ) from None
    return app, run, service


def _in_address(host: str) -> str:
    return f"[{host}]" if ":" in host else host
