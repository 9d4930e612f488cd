"""From a request to work: the prompt's tokens, how many may follow, and the steps that the worker takes.

What an answer is held to is made ready elsewhere (`grammars.py`): it may take a while, or fail.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from ....model.cache import Cache
from ....model.generation.prefill import prefill
from ....model.text.constrain import Constraint, Grammar, json_schema, tool_calls
from ..dialogue import Answer, Delta, Reader, prompt, speak
from ..voice import Voice
from .errors import ApiError, invalid
from .replies import ChatReply, Reply, TextReply
from .request import ChatRequest, Common, TextRequest, check_model

Items = list[tuple[int, Delta | Answer]]  # what a token adds, with the number of the choice


@dataclass(frozen=True)
class Work:
    """A request that is ready for the queue, once there is a constraint if it is `held` to a form.

    `steps` does it, in the worker's thread; each choice has up to `tokens`.
    """

    prompt_tokens: int
    tokens: int
    held: ChatRequest | None
    steps: Callable[[Constraint | None], Iterator[Items]]
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

    if asked.tools and asked.schema is not None and not asked.must_call:
        raise invalid("response_format", "JSON with tools: allowed where tool_choice is none, required or a function")
    held = asked if asked.held_by else None
    return _work(voice, asked, ids, max_new_tokens, reader, held, ChatReply(voice.name))


def prepare_text(voice: Voice, asked: TextRequest, max_new_tokens: int) -> Work:
    """Raises ApiError for another model, and a text that is too long."""
    check_model(asked.model, voice.name)
    ids = [voice.tokenizer.bos, *voice.tokenizer.encode(asked.prompt)]

    def reader() -> Reader:
        return Reader(voice.tokenizer, stop=asked.manner.stop, begins=not asked.prompt)

    return _work(voice, asked, ids, max_new_tokens, reader, None, TextReply(voice.name))


def _work(
    voice: Voice,
    asked: Common,
    ids: list[int],
    max_new_tokens: int,
    reader: Callable[[], Reader],
    held: ChatRequest | None,
    reply: Reply,
) -> Work:
    manner = replace(asked.manner, max_new_tokens=_count(voice, asked, len(ids), max_new_tokens))

    def steps(constraint: Constraint | None) -> Iterator[Items]:
        shared = _read(voice, ids, manner.max_new_tokens) if asked.choices > 1 and len(ids) > 1 else None
        for i in range(asked.choices):
            read, seed = reader(), manner.seed
            mine = replace(manner, seed=None if seed is None else seed + i)
            for deltas in speak(voice, ids, read, mine, constraint, shared and shared.fork()):
                yield [(i, delta) for delta in deltas]
            yield [(i, read.answer)]

    return Work(len(ids), manner.max_new_tokens, held, steps, reply, asked.stream, asked.usage)


def _read(voice: Voice, ids: list[int], max_new_tokens: int) -> Cache:
    """A cache of all but the last token, which every choice goes on from with a copy of its own."""
    cache = voice.model.new_cache(1, len(ids) + max_new_tokens)
    prefill(voice.model, torch.tensor([ids[:-1]], device=voice.model.head.weight.device), cache)
    return cache


def grammar_of(asked: ChatRequest) -> Grammar | None:
    """What the answer is held to: calls of the tools at hand with arguments that fit their schemas or a text, calls
    only, JSON that fits its schema, or nothing.
    """
    if not asked.tools:
        return None if asked.schema is None else json_schema(asked.schema)
    return tool_calls(asked.tools, "required" if asked.must_call else "auto", parallel=not asked.one_call)


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
