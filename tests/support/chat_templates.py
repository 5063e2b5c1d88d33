"""Chat templates for the tests, written for them: each uses other parts of jinja2, as the templates of models do."""

# ruff: noqa: E501

from __future__ import annotations

TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
START = "<|im_start|>assistant\n"

TEMPLATES = {
    "loop": "{% for m in messages %}" + TURN + "{% endfor %}" + START,
    "whitespace control": """{{- bos_token }}
{%- for m in messages %}
    {%- if loop.first and m['role'] == 'system' %}
        {{- '<<SYS>>\\n' + m['content'] | trim + '\\n<</SYS>>\\n\\n' }}
    {%- else %}
    {{ '[' ~ m.role ~ ']' }}{{ m['content'].strip() }}
    {%- endif %}
{% endfor %}
{% if add_generation_prompt %}
[answer]
{% endif %}""",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "<|im_start|>assistant\n{% set x = m.content %}{{ x }}<|im_end|>\n{% endgeneration %}{% else %}"
    + TURN
    + "{% endif %}{% endfor %}"
    + START,
    "replace by method": "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.replace('\\r\\n', '\\n').replace('a', '<a>', 2).replace('', '-', 2) }}<|im_end|>{% endfor %}",
    "replace in a block": "{% block body %}{% for m in messages %}{{ m.content.replace('e', 'E') }};"
    "{% endfor %}{% endblock %}{{ self.body() | length }}{{ self.body() }}",
    "replace by filter": "{% for m in messages %}{{ (m.role ~ ': ' ~ m.content) | replace(' ', '_') }}|{% endfor %}",
    "namespace in a list": "{% set sysm = namespace(role='system', content='Be kind.') %}"
    "{% for m in [sysm] + messages %}" + TURN + "{% endfor %}" + START,
    "tojson": "{{ messages | tojson }}{{ tools | tojson(indent=2) }}{{ tools | tojson(ensure_ascii=True) }}"
    "{{ messages | tojson(separators=(',', ':'), sort_keys=True) }}{{ {'<|x|>': messages[0].content, 'n': 1} | tojson }}",
    "indent": "{% if tools %}{{ tools | tojson(indent=4) | indent(2) }}{% endif %}{% for m in messages %}"
    "{{ ('<|t|>' ~ m.content) | indent(3, true, true) }}{{ m.content | indent('> ') }}{% endfor %}",
    "format filter": "{% for m in messages %}{{ '<|im_start|>%s\\n%s<|im_end|>%5s|%-4s|%.2s' | format(m.role, m.content, "
    "loop.index, m.role, m.content) }}{% endfor %}{{ '%(a)s-%(b)03d%%' | format(a=messages[0].role, b=7) }}",
    "percent": "{% for m in messages %}{{ '%s says %r' % (m.role, m.content) }}{{ '<%s>' % m.content }}"
    "{{ '%*d' % (4, loop.index) }}{{ 7 % 4 }}{% endfor %}",
    "format method": "{% for m in messages %}{{ '<|{}|>{:>12}|{!r}|{x[role]:^9}'.format(m.role, m.role, m.role, x=m) }}"
    "{{ '{0}{1:.2f}{0:_<9}'.format(m.role, 1.5) }}{{ m.role.format() }}{% endfor %}",
    "split": "{% for m in messages %}{% for w in m.content.split(' ') %}<{{ w }}>{% endfor %}"
    "{{ m.content.split() | length }}{{ m.content.rsplit(None, 1)[-1] }}{{ m.content.partition('<')[0] }}"
    "{{ m.content.splitlines() | join('¶') }}{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% endfor %}",
    "slices": "{% for m in messages[::-1] %}{{ m.content[:3] }}|{{ m.content[-2:] }}|{{ m.content[0] }}|"
    "{{ m.content[::-1] }}|{{ m.content | first }}{{ m.content | last }}{{ m.content | reverse }}{% endfor %}",
    "case": "{% for m in messages %}{{ ('<i>' ~ m.content) | upper }}{{ m.content | lower }}{{ m.content | title }}"
    "{{ (m.role ~ 'ß<|x|>' ~ m.content) | capitalize }}{{ m.content.swapcase() }}{{ m.role.title() }}"
    "{{ m.content.casefold() }}{% endfor %}",
    "padding": "{% for m in messages %}{{ m.role | center(20) }}|{{ m.role.ljust(12, '.') }}|{{ m.role.rjust(12) }}|"
    "{{ '7'.zfill(3) }}{{ m.content | truncate(9, true) }}{{ m.content | truncate(12, end=m.role) }}"
    "{{ m.content | wordwrap(8) }}{{ m.content.expandtabs(4) }}{% endfor %}",
    "macros": "{% macro turn(role, text='') %}<|{{ role }}|>{{ text }}{{ caller() if caller }}<|end|>{% endmacro %}"
    "{% for m in messages %}{{ turn(m.role, m.content) }}{% call turn(m.role) %}[{{ m.content }}]{% endcall %}"
    "{% endfor %}",
    "set blocks": "{% for m in messages %}{% set t %}<|{{ m.role }}|>{{ m.content }}{% endset %}{{ t | trim }}"
    "{{ t.split('|>')[1] }}{% filter upper %}x{{ m.content }}y{% endfilter %}"
    "{% set u | replace('e', '') %}{{ t }}{% endset %}{{ u }}{% endfor %}",
    "namespaces": "{% set ns = namespace(text='', last=-1) %}{% for m in messages %}"
    "{% set ns.text = ns.text ~ '<' ~ m.role ~ '>' + m.content %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{{ ns.text }}{{ ns.last }}",
    "groups": "{% for role, turns in messages | groupby('role') %}{{ role }}:{{ turns | map(attribute='content') | join('+') }}"
    "{% endfor %}{% for row in messages | batch(2, 'none') %}{{ row | length }}{% endfor %}"
    "{% for part in messages | slice(2) %}{{ part | map(attribute='role') | list }}{% endfor %}"
    "{{ messages | join(', ', attribute='content') }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "loop tools": "{% set c = cycler('odd', 'even') %}{% set j = joiner('; ') %}{% for m in messages %}{{ j() }}{{ c.next() }}"
    "{{ loop.cycle('a', 'b') }}{{ loop.revindex }}{{ m.role if loop.changed(m.role) }}{% if loop.index > 2 %}{% break %}"
    "{% endif %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ loop.previtem.role if not loop.first }}"
    "{{ loop.nextitem.content if not loop.last }}{% else %}none{% endfor %}",
    "recursive loop": "{% for item in [{'t': messages[0].content, 'c': [{'t': 'in'}, {'t': messages[-1].role}]}] recursive %}"
    "<{{ item.t }}{% if item.c %}{{ loop(item.c) }}{% endif %}@{{ loop.depth }}>{% endfor %}",
    "dicts": "{% set names = {'user': '<|u|>', 'assistant': '<|a|>'} %}{% for m in messages %}{{ names[m.role] or '<|o|>' }}"
    "{{ names.get(m.role, m.role) }}{% for k, v in m.items() | sort %}{{ k }}={{ v }};{% endfor %}{{ m }}"
    "{{ m | dictsort | first | last }}{{ dict(a=m.role, **names) | length }}{% endfor %}{{ messages | map('length') | sum }}",
    "tests and arithmetic": "{% for m in messages if m.content is string and m.role in ['user', 'assistant', 'system', 'tool'] %}"
    "{{ (loop.index0 % 2 == 0) == (m.role == 'user') }}{{ m.content | length // 2 }}{{ 2 ** 3 }}{{ -1 | abs }}"
    "{{ m.tool_calls is defined and m.tool_calls is not none }}{{ m.nothing | default('-') }}{{ 'x' * 3 }}"
    "{{ m.content.startswith('H') }}{{ m.content.find('e') }}{{ m.content == m.content[:] }}{{ '1' | int + 1 }}"
    "{{ 3 | string ~ 1.5 }}{{ none }}{{ true }}{{ m.content | wordcount }}{% endfor %}",
    "html": "{% for m in messages %}{{ m.content | e }}{{ m.content | safe }}{{ (m.content | e) ~ '<b>' ~ m.role }}"
    "{{ ('<i>' | safe) + m.content }}{% autoescape true %}{{ m.content }}<b>{{ '<b>' ~ m.content }}{% endautoescape %}"
    "{{ m.content | striptags }}{{ m.content | urlencode }}{{ {'a': m.role} | xmlattr }}{{ m.content | forceescape }}{% endfor %}",
    "tool calls": "{% for m in messages %}{% if m.tool_calls %}<tool_call>{% for c in m.tool_calls %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}{% endfor %}</tool_call>'
    "{% elif m.role == 'tool' %}<tool_response>{{ m.content }}</tool_response>{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}{% for t in tools or [] %}{% set f = t.function if t.function is defined else t %}{{ f.name }}("
    "{% for p, d in f.parameters.properties.items() %}{{ p }}: {{ d.type }}{{ ', ' if not loop.last }}{% endfor %})"
    "{% endfor %}",
    "arguments": "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    "{{ tools is not none }}{{ documents is none }}{{ add_generation_prompt }}{{ eos_token }}{{ strftime_now('%Y') }}",
    "raise": "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}" + TURN + "{% endfor %}",
}
