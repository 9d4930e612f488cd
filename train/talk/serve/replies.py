"""Answers in the shapes of OpenAI's API: whole, or as chunks of a stream.

What is added to those shapes: `reasoning_content` beside `content`, as in DeepSeek's API, and `format_error` on a
choice whose text is not in the model's chat format. Such an answer has no tool calls: all that it says is its content.
"""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from ..dialogue import Answer, Delta

Json = dict[str, Any]


def usage(prompt_tokens: int, answers: Sequence[Answer]) -> Json:
    """Token counts: the prompt once, all that was written for every choice."""
    written = sum(answer.tokens for answer in answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": written,
        "total_tokens": prompt_tokens + written,
        "completion_tokens_details": {"reasoning_tokens": sum(answer.reasoning_tokens for answer in answers)},
    }


class Reply(ABC):
    """What all objects of one reply have in common, and the two forms that it can take."""

    prefix, whole_object, chunk_object = "", "", ""

    def __init__(self, model: str) -> None:
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._head = {"created": int(time.time()), "model": model}

    def whole(self, prompt_tokens: int, answers: Sequence[Answer]) -> Json:
        choices = [self._choice(i, answer) for i, answer in enumerate(answers)]
        counts = usage(prompt_tokens, answers)
        return {"id": self.id, "object": self.whole_object, **self._head, "choices": choices, "usage": counts}

    def chunk(self, *choices: Json, counts: Json | None = None) -> Json:
        chunk = {"id": self.id, "object": self.chunk_object, **self._head, "choices": list(choices)}
        return chunk if counts is None else {**chunk, "usage": counts}

    def opening(self, i: int) -> list[Json]:
        """The chunks that come before a choice's text."""
        return []

    @abstractmethod
    def piece(self, i: int, delta: Delta) -> Json:
        """The chunk that adds a piece of text to a choice."""

    @abstractmethod
    def closing(self, i: int, answer: Answer) -> list[Json]:
        """The chunks that end a choice."""

    @abstractmethod
    def _choice(self, i: int, answer: Answer) -> Json:
        """A choice of the whole reply."""


class ChatReply(Reply):
    """Of /v1/chat/completions."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, i: int) -> list[Json]:
        return [self.chunk(_delta(i, {"role": "assistant", "content": ""}))]

    def piece(self, i: int, delta: Delta) -> Json:
        return self.chunk(_delta(i, {FIELDS[delta.kind]: delta.text}))

    def closing(self, i: int, answer: Answer) -> list[Json]:
        calls = [{"index": k, **call} for k, call in enumerate(answer.tool_calls)]
        chunks = [self.chunk(_delta(i, {"tool_calls": [call]})) for call in calls]
        return [*chunks, self.chunk({**_delta(i, {}), **_end(answer)})]

    def _choice(self, i: int, answer: Answer) -> Json:
        message: Json = {"role": "assistant", "content": answer.content, "refusal": None}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.tool_calls:
            message |= {"content": answer.content or None, "tool_calls": answer.tool_calls}
        return {"index": i, "message": message, "logprobs": None, **_end(answer)}


class TextReply(Reply):
    """Of /v1/completions."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def piece(self, i: int, delta: Delta) -> Json:
        return self.chunk({"index": i, "text": delta.text, "logprobs": None, "finish_reason": None})

    def closing(self, i: int, answer: Answer) -> list[Json]:
        return [self.chunk({"index": i, "text": "", "logprobs": None, "finish_reason": answer.finish_reason})]

    def _choice(self, i: int, answer: Answer) -> Json:
        return {"index": i, "text": answer.content, "logprobs": None, "finish_reason": answer.finish_reason}


FIELDS = {"reasoning": "reasoning_content", "content": "content"}


def _delta(i: int, delta: Json) -> Json:
    return {"index": i, "delta": delta, "logprobs": None, "finish_reason": None}


def _end(answer: Answer) -> Json:
    error = {} if answer.error is None else {"format_error": answer.error}
    return {"finish_reason": answer.finish_reason, **error}
