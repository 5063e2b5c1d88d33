from __future__ import annotations

import time
import tracemalloc

import pytest

from lowtide.models.chat_template import ChatTemplate
from lowtide.models.errors import TemplateError
from lowtide.models.spec import ModelSpec
from lowtide.models.text.prompt_span import text_of

USER = {"role": "user", "content": "Hi"}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def render(source: str, *messages: dict[str, str]) -> str:
    return text_of(ChatTemplate(source, SPECIAL).render(messages or (USER,)))


def test_the_default_models_own_template(smollm2_spec: ModelSpec) -> None:
    assert render(smollm2_spec.chat_template) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


LLAMA3 = (
    "{{- bos_token }}\n{%- set ns = namespace(turns=0) %}\n{%- for m in messages %}"
    "{%- set ns.turns = ns.turns + 1 %}"
    "{%- if loop.first and m['role'] == 'system' %}SYS:{{ m.content | trim }};"
    "{%- elif (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
    "{%- else %}{{ '<|' ~ m.role ~ '|>' + m.content.strip() }}{{ loop.length }}{%- endif %}\n"
    "{%- endfor %}{%- if add_generation_prompt %}<|assistant|>{{ ns.turns }}{%- endif %}"
)


def test_what_templates_commonly_use() -> None:
    assert render(LLAMA3) == "<s><|user|>Hi1<|assistant|>1"


def test_the_templates_own_error_is_reported() -> None:
    with pytest.raises(TemplateError, match="roles must alternate"):
        render(LLAMA3, {"role": "assistant", "content": "?"})


def test_more_of_the_language() -> None:
    source = (
        "{% macro turn(m) %}[{{ m.role | upper }}]{% endmacro %}"
        "{% for m in messages if m.role != 'system' %}{{ turn(m) }}{% if loop.last %}!{% endif %}"
        "{% else %}none{% endfor %}{{ messages | map(attribute='content') | join('+') }}"
        "{{ messages[0] | tojson }}{{ 'x' * 3 }}{{ ['a', 'b'] | length }}{{ strftime_now('%%') }}"
        "{% for k, v in {'a': 1}.items() %}{{ k }}={{ v }}{% endfor %}{{ undefined is defined }}"
        "{% for i in range(3) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}"
        "{{ 'a-b'.split('-')[-1] }}{{ messages[::-1][0].content }}"
    )
    out = render(source)
    assert out == '[USER]!Hi{"role": "user", "content": "Hi"}xxx2%a=1False02bHi'


HOSTILE = {
    "reaches for Python": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "reaches by attr": "{{ ''|attr('__class__') }}",
    "reaches init": "{{ namespace.__init__.__globals__['os'].system('true') }}",
    "imports": "{% import 'os' as os %}{{ os }}",
    "includes": "{% include '/etc/passwd' %}",
    "extends": "{% extends '/etc/passwd' %}",
    "counts for ever": "{% for i in range(10**9) %}x{% endfor %}",
    "big range": "{% for i in range(999999999) %}x{% endfor %}",
    "nested loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "nested lists": "{% set l = range(2000)|list %}{% for a in l %}{% for b in l %}{% for c in l %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "multiplies": "{{ 'x' * 10000000000 }}",
    "multiplies a list": "{{ ([0] * 100000000) | length }}",
    "multiplies twice": "{{ ('x' * 1000000) * 1000000 }}",
    "powers": "{{ 10 ** 1000000000 }}",
    "shifts": "{{ 7 ** 7 ** 7 ** 7 }}",
    "doubles": "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}"
    "{% endfor %}{{ ns.x | length }}",
    "adds": "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}"
    "{% endfor %}{{ ns.x | length }}",
    "joins": "{% set ns = namespace(x='xx') %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x,ns.x]|join(ns.x) %}{% endfor %}",
    "joins by method": "{% set ns = namespace(x='xx') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x.join([ns.x, ns.x]) %}{% endfor %}",
    "replaces": "{% set ns = namespace(x='xx') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x.replace('x', ns.x) %}{% endfor %}",
    "replaces by filter": "{% set ns = namespace(x='xx') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x | replace('x', ns.x) %}{% endfor %}",
    "pads": "{{ 'x'.ljust(10000000000) }}",
    "centers": "{{ 'x' | center(10000000000) }}",
    "indents": "{{ 'x\ny' | indent(10000000000) }}",
    "formats": "{{ '%10000000000d' | format(1) }}",
    "formats by operator": "{{ '%10000000000d' % 1 }}",
    "formats by method": "{{ '{:10000000000}'.format(1) }}",
    "makes bytes": "{{ (1).to_bytes(10000000000, 'big') }}",
    "maps to a method": "{{ ['{:10000000000}'] | map(attribute='format') | first }}{{ 1 / 0 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% for a in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "prints without end": "{% for i in range(90000) %}" + "x" * 200 + "{% endfor %}",
    "does not parse": "{% for %}",
    "unknown name": "{{ nothing.at.all }}",
    "divides by zero": "{{ 1 / 0 }}",
    "tojson in a loop": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
    "prints a nest": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "compares nests": "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}"
    "{% set ns.x = (ns.x, ns.x) %}{% set ns.y = (ns.y, ns.y) %}{% endfor %}{{ ns.x == ns.y }}",
    "nests dicts": "{% set ns = namespace(x={}) %}{% for i in range(60) %}"
    "{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
    "prints a namespace": "{{ namespace(x=1) }}",
    "batches": "{{ [1] | batch(10 ** 9, 'x') | list | length }}",
    "slices": "{{ [1] | slice(10 ** 9) | list | length }}",
    "nests batches": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set ns.x = (ns.x + ns.x) | batch(2) | list %}{% endfor %}{{ ns.x == ns.x }}{{ ns.x }}",
    "sums lists": "{% set l = range(9000) | list %}{{ ([l] * 9000) | sum(start=[]) | length }}",
    "recursive loops that fork": "{% for a in [1, 2] recursive %}{% if loop.depth < 60 %}{{ loop([1, 2]) }}"
    "{% endif %}{% endfor %}",
    "macros that fork": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "blocks that fork": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "filters out all": "{% for a in range(9999) %}{% for b in range(9999) if false %}{% endfor %}{% endfor %}",
    "names a variable as the limiter": "{% set tick = 1 %}{% set environment = 1 %}{% for a in range(9999) %}"
    "{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "compares long texts": "{% set a = 'x' * 4000000 %}{% set b = a[1:] ~ 'x' %}{% for i in range(90000) %}"
    "{{ 'y' if a == b }}{% endfor %}",
    "formats by a spec in a spec": "{{ '{:{}}'.format(1, 10 ** 12) }}",
    "formats by a star": "{{ '%*d' % (10 ** 12, 1) }}{{ '%.*f' % (10 ** 9, 1.5) }}",
    "formats numbers to many places": "{{ '{:.999999999f}'.format(1.5) }}",
    "rounds to many places": "{{ 1.5 | round(10 ** 9, 'ceil') }}",
    "fills with zeros": "{{ 'x'.zfill(10 ** 10) }}",
    "expands tabs": "{{ ('\t' * 1000).expandtabs(10 ** 9) }}",
    "translates": "{% set t = 'x' * 3000000 %}{{ 'aaaa'.translate({97: t}) }}",
    "fills with text": "{{ 'Lorem' }}{{ lipsum(n=10 ** 9) }}",
    "inserts at line ends": "{{ ('x ' * 90000) | wordwrap(1, wrapstring='y' * 90000) }}",
    "squares a number": "{% set ns = namespace(x=9) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}"
    "{% endfor %}{{ ns.x > 1 }}",
    "is long": "x" * 70000,
    "deep nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_with_one_sentence(name: str) -> None:
    tracemalloc.start()
    started = time.process_time()
    try:
        with pytest.raises(TemplateError) as caught:
            render(HOSTILE[name])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert peak < 64 << 20
    assert time.process_time() - started < 20  # no speed limit: it must only not be endless


@pytest.mark.parametrize(
    "path", ["raise_exception.__globals__", "messages.__class__", "''.__doc__"]
)
def test_hidden_attributes_are_undefined(path: str) -> None:
    assert render("{{ " + path + " is defined }}") == "False"


def test_a_missing_template_says_what_to_do() -> None:
    with pytest.raises(TemplateError, match="--raw"):
        ChatTemplate(None, SPECIAL)


@pytest.mark.parametrize("message", [{}, {"role": "king", "content": "x"}, {"role": "user"}])
def test_invalid_messages(message: dict[str, str]) -> None:
    with pytest.raises(TemplateError, match="a message has the role"):
        render("{{ messages }}", message)
