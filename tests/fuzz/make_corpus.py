"""Write the first inputs of each target; what the fuzzer finds is added to them by hand.

PYTHONPATH=tests/support python tests/fuzz/make_corpus.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import onnx
from gguf_files import write_model
from onnx_decoders import write_decoder
from onnx_folders import Shape
from vocabularies import write_vocabulary

HERE = Path(__file__).resolve().parent / "corpus"
TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0].content|trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('order') }}{% endif %}"
    "[INST] {{ system ~ m.content.strip() }} [/INST]{% endfor %}",
    "macro": "{% macro one(m) %}{{ m.role|upper }}: {{ m.content.replace('a', 'b')|tojson }}{% endmacro %}"
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ one(m) }}{% endfor %}{{ ns.n }}",
    "range": "{% for i in range(10) %}{{ '%s' % i }}{{ messages|map(attribute='role')|join(',') }}{% endfor %}",
    "date": "{{ strftime_now('%d %b %Y') }}{% generation %}{{ messages[-1]['content'] }}{% endgeneration %}",
    "hostile": "{{ ''.__class__.__mro__ }}{% for a in range(9999999) %}{{ 'x' * 99999 }}{% endfor %}",
}
TEXTS = {
    "words": "The tide is out; it's 12,345 o'clock.\n\n\tIndented  twice ",
    "control": "<|im_start|>user\n<|im_end|></s><s><unk>",
    "letters": "A" * 600,
    "mixed": "é中\u0301\u200d😀👨\u200d👩\u200d👧 …\ufeff\0",
    "digits": "0123456789" * 20 + "----====   \r\n",
}
CONSTRAINTS = {
    "schema": '{"type": "object", "properties": {"a": {"type": "string", "minLength": 3}}, "required": ["a"]}',
    "counts": "(((a{99}){99}){99}){99}|[a-z]{2,5}(?:x|yz)+",
    "lark": 'start: a | T{3}\na: "x" a? "y"\nT: /[0-9]+/ & ~/0+/\n',
    "gbnf": 'root ::= "a" item*\nitem ::= [0-9] | "b" root\n',
    "references": '{"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"const": 1}, {"$ref": "#/$defs/a"}]}}}',
}
OPTIONS = {
    "sizes": "memory=512MiB\nmemory=50%\nprefix_cache=0\ngpu_memory=1.5G\nmemory=1e9\nmemory=-1",
    "policies": "attention=tidal:k=512,layers=2+13\nattention=delta:granularity=block,block=8,sparsity=25%\n"
    "attention=gem:k=10%,layer=7\nattention=dense:prompts=bf16\nattention=tidal:k=nan%",
    "drafts": "speculate=auto:draft=4\nspeculate=ngram:rows=4\nspeculate=a/b.gguf:draft=31\nspeculate=off",
    "numbers": "max_tokens=-1\ntemperature=0.7\nseed=-1\ntop_p=1e-3\nstop=x\ncontext=4096\nthreads=2\ngpu_layers=auto",
    "run": "$run -p 'Hi there' -n 8 --temp 0.5 --stop A --stop B --memory 1GiB --attention tidal:k=256",
    "chat": "$chat smollm2 -c 512 --speculate ngram:draft=3 --prefix-cache 64MiB -s 'Be brief.' --overflow drop-oldest",
    "bench": "$bench --attention dense -d 512 --rounds 3 -n 4 --json",
    "plan": "$plan --gpu-layers auto --gpu-memory 4G --kv-type q8_0 -t 4 --repack",
}


def main() -> None:
    """Write every input."""
    with tempfile.TemporaryDirectory() as name:
        _write_models(Path(name))
    for target, texts in (
        ("template", TEMPLATES),
        ("options", OPTIONS),
        ("constraint", CONSTRAINTS),
    ):
        for key, text in texts.items():
            _write(target, key, text.encode())
    for kind in range(4):
        for key, text in TEXTS.items():
            _write("tokenise", f"{key}-{kind}", bytes([kind]) + text.encode())
    _write_sessions()


def _write(target: str, name: str, data: bytes) -> None:
    path = HERE / target / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _write_models(folder: Path) -> None:
    for kind in ("gpt2", "rwkv"):
        _write("gguf_header", kind, write_vocabulary(folder / f"{kind}.gguf", kind).read_bytes())
    sizes = {
        "layers": 1,
        "width": 16,
        "heads": 2,
        "kv_heads": 1,
        "feed_forward": 8,
        "vocabulary": 260,
    }
    for name, architecture, overrides in (
        ("llama", "llama", {}),
        ("gemma3", "gemma3", {"attention.sliding_window": 8, "attention.key_length": 8}),
        ("mamba", "mamba", {"ssm.inner_size": 32, "ssm.state_size": 16, "ssm.conv_kernel": 4}),
    ):
        path = write_model(
            folder / f"{name}.gguf", architecture=architecture, overrides=overrides, **sizes
        )
        data = path.read_bytes()
        _write("gguf_header", name, data)
        _write("gguf_header", f"{name}-cut", data[: len(data) // 3])
    shape = Shape(
        layers=1, width=16, heads=2, kv_heads=2, feed_forward=8, vocabulary=260, context=32
    )
    for form in ("gqa", "mha", "decomposed"):
        made = write_decoder(folder / form, form, shape, external=False)
        _write("onnx_graph", form, (made / "model.onnx").read_bytes())
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            [onnx.helper.make_node("Add", ["a", "b"], ["c"], domain="made.up", axis=1, name="n")],
            "g",
            [onnx.helper.make_tensor_value_info("a", onnx.TensorProto.FLOAT, ["n", 3])],
            [onnx.helper.make_tensor_value_info("c", onnx.TensorProto.FLOAT, None)],
            [onnx.helper.make_tensor("b", onnx.TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])],
        )
    )
    _write("onnx_graph", "small", model.SerializeToString())


def _write_sessions() -> None:
    from lowtide.runtime.sessions.file import Transcript, write_chat

    messages = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."})
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "chat"
        transcript = Transcript(model="tiny", messages=messages)
        transcript.save(path)
        _write("session_file", "transcript", path.read_bytes())
        header = {
            "properties": {"model": "tiny", "kv_type": "f16"},
            "num_tokens": 3,
            "exact_until": 3,
            "last": {"text": "Hi", "token_ids": [1, 2, 3], "num_messages": 2},
            "transcript": transcript.to_dict(),
        }

        def snapshot(target: Path) -> int:
            return target.write_bytes(b"KV" * 32)

        write_chat(path, snapshot, header)
        _write("session_file", "snapshot", path.read_bytes())
    for name, value in (("list", []), ("deep", json.loads("[" * 50 + "]" * 50)), ("number", 1e308)):
        _write("session_file", name, json.dumps(value).encode())


if __name__ == "__main__":
    main()
