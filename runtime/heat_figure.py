"""What a filter kept of a prompt, as a figure. Draws with matplotlib, like `profile_figures`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowtide.runtime.prompt_heat import PromptHeat

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCORE, KEPT = "#b3261e", "#2f6fab"


def draw_heat(figure: Figure, heat: PromptHeat) -> None:
    """Draw each token's score over the prompt, and below it which of them were kept."""
    axes, strip = figure.subplots(2, 1, sharex=True, height_ratios=[6, 1])
    edges = [i * heat.bin_tokens for i in range(len(heat.scores))]
    edges.append(heat.num_tokens)
    axes.stairs(heat.scores, edges, color=SCORE, fill=True, alpha=0.85)
    axes.set_ylabel("score")
    axes.set_ylim(bottom=min(0.0, *heat.scores))
    axes.set_title(
        f"What the last prompt's end attends to: {heat.num_kept:,} of {heat.num_tokens:,} tokens were kept",
        loc="left",
    )
    strip.pcolormesh(edges, [0, 1], [heat.kept], cmap=_from_white(KEPT), vmin=0, vmax=1)
    strip.set_yticks([0.5], ["kept"])
    strip.set_xlim(0, heat.num_tokens)
    strip.set_xlabel("position in the prompt, tokens")


def _from_white(colour: str) -> object:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("kept", ["#ffffff", colour])
