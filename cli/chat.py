"""`lowtide chat`: a conversation in the terminal, or over a pipe."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from lowtide.cli.enforce import enforce_option, hold
from lowtide.cli.options import (
    generation_options,
    opening_options,
    planned_model,
    prefix_cache_option,
    speculate_option,
    take_generation_options,
)

if TYPE_CHECKING:
    from lowtide.memory.control_group import ControlGroup


@click.command("chat")
@opening_options
@speculate_option
@click.option("-s", "--system", help="A system message before the conversation.")
@prefix_cache_option
@enforce_option
@generation_options
def command(system: str | None, enforce: ControlGroup | None, **options: Any) -> None:
    """Talk with a model; /help lists what you can type.

    MODEL is a .gguf file, an ONNX folder, a name from `lowtide models`, or hf:user/repo[:quant].
    """
    from lowtide.cli.input import TurnReader
    from lowtide.cli.repl import Repl
    from lowtide.cli.summary import note, plan_line
    from lowtide.memory.footprint import prompt_limit_bytes
    from lowtide.runtime import Runtime

    generation = take_generation_options(options)
    planned = planned_model(options)
    planned.require_fit()
    note(plan_line(planned))
    hold(enforce, planned.plan.budget)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    with Runtime.load(planned) as runtime:
        reader = TurnReader(prompt_limit_bytes(planned.plan.kv_tokens), interactive=interactive)
        repl = Repl(runtime, generation, system)
        try:
            exit_code = repl.run(reader, interactive=interactive)
        finally:
            reader.close()
    if exit_code:
        sys.exit(exit_code)
