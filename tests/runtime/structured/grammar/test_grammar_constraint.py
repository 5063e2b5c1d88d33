"""llguidance behind `Constraint`: what it gets wrong when it is used naively, and what its errors say."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowtide import FakeModel, LowtideError, Runtime
from lowtide.models.errors import BadOption
from lowtide.models.fake_model import BOS, NUM_TOKENS, TURN_END, ByteTokenizer
from lowtide.runtime.errors import ConstraintFailed
from lowtide.runtime.structured.constraint import Constraint
from lowtide.runtime.structured.formats import (
    MAX_SOURCE_BYTES,
    Choice,
    Grammar,
    JsonObject,
    JsonSchema,
    OutputFormat,
    Regex,
)
from lowtide.runtime.structured.vocabulary import TokenVocabulary

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
VOCABULARY = TokenVocabulary(ByteTokenizer(), NUM_TOKENS)


def start(form: OutputFormat) -> Constraint:
    return form.compile(VOCABULARY)


def after(form: OutputFormat, text: str) -> Constraint:
    constraint = start(form)
    for byte in text.encode():
        assert constraint.allows(byte), (text, chr(byte))
        constraint.advance(byte)
    return constraint


def accepts(form: OutputFormat, text: str) -> bool:
    constraint, data = start(form), text.encode()
    if constraint.num_legal(data) < len(data):
        return False
    for byte in data:
        constraint.advance(byte)
    return constraint.is_accepting


@pytest.mark.parametrize(
    ("form", "right", "wrong"),
    [
        (Regex(r"[0-9]{3}-[a-z]+"), ["123-ab"], ["12-a", "123-", "x"]),
        (Choice("yes", "no", 'a "quote"'), ["yes", "no", 'a "quote"'], ["y", "maybe", "yesno"]),
        (Grammar('root ::= "a" [0-9]+ "b"'), ["a1b", "a123b"], ["ab", "a1"]),
        (Grammar('start: "x" NUMBER\nNUMBER: /[0-9]+/'), ["x1"], ["x", "1"]),
        (JsonObject(), ["{}", '{"a": [1, 2.5, null]}'], ["[]", "1", "{"]),
        (JsonSchema(PERSON), ['{"name": "A", "age": 3}'], ['{"name": "A"}', '{"name":1,"age":3}']),
    ],
)
def test_what_each_format_accepts(
    form: OutputFormat, right: Sequence[str], wrong: Sequence[str]
) -> None:
    assert [text for text in right if not accepts(form, text)] == []
    assert [text for text in wrong if accepts(form, text)] == []


@pytest.mark.parametrize("size", [8, 9])
def test_white_space_is_bounded(size: int) -> None:
    assert accepts(JsonSchema(PERSON), '{"name":' + " " * size + '"A","age":3}') == (size <= 8)


@pytest.mark.parametrize(
    ("style", "text"),
    [("compact", '{"name":"A","age":3}'), ("pretty", '{"name": "A", "age": 3}')],
)
def test_a_style_allows_its_own_white_space_only(style: str, text: str) -> None:
    assert accepts(JsonSchema(PERSON, style), text)
    assert not accepts(JsonSchema(PERSON, style), text.replace(":", " :"))
    other = "pretty" if style == "compact" else "compact"
    assert not accepts(JsonSchema(PERSON, other), text)


def test_end_and_control_tokens_are_never_text() -> None:
    for text in ("", '{"name": "', '{"name": "A", "age": 3}'):
        constraint = after(JsonSchema(PERSON), text)
        assert not {TURN_END, BOS} & set(constraint.legal_ids().tolist())
        assert not constraint.allows(BOS)
    for written in ("<special_258>", "<|end|>"):
        inside = after(JsonSchema(PERSON), '{"name": "' + written)
        assert not inside.is_accepting


def test_the_mask_is_what_allows_says() -> None:
    for text in ("", "{", '{"name": "A', '{"name": "A", "age": 1', '{"name": "é'):
        constraint = after(JsonSchema(PERSON), text)
        allowed = [i for i in range(NUM_TOKENS) if i != TURN_END and constraint.allows(i)]
        assert constraint.legal_ids().tolist() == allowed


def test_a_complete_answer_is_done_only_where_nothing_may_follow() -> None:
    assert after(JsonSchema(PERSON), '{"name": "A", "age": 3}').is_done
    digits = after(Regex("[0-9]+"), "12")
    assert digits.is_accepting and not digits.is_done


def test_an_illegal_token_that_is_asked_for_breaks_nothing() -> None:
    constraint = after(JsonSchema(PERSON), "{")
    assert not constraint.allows(ord("x")) and constraint.num_legal(b'"name": x') == 8
    assert constraint.allows(ord('"'))


def test_a_copy_is_independent() -> None:
    first = after(JsonSchema(PERSON), '{"name": "A')
    second = first.fork()
    second.advance(ord('"'))
    assert first.allows(ord("x")) and not second.allows(ord("x"))


def test_one_vocabulary_serves_several_threads() -> None:
    failures: list[Exception] = []

    def walk() -> None:
        try:
            for _ in range(20):
                constraint = start(JsonSchema(PERSON))
                for byte in b'{"name": "Ada", "age": 36}':
                    assert byte in constraint.legal_ids()
                    constraint.advance(byte)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=walk) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_constraint_outlives_its_model() -> None:
    runtime = Runtime.open(FakeModel(), memory="8GiB")
    constraint = JsonSchema(PERSON).compile(runtime._engine._vocabulary)
    runtime.close()
    assert constraint.legal_ids().tolist() == [ord("{")]


def test_forced_text_is_drafted() -> None:
    assert bytes(after(JsonSchema(PERSON, "compact"), '{"name":"A"').forced()) == b',"age":'
    assert bytes(start(JsonSchema(PERSON, "compact")).forced()) == b'{"name":"'


@pytest.mark.parametrize(
    ("schema", "keyword", "pointer"),
    [
        ({"not": {"type": "string"}}, "not", "/not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems", "/uniqueItems"),
        (
            {"properties": {"a/b": {"type": "string", "format": "topic"}}},
            "format",
            "/properties/a~1b/format",
        ),
        (
            {"properties": {"not": {"items": {"not": {}}}}},
            "not",
            "/properties/not/items/not",
        ),
        (
            {"$defs": {"x": {"contains": {"const": 1}}}, "$ref": "#/$defs/x"},
            "contains",
            "/$defs/x/contains",
        ),
        (
            {"oneOf": [{"type": "number"}, {"type": "number", "minimum": 2}]},
            "oneOf",
            "/oneOf",
        ),
    ],
)
def test_what_cannot_be_enforced_is_named(schema: Any, keyword: str, pointer: str) -> None:
    with pytest.raises(BadOption, match="cannot be enforced") as refused:
        start(JsonSchema(schema))
    assert f"{keyword} at {pointer} " in str(refused.value)


@pytest.mark.parametrize("check", ["exact", "verified"])
@pytest.mark.parametrize("depth", [130, 400, 900])
def test_a_schema_nested_too_deeply_is_refused(depth: int, check: str) -> None:
    schema = '{"items":' * depth + "{}" + "}" * depth
    with pytest.raises(BadOption, match="cannot be enforced: recursion limit"):
        JsonSchema(schema, check=check).compile(VOCABULARY)


@pytest.mark.parametrize(
    "form",
    [
        lambda: Regex("("),
        lambda: Regex(r"(?=a)b"),
        lambda: Grammar("start: missing"),
        lambda: Grammar("root ::= ("),
        lambda: Grammar("   "),
        lambda: Choice(),
        lambda: Choice(""),
        lambda: Choice(3),
        lambda: JsonSchema('{"type": '),
        lambda: JsonSchema("[1]"),
        lambda: JsonSchema(3),
        lambda: JsonSchema({"type": object()}),
        lambda: JsonSchema({}, style="wide"),
        lambda: JsonSchema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}),
        lambda: JsonSchema({"$ref": "#/$defs/a"}),
        lambda: JsonSchema({"type": "strange"}),
        lambda: JsonSchema("[" * 100_000),
        lambda: JsonSchema('{"a":' * 5_000 + "1" + "}" * 5_000),
        lambda: JsonSchema({"enum": ["x" * 100] * (MAX_SOURCE_BYTES // 100)}),
    ],
)
def test_wrong_input_is_one_sentence(form: Any) -> None:
    with pytest.raises(LowtideError) as refused:
        start(form())
    message = str(refused.value)
    assert "\n" not in message and len(message) < 400


def test_a_schema_may_come_from_a_class() -> None:
    pydantic = pytest.importorskip("pydantic")
    model = pydantic.create_model("Person", name=(str, ...), age=(int, ...))
    form = JsonSchema(model)
    assert accepts(form, '{"name": "A", "age": 3}') and not accepts(form, '{"name": "A"}')
    parsed = form.parse('{"name": "A", "age": 3}')
    assert isinstance(parsed, model) and parsed.age == 3  # type: ignore[attr-defined]


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from lowtide.runtime.structured.grammar import library

    monkeypatch.setattr(library, "find_spec", lambda _name: None)
    with pytest.raises(BadOption, match=r"pip install 'lowtide\[structured\]'"):
        JsonObject().compile(TokenVocabulary(ByteTokenizer(), NUM_TOKENS))


def test_closing_ends_from_every_point() -> None:
    schema = {
        "type": "object",
        "properties": {
            "kind": {"enum": ["circle", "square"]},
            "size": {"type": "number", "minimum": 10},
            "code": {"type": "string", "minLength": 4, "pattern": "^[a-z]+[0-9]$"},
            "child": {"anyOf": [{"type": "null"}, {"$ref": "#"}]},
        },
        "required": ["kind", "size", "code", "child"],
        "additionalProperties": False,
    }
    child = {"kind": "square", "size": 11.5, "code": "abc1", "child": None}
    text = json.dumps({"kind": "circle", "size": 25, "code": "wxyz7", "child": child})
    import jsonschema

    for cut in range(len(text) + 1):
        constraint = after(JsonSchema(schema), text[:cut])
        closing = constraint.closing(400)
        assert closing is not None, text[:cut]
        jsonschema.validate(json.loads(text[:cut] + bytes(closing).decode()), schema)


def test_closing_says_where_there_is_no_room() -> None:
    constraint = after(JsonSchema(PERSON, "compact"), '{"name":"A')
    closing = constraint.closing(100)
    assert closing is not None and len(closing) == len('","age":0}')
    assert constraint.closing(len(closing) - 1) is None


def test_a_grammar_that_cannot_go_on_says_so_in_one_line() -> None:
    """Two patterns that count from the end have a state for each of the texts between."""
    form = JsonSchema(
        {"allOf": [{"type": "string", "pattern": "^.*a.{20}$"}, {"pattern": "^.*b.{19}$"}]}
    )
    constraint, text = start(form), "".join(random.Random(1).choices("ab", k=400))
    with pytest.raises(ConstraintFailed, match="cannot go on") as failed:
        for byte in b'"' + text.encode():
            constraint.advance(byte)
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize(
    ("grammar", "right", "wrong"),
    [
        ('root ::= ("a"{2}){3}', ["aaaaaa"], ["aaaaa", "aaaaaaa"]),
        ('root ::= (("a" "b")?){2} "c"', ["c", "ababc"], ["abababc"]),
        ('root ::= ("x" ("y"){,2}){2}', ["xx", "xyyx"], ["xyyyx"]),
        ('root ::= (item{1,2} # two\n )+\nitem ::= [)}"] "?"', [")?", '}?"?'], ["?"]),
        ('root ::= ("}"{2} | ")"?)* "."', ["}}).", "."], ["}."]),
    ],
)
def test_counts_of_counted_groups_in_gbnf(grammar: str, right: list[str], wrong: list[str]) -> None:
    form = Grammar(grammar)
    assert all(accepts(form, text) for text in right)
    assert not any(accepts(form, text) for text in wrong)


BOUNDS = st.sampled_from([-10, -1.5, -1, -0.5, -0.01, 0, 1e-7, 0.001, 0.25, 0.5, 1, 1.5, 2, 10])


@given(BOUNDS, BOUNDS, st.booleans(), st.booleans(), st.booleans())
def test_exclusive_bounds_are_kept(
    lower: float, upper: float, above: bool, below: bool, apart: bool
) -> None:
    lowest = {"exclusiveMinimum" if above else "minimum": lower}
    highest = {"exclusiveMaximum" if below else "maximum": upper}
    schema = {"type": "number", "allOf": [lowest, highest]} if apart else {
        "type": "number", **lowest, **highest
    }  # fmt: skip
    try:
        form = JsonSchema(schema)
        start(form)
    except BadOption:
        assert lower >= upper
        return
    for text in (str(lower), str(upper), f"{lower:.9f}", f"{upper:.9f}", "-0", "0", "0.0"):
        value = float(text)
        is_legal = (value > lower if above else value >= lower) and (
            value < upper if below else value <= upper
        )
        assert is_legal or not accepts(form, text), (schema, text)
    for share in (0.3, 0.5):
        text = f"{lower + share * (upper - lower):.6f}".rstrip("0").rstrip(".")
        if lower < float(text) < upper:
            assert accepts(form, text), (schema, text)


def test_exclusive_bounds_of_draft_4() -> None:
    schema = {"type": "number", "minimum": 0, "exclusiveMinimum": True, "maximum": 0.5}
    assert not accepts(JsonSchema(schema), "0") and accepts(JsonSchema(schema), "0.5")
    closed = {"type": "number", "minimum": 0, "exclusiveMinimum": False, "maximum": 0.5}
    assert accepts(JsonSchema(closed), "0")


def test_bounds_too_near_to_zero_are_refused() -> None:
    with pytest.raises(BadOption, match="minimum"):
        start(JsonSchema({"type": "number", "exclusiveMinimum": 0, "maximum": 5e-324}))


def test_what_a_wrong_pattern_says() -> None:
    with pytest.raises(BadOption, match=r"regex '\(' is not a regular expression.*unclosed group"):
        start(Regex("("))
