"""Makes the graph hook that a plan needs, and keeps it told of what happens to the cache."""

from __future__ import annotations

from lowtide.attention.graph_hook import GraphHook
from lowtide.attention.kernel_host import KernelHost
from lowtide.memory.key_groups import KeyGroups
from lowtide.models.errors import LowtideError
from lowtide.models.gguf_model import GgufModel
from lowtide.models.model import Model
from lowtide.models.onnx.swapped.model import SwappedModel
from lowtide.runtime.planning import PlannedModel
from lowtide.runtime.profiler import Profiler


def graph_hook(planned: PlannedModel, profiler: Profiler) -> GraphHook | None:
    """Our attention needs a hook, and so do packed weights and giving weights back; times of layers can be
    gone without.
    """
    is_needed = (
        planned.policy.uses_hook
        or planned.plan.kept_layers is not None
        or bool(planned.spec.packed_tensors)
    )
    if not is_needed and not profiler.wants_layers:
        return None
    try:
        hook = GraphHook(planned.options.num_threads)
    except LowtideError:
        if is_needed:
            raise
        return None
    hook.set_active(planned.policy.uses_hook)
    profiler.time_layers(hook, planned.spec.num_layers)
    return hook


def keep_from_going_back(model: Model, host: KernelHost, groups: KeyGroups | None) -> None:
    """Where groups replace the cache's cells, the model cannot go back to those, nor tell its state."""
    if groups is None or not groups.replaced_layers:
        return
    assert isinstance(model, GgufModel | SwappedModel), "our kernels run in its graph"
    model.keeps_state = model.copies_state = False
    model.least_tokens = lambda: host.least_cells


def tell_cuts(model: Model, hook: GraphHook) -> None:
    """Tokens may come back in another way than by a pass: what the hook keeps of them is cut, too."""
    if not isinstance(model, GgufModel):
        return
    told = model.on_cut

    def cut(num_used: int, num_kept: int) -> None:
        hook.cut(num_kept)
        if told is not None:
            told(num_used, num_kept)

    model.on_cut = cut
