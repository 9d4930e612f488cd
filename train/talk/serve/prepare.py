"""From a request to work: the prompt's tokens, how many may follow, and the steps that the worker takes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from ....model.cache import Cache
from ....model.generation.prefill import prefill
from ....model.text.constrain import Constraint, Grammar, GrammarError, json_schema, tool_calls
from ..dialogue import Answer, Delta, Reader, prompt, speak
from ..voice import Voice
from .errors import ApiError, invalid
from .replies import ChatReply, Reply, TextReply
from .request import ChatRequest, Common, TextRequest, check_model

Items = list[tuple[int, Delta | Answer]]  # what a token adds, with the number of the choice


@dataclass(frozen=True)
class Work:
    """A request that is ready for the queue. `steps` does it, in the worker's thread."""

    prompt_tokens: int
    steps: Callable[[], Iterator[Items]]
    reply: Reply
    stream: bool
    usage: bool


def prepare_chat(voice: Voice, asked: ChatRequest, max_new_tokens: int) -> Work:
    """Raises ApiError for another model, what the format has no place for, and a conversation that is too long."""
    check_model(asked.model, voice.name)
    try:
        ids = prompt(
            voice,
            asked.messages,
            thinking=asked.thinking,
            effort=asked.effort,
            tools=asked.shown,
            schema=asked.schema,
        )
    except ValueError as error:
        raise invalid("messages", str(error)) from None
    names = [tool["function"]["name"] for tool in asked.tools]

    def reader() -> Reader:
        return Reader(voice.tokenizer, asked.thinking, asked.manner.stop, names)

    constraint = _constraint(voice, asked)
    return _work(voice, asked, ids, max_new_tokens, reader, constraint, ChatReply(voice.name))


def prepare_text(voice: Voice, asked: TextRequest, max_new_tokens: int) -> Work:
    """Raises ApiError for another model, and a text that is too long."""
    check_model(asked.model, voice.name)
    ids = [voice.tokenizer.bos, *voice.tokenizer.encode(asked.prompt)]

    def reader() -> Reader:
        return Reader(voice.tokenizer, stop=asked.manner.stop)

    return _work(voice, asked, ids, max_new_tokens, reader, None, TextReply(voice.name))


def _work(
    voice: Voice,
    asked: Common,
    ids: list[int],
    max_new_tokens: int,
    reader: Callable[[], Reader],
    constraint: Constraint | None,
    reply: Reply,
) -> Work:
    manner = replace(asked.manner, max_new_tokens=_count(voice, asked, len(ids), max_new_tokens))
    if constraint is not None:
        _check_budget(constraint, manner.max_new_tokens)

    def steps() -> Iterator[Items]:
        shared = _read(voice, ids, manner.max_new_tokens) if asked.choices > 1 and len(ids) > 1 else None
        for i in range(asked.choices):
            read, seed = reader(), manner.seed
            mine = replace(manner, seed=None if seed is None else seed + i)
            for deltas in speak(voice, ids, read, mine, constraint, shared and shared.fork()):
                yield [(i, delta) for delta in deltas]
            yield [(i, read.answer)]

    return Work(len(ids), steps, reply, asked.stream, asked.usage)


def _read(voice: Voice, ids: list[int], max_new_tokens: int) -> Cache:
    """A cache of all but the last token, which every choice goes on from with a copy of its own."""
    cache = voice.model.new_cache(1, len(ids) + max_new_tokens)
    prefill(voice.model, torch.tensor([ids[:-1]], device=voice.model.head.weight.device), cache)
    return cache


def _constraint(voice: Voice, asked: ChatRequest) -> Constraint | None:
    """Calls are of the tools at hand with arguments that fit their schemas; answers in JSON fit theirs."""
    param = "tools" if asked.tools else "response_format"
    try:
        grammar = grammar_of(asked)
        if grammar is None:
            return None
        return Constraint(grammar.after_thinking() if asked.thinking else grammar, voice.tokenizer)
    except GrammarError as error:
        raise invalid(param, str(error), "unsupported_schema") from None


def grammar_of(asked: ChatRequest) -> Grammar | None:
    """What the answer is held to: calls or a text, calls only, JSON, or nothing."""
    if not asked.tools:
        return None if asked.schema is None else json_schema(asked.schema)
    if asked.schema is not None and not asked.must_call:
        raise invalid("response_format", "JSON with tools: allowed where tool_choice is none, required or a function")
    return tool_calls(asked.tools, "required" if asked.must_call else "auto", parallel=not asked.one_call)


def _check_budget(constraint: Constraint, tokens: int) -> None:
    """Raises ApiError if no answer of the required form is that short."""
    try:
        constraint.walk(tokens)
    except GrammarError as error:
        raise invalid("max_tokens", str(error)) from None


def _count(voice: Voice, asked: Common, prompt_tokens: int, max_new_tokens: int) -> int:
    """How many tokens may be written: as many as asked for, else the server's number or what the context has left."""
    room, wanted = voice.context - prompt_tokens, asked.max_tokens
    if room < (wanted or 1):
        raise ApiError(
            400,
            f"the prompt has {prompt_tokens} tokens and {wanted or 'some'} are to follow: "
            f"this model's context is {voice.context} tokens",
            param="messages" if isinstance(asked, ChatRequest) else "prompt",
            code="context_length_exceeded",
        )
    return wanted or min(room, max_new_tokens)
