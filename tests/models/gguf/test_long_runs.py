"""Long runs of one character: llama.cpp's pre-tokenizers recurse, and no text may end the process."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import pytest
from processes import run_measured
from vocabularies import opened, pre_tokenizer_candidates, write_vocabulary

from lowtide.models.errors import ModelError

RUNS = (
    "A",
    "a",
    "1",
    " ",
    "\n",
    "-",
    ".",
    "_",
    "😀",
    "中",
    "\u0301",
    "Ж",
    "\u00a0",
    "aB1 -.\n",
    "tide ",
)
RECURSING = ("tekken", "gpt-4o", "deepseek-v3", "exaone-moe", "viking", "deepseek-llm")

TOKENISE = """
import ctypes, json, sys, threading
from pathlib import Path
from vocabularies import opened
folder, names, runs, num = Path(sys.argv[1]), *map(json.loads, sys.argv[2:])
texts = [(run * num)[:num] + end for run in runs for end in ("", "x")]

def whole(tokenizer, text):
    "The oracle: llama_tokenize itself, on a Python thread with a huge stack."
    data = text.encode()
    token_ids = (ctypes.c_int32 * (4 * len(data) + 8))()
    def call():
        global count
        count = tokenizer._api.llama_tokenize(
            tokenizer._vocabulary, data, len(data), token_ids, len(token_ids), False, False)
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return token_ids[:count]

threading.stack_size(2 << 30)
for name in names:
    with opened(folder / f"{name}.gguf") as tokenizer:
        for text in texts:
            mine = tokenizer.encode(text, add_special=False, parse_special=False)
            assert mine == whole(tokenizer, text), (name, text[:9])
print("done", len(names) * len(texts))
"""


def _tokenise(folder: Path, names: list[str], num: int, timeout: float = 120) -> str:
    support = str(Path(__file__).parents[2] / "support")
    code = f"import sys; sys.path.insert(0, {support!r})\n{TOKENISE}"
    arguments = (str(folder), json.dumps(names), json.dumps(RUNS), json.dumps(num))
    shell = 'ulimit -s 1024; exec "$@"'
    command = ("/bin/bash", "-c", shell, "bash", sys.executable, "-c", code, *arguments)
    done = run_measured(*command, timeout=timeout)
    assert done.code == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_a_long_run_has_the_tokens_of_llama_cpp(tmp_path: Path) -> None:
    for name in RECURSING:
        write_vocabulary(tmp_path / f"{name}.gguf", pre=name)
    done = _tokenise(tmp_path, list(RECURSING), 6_000)
    assert done == f"done {len(RECURSING) * len(RUNS) * 2}"


@pytest.mark.slow
@pytest.mark.parametrize("num", [1, 200_000])
def test_every_pre_tokenizer_of_the_library_takes_long_runs(tmp_path: Path, num: int) -> None:
    names = []
    for name in pre_tokenizer_candidates():
        path = write_vocabulary(tmp_path / f"{name}.gguf", pre=name)
        with contextlib.suppress(ValueError), opened(path):
            names.append(name)
    assert len(names) > 80 and set(RECURSING) <= set(names)
    assert _tokenise(tmp_path, names, num, 3000) == f"done {len(names) * len(RUNS) * 2}"


def test_the_stack_of_a_text_is_known_beforehand(tmp_path: Path) -> None:
    with opened(write_vocabulary(tmp_path / "a.gguf", pre="tekken")) as tokenizer:
        assert 200 < tokenizer.stack_bytes("A" * 10_000) / 10_000 < 400
        assert tokenizer.stack_bytes("tide " * 10_000) < 4000
    with opened(write_vocabulary(tmp_path / "b.gguf", pre="exaone-moe")) as tokenizer:
        assert tokenizer.stack_bytes("tide " * 10_000) > 200 * 50_000
        assert tokenizer.stack_bytes("tide\n" * 10_000) < 4000
    with opened(write_vocabulary(tmp_path / "c.gguf", pre="llama-bpe")) as tokenizer:
        assert tokenizer.stack_bytes("A" * 10_000) == 0


def test_what_the_tokenizer_throws_is_an_error(tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "a.gguf", "llama", with_bytes=False)
    with opened(path) as tokenizer:
        assert tokenizer.encode("tide", add_special=False, parse_special=False)
        with pytest.raises(ModelError, match="cannot tokenise this text of 2 bytes"):
            tokenizer.encode("ж", add_special=False, parse_special=False)
