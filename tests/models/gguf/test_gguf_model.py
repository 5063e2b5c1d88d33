from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf_files import write_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import run_python

from lowtide.models.errors import ForwardError, ModelError, UnsupportedModel
from lowtide.models.gguf import model as gguf_model
from lowtide.models.gguf.header.spec import read_spec
from lowtide.models.gguf.llama_cpp import LlamaLibrary, llama_library
from lowtide.models.gguf.model import GgufModel
from lowtide.models.gguf.parameters import LoadOptions, model_parameters

OPTIONS = LoadOptions(context=256, batch_size=16, threads=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GgufModel]:
    path = write_model(tmp_path_factory.mktemp("model") / "random.gguf")
    with GgufModel(read_spec(path), OPTIONS) as loaded:
        yield loaded


def _logits(model: GgufModel, token_ids: list[int]) -> bytes:
    return b"".join(model.forward([token]).tobytes() for token in token_ids)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prefix=st.lists(st.integers(3, 319), min_size=1, max_size=20),
    dropped=st.lists(st.integers(3, 319), max_size=20),
    after=st.lists(st.integers(3, 319), min_size=1, max_size=10),
)
def test_truncating_equals_never_having_appended(
    model: GgufModel, prefix: list[int], dropped: list[int], after: list[int]
) -> None:
    model.truncate(0)
    _logits(model, prefix)
    expected = _logits(model, after)
    model.truncate(0)
    _logits(model, prefix)
    _logits(model, dropped)
    assert model.truncate(len(prefix)) == len(prefix) == model.num_tokens
    assert _logits(model, after) == expected


@pytest.mark.parametrize("token_ids", [[], list(range(17)), [320], [-1]])
def test_invalid_batches_change_nothing(model: GgufModel, token_ids: list[int]) -> None:
    model.truncate(0)
    model.forward([5])
    with pytest.raises(ForwardError):
        model.forward(token_ids)
    assert model.num_tokens == 1


def test_tokens_beyond_the_context_are_refused(model: GgufModel) -> None:
    model.truncate(0)
    for _ in range(16):
        model.forward([5] * 16)
    with pytest.raises(ForwardError, match="257 tokens do not fit the context of 256"):
        model.forward([5])
    assert model.truncate(3) == 3


def test_a_closed_model_says_so(tmp_path: Path) -> None:
    model = GgufModel(read_spec(write_model(tmp_path / "m.gguf")), OPTIONS)
    model.close()
    model.close()
    with pytest.raises(ForwardError, match="closed"):
        model.forward([1])


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    spec = read_spec(write_model(tmp_path / "odd.gguf", architecture="perceptron"))
    with pytest.raises(
        UnsupportedModel, match="unknown model architecture: 'perceptron'"
    ) as caught:
        GgufModel(spec, OPTIONS)
    assert caught.value.exit_code == 2


def test_a_model_that_llama_cpp_refuses_carries_its_reason(tmp_path: Path) -> None:
    # The header says four layers, the file has two.
    spec = read_spec(write_model(tmp_path / "two.gguf", overrides={"block_count": 4}))
    with pytest.raises(ModelError, match="blk.2.attn_norm.weight"):
        GgufModel(spec, OPTIONS)


@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "q4_0"])
def test_kv_types(kv_type: str, tmp_path: Path) -> None:
    path = write_model(tmp_path / "wide.gguf", width=128)
    options = LoadOptions(context=256, batch_size=16, threads=2, kv_type=kv_type, memory_map=False)
    with GgufModel(read_spec(path), options) as model:
        assert model.forward([5, 6, 7]).shape == (320,)


@pytest.mark.parametrize(
    ("sets", "repacks"), [("AMX_INT8 = 1 | REPACK = 1", False), ("REPACK = 1", True)]
)
def test_llama_cpp_does_not_repack_where_it_was_compiled_for_amx(
    sets: str, repacks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requested: list[bool] = []

    def recorded(api: object, **options: object) -> object:
        requested.append(bool(options["repack"]))
        return model_parameters(api, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(LlamaLibrary, "system_info", f"CPU : AVX2 = 1 | {sets} | ")
    monkeypatch.setattr(gguf_model, "model_parameters", recorded)
    with GgufModel(read_spec(write_model(tmp_path / "random.gguf")), OPTIONS):
        assert llama_library().repacks == repacks
    assert requested == [repacks]


def test_a_later_import_of_llama_cpp_finds_the_whole_package() -> None:
    done = run_python(
        "from lowtide.models.gguf.llama_cpp import llama_library\n"
        "api = llama_library().api\n"
        "import sys; assert 'llama_cpp' not in sys.modules\n"
        "import llama_cpp; print(llama_cpp.Llama.__name__)"
    )
    assert (done.code, done.stdout) == (0, "Llama\n"), done.stderr


def test_only_the_bindings_are_imported() -> None:
    done = run_python(
        "from lowtide.models.gguf.llama_cpp import llama_library; llama_library()\n"
        "import sys; print('numpy' in sys.modules, 'diskcache' in sys.modules)"
    )
    assert done.stdout == "False False\n", done.stderr
    assert done.peak_bytes < 32 << 20
