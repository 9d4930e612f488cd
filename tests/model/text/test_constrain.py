"""Constrained generation against judges that know nothing of the grammars: jsonschema, re, the chat format's parser."""

import builtins
import itertools
import json
import math
import re
import sys
import time

import numpy as np
import pytest
import schemas
import torch
from explorer import Explorer
from lively import lively
from oracle import assert_same

from abyssal.model import generate
from abyssal.model.generation import speculative
from abyssal.model.generation.sampling import Sampling
from abyssal.model.generation.speculative import acceptance, residual
from abyssal.model.text.chat import encode_messages, parse_message_from_completion_text
from abyssal.model.text.constrain import (
    Constraint,
    DeadEndError,
    GrammarError,
    json_object,
    json_schema,
    regex,
    tool_calls,
)
from abyssal.model.text.constrain.walk import Guide
from abyssal.train.data.tokenizers import load_tokenizer
from abyssal.train.evaluate.constrained import SCHEMAS, TOOLS, json_tasks, run, tool_tasks

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

BYTES = load_tokenizer("bytes")
TINY = {"vocab_size": 288, "num_hidden_layers": 1, "compress_ratios": [0], "num_hash_layers": 0, "engram": None}
TINY |= {"hidden_size": 16, "n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
TINY |= {"num_attention_heads": 1, "o_groups": 1, "hc_mult": 1, "hc_sinkhorn_iters": 1}


@pytest.fixture(scope="module")
def model():
    """Random weights, bytes as tokens."""
    return lively(**TINY)


class Few:
    """A tokenizer of a few tokens, the last two eos and a special one."""

    def __init__(self, *pieces: bytes, special: str = "<x>"):
        self.pieces, self.vocab_size = pieces, len(pieces) + 2
        self.eos, self.special = len(pieces), {"<eos>": len(pieces), special: len(pieces) + 1}

    def token_bytes(self, token):
        return self.pieces[token] if token < len(self.pieces) else b""

    def spell(self, data):
        ids, ranked = [], sorted(self.pieces, key=len, reverse=True)
        while data:
            piece = next((p for p in ranked if data.startswith(p)), None)
            ids, data = ids if piece is None else [*ids, self.pieces.index(piece)], data[len(piece or b"x") :]
        return ids


def allowed(walk, vocabulary=288) -> list[int]:
    words = np.zeros((1, -(-vocabulary // 32)), np.int32)
    walk.fill(words, 0)
    return np.unpackbits(words.view(np.uint8), bitorder="little", count=vocabulary).nonzero()[0].tolist()


def accepts(constraint, text: str) -> bool:
    """Whether the whole text, special strings as their tokens, may be written, and may end there."""
    walk = constraint.walk(10_000)
    for token in [*BYTES.encode(text, special=True), BYTES.eos]:
        if token not in allowed(walk):
            return False
        assert walk.take(token) == token
    return walk.complete


# what comes out of a random model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks, answers, tokens", [(json_tasks, 100, 120), (tool_tasks, 48, 280)])
def test_every_answer_of_a_random_model_is_valid(model, tasks, answers, tokens):
    report = run(model, BYTES, tasks(BYTES), answers, tokens, batch=80)
    assert report.failures == [] and report.valid == answers
    assert report.tokens > 20 * answers and 0 < report.mask_seconds < report.seconds
    assert f"{answers} of them valid" in str(report) and "us per token" in str(report)


@pytest.mark.slow("what holds for a hundred answers may fail for one in a thousand")
def test_a_thousand_answers_of_a_random_model_are_valid(model):
    """Of JSON, and with them 300 of calls: 25 rounds of 40 and 12, side by side."""
    tasks = [*2 * json_tasks(BYTES), *tool_tasks(BYTES)]
    assert run(model, BYTES, tasks, 1300, 300, batch=1300, seed=1).failures == []


def test_the_judges_judge():
    """What a report calls valid is valid: each judge refuses what is not."""
    tasks = {task.name: task for task in [*json_tasks(BYTES), *tool_tasks(BYTES)]}
    assert tasks["integer bounds"].judge('{"age":7,"year":1900,"balance":0}') is None
    assert "131" in tasks["integer bounds"].judge('{"age":131,"year":1900,"balance":0}')
    assert tasks["map"].judge('{"a":1') is not None
    call = tool_text([{"name": "get_weather", "arguments": {"city": "Bonn"}}])
    assert tasks["required"].judge(call) is None and tasks["get_weather"].judge(call) is None
    assert tasks["now"].judge(call) == "call of get_weather"
    assert tasks["auto"].judge(EOS) is None and tasks["required"].judge(EOS) == "no call"
    assert tasks["auto"].judge("a") is not None
    assert "99" in tasks["auto"].judge(tool_text([{"name": "get_weather", "arguments": {"city": "", "days": 99}}]))


@pytest.mark.parametrize("budget", [30, 40, 60])
def test_complete_however_short_the_budget(model, budget):
    constraint = Constraint(json_schema(SCHEMAS["optional properties"]), BYTES)
    rows = generate(model, [[1]] * 20, max_new_tokens=budget, constraint=constraint, seed=budget)
    for row in rows:
        assert len(row) <= budget and row[-1] == BYTES.eos
        jsonschema.validate(json.loads(BYTES.decode(row)), SCHEMAS["optional properties"])
    assert any(len(row) == budget for row in rows), "some were to be closed at the last moment"


# what grammars allow -------------------------------------------------------------------------------------------------

VALUES = [
    None, True, 3, -1, 2.5, "", "ab", "12345", [], [1], ["a", "b"], ["a", 1.5, True], {}, {"a": 1}, {"title": "x"},
    {"title": "x", "pages": 0}, {"title": "x", "pages": 3, "tags": ["y"]}, {"value": 1, "children": []},
    {"value": 1, "children": [{"value": 2, "children": []}]}, {"value": 1, "children": [{}]},
    {"error": "e"}, {"error": 1},
    {"shape": "circle", "radius": 2}, {"shape": "box", "radius": 2}, {"age": 130, "year": 2100, "balance": -5000},
    {"age": 131, "year": 2100, "balance": 0}, {"age": 1, "year": 1899, "balance": 0}, {"x-a": True}, {"x-A": True},
    {"share": 1, "celsius": -273.15}, {"share": 1.0001, "celsius": 0}, {"share": 0.5, "celsius": 1000.5}, [5, 10], [7],
    {"größe": 1, "名前": "ab", "🙂": "да"}, {"größe": 1, "名前": "a", "🙂": "да"}, {"id": 1, "name": "n"},
    {"id": 0, "name": "n"}, {"name": "n", "home": {"street": "s", "zip": "12345", "country": "日本"}},
    {"name": "n", "home": {"street": "", "zip": "12345"}}, {"from": {"x": 1, "y": 2.5e-3}, "to": {"x": 0, "y": -1}},
    {"kind": "reading", "level": None}, {"kind": "reading", "level": 4}, [[1, 2]], [[1]], ["a", "b", "c", "d", "e"],
    {"phone": "+49301234", "code": "ab-1", "path": "x/v1/"}, {"phone": "+49301234", "code": "AB-1", "path": "a/v12/b"},
]  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
def test_json_schemas_allow_what_they_say(name):
    constraint = Constraint(json_schema(SCHEMAS[name]), BYTES, finish=False)
    judge = jsonschema.Draft202012Validator(SCHEMAS[name])
    verdicts = {judge.is_valid(value) for value in VALUES}
    for value in VALUES:
        for separators in ((",", ":"), (", ", ": ")):
            text = json.dumps(value, ensure_ascii=False, separators=separators)
            assert accepts(constraint, text) == judge.is_valid(value), text
    assert verdicts == {True, False} or name in ("formats", "anything")


def test_whitespace():
    schema = {"type": "array", "items": {"type": "integer"}}
    narrow, wide = (Constraint(json_schema(schema, any_whitespace=any_), BYTES) for any_ in (False, True))
    assert accepts(narrow, "[1, 2]") and not accepts(narrow, "[1,  2]") and not accepts(narrow, "[ 1]")
    assert accepts(wide, "[\n  1,\t 2 ]") and accepts(wide, "[1,2]")
    assert accepts(Constraint(json_object(), BYTES), '{"a": [1, {}]}')
    assert not accepts(Constraint(json_object(), BYTES), "[]")
    assert accepts(Constraint(json_object(any_whitespace=True), BYTES), '{ "a" : 1 }')
    assert accepts(Constraint(json_schema(True), BYTES), "null")


@pytest.mark.parametrize("pattern", ["a{2,3}", "(ab|a)*c?", r"[0-9]+/[0-9]+", "é|ü\n", r"a\/b", r"\\", "x|"])
def test_regular_expressions_match_the_whole(pattern):
    constraint = Constraint(regex(pattern), BYTES)
    texts = ["", "a", "aa", "aaa", "aaaa", "ab", "abc", "aab", "1/2", "1/", "é", "ü", "ü\n", "a/b", "\\", "x"]
    assert [accepts(constraint, text) for text in texts] == [re.fullmatch(pattern, text) is not None for text in texts]


def test_eos_exactly_where_the_text_is_complete():
    walk = Constraint(json_schema({"type": "array", "items": {"type": "integer"}}), BYTES).walk(20)
    may_end = []
    for byte in b"[12,3]":
        may_end.append(BYTES.eos in allowed(walk))
        walk.take(byte)
    assert not any(may_end) and allowed(walk) == [BYTES.eos] and not walk.complete
    walk.take(BYTES.eos)
    assert walk.complete
    number = Constraint(json_schema({"type": "integer"}), BYTES).walk(20)
    number.take(ord("1"))
    assert BYTES.eos in allowed(number) and ord("2") in allowed(number)


def test_reasoning_first():
    constraint = Constraint(json_object().after_thinking(), BYTES)
    assert accepts(constraint, "hm\n{</think>{}") and accepts(constraint, "</think>{}")
    assert not accepts(constraint, "{}") and not accepts(constraint, "hm</think></think>{}")
    walk = constraint.walk(50)
    assert BYTES.special["</think>"] in allowed(walk) and BYTES.special["<think>"] not in allowed(walk)


# where the library allows more than a schema -------------------------------------------------------------------------

ADMIN = {"type": "object", "properties": {"admin": {"const": False}}}


@pytest.mark.parametrize("schema, right, wrong", [
    (ADMIN, '{"admin":false,"x":1}', r'{"\u0061dmin":true}'),
    ({"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}, '{"a":1}', r'{"a":1,"\u0061":"x"}'),
    ({"type": "object", "patternProperties": {"^x": {"type": "integer"}}}, '{"x":1}', r'{"\u0078":"s"}'),
    ({"properties": {"\n": False}, "additionalProperties": {"type": "string"}}, '{"a":"s"}', r'{"\u000a":"s"}'),
    ({"allOf": [ADMIN, {"required": ["b"]}]}, '{"b":1}', r'{"b":1,"admi\u006e":true}'),
], ids=str)  # fmt: skip
def test_no_name_is_written_as_another(schema, right, wrong):
    judge = jsonschema.Draft202012Validator(schema)
    assert judge.is_valid(json.loads(right)) and not judge.is_valid(json.loads(wrong)), "the table"
    for any_whitespace in (False, True):
        constraint = Constraint(json_schema(schema, any_whitespace), BYTES, finish=False)
        assert accepts(constraint, right) and not accepts(constraint, wrong)
    call = Constraint(tool_calls(tool(properties={"p": {"type": "object", **schema}}), "f"), BYTES, finish=False)
    written = tool_text([{"name": "f", "arguments": {"p": {"~": 1}}}])[: -len(EOS)]
    assert accepts(call, written.replace('{"~": 1}', right)) and not accepts(call, written.replace('{"~": 1}', wrong))


def test_long_tokens_write_no_name_as_another():
    tokens = Few(b"{", b'"', b'"\\u0061', b"a", b"x\\u", b"x\\n", b"\\")
    walk = Constraint(json_schema({"type": "object", "properties": {"a": {"const": 1}}}), tokens, finish=False).walk(9)
    walk.take(0)
    assert allowed(walk, 9) == [1]
    walk.take(1)
    assert allowed(walk, 9) == [0, 1, 3, 5, 6]


def test_names_that_may_come_twice_do_not_count():
    counted = {"type": "object", "required": ["a"], "minProperties": 2}
    constraint = Constraint(json_schema(counted), BYTES, finish=False)
    assert accepts(constraint, '{"a":1,"b":2}') and not accepts(constraint, '{"a":1}')
    for beside in ({"required": []}, {"minProperties": 3}, {"required": ["a", "a"], "minProperties": 3}):
        with pytest.raises(GrammarError, match=r"minProperties=.: at most \d is allowed"):
            json_schema({**counted, "patternProperties": {"^c": {}}, **beside})


@pytest.mark.parametrize("schema, edge", [
    ({"exclusiveMinimum": 0, "maximum": 0.25}, 0), ({"exclusiveMinimum": 99, "maximum": 99.5}, 99),
    ({"minimum": -1.5, "exclusiveMaximum": -1}, -1), ({"minimum": -0.5, "exclusiveMaximum": 0}, 0),
    ({"allOf": [{"exclusiveMinimum": 5}, {"maximum": 5.5}]}, 5), ({"minimum": 99.00000000000001, "maximum": 99.5}, 99),
    ({"type": "integer", "exclusiveMinimum": 2**53}, 2**53), ({"type": "integer", "exclusiveMaximum": -4}, -4),
    ({"type": "integer", "exclusiveMaximum": 2**53 + 4}, 2**53 + 4), ({"exclusiveMaximum": 1, "minimum": 0}, 1),
    ({"exclusiveMinimum": -1, "exclusiveMaximum": 1}, -1), ({"type": "integer", "maximum": 2**53 - 1}, 2**53 - 1),
], ids=str)  # fmt: skip
def test_numbers_at_their_bounds(schema, edge):
    schema = {"type": "number", **schema}
    constraint = Constraint(json_schema(schema), BYTES, finish=False)
    judge = jsonschema.Draft202012Validator(schema)
    near = [edge + step for step in (0, 1, -1, 0.1, -0.1, 0.5, -0.5, 2, -2, 4, -4)]
    texts = [f"{value:.1f}".removesuffix(".0") if abs(edge) < 2**52 else str(int(value)) for value in near]
    texts += ["-0", "-0.0", "0." + 400 * "0" + "1"]
    got = [text for text in texts if accepts(constraint, text)]
    assert got and all(judge.is_valid(json.loads(text)) for text in got)
    plain = [text for text in texts[:-3] if not math.isclose(float(text), edge, rel_tol=1e-15)]
    assert [text for text in plain if text in got] == [text for text in plain if judge.is_valid(json.loads(text))]


@pytest.mark.parametrize("pattern", [r"^a\*+$", "^[*+]+$", "^a*?$", "^a{1,2}?$", "^(a*)+$", r"^a+\++$", r"^\(?>$"])
def test_patterns_that_only_look_possessive(pattern):
    constraint = Constraint(json_schema({"type": "string", "pattern": pattern}), BYTES, finish=False)
    for text in ("a", "aa", "a*", "a**", "++", "a+", "a++", "(>", ">", "b"):
        assert accepts(constraint, f'"{text}"') == (re.search(pattern, text) is not None)


# tool calls ----------------------------------------------------------------------------------------------------------

EOS = "<｜end▁of▁sentence｜>"


def tool_text(calls, content="", reasoning=None) -> str:
    """A completion as the encoder writes it, with its eos."""
    written = [{"type": "function", "function": call} for call in calls]
    answer = {"role": "assistant", "content": content, "tool_calls": written, "reasoning_content": reasoning}
    mode = "chat" if reasoning is None else "thinking"
    messages = [{"role": "system", "content": "", "tools": TOOLS}, {"role": "user", "content": "q"}]
    prompt = encode_messages(messages, mode)
    return encode_messages([*messages, answer], mode)[len(prompt) :]


CALLS = [
    [{"name": "now", "arguments": {}}],
    [{"name": "get_weather", "arguments": {"city": "Köln <b> </x> \n\n<"}}],
    [{"name": "get_weather", "arguments": {"city": "", "days": 14, "unit": "celsius"}},
     {"name": "now", "arguments": {}}],
    [{"name": "search", "arguments": {}}],
    [{"name": "search", "arguments": {"filter": {"a": [1, None, "ü"]}, "since": "2024-02-28"}}],
    [{"name": "search", "arguments": {"query": "x", "filter": "text"}}],
    [{"name": "send_mail", "arguments": {"to": ["a@b.de"], "subject": "abc", "priority": 1}}],
    [{"name": "send_mail", "arguments": {"to": ["a@b.de"], "subject": "abc", "priority": "hoch", "when": "tue"}}],
    [{"name": "send_mail", "arguments": {"to": ["a@b.de"], "subject": "abc", "priority": None, "when": None,
                                         "options": {"html": True}}}],
]  # fmt: skip
BAD_CALLS = [
    [{"name": "never", "arguments": {}}],
    [{"name": "now", "arguments": {"x": 1}}],
    [{"name": "get_weather", "arguments": {}}],
    [{"name": "get_weather", "arguments": {"city": 1}}],
    [{"name": "get_weather", "arguments": {"city": "x", "days": 15}}],
    [{"name": "get_weather", "arguments": {"city": "x", "days": "3"}}],
    [{"name": "get_weather", "arguments": {"city": "x", "unit": "kelvin"}}],
    [{"name": "get_weather", "arguments": {"days": 3, "city": "x"}}],
    [{"name": "search", "arguments": {"query": ""}}],
    [{"name": "search", "arguments": {"since": "2024-02-31x"}}],
    [{"name": "send_mail", "arguments": {"to": [], "subject": "abc", "priority": 1}}],
    [{"name": "send_mail", "arguments": {"to": ["a@b.de"], "subject": "ab", "priority": 1}}],
    [{"name": "send_mail", "arguments": {"to": ["a@b.de"], "subject": "abc", "priority": 0}}],
    [{"name": "send_mail", "arguments": {"to": ["a@b.de"], "subject": "abc", "priority": "urgent"}}],
    [{"name": "send_mail", "arguments": {"to": ["a@b.de"], "subject": "abc", "priority": 1, "when": "wed"}}],
    [{"name": "send_mail", "arguments": {"to": ["a@b.de"], "subject": "abc", "priority": 1, "options": {}}}],
]


@pytest.fixture(scope="module")
def choices():
    named = {name: Constraint(tool_calls(TOOLS, name), BYTES) for name in ("auto", "required", "none", "now")}
    return named | {"one": Constraint(tool_calls(TOOLS, "required", parallel=False), BYTES)}


@pytest.mark.parametrize("calls", CALLS)
def test_calls_as_the_encoder_writes_them_are_allowed(choices, calls):
    text = tool_text(calls)[: -len(EOS)]
    only_now = [call["name"] for call in calls] == ["now"]
    assert accepts(choices["auto"], text) and accepts(choices["required"], text)
    assert accepts(choices["now"], text) == only_now and accepts(choices["one"], text) == (len(calls) == 1)
    assert accepts(choices["auto"], "Let me see.\n" + text) and not accepts(choices["required"], "Let me see." + text)
    assert not accepts(choices["none"], text) and not accepts(choices["auto"], text + "x")
    assert parse_message_from_completion_text(text + EOS)["tool_calls"]


@pytest.mark.parametrize("calls", BAD_CALLS)
def test_calls_that_no_tool_takes_are_not(choices, calls):
    assert not accepts(choices["auto"], tool_text(calls)[: -len(EOS)])


def test_text_without_calls(choices):
    for text in ("", "hello\n\n<there", "a < b"):
        assert accepts(choices["auto"], text) and accepts(choices["none"], text)
        assert not accepts(choices["required"], text)
    thinking = Constraint(tool_calls(TOOLS).after_thinking(), BYTES)
    assert accepts(thinking, tool_text(CALLS[0], "so", "hm")[: -len(EOS)])
    assert not accepts(thinking, tool_text(CALLS[0])[: -len(EOS)])


def tool(name="f", **parameters):
    return [{"type": "function", "function": {"name": name, "parameters": parameters}}]


def parameter_values(schema, *values, **root) -> list[bool]:
    """Which values may be given for a parameter of that schema."""
    grammar = tool_calls(tool(properties={"p": schema}, required=["p"], **root), "f")
    constraint = Constraint(grammar, BYTES, finish=False)
    return [accepts(constraint, tool_text([{"name": "f", "arguments": {"p": value}}])[: -len(EOS)]) for value in values]


@pytest.mark.parametrize("schema", [
    {}, True, {"type": "string", "pattern": "^ab|c$|d"}, {"type": "string", "pattern": r"^a[$^]\$$"},
    {"type": "string", "pattern": "[^a]b"}, {"type": "string", "minLength": 2}, {"type": "string", "maxLength": 1},
    {"enum": ["ab", 3, None]}, {"const": "c"}, {"const": 3}, {"type": ["string", "integer"]}, {"type": "number"},
    {"oneOf": [{"type": "string", "maxLength": 1}, {"type": "integer", "maximum": 2}]},
    {"allOf": [{"type": "boolean"}]},
    {"$ref": "#/$defs/s"}, {"anyOf": [{"$ref": "#/$defs/s"}, {"type": "null"}]},
    {"type": "array", "items": {"$ref": "#/$defs/s"}},
    {"type": "string", "enum": ["ab", "abc"]}, {"type": "string", "format": "date"},
    {"type": "string", "enum": ["ab", None], "nullable": True},
    {"type": ["string", "integer"], "enum": ["ab", 1, None]},
    {"type": "string", "enum": ["1", 1]}, {"enum": [1, True, "True", 0, False]}, {"type": "integer", "const": 3},
    {"type": "string", "enum": ["", "ab", "abc"], "minLength": 1, "maxLength": 2},
    {"type": "string", "enum": ["ab", "c"], "pattern": "c"}, {"anyOf": [{}], "minLength": 3},
    {"allOf": [{"minLength": 2}, {"maxLength": 2}, {"maximum": 2}]},
    {"oneOf": [{"type": "string", "minLength": 2}, {"type": ["string", "null"], "maxLength": 2}]},
    {"oneOf": [{"const": "ab"}, {"const": "c"}, {"$ref": "#/$defs/s"}, {"type": "null"}]},
    {"$ref": "#/$defs/s", "maxLength": 2},
    {"$ref": "#/$defs/s", "type": ["string", "null"]}, {"type": ["string", "null"], "allOf": [{"pattern": "b"}]},
], ids=str)  # fmt: skip
def test_parameters_of_every_kind(schema):
    definitions = {"$defs": {"s": {"type": "string", "pattern": "c"}}}
    values = ["", "a", "ab", "abc", "xc", "c", "cd", "bb", "a$$", "a^$", 3, 1, 2.5, None, True, ["c"], ["a"], {}]
    values += ["2024-12-01", "2024-13-01"]
    judge = jsonschema.Draft202012Validator(
        {**schema, **definitions} if isinstance(schema, dict) else schema,
        format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER,
    )
    assert parameter_values(schema, *values, **definitions) == [judge.is_valid(value) for value in values]


def test_optional_parameters_that_allow_nothing_are_left_out():
    constraint = Constraint(tool_calls(tool(properties={"a": False, "b": {"type": "null"}}), "f"), BYTES)
    assert accepts(constraint, tool_text([{"name": "f", "arguments": {"b": None}}])[: -len(EOS)])
    assert accepts(constraint, tool_text([{"name": "f", "arguments": {}}])[: -len(EOS)])
    named = tool_calls(tool(required=["x"], additionalProperties={"type": "null"}), "f")
    assert accepts(Constraint(named, BYTES), tool_text([{"name": "f", "arguments": {"x": None}}])[: -len(EOS)])


ITSELF = {"$ref": "#/$defs/q"}


@pytest.mark.parametrize("tools, choice, message", [
    ([{}], "auto", r"tools\[0\]"),
    (["f"], "auto", r"tools\[0\]"),
    ([], "auto", "tools are empty"),
    (tool(), "g", "choice='g'.*f"),
    (tool('a"b'), "auto", "name"),
    (tool(type="array"), "auto", "type 'array'"),
    (tool(anyOf=[]), "auto", "anyOf"),
    (tool(properties={"p": False}, required=["p"]), "auto", "allows no value"),
    (tool(properties={"p": 3}), "auto", "no schema"),
    (tool(properties={"p": {"$ref": "#/$defs/q"}}), "auto", "leads nowhere"),
    (tool(properties={"p": ITSELF}, **{"$defs": {"q": ITSELF}}), "auto", "refers to itself"),
    (tool(properties={"p": {"type": "string", "not": {"const": "a"}}}), "auto", "not: allowed are"),
    (tool(properties={"p": {"type": "string", "pattern": "(?i)a"}}), "auto", "flags"),
    (tool(properties={"p": {"$ref": "#p"}}), "auto", "leads nowhere.*#/"),
    (tool() + tool(), "auto", r"tools\[1\] is another"),
    (5, "auto", "tools=5: a list"),
    ([{"function": {"name": "f", "parameters": []}}], "auto", "parameters of tool 'f' are \\[\\]"),
    (tool(properties={"p": {"type": "string", "format": "colour"}}), "auto", "colour.*date"),
    (tool(properties={"p": {"type": "string", "pattern": "a$b"}}), "auto", r"a\$b"),
    (tool(properties={"p\n": {}}), "auto", "name"),
])  # fmt: skip
def test_tools_that_calls_have_no_form_for(tools, choice, message):
    with pytest.raises(GrammarError, match=message):
        tool_calls(tools, choice)


# what schemas say, and where ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("schema, text", [
    ({"type": "object", "properties": {"pattern": True}, "required": ["pattern"]}, '{"pattern":1}'),
    ({"properties": dict.fromkeys(("$ref", "not", "$id", "enum", "patternProperties"), True)}, '{"$ref":5,"not":2}'),
    ({"const": {"pattern": 5, "$ref": "#/x"}}, '{"pattern":5,"$ref":"#/x"}'),
    ({"enum": [{"pattern": None}, {"not": 2}]}, '{"not":2}'),
    ({"properties": {"a": {"type": "string", "default": {"pattern": 3}, "examples": [{"not": {}}]}}}, '{"a":"x"}'),
    ({"type": "object", "$defs": {"pattern": {"type": "null"}}, "x-note": {"$ref": 5}}, "{}"),
])  # fmt: skip
def test_names_and_data_are_no_schemas(schema, text):
    assert accepts(Constraint(json_schema(schema), BYTES, finish=False), text)
    parameters = {"a": {"type": ["object", "string"], **schema}}
    constraint = Constraint(tool_calls(tool(properties=parameters), "f"), BYTES, finish=False)
    assert accepts(constraint, tool_text([{"name": "f", "arguments": {"a": json.loads(text)}}])[: -len(EOS)])


FILTERS = {"op": {"enum": ["and", "or"]}, "args": {"type": "array", "items": {"$ref": "#"}}}
NESTED = {
    "v": {"type": "integer"},
    "next": {"$ref": "#"},
    "same": {"type": "array", "items": {"$ref": "#/properties/v"}},
}
ODD_NAMES = {"a/b": {"type": "null"}, "~": {"$ref": "#/$defs/a~1b"}, "100% é": {"type": "integer"}}


@pytest.mark.parametrize("parameters, right, wrong", [
    ({"properties": FILTERS, "required": ["op"], "additionalProperties": False},
     [{"op": "and", "args": [{"op": "or", "args": []}]}], [{"op": "and", "args": [[[]]]}, {"op": "and", "args": [{}]}]),
    ({"properties": NESTED, "required": ["v"]}, [{"v": 1, "next": {"v": 2, "next": {"v": 3}}}, {"v": 1, "same": [2]}],
     [{"v": 1, "next": {}}, {"v": 1, "same": ["x"]}, {"v": 1, "next": "v"}]),
    ({"properties": {"p": {"$ref": "#/$defs/~0"}, "q": {"$ref": "#/$defs/100%25%20%C3%A9"}}, "$defs": ODD_NAMES},
     [{"p": None, "q": 1}], [{"p": 1}, {"q": None}, {"p": "None"}]),
    ({"properties": {"p": {"$ref": "#/properties/q"}, "q": {"anyOf": [{"const": "x"}, {"$ref": "#/$defs/l/items"}]}},
      "$defs": {"l": {"items": {"enum": [1, "1"]}}}},
     [{"p": 1, "q": "x"}, {"p": "1"}, {"q": 1}], [{"p": 2}, {"q": []}]),
])  # fmt: skip
def test_references_start_from_the_tools_parameters(parameters, right, wrong):
    parameters = {"type": "object", **parameters}
    constraint = Constraint(tool_calls(tool(**parameters), "f"), BYTES)
    judge = jsonschema.Draft202012Validator(parameters)
    for arguments in [*right, *wrong]:
        assert judge.is_valid(arguments) == (arguments in right), "the table"
        assert accepts(constraint, tool_text([{"name": "f", "arguments": arguments}])[: -len(EOS)]) == (
            arguments in right
        )
        assert accepts(Constraint(json_schema(parameters), BYTES), json.dumps(arguments)) == (arguments in right)


WORD = {"enum": ["a", 1]}


@pytest.mark.parametrize("reference, beside", [
    ("#/components/schemas/A", {"components": {"schemas": {"A": WORD}}}),
    ("#/x/0", {"x": [{"$ref": "#/y"}], "y": WORD}),
    ("#/$defs/l/x-y", {"$defs": {"l": {"x-y": {"anyOf": [WORD]}}}}), ("#/x/anyOf/0", {"x": {"anyOf": [WORD]}}),
    ("#word", {"$defs": {"l": {"items": {"$anchor": "word", **WORD}}}}),
    ("#w", {"$defs": {"l": {"$id": "#w", **WORD}}}),
    ("https://a.b/c#/$defs/l", {"$id": "https://a.b/c", "$defs": {"l": WORD}}),
    ("https://a.b/c#w", {"$id": "https://a.b/c#", "$defs": {"l": {"$anchor": "w", **WORD}}}),
    ("urn:c#/x", {"$id": "urn:c", "x": {"items": False, "enum": ["a", 1]}}), ("#/x", {"x": {"$ref": "#/properties/q"}}),
    ("#/$defs/0", {"$defs": {**{str(i): {"$ref": f"#/$defs/{i + 1}", "title": "x"} for i in range(100)}, "100": WORD}}),
])  # fmt: skip
def test_where_references_lead(reference, beside):
    properties = {"p": {"$ref": reference}, "q": {"type": ["integer", "string"], "maxLength": 1, "maximum": 1}}
    whole = {"type": "object", "properties": properties, "required": ["p"], **beside}
    right = {**whole, "properties": {**properties, "p": properties["q"] if reference == "#/x" else WORD}}
    check_both(whole, [{"p": v} for v in ("a", "bb", 1, 2, None)], lambda _: jsonschema.Draft202012Validator(right))


@pytest.mark.parametrize("reference, beside, message", [
    ("#/x", {"x": 5}, "x.* no schema"), ("#/x/0", {"x": [{"type": "foo"}]}, "#/x/0: type='foo'"),
    ("#/x/1", {"x": [1]}, "nowhere"), ("#None", {}, "nowhere"), ("None#", {}, "nowhere"),
    ("#a", {}, "nowhere"), ("https://a.b/d#/$defs/l", {"$id": "https://a.b/c", "$defs": {"l": {}}}, "nowhere"),
    ("#/enum/0", {"enum": [{}]}, "nowhere"), ("#/x/-1", {"x": [{}]}, "nowhere"), ("#/x/y", {"x": "y"}, "nowhere"),
    ("#/$defs/a", {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "refers to itself"),
    ("#/x", {"x": {"$ref": "#/x"}}, "refers to itself"),
])  # fmt: skip
def test_references_that_lead_to_no_schema(reference, beside, message):
    whole = {"type": "object", "properties": {"p": {"$ref": reference}}, **beside}
    with pytest.raises(GrammarError, match=message):
        json_schema(whole)
    with pytest.raises(GrammarError, match=message if "enum" not in beside else "enum"):
        tool_calls(tool(**whole))


def variant(name, **properties):
    properties = {"kind": {"const": name, "type": "string"}, **properties}
    return {"type": "object", "properties": properties, "required": [*properties]}


PETS = {"cat": variant("cat", n={"type": "integer"}), "dog": variant("dog", b={"type": "boolean"})}
PETS |= {"chain": {"$ref": "#/$defs/cat"}, "word": {"type": "string"}, "both": {"oneOf": [{"$ref": "#/$defs/dog"},
         {"$ref": "#/$defs/word"}], "title": "x"}}  # fmt: skip


def refer(*names, **beside):
    return {"oneOf": [{"$ref": f"#/$defs/{name}"} for name in names], **beside}


@pytest.mark.parametrize("schema", [
    refer("cat", "dog"), refer("cat", "dog", discriminator={"propertyName": "kind", "mapping": {"cat": "#/$defs/cat"}}),
    refer("chain", "dog"), refer("word", "dog"), refer("cat", "both"), {"type": "array", "items": refer("cat", "dog")},
    {"oneOf": [{"$ref": "#/$defs/cat", "description": "x"}, {"type": "null"}]}, {"anyOf": [refer("cat", "dog"), False]},
])  # fmt: skip
def test_one_of_what_is_referred_to(schema):
    cat, dog = {"kind": "cat", "n": 1}, {"kind": "dog", "b": True}
    whole = {"type": "object", "properties": {"p": schema}, "required": ["p"], "$defs": PETS}
    check_both(whole, [{"p": v} for v in (cat, dog, {"kind": "dog", "n": 1}, {"n": 1}, "x", None, [cat, dog], [None])])


def check_both(schema, values, judge=jsonschema.Draft202012Validator):
    """As an answer in JSON and as a tool's parameters a schema allows what a judge says."""
    answer = Constraint(json_schema(schema), BYTES, finish=False)
    call = Constraint(tool_calls(tool(**schema), "f"), BYTES, finish=False)
    right = [judge(schema).is_valid(value) for value in values]
    assert {True, False} == set(right), "the table"
    assert [accepts(answer, json.dumps(value)) for value in values] == right
    assert [accepts(call, tool_text([{"name": "f", "arguments": v}])[: -len(EOS)]) for v in values] == right


def test_one_of_references_that_go_on_and_on():
    twice = {f"d{i}": refer(f"d{i + 1}", f"d{i + 1}") for i in range(300)}
    with pytest.raises(GrammarError, match="oneOf"):
        Constraint(json_schema({"$ref": "#/$defs/d0", "$defs": {**twice, "d300": {}}}), BYTES)
    large = {"cat": {"enum": ["x" * 1000] * 150}}
    with pytest.raises(GrammarError, match="oneOf: more than 2000000 characters"):
        json_schema(refer(*["cat"] * 100, **{"$defs": large}))


DRAFTS = {3: jsonschema.Draft3Validator, 4: jsonschema.Draft4Validator, 7: jsonschema.Draft7Validator}
TUPLE = [{"type": "integer"}, {"enum": ["a", None]}]


@pytest.mark.parametrize("draft, schema", [
    (7, {"type": "array", "items": TUPLE}), (7, {"type": "array", "items": TUPLE, "additionalItems": False}),
    (7, {"type": "array", "items": TUPLE, "additionalItems": {"type": "boolean"}}),
    (7, {"type": "array", "items": [], "additionalItems": {"type": "integer"}}), (7, {"items": [TUPLE[0]]}),
    (7, {"type": "array", "items": TUPLE[0], "additionalItems": False}),
    (7, {"type": "array", "additionalItems": False}),
    (7, {"type": "array", "items": [{"type": "array", "items": TUPLE, "additionalItems": False}]}),
    (4, {"type": "integer", "minimum": 1, "exclusiveMinimum": True}), (4, {"maximum": 7, "exclusiveMaximum": True}),
    (4, {"type": "number", "minimum": 1, "exclusiveMinimum": False, "maximum": 7, "exclusiveMaximum": True}),
    (4, {"type": "number", "exclusiveMaximum": False}),
    (3, {"type": "object", "properties": {"a": {"type": "integer", "required": True}, "b": {"required": False}}}),
    (3, {"type": "integer", "required": True}), (3, {"type": "array", "items": {"type": "integer", "required": True}}),
    (3, {"type": "object", "properties": {"a": {"type": "object", "required": True, "properties": {"b": {"required":
     True}}}}}),
    (7, {"type": "array", "items": {"$ref": "#/definitions/i"}}),
], ids=str)  # fmt: skip
def test_older_drafts(draft, schema):
    values = [
        1,
        2,
        7,
        8,
        0,
        "a",
        None,
        [],
        [1],
        [1, "a"],
        [1, None, True],
        [1, 1],
        [2, "b"],
        [[1, "a"], 3],
        [[1, "a", 2]],
    ]
    values += [{}, {"a": 1}, {"b": 1}, {"a": {}}, {"a": {"b": 1}}]
    whole = {"type": "object", "properties": {"p": schema}, "definitions": {"i": {"type": "integer"}}}
    check_both(whole, [{}, *({"p": value} for value in values)], DRAFTS[draft])


@pytest.mark.parametrize("key", ["required", "properties", "patternProperties", "$defs", "definitions"])
def test_null_for_what_lists_nothing(key):
    inside = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    whole = {"type": "object", "properties": {"p": {**inside, key: None}}}
    absent = {"type": "object", "properties": {"p": {name: inside[name] for name in inside if name != key}}}
    values = [{"p": {"a": 1}}, {"p": {"a": "x"}}, {"p": {}}, {"p": 3}, {}]
    check_both(whole, values, lambda _: jsonschema.Draft202012Validator(absent))
    assert accepts(Constraint(json_schema({"type": "object", key: None}), BYTES, finish=False), "{}")
    tools = tool(**{"type": "object", key: None})
    assert Constraint(tool_calls(tools, "f"), BYTES).walk(200).way


def test_a_schema_is_not_changed_by_reading_it():
    shared = {"type": "array", "items": [{"required": True}], "required": None}
    given = {"type": "object", "properties": {"a": shared, "b": shared}, "required": None}
    before = json.dumps(given)
    json_schema(given), tool_calls(tool(**given))
    assert json.dumps(given) == before


def test_random_schemas_admit_what_jsonschema_says():
    counts, wrong = schemas.agree(80, 5)
    assert wrong == []
    assert all(counts[f"{form} {verdict}"] > 50 for form in ("json", "call") for verdict in ("valid", "invalid"))


MALFORMED = [
    ("properties", [1], "an object of schemas"), ("properties", {"a": 1}, "#/properties/a"),
    ("enum", 5, "a list of values"),
    ("pattern", 5, "a regular expression"), ("required", "a", "a list of names"), ("required", [1], "a list of names"),
    ("type", "foo", "integer"), ("type", [], "integer"), ("type", [["null"]], "integer"), ("items", 3, "/items"),
    ("$ref", 5, "a text"), ("$ref", "http://a.b/c", "#/"), ("$ref", "#/enum/0", "#/"), ("minimum", "1", "a number"),
    ("minimum", True, "a number"), ("maxLength", -1, "from 0 on"), ("maxLength", 2.5, "from 0 on"),
    ("multipleOf", 0, "above 0"), ("anyOf", {}, "a list of schemas"), ("anyOf", [], "at least one"),
    ("allOf", [None], "/allOf/0"), ("prefixItems", True, "a list of schemas"), ("patternProperties", {"[": 2}, "#/"),
    ("const", "\ud800", "surrogate"), ("const", {"\udfff": 1}, "surrogate"), ("const", {1: 1}, "no text"),
    ("const", {1}, "type set"), ("minimum", math.inf, "finite"), ("default", [10**400], "finite"),
    ("enum", [math.nan], "finite"),
    ("const", 2**53 + 1, "float64"), ("pattern", "[a&&b]", "signs? of sets"), ("not", {}, "not: allowed are"),
    ("dependencies", {}, "dependencies"), ("$dynamicRef", "#", "dynamicRef"),
    ("divisibleBy", 2, "divisibleBy: allowed are"), ("disallow", "null", "disallow: allowed are"),
    ("extends", {"type": "null"}, "extends: allowed are"), ("const", ["\x01"], "control character"),
    ("enum", ["a", "\x7f"], "control character"), ("minimum", 1e19, "no number beyond"),
    ("exclusiveMaximum", -(2**63), "no number beyond"), ("pattern", "^a*+a$", "possessive"),
    ("pattern", "a{2}{3}", "possessive"), ("pattern", "(?>a|ab)c", "atomic"),
]  # fmt: skip


@pytest.mark.parametrize(
    "key, value, allowed_is", MALFORMED, ids=lambda value: str(value)[:20].encode("ascii", "replace").decode()
)
def test_malformed_schemas_are_named_in_a_line(key, value, allowed_is):
    at_once = {"type": "object", "properties": {"a": {key: value}}}
    for make in (lambda: json_schema(at_once), lambda: tool_calls(tool(**at_once))):
        with pytest.raises(GrammarError, match=allowed_is) as caught:
            make()
        assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 1000
        assert key in str(caught.value)


def deep(levels):
    schema = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def endless():
    schema = {"properties": {}}
    schema["properties"]["a"] = schema
    return schema


@pytest.mark.parametrize("schema, bound", [
    (deep(60), "100 levels"), (deep(600), "100 levels"), (deep(100_000), "100 levels"), (endless(), "100 levels"),
    ({"description": "x" * 200_001}, "200000 bytes"), ({"enum": list(range(10_001))}, "10001 entries: at most 10000"),
    ({"required": [str(i) for i in range(1001)]}, "required has 1001"), ({"anyOf": [{}] * 1001}, "anyOf has 1001"),
    ({"properties": {str(i): {} for i in range(1001)}}, "properties has 1001"), ({"allOf": [{}] * 9}, "allOf has 9"),
    ({"patternProperties": {str(i): {} for i in range(51)}}, "patternProperties has 51"),
    ({"allOf": [{"multipleOf": 99991}, {"multipleOf": 99989}]}, "99991, 99989.*65535"),
    ({"multipleOf": 0.01, "items": {"multipleOf": 1000}}, "0.01, 1000.*65535"),
    ({"pattern": "((a{100}){100}){100}"}, "10000 repetitions"),
    ({"pattern": "a{99999999999999999999}"}, "10000 repetitions"),
])  # fmt: skip
def test_sizes_are_bounded(schema, bound):
    for make in (lambda: json_schema(schema), lambda: tool_calls(tool(properties={"p": schema}))):
        with pytest.raises(GrammarError, match=bound) as caught:
            make()
        assert len(str(caught.value)) < 1000


def test_references_are_bounded():
    parts = [{"$ref": f"#/$defs/{i}"} for i in range(501)]
    with pytest.raises(GrammarError, match="more than 500 schemas"):
        json_schema({"prefixItems": parts, "$defs": {str(i): {} for i in range(501)}})


def test_a_chain_of_alternatives_is_looked_at_once():
    """Twice as many ways at each step: 2^300 of them."""
    chain = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}, {"$ref": f"#/$defs/d{i + 1}"}]} for i in range(300)}
    definitions = {**chain, "d300": {"type": ["string", "null"]}}
    with pytest.raises(GrammarError, match="more than 10 references"):
        tool_calls(tool(properties={"p": {"$ref": "#/$defs/d0"}}, **{"$defs": definitions}))
    assert parameter_values({"$ref": "#/$defs/d295"}, "a", None, 1, **{"$defs": definitions}) == [True, True, False]


def test_many_optional_parameters_take_a_rule_each():
    sizes = [len(tool_calls(tool(properties={f"p{i}": {} for i in range(n)})).rules) for n in (100, 200, 400)]
    assert sizes[2] - sizes[1] < 2.2 * (sizes[1] - sizes[0])
    with pytest.raises(GrammarError, match="at most 400"):
        tool_calls(tool(properties={f"p{i}": {} for i in range(401)}))
    names = [f"p{i}" for i in range(400)]
    grammar = tool_calls(tool(properties={name: {} for name in names}, required=["p7"]), "f")
    constraint = Constraint(grammar, BYTES, finish=False)
    for chosen, right in ((["p7"], True), (["p0", "p7", "p399"], True), (["p0"], False), (["p399", "p7"], False)):
        assert (
            accepts(constraint, tool_text([{"name": "f", "arguments": dict.fromkeys(chosen, 1)}])[: -len(EOS)]) == right
        )


def test_a_tool_may_be_named_like_a_choice():
    constraint = Constraint(tool_calls(tool("auto") + tool("g")), BYTES)
    assert accepts(constraint, tool_text([{"name": "g", "arguments": {}}])[: -len(EOS)])


def test_broken_schemas_end_in_a_constraint_or_an_error():
    counts, odd = schemas.mutate(150, 3)
    assert odd == [] and sum(counts.values()) == 150 and counts["Constraint"] > 5


# special tokens ------------------------------------------------------------------------------------------------------


FILTER = tool_text([{"name": "search", "arguments": {"filter": {"a": 1}}}]).split("1}")[0] + '"'


@pytest.mark.parametrize("grammar, start", [
    (tool_calls(TOOLS), "text "),
    (tool_calls(TOOLS).after_thinking(), "hm "),
    (json_object(), '{"a":"'),
    (tool_calls(TOOLS, "search"), FILTER),
], ids=["text", "reasoning", "json", "json in a call"])  # fmt: skip
@pytest.mark.parametrize("spelled", ["｜DSML｜", "</think>", EOS])
def test_no_text_spells_a_special_token(grammar, start, spelled):
    walk = Constraint(grammar, BYTES).walk(500)
    for token in [*BYTES.encode(start, special=True), *spelled.encode()[:-1]]:
        assert token in allowed(walk)
        walk.take(token)
    assert spelled.encode()[-1] not in allowed(walk)
    assert len(allowed(walk)) > 1


def test_long_tokens_neither():
    """A token that ends a special string and goes on, or that holds one."""
    tokens = Few(b"a", b"<", b"x", b">", b"x>a", b"a<x>", b'"')
    walk = Constraint(json_schema({"type": "string"}), tokens).walk(20)
    walk.take(6)
    assert allowed(walk, 9) == [0, 1, 2, 3, 4, 6]
    walk.take(1)
    assert allowed(walk, 9) == [0, 1, 2, 3, 6]
    walk.take(2)
    assert allowed(walk, 9) == [0, 1, 2, 4, 6]
    walk.back()
    assert allowed(walk, 9) == [0, 1, 2, 3, 6]


def test_what_a_schema_wants_spelled_is_spelled():
    walk = Constraint(json_schema({"const": "</think>"}), BYTES).walk(20)
    for byte in b'"</think>"':
        assert allowed(walk) == [byte]
        walk.take(byte)


# the way to the end --------------------------------------------------------------------------------------------------


def test_each_token_leaves_a_way_to_the_end():
    """After any allowed tokens the rest of the budget is enough."""
    constraint = Constraint(json_schema(SCHEMAS["nested objects"]), BYTES)
    generator = torch.Generator().manual_seed(0)
    for budget in (60, 61, 64, 90, 200):
        walk, text, forced = constraint.walk(budget), [], 0
        while not walk.complete:
            may = allowed(walk)
            drawn = may[int(torch.randint(len(may), (), generator=generator))]
            token = walk.take(drawn)
            forced += token != drawn
            text.append(token)
            assert walk.left == budget - len(text) >= len(walk.way)
        assert walk.way == [] and len(text) <= budget
        jsonschema.validate(json.loads(BYTES.decode(text)), SCHEMAS["nested objects"])
        assert forced > 0


def optional(names):
    properties = {name: {"type": "integer"} for name in names}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def test_many_names_may_come_next():
    walk = Constraint(json_schema(optional(f"p{i}" for i in range(1000))), BYTES).walk(60)
    for byte in b'{"p':
        assert byte in allowed(walk) and walk.take(byte) == byte
    assert allowed(walk) == [*b"0123456789"]


@pytest.mark.parametrize("kind", ["integer", "number"])
@pytest.mark.parametrize(
    "bounds",
    [{"minimum": 0, "maximum": 2**64 - 1}, {"minimum": -(2**63), "maximum": 2**63 - 1}, {"maximum": 1e20}],
)
def test_bounds_of_64_bits_are_kept_to_as_far_as_numbers_are_written(kind, bounds):
    walk = Constraint(json_schema({"type": kind, **bounds}), BYTES).walk(40)
    for digit in str(2**63 - 1024).encode():
        assert digit in allowed(walk) and walk.take(digit) == digit
    assert BYTES.eos in allowed(walk) and ord("0") not in allowed(walk)


def test_where_the_library_gives_up_no_answer_is_made_up():
    schema = {"anyOf": [optional(f"{letter}{i}" for i in range(900)) for letter in "ab"]}
    for finish in (True, False):
        with pytest.raises(DeadEndError, match="cannot go on: "):
            Constraint(json_schema(schema), BYTES, finish=finish).walk(60).take(ord("{"))


def test_a_model_that_ends_in_time_is_left_alone():
    """With room, every token that is drawn is written; without `finish` always, to the last."""
    text = b'{"title":"a \\" b","tags":["x","y"]}'
    for finish, budget in ((True, len(text) + 1), (False, 4)):
        walk = Constraint(json_schema(SCHEMAS["optional properties"]), BYTES, finish=finish).walk(budget)
        assert [walk.take(byte) for byte in text] == list(text)


def test_the_least_budget():
    constraint = Constraint(json_schema({"type": "array", "items": {"type": "integer"}, "minItems": 3}), BYTES)
    assert constraint.walk(8).way == [*b"[0,0,0]", BYTES.eos]
    with pytest.raises(GrammarError, match="fewer than 8 tokens was found, and max_new_tokens=7"):
        constraint.walk(7)


@pytest.mark.parametrize("pattern, most", [
    ("[a-z]+END", 5), ("(foo|bar)[0-9]{4}", 8), ("(?s:.*)needle", 7), ("a{50}", 51), ("(a|b)*c(d|e){2}", 4),
    ("[äöü]x", 4),
    (r"[a-z0-9]+(\.[a-z0-9]+)*@[a-z]+(-[a-z]+)*\.[a-z]{2,}", 7), ("(?s:.)+ and (?s:.)+ and (?s:.)+", 14),
])  # fmt: skip
def test_ways_are_found_and_short(pattern, most):
    way = Constraint(regex(pattern), BYTES).walk(100).way
    assert re.fullmatch(pattern, BYTES.decode(way)) and way[-1] == BYTES.eos and len(way) <= most


def test_ways_in_as_few_tokens_as_the_tokenizer_knows():
    tokens = Few(*(bytes([i]) for i in range(256)), b'{"', b'":', b"name", b"0}")
    constraint = Constraint(
        json_schema({"type": "object", "properties": {"name": {"type": "integer"}}, "required": ["name"]}), tokens
    )
    assert constraint.walk(9).way == [256, 258, 257, 259, tokens.eos]


@pytest.mark.parametrize(
    "values", [[{"abcdef": None}, {"xy": 2}], [{"ab": 1}, {"xyz": 2}, {"a": [1]}], [[1, "x"], "x"]]
)
def test_a_way_is_found_past_what_differs(values):
    """Each branch forces another run of tokens: what one of them allows must not be taken for what the other does."""
    walk = Constraint(json_schema({"enum": values}), BYTES).walk(60)
    text = bytes(walk.way[:-1])
    assert json.loads(text) in values
    for token in walk.way:
        assert walk.take(token) == token


@pytest.mark.parametrize("schema", [
    {"type": "array", "items": {"type": "integer"}, "minItems": 60},
    {"type": "string", "minLength": 300},
])  # fmt: skip
def test_a_way_is_found_through_what_counts(schema):
    way = Constraint(json_schema(schema), BYTES).walk(400).way
    jsonschema.validate(json.loads(bytes(way[:-1])), schema)


NAMES = ["owner", "repo", "title", "body", "state", "labels", "assignee", "sort", "since", "page", "after", "head"]
LISTED = {"type": "object", "properties": {name: {"type": "string"} for name in NAMES}, "required": NAMES[:6]}
LISTED = {"type": "array", "minItems": 2, "items": LISTED}


@pytest.mark.parametrize("value, required, most", [
    ({"type": "string"}, 1, 124), ({"type": "string"}, 4, 271), ({"type": "string"}, 6, 378),
    ({"type": "string"}, 10, 600), ({"type": ["string", "null", "integer"]}, 6, 390),
    ({"type": "string", "format": "email"}, 6, 414), ({"type": "string", "minLength": 20}, 6, 498), (LISTED, 1, 250),
    ({"enum": [f"Europe/City {i}" for i in range(50)]}, 6, 470),
])  # fmt: skip
def test_a_way_is_found_where_optional_parameters_follow(value, required, most):
    given = {"type": "object", "properties": dict.fromkeys(NAMES, value), "required": NAMES[:required]}
    for grammar in (tool_calls(tool(**given), "f"), tool_calls([*TOOLS, *tool(**given)], "f")):
        began = time.process_time()
        way = Constraint(grammar, BYTES).walk(1000).way
        seconds = time.process_time() - began
        message = parse_message_from_completion_text(BYTES.decode(way[:-1], special=True) + EOS)
        arguments = json.loads(message["tool_calls"][0]["function"]["arguments"])
        jsonschema.validate(arguments, given)
        assert len(way) <= most and seconds < 3
    thinking = Constraint(grammar.after_thinking(), BYTES).walk(1000).way
    assert thinking == [BYTES.special["</think>"], *way]


def test_a_way_is_found_where_parts_lead_to_none():
    """Each of the two alone forbids what the other requires."""
    parts = [{"type": "object", "properties": {n: {"type": "integer"} for n in "ab"}, "required": [n]} for n in "ab"]
    way = Constraint(json_schema({"allOf": parts}), BYTES).walk(60).way
    assert json.loads(bytes(way[:-1])).keys() == {"a", "b"}


def test_back_takes_back():
    walk = Constraint(json_schema(SCHEMAS["nested objects"]), BYTES).walk(80)
    for byte in b'{"name":"caf':
        walk.take(byte)
    for token in (ord("e"), ord("\\"), 0xC3, ord('"')):
        before = allowed(walk), walk.left, walk.way
        walk.take(token)
        assert allowed(walk) != before[0] or token == ord("e")
        walk.back()
        assert (allowed(walk), walk.left, walk.way) == before
    for byte in b'","home":{"street":"a","zip":"12345"}}':
        walk.take(byte)
    walk.take(BYTES.eos)
    walk.back()
    assert not walk.complete and allowed(walk) == [BYTES.eos]


# in generate ---------------------------------------------------------------------------------------------------------

AB = Few(b"a", b"b", b"ab")  # ids 0 1 2, eos 3, special 4
TEXTS = [s for n in range(5) for s in map("".join, itertools.product("ab", repeat=n)) if re.fullmatch("(ab?a|b)*", s)]


def spelled(ids) -> str:
    return b"".join(AB.pieces[i] for i in ids if i < 3).decode()


def may_follow(ids) -> list[int]:
    """The oracle: tokens after which some text of the language, of any length, can still come."""

    def begins(text):
        return any(re.fullmatch("(ab?a|b)*", text + end) for end in ("", "a", "ba"))

    ok = [i for i in range(3) if begins(spelled(ids) + AB.pieces[i].decode())]
    return ok + [3] * bool(re.fullmatch("(ab?a|b)*", spelled(ids)))


@pytest.fixture(scope="module")
def small():
    tiny = {"vocab_size": 6, "bos_token_id": 4, "pad_token_id": 5, "engram": None, "num_hidden_layers": 1}
    return lively(seed=2, **tiny, compress_ratios=[4], sliding_window=3, num_hash_layers=0)


@torch.no_grad()
def oracle(model, prompt, count):
    """Greedy: no cache, masks from `may_follow`."""
    ids = []
    while len(ids) < count and (not ids or ids[-1] != 3):
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, -1]
        ids.append(max(may_follow(ids), key=lambda i: float(logits[i])))
    return ids


def test_greedy_takes_the_best_of_what_is_allowed(small):
    constraint = Constraint(regex("(ab?a|b)*"), AB, finish=False)
    prompts = [[4], [0, 1, 2], [2, 2], [1, 5, 0], [5, 5, 5, 1], [0, 0]]
    want = [oracle(small, prompt, 12) for prompt in prompts]
    assert len({tuple(row) for row in want}) >= 3
    alone = [generate(small, prompt, max_new_tokens=12, constraint=constraint, temperature=0) for prompt in prompts]
    assert alone == want
    assert generate(small, prompts, max_new_tokens=12, constraint=constraint, temperature=0) == want
    fast = {"speculative": True, "temperature": 0}
    assert [generate(small, p, max_new_tokens=12, constraint=constraint, **fast) for p in prompts] == want


def test_masks_come_before_the_filters(small):
    """top_k=1 takes the best allowed token, though a token that is not allowed is better."""
    constraint = Constraint(regex("(ab?a|b)*"), AB, finish=False)
    for settings in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 0.999}):
        for prompt in ([4], [0, 1, 2], [5, 5, 5, 1]):
            assert generate(small, prompt, max_new_tokens=12, constraint=constraint, seed=0, **settings) == oracle(
                small, prompt, 12
            )


def explored(run, module_patches) -> dict[tuple, float]:
    """Every outcome of a generation with its probability."""
    explorer, got, going = Explorer(), {}, True

    def pick(p, u):
        return torch.tensor([explorer.choose(p[0])])

    def verify(p, q, draft, u):
        chance = acceptance(p, q)[0, draft]
        accepted = torch.tensor([explorer.choose(torch.cat([chance, 1 - chance])) == 0])
        return (draft if accepted else pick(residual(p, q), None)), accepted

    for name, function in (("pick", pick), ("verify", verify)):
        module_patches(name, function)
    while going:
        text = tuple(run())
        got[text] = got.get(text, 0) + explorer.weight
        going = explorer.next_run()
    return got


@pytest.mark.parametrize("finish", [False, True])
def test_the_joint_distribution(small, monkeypatch, finish):
    """Plain: that of the oracle's masks. Speculative: the same, with every draft, verdict and replacement weighted."""
    constraint = Constraint(regex("(ab?a|b)*"), AB, finish=finish)
    settings = {"max_new_tokens": 3, "temperature": 0.5, "top_p": 0.95, "constraint": constraint}

    def patches(name, function):
        for module in (speculative, *(sys.modules[f"abyssal.model.generation.{x}"] for x in ("generate", "sampling"))):
            monkeypatch.setattr(module, name, function, raising=False)

    plain = explored(lambda: generate(small, [4, 0], **settings), patches)
    fast = explored(lambda: generate(small, [4, 0], speculative=True, **settings), patches)
    texts = sorted(plain.keys() | fast.keys())
    assert_same("distribution", *(torch.tensor([p.get(t, 0.0) for t in texts]) for p in (fast, plain)), 1e-4)
    assert len(texts) >= 5 and sum(plain.values()) == pytest.approx(1)
    if finish:
        assert all(text[-1] == 3 for text in texts)
        return
    want = {(): 1.0}
    for _ in range(3):
        longer = {}
        for ids, weight in want.items():
            if ids and ids[-1] == 3:
                longer[ids] = weight
                continue
            with torch.no_grad():
                logits = small(torch.tensor([[4, 0, *ids]])).logits[:, -1]
            mask = torch.full((6,), -torch.inf)
            mask[may_follow(ids)] = 0
            p = Sampling(0.5, top_p=0.95).probabilities(logits + mask)[0]
            longer |= {(*ids, i): weight * float(p[i]) for i in range(6) if p[i] > 0}
        want = longer
    assert set(plain) == set(want)
    assert_same("oracle", *(torch.tensor([p[t] for t in texts]) for p in (plain, want)), 1e-4)


def test_speculation_with_rejected_drafts_keeps_to_the_grammar():
    model = lively(**{**TINY, "num_nextn_predict_layers": 1})
    constraint = Constraint(json_schema(SCHEMAS["optional properties"]), BYTES)
    accepted = drafted = 0
    for seed in range(3):
        run = generate(model, [65], max_new_tokens=50, constraint=constraint, seed=seed, speculative=True, stream=True)
        text = list(run)
        assert run.stats.complete == (True,) and text[-1] == BYTES.eos and len(text) <= 50
        jsonschema.validate(json.loads(BYTES.decode(text)), SCHEMAS["optional properties"])
        accepted, drafted = accepted + run.stats.speculation.accepted, drafted + run.stats.speculation.drafted
    assert 0 < accepted < drafted
    plain = generate(model, [65], max_new_tokens=50, constraint=constraint, temperature=0)
    assert generate(model, [65], max_new_tokens=50, constraint=constraint, temperature=0, speculative=True) == plain


def test_rows_of_a_batch_follow_their_own(model):
    """JSON of two kinds, a free row and a call side by side, as if each were alone."""
    tasks = [
        Constraint(json_schema(SCHEMAS["map"]), BYTES),
        None,
        Constraint(tool_calls(TOOLS, "get_weather"), BYTES),
        Constraint(regex("[0-9]{3}"), BYTES),
    ]
    prompts = [[7], [8, 9], [7], [7, 7, 7]]
    stream = generate(model, prompts, max_new_tokens=150, constraint=tasks, seed=3, stop=(), stream=True)
    steps = list(stream)
    rows = [[step[i] for step in steps if step[i] is not None] for i in range(4)]
    assert stream.stats.complete == (True, None, True, True)
    assert len(rows[1]) == 150 and len(rows[3]) == 4
    jsonschema.validate(json.loads(BYTES.decode(rows[0])), SCHEMAS["map"])
    text = BYTES.decode(rows[2], special=True)
    assert parse_message_from_completion_text(text)["tool_calls"][0]["function"]["name"] == "get_weather"
    assert rows[0] == generate(model, prompts[:1], max_new_tokens=150, constraint=tasks[:1], seed=3, stop=())[0]
    assert rows[:2] == generate(model, prompts[:2], max_new_tokens=150, constraint=tasks[:2], seed=3, stop=())


def test_a_model_with_more_rows_than_the_tokenizer_has_tokens():
    wide = lively(**{**TINY, "vocab_size": 300})
    constraint = Constraint(json_object(), BYTES)
    rows = generate(wide, [[1], [1]], max_new_tokens=60, constraint=[constraint, None], seed=0, stop=())
    json.loads(BYTES.decode(rows[0]))
    assert max(rows[0]) < 288


def test_one_token_at_a_time_takes_the_numpy_path(model, monkeypatch):
    from abyssal.model.decode import Decoder

    passes, original = [], Decoder.__call__
    monkeypatch.setattr(Decoder, "__call__", lambda *given: passes.append(1) or original(*given))
    text = generate(model, [1], max_new_tokens=40, constraint=Constraint(json_object(), BYTES), seed=1)
    assert len(passes) == len(text), "the prompt of one token, and each written one but the last"


def test_cut_off_texts_are_flagged(model):
    constraint = Constraint(json_schema(SCHEMAS["nested objects"]), BYTES, finish=False)
    run = generate(model, [1], max_new_tokens=12, constraint=constraint, stream=True, seed=0)
    assert run.stats.complete == (False,)
    text = list(run)
    assert len(text) == 12 and text[-1] != BYTES.eos and run.stats.complete == (False,)
    stopped = generate(
        model, [1], max_new_tokens=99, constraint=Constraint(json_object(), BYTES), stop=[123], stream=True
    )
    assert list(stopped) == [123] and stopped.stats.complete == (False,)


def test_stats(model):
    run = generate(
        model, [[1], [2]], max_new_tokens=30, constraint=[Constraint(json_object(), BYTES), None], stream=True
    )
    steps = list(run)
    assert run.stats.guide.tokens == sum(step[0] is not None for step in steps)
    each = run.stats.mask_seconds_per_token
    assert 0 < each == run.stats.guide.seconds / run.stats.guide.tokens < 0.1
    assert f"constraint {1e6 * each:,.0f} us per token" in str(run.stats)
    free = generate(model, [1], max_new_tokens=2, stream=True)
    assert list(free) and "constraint" not in str(free.stats) and free.stats.complete == (None,)
    assert free.stats.mask_seconds_per_token == 0


# errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schema, message", [
    ({"type": "string", "not": {"const": "a"}}, "not"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"type": "string", "format": "colour"}, "colour"),
    ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
    ({"enum": []}, "at least one"),
    ({"$ref": "#/$defs/missing"}, "missing.* leads nowhere"),
    ({"type": "string", "pattern": "(?=a)b"}, "look"),
])  # fmt: skip
def test_schemas_that_cannot_be_followed(schema, message):
    with pytest.raises(GrammarError, match=f"the JSON schema.*{message}"):
        Constraint(json_schema(schema), BYTES)


@pytest.mark.parametrize("make, message", [
    (lambda: json_schema(False), "allows nothing"),
    (lambda: json_schema("object"), "no schema: allowed is an object"),
    (lambda: json_schema({"const": {1}}), "no JSON"),
    (lambda: json_schema({"const": float("nan")}), "#/const: .*not finite"),
    (lambda: regex(""), "regular expression is needed"),
    (lambda: Constraint(regex("a("), BYTES), r"a\("),
    (lambda: Constraint(regex(r"[^\s\S]"), BYTES), "allows no text"),
    (lambda: Constraint(regex("aé"), Few(b"a", b"b")).walk(9), "no text of up to"),
])  # fmt: skip
def test_grammars_that_are_none(make, message):
    with pytest.raises(GrammarError, match=message):
        make()


def test_a_language_without_end():
    endless = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
    with pytest.raises(GrammarError, match="no text of up to 512"):
        Constraint(json_schema(endless), BYTES).walk(100)


def test_a_dead_end_raises(small):
    """No token of this vocabulary can go on: the text needs a c."""
    constraint = Constraint(regex("abc"), AB, finish=False)
    with pytest.raises(DeadEndError, match="regular expression abc: cannot go on"):
        generate(small, [4], max_new_tokens=9, constraint=constraint)


def test_the_argument(model, small):
    constraint = Constraint(json_object(), BYTES)
    with pytest.raises(ValueError, match="288 tokens, the model 6"):
        generate(small, [4], constraint=constraint)
    for wrong in ([constraint], [constraint, "json"], "ab"):
        with pytest.raises(ValueError, match="for each of 2 rows"):
            generate(model, [[1], [2]], constraint=wrong)
    with pytest.raises(GrammarError, match="max_new_tokens=2"):
        generate(model, [1], max_new_tokens=2, constraint=constraint)


def test_the_extra_is_named(monkeypatch):
    original = builtins.__import__

    def without(name, *given, **options):
        if name.startswith("llguidance"):
            raise ModuleNotFoundError(name)
        return original(name, *given, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"abyssal\[serve\]"):
        Constraint(json_object(), BYTES)


def test_a_free_guide_does_nothing():
    logits = torch.randn(2, 5)
    guide = Guide([None, None], 10)
    assert guide.mask(logits, [0, 1]) is logits and guide.take(torch.tensor([1, 2]), [0, 1]).tolist() == [1, 2]
    assert guide.complete == (None, None) and not guide.ended(0) and guide.seconds == 0
