"""Where lowtide's files lie, for users with and without a home."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowtide.attention import calibration
from lowtide.models import catalog
from lowtide.models.errors import LowtideWarning, ModelError
from lowtide.models.files import folders


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_uid: int) -> None:
        raise KeyError("uid not found")

    for name in ("HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)


def test_the_folders_of_the_xdg_specification(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert folders.cache_folder() == Path("/somewhere/.cache/lowtide")
    assert folders.state_folder() == Path("/somewhere/.local/state/lowtide")
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert folders.cache_folder() == Path("/elsewhere/lowtide")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert folders.cache_folder() == Path("/somewhere/.cache/lowtide")


@pytest.mark.parametrize("home", [None, "", "relative"])
def test_a_user_without_a_home_has_no_folders(
    no_home: None, monkeypatch: pytest.MonkeyPatch, home: str | None
) -> None:
    if home is not None:
        monkeypatch.setenv("HOME", home)
    assert folders.cache_folder() is None and folders.state_folder() is None
    assert "set XDG_CACHE_HOME" in str(folders.unusable(None, "XDG_CACHE_HOME"))


def test_a_folder_that_cannot_be_made_is_named_with_the_reason(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    reason = folders.unusable(file / "below", "XDG_CACHE_HOME")
    assert reason is not None and str(file) in reason and "Not a directory" in reason
    assert folders.unusable(tmp_path / "new" / "folder", "XDG_CACHE_HOME") is None


def test_only_shipped_calibrations_are_found_without_a_home(
    no_home: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # of the folder that every test has
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(folders, "_listed_home", lambda: "")
    assert calibration.calibration_folder() is None
    shipped = next(calibration.SHIPPED.iterdir())
    assert calibration.find_file(shipped.name) == shipped
    with pytest.raises(calibration.CalibrationError, match="set XDG_CACHE_HOME"):
        calibration.write_values("name.json", {})


class _Parts:
    """Stands for the package of a model in parts."""

    @staticmethod
    def assemble(target: Path, overwrite: bool) -> None:
        target.write_bytes(b"whole")


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> catalog.NamedModel:
    model = catalog.NamedModel(
        name="parted", package="os", install="", description="", license="", assembled="parted.gguf"
    )
    monkeypatch.setattr(catalog, "NAMED_MODELS", (model,))
    monkeypatch.setattr(catalog, "_package_folder", lambda _model: tmp_path)
    monkeypatch.setattr(catalog.importlib, "import_module", lambda _name: _Parts)
    monkeypatch.setattr(catalog, "_temporary", {})
    monkeypatch.setattr(catalog.tempfile, "tempdir", str(tmp_path))
    return model


def test_a_model_in_parts_is_joined_for_the_process_where_there_is_no_cache(
    no_home: None, in_parts: catalog.NamedModel
) -> None:
    with pytest.warns(LowtideWarning, match="set XDG_CACHE_HOME"):
        path = catalog.resolve("parted")
    assert path.read_bytes() == b"whole"
    assert catalog.resolve("parted") == path  # joined once
    path.unlink()


def test_without_a_temporary_folder_either_a_sentence_says_so(
    no_home: None, in_parts: catalog.NamedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_options: object) -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(catalog.tempfile, "mkdtemp", refuse)
    with pytest.raises(ModelError, match=r"no home folder.*no temporary\s+folder"):
        catalog.resolve("parted")
