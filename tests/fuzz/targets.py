"""What is fuzzed: functions of bytes. What one raises is a finding; errors that users can act on are none.

`tests/fuzz/run.py` searches for inputs, `tests/fuzz/test_corpus.py` replays those that it found.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path

from lowtide.models.errors import LowtideError

KINDS = ("gpt2", "llama", "t5", "rwkv")
"""The vocabularies of `tokenise`, by the first byte of its input."""
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<|im_start|>Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "  Name a colour.\n"},
]


@functools.cache
def folder() -> Path:
    """Return a folder for the inputs of targets that read files; it lies in memory where the system has that."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory if memory.is_dir() else None))


def gguf_header(data: bytes) -> None:
    """Read a GGUF header, and everything that lowtide derives from it."""
    from lowtide.models.read_spec import read_spec

    path = folder() / "model.gguf"
    path.write_bytes(data)
    with contextlib.suppress(LowtideError):
        spec = read_spec(path)
        assert 0 <= spec.weight_bytes <= len(data)
        for group in spec.weight_groups:
            for span in group.spans:
                assert 0 <= span.offset <= span.offset + span.num_bytes <= len(data)


def onnx_graph(data: bytes) -> None:
    """Read an ONNX graph, and the folder that it lies in as a model."""
    from lowtide.models.onnx.graph import read_graph
    from lowtide.models.read_spec import read_spec

    path = _onnx_folder() / "model.onnx"
    path.write_bytes(data)
    with contextlib.suppress(LowtideError):
        read_graph(path)
        read_spec(path.parent)


@functools.cache
def _onnx_folder() -> Path:
    from onnx_decoders import write_decoder

    return write_decoder(folder() / "onnx", external=False)


def template(data: bytes) -> None:
    """Compile and render a chat template."""
    from lowtide.models.chat_template import ChatTemplate

    with contextlib.suppress(LowtideError):
        source = data.decode("utf-8", errors="replace")
        spans = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}).render(CONVERSATION)
        assert all(isinstance(span.text, str) for span in spans)


def tokenise(data: bytes) -> None:
    """Tokenise a text as a message is, and compare what its tokens spell where the vocabulary has every byte."""
    kind = KINDS[data[0] % len(KINDS)] if data else KINDS[0]
    text = data[1:].decode("utf-8", errors="ignore")
    tokenizer = _tokenizer(kind)
    with contextlib.suppress(LowtideError):
        plain = tokenizer.encode(text, add_special=False, parse_special=False)
        if kind == "gpt2":
            assert tokenizer.decode(plain) == text
        tokenizer.decode(tokenizer.encode(text, add_special=True, parse_special=True))


_open = contextlib.ExitStack()


@functools.cache
def _tokenizer(kind: str):  # type: ignore[no-untyped-def]
    from vocabularies import opened, write_vocabulary

    return _open.enter_context(opened(write_vocabulary(folder() / f"{kind}.gguf", kind)))


def session_file(data: bytes) -> None:
    """Read a saved chat. A wrong checksum is mended first: the checks behind it are what is fuzzed."""
    from lowtide.runtime.sessions.file import ChatHeader, Transcript, open_chat

    path = folder() / "chat.session"
    for candidate in (data, _with_checksum(data)):
        path.write_bytes(candidate)
        with contextlib.suppress(LowtideError), open_chat(path) as file:
            if file is None:
                Transcript.load(path)
                continue
            header = ChatHeader.from_dict(path, file.header())
            header.require_match(path, {}, 512)


def _with_checksum(data: bytes) -> bytes:
    import hashlib

    from lowtide.runtime.sessions.file import _LENGTHS, FOOTER_BYTES, MAGIC, _checksum

    if data.startswith(b"{"):
        with contextlib.suppress(ValueError, RecursionError):
            body = json.loads(data)
            if isinstance(body, dict):
                body.pop("sha256", None)
                with contextlib.suppress(Exception):
                    return json.dumps({**body, "sha256": _checksum(body)}).encode()
        return data
    header = data[:-FOOTER_BYTES] if MAGIC in data[-FOOTER_BYTES:] else data
    start = max(header.find(b"{"), 0)
    lengths = _LENGTHS.pack(MAGIC, start, len(header) - start)
    return header + lengths + hashlib.sha256(header + lengths).digest()


def options(data: bytes) -> None:
    """Parse the texts that options have: a line `NAME=VALUE` each, and whole command lines behind `$`."""
    from lowtide.runtime.backends.config import LoadConfig
    from lowtide.runtime.options import SamplingParams

    for line in data.decode("utf-8", errors="surrogateescape").splitlines()[:8]:
        if line.startswith("$"):
            _parse_command(line[1:])
            continue
        name, _, value = line.partition("=")
        kinds: tuple[Callable[..., object], ...] = (LoadConfig.of, SamplingParams.of)
        for make in kinds:
            with contextlib.suppress(LowtideError):
                made = make(**{name: value})
                assert hash(made) is not None and repr(made)


def _parse_command(line: str) -> None:
    """Parse a command line as click does, and make its options; no model is read."""
    import click

    from lowtide.cli.common.options import take_generation_options, take_open_options
    from lowtide.cli.main import main

    with contextlib.suppress(click.ClickException, click.exceptions.Exit, LowtideError, ValueError):
        name, *words = shlex.split(line)
        context = click.Context(main)
        command = main.get_command(context, name)
        if command is None or "--enforce" in line:
            return
        values = dict(command.make_context(name, words, parent=context).params)
        if "max_tokens" in values:
            take_generation_options(values)
        if "memory" in values and "attention" in values:
            take_open_options(values)


def constraint(data: bytes) -> None:
    """Read a text as a JSON schema, a pattern and a grammar; what is accepted has an end that it accepts."""
    from lowtide.models.fake_model import NUM_TOKENS, ByteTokenizer
    from lowtide.runtime.structured.answer import ConstrainedAnswer
    from lowtide.runtime.structured.formats import Grammar, JsonSchema, Regex
    from lowtide.runtime.structured.vocabulary import TokenVocabulary

    source = data.decode("utf-8", errors="replace")
    vocabulary = TokenVocabulary(ByteTokenizer(), NUM_TOKENS)
    kinds: tuple[Callable[[str], JsonSchema | Regex | Grammar], ...] = (JsonSchema, Regex, Grammar)
    for make in kinds:
        with contextlib.suppress(LowtideError):
            made = make(source).compile(vocabulary)
            answer = ConstrainedAnswer(made.fork(), vocabulary.end_ids, 64)
            assert made.ends(answer.close())


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (gguf_header, template, tokenise, session_file, onnx_graph, options, constraint)
}
