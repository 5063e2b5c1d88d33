"""The memory of a batch with drafts and without."""

from __future__ import annotations

from promising_drafts import speculation_of

from lowtide.memory.plan.batch import BatchPlan, plan_batch
from lowtide.memory.plan.estimates import FormulaSizes
from lowtide.memory.plan.speculation.choices import DraftTables
from lowtide.models.fake_model import fake_spec

SPEC = fake_spec(512)
CONFIG = speculation_of(DraftTables(name="ngram", table_bytes=1000, token_bytes=9))


def plan_of(max_drafted: int) -> BatchPlan:
    return plan_batch(
        SPEC,
        FormulaSizes(SPEC),
        num_sequences=3,
        shared_tokens=100,
        own_tokens=50,
        batch_size=64,
        kv_type="f16",
        context=512,
        attention_threads=0,
        max_drafted=max_drafted,
        speculation=CONFIG,
        drafts=("ngram",),
    )


def test_drafts_take_logits_and_tables_but_no_kv_cache() -> None:
    without, drafting = plan_of(0), plan_of(5)
    logits = 5 * 2 * 4 * SPEC.vocabulary.num_tokens
    tables = 3 * 1000 + 9 * (3 * 100 + 50)
    assert drafting.num_bytes - without.num_bytes == logits + tables
    assert drafting.cache_bytes == without.cache_bytes
    assert (drafting.num_logits, drafting.max_drafted) == (8, 5)
    assert (without.num_logits, without.max_drafted) == (3, 0)
