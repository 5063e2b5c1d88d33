"""How long OpenMP spins: set while llama.cpp's library is loaded, unless the user has said so."""

from __future__ import annotations

import os

import pytest

from lowtide.models.gguf.binding.openmp import SETTINGS, short_spins


def test_the_setting_is_there_inside_the_block_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    with short_spins():
        assert 100 < int(os.environ["GOMP_SPINCOUNT"]) < 300_000
    assert "GOMP_SPINCOUNT" not in os.environ


@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_user_has_set_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in SETTINGS:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "7")
    before = dict(os.environ)
    with short_spins():
        assert dict(os.environ) == before
    assert dict(os.environ) == before
