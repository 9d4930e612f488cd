"""`abyssal serve` as its clients see it: the openai package, raw requests, crowds, and clients that go away."""

import asyncio
import contextlib
import errno
import itertools
import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import openai
import patience
import pytest
import torch
from lively import lively
from patience import wait_for
from requests_fuzz import fuzz
from starlette.requests import Request

from abyssal.model import generate
from abyssal.model.text.constrain import json_schema, tool_calls
from abyssal.train.data.tokenizers import ByteTokenizer
from abyssal.train.talk.dialogue import prompt
from abyssal.train.talk.serve.app import Limits
from abyssal.train.talk.serve.app import Server as Endpoints
from abyssal.train.talk.serve.errors import ApiError
from abyssal.train.talk.serve.fields import parse_object
from abyssal.train.talk.serve.grammars import Grammars
from abyssal.train.talk.serve.prepare import grammar_of, prepare_chat
from abyssal.train.talk.serve.request import read_chat
from abyssal.train.talk.serve.respond import respond
from abyssal.train.talk.serve.run import PrintableFormatter, bind, build_server, is_local
from abyssal.train.talk.serve.worker import Worker
from abyssal.train.talk.voice import Voice, random_voice

BYTES = ByteTokenizer()
HI = [{"role": "user", "content": "hi"}]
PROPERTIES = {"a": {"type": "integer"}, "how": {"enum": ["up", "down"]}}
PARAMETERS = {"type": "object", "properties": PROPERTIES, "required": ["a", "how"]}
ADD = {"type": "function", "function": {"name": "add", "parameters": PARAMETERS}}


@pytest.fixture(scope="module")
def voice():
    """A model whose greedy answers never end by themselves."""
    model = lively(vocab_size=288, eos_token_id=257, num_hidden_layers=2, compress_ratios=[0, 4])
    with torch.no_grad():
        model.head.weight[BYTES.eos] = 0
    return Voice(model, BYTES, "tiny", 2048)


@contextlib.contextmanager
def serving(voice, **limits):
    """The address of a real server in a thread."""
    listening = bind("127.0.0.1", 0)
    server = build_server(voice, Limits(**limits))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def address(voice):
    with serving(voice, max_body=200_000) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def ask(client, messages=HI, **options):
    options = {"max_tokens": 12, "temperature": 0, **options}
    return client.chat.completions.create(model="tiny", messages=messages, **options)


HTTP = httpx.Client(timeout=patience.SECONDS)


def post(address, **fields):
    return HTTP.post(f"{address}/v1/chat/completions", json={"model": "tiny", "max_tokens": 4, **fields})


def health(address):
    return HTTP.get(f"{address}/health").json()


def expected(voice, messages, count, thinking=False, **sampling):
    """The prompt, what the model writes, and its text without special tokens, which also end characters."""
    ids = prompt(voice, messages, thinking=thinking)
    written = generate(voice.model, ids, max_new_tokens=count, **{"temperature": 0, **sampling})
    runs = [list(run) for special, run in itertools.groupby(written, lambda t: t >= 256) if not special]
    return ids, written, "".join(map(BYTES.decode, runs))


# what real clients do


def test_the_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt")
    assert caught.value.code == "model_not_found"


def test_a_chat(client, voice):
    messages = [{"role": "system", "content": "Be brief."}, *HI]
    ids, written, text = expected(voice, messages, 12)
    reply = ask(client, messages)
    choice = reply.choices[0]
    assert choice.message.content == text and choice.finish_reason == "length"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(ids), len(written))
    assert reply.usage.total_tokens == len(ids) + len(written)


def test_a_conversation_goes_on_with_what_the_client_was_given(client, voice):
    first = ask(client).choices[0].message
    messages = [*HI, first.model_dump(), {"role": "user", "content": [{"type": "text", "text": "more"}]}]
    plain = [*HI, {"role": "assistant", "content": first.content}, {"role": "user", "content": "more"}]
    assert ask(client, messages).choices[0].message.content == expected(voice, plain, 12)[2]


def test_a_developer_message_is_the_systems(client, voice):
    want = expected(voice, [{"role": "system", "content": "Be brief."}, *HI], 12)[2]
    assert ask(client, [{"role": "developer", "content": "Be brief."}, *HI]).choices[0].message.content == want


def test_sampling_and_choices(client, voice):
    sampling = {"temperature": 0.9, "top_p": 0.8}
    reply = ask(client, seed=5, n=2, **sampling)
    want = [expected(voice, HI, 12, seed=seed, **sampling) for seed in (5, 6)]
    assert [choice.message.content for choice in reply.choices] == [text for _, _, text in want]
    assert [choice.index for choice in reply.choices] == [0, 1]
    assert reply.usage.completion_tokens == sum(len(written) for _, written, _ in want)
    assert ask(client, seed=6, **sampling).choices[0].message.content == reply.choices[1].message.content


def test_the_prompt_of_several_choices_is_read_once(client, voice, monkeypatch):
    """Then each choice reads the last token, and what it writes itself but for its last."""
    read, original = [], type(voice.model)._append
    monkeypatch.setattr(type(voice.model), "_append", lambda *given: read.append(given[1].shape[1]) or original(*given))
    reply = ask(client, n=3, max_tokens=4)
    assert sum(read) == reply.usage.prompt_tokens - 1 + 3 * 4 and read.count(1) == 3 * 4
    assert len({choice.message.content for choice in reply.choices}) == 1, "greedy: each goes on from the prompt alone"


@pytest.mark.parametrize("n", [1, 2])
def test_streams_are_the_whole_answer_in_pieces(client, n):
    options = {"seed": 3, "temperature": 1, "n": n, "max_tokens": 24, "extra_body": {"thinking": {"type": "enabled"}}}
    whole = ask(client, **options)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}, **options))
    for i, choice in enumerate(whole.choices):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == i]
        assert mine[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in mine) == choice.message.content
        reasoning = "".join(getattr(c.delta, "reasoning_content", "") for c in mine)
        assert reasoning == getattr(choice.message, "reasoning_content", "")
        assert [c.finish_reason for c in mine if c.finish_reason] == [choice.finish_reason]
        assert mine[-1].model_extra.get("format_error") == choice.model_extra.get("format_error")
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize(("options", "thinking"), [
    ({}, False),
    ({"reasoning_effort": "none"}, False),
    ({"reasoning_effort": "high"}, True),
    ({"extra_body": {"thinking": {"type": "enabled"}}}, True),
    ({"reasoning_effort": "high", "extra_body": {"thinking": {"type": "disabled"}}}, False),
])  # fmt: skip
def test_thinking_mode(client, voice, options, thinking):
    reply = ask(client, **options)
    ids, _, text = expected(voice, HI, 12, thinking)
    message, counts = reply.choices[0].message, reply.usage
    assert counts.prompt_tokens == len(ids)
    assert (message.reasoning_content if thinking else message.content) == text
    assert counts.completion_tokens_details.reasoning_tokens == (12 if thinking else 0)


def test_maximal_effort_is_asked_for(client, voice):
    longer = ask(client, reasoning_effort="xhigh", max_tokens=1).usage.prompt_tokens
    assert longer == len(prompt(voice, HI, thinking=True, effort="max")) > len(prompt(voice, HI, thinking=True))


def test_text_completions(client, voice):
    ids = [BYTES.bos, *b"once"]
    written = generate(voice.model, ids, max_new_tokens=9, temperature=0)
    reply = client.completions.create(model="tiny", prompt="once", max_tokens=9, temperature=0)
    assert reply.choices[0].text == BYTES.decode(written) and reply.usage.prompt_tokens == 5
    chunks = client.completions.create(model="tiny", prompt=["once"], max_tokens=9, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == BYTES.decode(written)


def test_stop_texts(client, voice):
    text = expected(voice, HI, 60)[2]
    stop = text[5:7]
    reply = ask(client, max_tokens=60, stop=[stop, "never said"])
    assert reply.choices[0].message.content == text[: text.index(stop)]
    assert reply.choices[0].finish_reason == "stop" and reply.usage.completion_tokens < 60


# tools and JSON


def test_a_tool_call_that_is_required(client):
    reply = ask(client, tools=[ADD], tool_choice="required", temperature=1, seed=1, max_tokens=300)
    choice = reply.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    for call in choice.message.tool_calls:
        arguments = json.loads(call.function.arguments)
        assert call.function.name == "add" and isinstance(arguments["a"], int) and arguments["how"] in ("up", "down")
    sub = {"type": "function", "function": {"name": "sub"}}
    named = {"type": "function", "function": {"name": "sub"}}
    reply = ask(client, tools=[ADD, sub], tool_choice=named, parallel_tool_calls=False, temperature=1, max_tokens=300)
    assert [call.function.name for call in reply.choices[0].message.tool_calls] == ["sub"]


def test_a_tool_call_in_a_stream_and_its_result(client):
    options = {"temperature": 1, "seed": 1, "max_tokens": 200, "parallel_tool_calls": False}
    chunks = [c.choices[0] for c in ask(client, stream=True, tools=[ADD], tool_choice="required", **options)]
    (call,) = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    arguments = json.loads(call.function.arguments)
    assert (call.index, call.function.name, chunks[-1].finish_reason) == (0, "add", "tool_calls")
    assert isinstance(arguments["a"], int) and not any(chunk.delta.content for chunk in chunks)
    said = {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]}
    result = {"role": "tool", "tool_call_id": call.id, "content": "2"}
    reply = ask(client, [*HI, said, result], tools=[ADD], max_tokens=5)
    assert reply.usage.prompt_tokens > 1000


@pytest.mark.parametrize(("fields", "grammar"), [
    ({}, None),
    ({"tools": [ADD]}, tool_calls([ADD])),
    ({"tools": [ADD], "tool_choice": "none"}, None),
    ({"tools": [ADD], "tool_choice": "required"}, tool_calls([ADD], "required")),
    ({"tools": [ADD], "parallel_tool_calls": False}, tool_calls([ADD], parallel=False)),
    ({"response_format": {"type": "json_object"}}, json_schema({"type": "object"})),
    ({"response_format": {"type": "text"}}, None),
])  # fmt: skip
def test_what_answers_are_held_to(fields, grammar):
    assert grammar_of(read_chat({"model": "tiny", "messages": HI, **fields})) == grammar


def test_json_as_a_schema_says(client):
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "number", "schema": schema}}
    for thinking in ("disabled", "enabled"):
        extra = {"thinking": {"type": thinking}}
        reply = ask(client, response_format=form, temperature=1, seed=2, max_tokens=120, extra_body=extra)
        assert isinstance(json.loads(reply.choices[0].message.content)["n"], int)
        assert reply.choices[0].finish_reason == "stop" and "format_error" not in reply.choices[0].model_extra
    reply = ask(client, response_format={"type": "json_object"}, temperature=1, seed=2, max_tokens=120)
    assert isinstance(json.loads(reply.choices[0].message.content), dict)


def test_tools_that_may_not_be_called_are_not_shown(client, voice):
    reply = ask(client, tools=[ADD], tool_choice="none", max_tokens=1)
    assert reply.usage.prompt_tokens == len(prompt(voice, HI))
    assert ask(client, tools=[ADD], max_tokens=60).usage.prompt_tokens == len(prompt(voice, HI, tools=[ADD]))


# what is refused

MISSING, TOO_LONG = "missing_required_parameter", "context_length_exceeded"
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "x"}


def tool(**function):
    return {"type": "function", "function": function}


def schema(**named):
    return {"type": "json_schema", "json_schema": named}


BAD = [
    ({"messages": None}, "messages", "missing_required_parameter"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": "hi"}, "messages", "invalid_value"),
    ({"messages": ["hi"]}, "messages[0]", "invalid_type"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "invalid_value"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_value"),
    ({"messages": [{"role": "user", "content": "x", "name": "Bo"}]}, "messages[0].name", "unknown_parameter"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].type", "invalid_value"),
    ({"messages": [*HI, {"role": "assistant", "content": "x"}]}, "messages", "invalid_value"),
    ({"messages": [*HI, RESULT]}, "messages[1].tool_call_id", "invalid_value"),
    ({"messages": [{"role": "latest_reminder", "content": ""}, *HI]}, "messages", "invalid_value"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"max_tokens": True}, "max_tokens", "invalid_value"),
    ({"max_completion_tokens": 5}, "max_tokens", "invalid_value"),
    ({"temperature": -1}, "temperature", "invalid_value"),
    ({"temperature": "hot"}, "temperature", "invalid_value"),
    ({"temperature": 10**400}, "temperature", "invalid_value"),
    ({"top_p": 10**400}, "top_p", "invalid_value"),
    ({"seed": 10**400}, "seed", "invalid_value"),
    ({"max_tokens": 1e300}, "max_tokens", "invalid_value"),
    ({"top_p": 0}, "top_p", "invalid_value"),
    ({"seed": 0.5}, "seed", "invalid_value"),
    ({"n": 9}, "n", "invalid_value"),
    ({"stop": [""]}, "stop", "invalid_value"),
    ({"stop": ["x"] * 17}, "stop", "invalid_value"),
    ({"stream": "yes"}, "stream", "invalid_value"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"stream": True, "stream_options": {"other": 1}}, "stream_options.other", "unknown_parameter"),
    ({"presence_penalty": 0.5}, "presence_penalty", "unsupported_parameter"),
    ({"logprobs": True}, "logprobs", "unsupported_parameter"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter"),
    ({"temprature": 1}, "temprature", "unknown_parameter"),
    ({"reasoning_effort": "huge"}, "reasoning_effort", "invalid_value"),
    ({"thinking": {"type": "on"}}, "thinking.type", "invalid_value"),
    ({"thinking": True}, "thinking", "invalid_type"),
    ({"tools": [{"type": "web"}]}, "tools[0].type", "invalid_value"),
    ({"tools": [tool(name="a b")]}, "tools[0].function.name", "invalid_value"),
    ({"tools": [ADD, ADD]}, "tools", "invalid_value"),
    ({"tools": [tool(name="f", parameters=3)]}, "tools[0].function.parameters", "invalid_value"),
    ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
    ({"tools": [ADD], "tool_choice": tool(name="x")}, "tool_choice", "invalid_value"),
    ({"tools": [ADD], "response_format": {"type": "json_object"}}, "response_format", "invalid_value"),
    ({"tools": [ADD], "tool_choice": "required"}, "max_tokens", "invalid_value"),
    ({"tools": [tool(name="f", parameters={"type": "array"})]}, "tools", "unsupported_schema"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_value"),
    ({"response_format": schema(name="x")}, "response_format.json_schema.schema", MISSING),
    ({"response_format": schema(name="x", schema={"type": "strange"})}, "response_format", "unsupported_schema"),
    ({"max_tokens": 2043}, "messages", TOO_LONG),
    ({"messages": [{"role": "user", "content": "x" * 2048}], "max_tokens": None}, "messages", TOO_LONG),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param", "code"), BAD, ids=[f"{i} {param}" for i, (_, param, _) in enumerate(BAD)])
def test_a_bad_field_is_named(address, fields, param, code):
    reply = post(address, **{"messages": HI, **fields})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["code"]) == (400, param, code), error["message"]
    assert error["type"] == "invalid_request_error"
    assert param in error["message"] or code == TOO_LONG


NEUTRAL = {
    "user": "me", "metadata": {"a": "b"}, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {},
    "logprobs": False, "top_logprobs": None, "service_tier": "auto", "store": False, "parallel_tool_calls": True,
    "modalities": ["text"],
    "stop": None, "tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "n": 1,
    "reasoning_effort": None,
}  # fmt: skip


def test_labels_and_neutral_values_change_nothing(address):
    plain, labelled = (post(address, messages=HI, temperature=0, **fields).json() for fields in ({}, NEUTRAL))
    assert plain["choices"] == labelled["choices"]


BODIES = [
    (b"", 400), (b"{", 400), (b"[]", 400), (b"null", 400), (b"\xff\xfe", 400), (b'{"a": NaN}', 400),
    (b'{"a": 1e999}', 400), (b'{"a": 1%s}' % (b"0" * 5000), 400), (b'{"a": "\x00"}', 400),
    (b'{"a":' * 200 + b"1" + b"}" * 200, 400),
    (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', 400), (b"[" * 100_000, 400),
    (b'{"model": "tiny", "messages": "' + b"x" * 200_001 + b'"}', 413), (b'{"messages": []}', 400),
]  # fmt: skip


def test_schemas_nested_without_end(address):
    deep = {"type": "integer"}
    for depth in range(1, 900):
        deep = {"type": "array", "items": deep}
        if depth in (150, 300, 899):
            reply = post(address, messages=HI, response_format=schema(name="deep", schema=deep))
            assert reply.status_code == 400 and reply.json()["error"]["message"]


@pytest.mark.parametrize(("body", "status"), BODIES, ids=range(len(BODIES)))
def test_malformed_bodies(address, body, status):
    reply = HTTP.post(f"{address}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert reply.status_code == status and reply.json()["error"]["message"]


def test_other_addresses_methods_hosts_and_types(address):
    assert HTTP.get(f"{address}/v1/embeddings").json()["error"]["code"] == "not_found"
    assert HTTP.get(f"{address}/v1/chat/completions").json()["error"]["code"] == "method_not_allowed"
    assert post(address, messages=HI, model="gpt").json()["error"]["code"] == "model_not_found"
    other = HTTP.get(f"{address}/v1/models", headers={"Host": "evil.example:80"})
    assert (other.status_code, other.json()["error"]["code"]) == (403, "forbidden_host")
    form = HTTP.post(f"{address}/v1/chat/completions", content=b"{}", headers={"Content-Type": "text/plain"})
    assert (form.status_code, form.json()["error"]["code"]) == (415, "unsupported_media_type")


def test_what_goes_wrong_inside_stays_inside(voice, monkeypatch, caplog):
    def broken(*arguments, **options):
        raise RuntimeError("secret")

    with serving(voice) as address:
        monkeypatch.setattr("abyssal.train.talk.serve.prepare.speak", broken)
        whole, stream = post(address, messages=HI), post(address, messages=HI, stream=True)
        monkeypatch.setattr("abyssal.train.talk.serve.app.prepare_chat", broken)
        early = post(address, messages=HI)
        monkeypatch.undo()
        assert post(address, messages=HI).status_code == 200
    assert whole.status_code == early.status_code == 500
    assert whole.json()["error"]["code"] == early.json()["error"]["code"] == "internal_error"
    assert '"code": "internal_error"' in stream.text and stream.text.endswith("data: [DONE]\n\n")
    assert not any("secret" in reply.text for reply in (whole, early, stream))
    assert "secret" in caplog.text


# what one client cannot do to the server

HEAVY = {
    "two multiples": {"allOf": [{"type": "integer", "multipleOf": 1000003}, {"multipleOf": 999983}]},
    "many names": {"type": "object", "required": [f"n{i}" for i in range(40_000)]},
}


LONG = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "string"}}}


@pytest.fixture(scope="module")
def grammars():
    grammars = Grammars(BYTES)
    yield grammars
    grammars.close()


def asked(schema):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return read_chat({"model": "tiny", "messages": HI, "response_format": form})


def followers():
    """The processes that follow grammars, of all servers here."""
    children = [Path(f"/proc/{child}/task/{child}/children") for child in below(os.getpid())]
    return [child for each in children for child in map(int, each.read_text().split())]


def below(process):
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


processes = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="/proc tells which processes there are")


def follows(grammars):
    """Whether a grammar can still be made, and followed."""
    held = asyncio.run(grammars.make(asked({"const": 7}), 5))
    walk, words = held.walk(5), np.zeros((1, 9), np.int32)
    walk.fill(words, 0)
    assert np.unpackbits(words.view(np.uint8), bitorder="little").nonzero()[0].tolist() == [ord("7")]
    assert walk.take(ord("7")) == ord("7") and not walk.complete
    walk.back()
    assert walk.take(ord("7")) == ord("7") and walk.take(BYTES.eos) == BYTES.eos and walk.complete
    held.close()


@pytest.mark.parametrize("name", HEAVY)
def test_a_grammar_beyond_all_limits_costs_one_request(grammars, name):
    with pytest.raises(ApiError) as caught:
        asyncio.run(grammars.make(asked(HEAVY[name]), 50))
    assert (caught.value.status, caught.value.code, caught.value.param) == (
        400,
        "unsupported_schema",
        "response_format",
    )
    follows(grammars)


@processes
def test_a_follower_that_is_not_needed_any_more_ends(grammars, voice):
    async def leave():
        making = asyncio.create_task(grammars.make(asked(HEAVY["two multiples"]), 50))
        await asyncio.to_thread(wait_for, lambda: followers() or making.done())
        making.cancel()

    asyncio.run(leave())
    wait_for(lambda: not followers())
    follows(grammars)
    with serving(voice) as address:
        body = {"model": "tiny", "messages": HI, "max_tokens": 1500, "temperature": 0, "response_format": LONG}
        with HTTP.stream("POST", f"{address}/v1/chat/completions", json={**body, "stream": True}) as reply:
            assert next(reply.iter_text()).startswith("data: ") and len(followers()) == 1
        wait_for(lambda: not followers())


@processes
def test_a_library_that_breaks_while_a_text_is_written(address):
    fields = {"messages": HI, "max_tokens": 1500, "temperature": 0, "response_format": LONG}
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(post, address, **fields)
        wait_for(lambda: followers() or whole.done())
        kill(followers(), signal.SIGSEGV)
        assert (whole.result().status_code, whole.result().json()["error"]["code"]) == (400, "unsupported_schema")
    body = {"model": "tiny", "stream": True, **fields}
    with HTTP.stream("POST", f"{address}/v1/chat/completions", json=body) as reply:
        chunks = reply.iter_text()
        said = next(chunks)
        kill(followers(), signal.SIGSEGV)
        said += "".join(chunks)
    assert '"unsupported_schema"' in said and said.endswith("data: [DONE]\n\n")
    assert post(address, messages=HI).status_code == 200


def kill(processes, number):
    for process in processes:
        os.kill(process, number)


@processes
def test_followers_that_end_together_leave_their_nursery_alone(grammars):
    """It learns of their ends between two commands, never by a signal in the middle of one, or of another signal."""

    async def many():
        return await asyncio.gather(*(grammars.make(asked({"const": 7}), 5) for _ in range(8)))

    held = asyncio.run(many())
    nursery = grammars._nursery._process.pid
    caught = next(line for line in Path(f"/proc/{nursery}/status").read_text().splitlines() if "SigCgt" in line)
    assert not int(caught.split()[1], 16) >> signal.SIGCHLD - 1 & 1
    kill(below(nursery), signal.SIGKILL)
    for each in held:
        each.close()
    follows(grammars)
    assert grammars._nursery._process.pid == nursery


@processes
def test_a_nursery_that_is_lost_is_started_again():
    grammars = Grammars(BYTES)
    follows(grammars)
    lost = grammars._nursery._process.pid
    kill([lost], signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        asks = pool.submit(follows, grammars)
        time.sleep(0.2)
        kill([lost], signal.SIGKILL)
        with pytest.raises(ApiError, match="was lost: try again") as caught:
            asks.result()
    assert caught.value.status == 503
    follows(grammars)
    process = grammars._nursery._process
    kill([process.pid], signal.SIGKILL)
    wait_for(lambda: Path(f"/proc/{process.pid}/stat").read_text().split()[2] == "Z")
    process.poll = lambda: process.returncode  # nobody has waited for it yet: all that shows is its closed socket
    follows(grammars)
    grammars.close()


def test_changed_requests(voice):
    report = fuzz(80, seed=1, voice=voice)
    assert not report.failures and report.statuses[200] and report.statuses[400]


def test_numbers_beyond_float64_are_named():
    with pytest.raises(ApiError, match="allowed are numbers that float64 holds") as raised:
        parse_object(b'{"temperature": 1, "tools": [{"function": {"parameters": {"maximum": 1e400}}}]}')
    assert (raised.value.status, raised.value.param) == (400, "tools[0].function.parameters.maximum")


def test_signs_of_clients_in_the_log():
    record = logging.LogRecord("x", logging.INFO, "x", 1, "GET %s", ("/\x1b[2J\r\n\x9b\u2028é",), None)
    assert PrintableFormatter("%(message)s").format(record) == r"GET /\x1b[2J\r\n\x9b\u2028é"
    try:
        raise ValueError("\x1b]0;")
    except ValueError:
        record.exc_info = sys.exc_info()
    lines = PrintableFormatter("%(message)s").format(record).split("\n")
    assert len(lines) > 2 and all(line.isprintable() for line in lines) and lines[-1] == r"ValueError: \x1b]0;"


def talk(address, *parts):
    """What the server says to these bytes until it closes."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=patience.SECONDS) as connection:
        for part in parts:
            connection.sendall(part)
        return b"".join(iter(lambda: connection.recv(4096), b"")).decode()


POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
GET = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(("sent", "status", "code"), [
    (b"", 408, "timeout"),
    (b"GE", 408, "timeout"),
    (POST, 408, "timeout"),
    (POST + b"Content-Length: 9\r\n\r\n{", 408, "timeout"),
    (POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", 408, "timeout"),
    (GET + GET + POST, 408, "timeout"),
    (b"\0\1\2\r\n\r\n", 400, "invalid_http"),
    (POST + b"X: " + b"x" * 20_000, 400, "invalid_http"),
    (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400, "invalid_http"),
    (POST + b"Content-Length: -1\r\n\r\n", 400, "invalid_http"),
])  # fmt: skip
def test_connections_end(address, monkeypatch, caplog, sent, status, code):
    monkeypatch.setattr("abyssal.train.talk.serve.connections.HEAD_SECONDS", 0.5)
    monkeypatch.setattr("abyssal.train.talk.serve.app.BODY_SECONDS", 0.3)
    said = talk(address, sent)
    last = said[said.rindex("HTTP/1.1 ") :]
    assert last.startswith(f"HTTP/1.1 {status} ") and json.loads(last.partition("\r\n\r\n")[2])["error"]["code"] == code
    assert said.count("HTTP/1.1 200") == sent.count(b"GET")
    assert "Traceback" not in caplog.text


def test_a_client_that_does_not_read_is_cut_off(voice, monkeypatch):
    monkeypatch.setattr("abyssal.train.talk.serve.run.SENDING", 1.0)
    with serving(voice, timeout=0.5) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((host, int(port)))
            connection.settimeout(0.2)
            with contextlib.suppress(OSError):  # no longer read from, or cut
                while True:
                    connection.sendall(GET.replace(b"models", b"x" * 15_000) * 100)  # the answer says it again
            wait_for(lambda: cut(connection))


def cut(connection):
    try:
        return connection.send(b"x") == 0
    except TimeoutError:
        return False
    except OSError:
        return True


def test_more_connections_than_there_may_be(voice, monkeypatch):
    monkeypatch.setattr("abyssal.train.talk.serve.connections.MOST", 2)
    with serving(voice) as address:
        host, port = address.removeprefix("http://").split(":")
        idle = [socket.create_connection((host, int(port))) for _ in range(2)]
        said = talk(address)
        assert said.startswith("HTTP/1.1 503 ") and '"overloaded"' in said
        for connection in idle:
            connection.close()
        wait_for(lambda: "200 OK" in talk(address, GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")))


def test_no_file_descriptors_left(monkeypatch, caplog):
    real, left = socket.socket.accept, [False, True, False, True, True]

    def accept(listening):
        if not left.pop(0):
            raise OSError(errno.EMFILE, "Too many open files")
        return real(listening)

    monkeypatch.setattr(socket.socket, "accept", accept)
    with bind("127.0.0.1", 0) as listening:
        for _ in range(2):
            with socket.create_connection(listening.getsockname()) as turned_away:
                with pytest.raises(BlockingIOError):
                    listening.accept()
                assert turned_away.recv(1) == b""
        with socket.create_connection(listening.getsockname()):
            listening.accept()[0].close()
    assert caplog.text.count("no file descriptors are left") == 1


HUNG = """
import time
from abyssal.train.cli import main
from abyssal.train.talk.serve import prepare, run
run.GRACE, run.HEARD, run.LAST = {grace}, 0.1, {last}
prepare.speak = lambda *arguments: time.sleep(1000)
main(["serve", "--random", "nano", "--port", "0"])
"""


@pytest.mark.parametrize(("grace", "last", "signals"), [(0.1, 1.0, 1), (1000, 1000, 2)])
def test_a_hung_server_ends_when_it_is_told_to(grace, last, signals):
    command = [sys.executable, "-c", HUNG.format(grace=grace, last=last)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        line = next(line for line in process.stderr if "http://" in line)
        address = line.split(" at ")[1].removesuffix("/v1\n")
        with ThreadPoolExecutor(1) as pool:
            hung = pool.submit(HTTP.post, f"{address}/v1/completions", json={"model": "nano-random", "prompt": "x"})
            wait_for(lambda: health(address)["running"])
            for _ in range(signals):
                process.send_signal(signal.SIGTERM)
                time.sleep(0.5)
            assert process.wait(20) == 128 + signal.SIGTERM
            assert hung.exception() or hung.result().status_code == 503
        assert "stopped: " in process.stderr.read()


# crowds


def test_many_clients_at_once_get_what_each_would_get_alone(client, voice):
    """64 conversations of their own, whole and streamed, greedy and drawn."""

    def options(i):
        messages = [{"role": "user", "content": f"number {i}" * (1 + i % 3)}]
        return messages, {"max_tokens": 3, "temperature": i % 2, "seed": i}

    def one(i):
        messages, chosen = options(i)
        if i % 4 < 2:
            return ask(client, messages, **chosen).choices[0].message.content
        return "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, messages, stream=True, **chosen))

    with ThreadPoolExecutor(64) as pool:
        together = list(pool.map(one, range(64)))
    for i in range(0, 64, 5):
        messages, chosen = options(i)
        count = chosen.pop("max_tokens")
        assert together[i] == expected(voice, messages, count, **chosen)[2]
    assert len(set(together)) > 50


async def leave(address, turned_away):
    """A client whose long request runs, three behind it, and one too many; the three go away, then the first."""
    url = f"{address}/v1/chat/completions"

    def busy():
        now = health(address)
        return now["running"], now["queued"]

    async def until(running, queued):
        await asyncio.to_thread(wait_for, lambda: busy() == (running, queued))

    async with httpx.AsyncClient(timeout=patience.SECONDS) as http:

        async def one(stream):
            fields = {"model": "tiny", "messages": HI, "max_tokens": 2000, "temperature": 0, "stream": stream}
            async with http.stream("POST", url, json=fields) as reply:
                await reply.aread()

        async def cancel(*tasks):
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        first = asyncio.create_task(one(True))
        await until(1, 0)
        others = [asyncio.create_task(one(stream)) for stream in (True, False, False)]
        await until(1, 3)
        turned_away.append(await asyncio.to_thread(post, address, messages=HI))
        await cancel(*others)
        await until(1, 0)
        await cancel(first)
        await until(0, 0)


def test_clients_that_go_away_free_their_places(voice, caplog):
    caplog.set_level(logging.INFO, "abyssal.serve")
    turned_away = []
    with serving(voice, queue=3) as address:
        asyncio.run(leave(address, turned_away))
        assert post(address, messages=HI).status_code == 200
    assert caplog.text.count("client gone") == 4
    assert (turned_away[0].status_code, turned_away[0].json()["error"]["code"]) == (429, "queue_full")


@processes
def test_a_stream_whose_client_has_gone_before_it_begins(voice):
    """The server's library then never asks for the first chunk: nothing in the stream could tidy up."""
    limits, worker, grammars = Limits(), Worker(4), Grammars(BYTES)
    server, submitted = Endpoints(voice, limits, worker, grammars), []
    worker.submit = submitted.append

    async def go() -> None:
        work, held = await server._prepared(lambda body: prepare_chat(voice, asked({"const": 7}), 50), b"", math.inf)
        request = Request({"type": "http"}, receive=lambda: asyncio.sleep(0, {"type": "http.disconnect"}))
        response = await respond(request, worker, replace(work, stream=True), held, math.inf)
        assert followers() and not submitted[0].cancelled
        await response({"type": "http"}, request.receive, lambda message: asyncio.sleep(0))

    asyncio.run(go())
    assert submitted[0].cancelled
    wait_for(lambda: not followers())
    grammars.close()
    worker.close()


def test_a_request_that_takes_too_long(voice):
    with serving(voice, timeout=0.3) as address:
        long = {"messages": HI, "max_tokens": 2000, "temperature": 0}
        whole, stream = post(address, **long), post(address, stream=True, **long)
        assert (whole.status_code, whole.json()["error"]["code"]) == (504, "timeout")
        assert '"code": "timeout"' in stream.text and stream.text.endswith("data: [DONE]\n\n")
        wait_for(lambda: not health(address)["running"])


def test_a_server_that_is_told_to_stop_cuts_off_what_takes_too_long(voice, monkeypatch):
    monkeypatch.setattr("abyssal.train.talk.serve.run.GRACE", 0.3)
    with ThreadPoolExecutor(2) as pool:
        with serving(voice) as address:
            long = {"messages": HI, "max_tokens": 2000, "temperature": 0}
            stream = pool.submit(post, address, stream=True, **long)
            wait_for(lambda: health(address)["running"])
            whole = pool.submit(post, address, **long)
            wait_for(lambda: health(address)["queued"])
        assert '"code": "shutting_down"' in stream.result().text and "[DONE]" in stream.result().text
        assert (whole.result().status_code, whole.result().json()["error"]["code"]) == (503, "shutting_down")


def test_addresses():
    assert [is_local(host) for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost")] == [True] * 4
    assert [is_local(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.com")] == [False] * 4
    refused = pytest.raises(ValueError, match=r"host='127.0.0.1', port=\d+: cannot listen there")
    with bind("127.0.0.1", 0) as taken, refused:
        bind("127.0.0.1", taken.getsockname()[1])
    for field in ("queue", "timeout", "max_new_tokens", "max_body"):
        for value in (0, math.inf, math.nan):
            with pytest.raises(ValueError, match=f"{field.replace('_', '-')}={value}: allowed are positive"):
                Limits(**{field: value})
    with pytest.raises(ValueError, match=r"name='a\\udcff': allowed are names in UTF-8"):
        random_voice("nano", name="a\udcff")
