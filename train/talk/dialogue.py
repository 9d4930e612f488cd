"""Talking to a model: messages to tokens, and tokens to the parts of an answer as they come.

    ids = prompt(voice, messages)     reader = Reader(voice.tokenizer, thinking, ...)
    for deltas in speak(voice, ids, reader, manner): ...        then reader.answer

Special tokens are control, text is text: a message that spells `<｜User｜>` is encoded as the bytes it is written with,
and a special token that the model writes where the format has no place for it is left out of the text. An answer is in
the format or it is not (strict, as in `model/text/chat.py`): tool calls are given only where the whole answer is, and
otherwise everything it says is content, with `Answer.error` saying where it went wrong.
"""

import codecs
import re
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from ...model.text.chat import (
    CALLS,
    DSML,
    END_CALLS,
    END_THINK,
    EOS,
    ChatFormatError,
    encode_messages,
    parse_message_from_completion_text,
)
from ...model.text.marked import marked
from ..data.tokenizers import Tokenizer
from .voice import Voice

if TYPE_CHECKING:
    from ...model.cache import Cache
    from ...model.generation.generate import Generation
    from ...model.text.constrain import Constraint

Message = Mapping[str, Any]
BLOCK = "\n\n" + CALLS[: CALLS.index(DSML)]  # what comes before the first DSML token of an answer


@dataclass(frozen=True)
class Manner:
    """How to write: sampling as in `generate`, and when to stop. `stop`: texts that end the answer, not part of it."""

    max_new_tokens: int = 512
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


class Delta(NamedTuple):
    """A piece of an answer's text."""

    kind: Literal["reasoning", "content"]
    text: str


@dataclass
class Answer:
    """What a model said. `tokens` counts all that it wrote, its end-of-text token too; `error`: see above."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "tool_calls"] = "length"
    error: str | None = None
    tokens: int = 0
    reasoning_tokens: int = 0

    def message(self) -> dict[str, Any]:
        """As the assistant's message of a conversation that goes on."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = self.tool_calls
        return message


# prompts -------------------------------------------------------------------------------------------------------------


def prompt(
    voice: Voice,
    messages: Sequence[Message],
    *,
    thinking: bool = False,
    effort: str | None = None,
    tools: Sequence[Message] = (),
    schema: Mapping[str, Any] | None = None,
) -> list[int]:
    """The tokens of a conversation up to where the model is to go on.

    Args:
        messages: as for `encode_messages`; the last one is a user's or a tool's. A call whose arguments are an empty
            text or null is one without any.
        effort: None, "high" or "max".
        tools: as in a request of OpenAI's API.
        schema: JSON schema of the answer, which the prompt then asks for.

    Raises:
        ValueError: what the format has no place for, what is nested too deeply, or text that is no Unicode.
    """
    voice.check_chat()
    if not messages or messages[-1].get("role") not in ("user", "tool"):
        raise ValueError("messages: the last one must be of the user or a tool, so that it is the model's turn")
    extra: dict[str, Any] = {"tools": list(tools)} if tools else {}
    extra |= {"response_format": schema} if schema is not None else {}
    if extra:
        messages = messages if messages[0]["role"] == "system" else [{"role": "system", "content": ""}, *messages]
        messages = [{**messages[0], **extra}, *messages[1:]]
    try:
        messages, mark = marked(messages, voice.tokenizer.special)
        text = encode_messages(messages, "thinking" if thinking else "chat", reasoning_effort=effort)
        return [token for part in text.split(mark) for token in voice.tokenizer.encode(part, special=True)]
    except RecursionError:
        raise ValueError("messages: a tool, a schema or arguments are nested too deeply") from None
    except UnicodeEncodeError as error:
        raise ValueError(f"messages: {error.object[error.start]!r} is no character of Unicode") from None


# answers -------------------------------------------------------------------------------------------------------------


class Reader:
    """Makes an answer of tokens: `feed` gives the text that is certain by then, `finish` the rest.

    Text is held back while it may turn out to be something else: part of a character, of a stop text, or of the
    opening of a block of tool calls. Stop texts are looked for in the answer only, not in reasoning or calls.

    Args:
        thinking: the prompt ended with `<think>`.
        stop: texts that end the answer.
        tools: names of the tools that may be called; without any, a block of calls is not in the format.
        begins: whether a text begins with the answer; None = as it does behind a special token.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        thinking: bool = False,
        stop: Sequence[str] = (),
        tools: Collection[str] = (),
        begins: bool | None = None,
    ) -> None:
        self.answer = Answer()
        self.ended = False
        self.written: list[int] = []
        self._tokenizer, self._stop, self._tools = tokenizer, tuple(stop), tools
        self._strings = {token: string for string, token in tokenizer.special.items()}
        self._begins = tokenizer.leads_again if begins is None else begins
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._state: Literal["reasoning", "content", "calls"] = "reasoning" if thinking else "content"
        self._guards = (*self._stop, *([BLOCK + DSML[0]] if tools else []))
        self._pending = self._block = ""
        self._position = 0
        self._finished = False

    def feed(self, token: int) -> list[Delta]:
        """Takes a token in; the text that it makes certain. `ended` is then true if nothing is to follow."""
        self.written.append(token)
        self.answer.tokens += 1
        self.answer.reasoning_tokens += self._state == "reasoning"
        piece = self._tokenizer.token_bytes(token)
        if piece:
            begins, self._begins = self._begins, False
            return self._text(self._decoder.decode(piece.removeprefix(self._tokenizer.lead) if begins else piece))
        self._begins = self._tokenizer.leads_again
        deltas = self._end_text()
        return deltas if self.ended else deltas + self._special(self._strings.get(token, f"<token {token}>"))

    def finish(self) -> list[Delta]:
        """Ends the answer: the text that was held back; `answer` is complete."""
        if self._finished:
            return []
        self._finished = True
        deltas = self._end_text() + self._release()
        answer = self.answer
        if self.ended:
            answer.finish_reason = "stop"
            if self._state == "reasoning":
                self._fail(f"the reasoning is not ended by {END_THINK}")
        if not self._block:
            return deltas
        try:
            calls = self._parse_calls()
        except ChatFormatError as error:
            answer.error = answer.error or str(error)
            return deltas + self._emit("content", self._plain(self._block))
        answer.tool_calls, answer.finish_reason = calls, "tool_calls"
        return deltas

    def _parse_calls(self) -> list[dict[str, Any]]:
        """The calls of the block. Raises ChatFormatError for a block, or an answer before it, not in the format."""
        if self.answer.error:
            raise ChatFormatError(self.answer.error, 0)
        start = self._position - len(self._block)
        try:
            calls = parse_message_from_completion_text(self._block)["tool_calls"]
        except ChatFormatError as error:
            raise ChatFormatError(str(error).rpartition(" (")[0], start + error.position) from None
        for call in calls:
            if call["function"]["name"] not in self._tools:
                raise ChatFormatError(f"a call of {call['function']['name']!r}, which is no tool at hand", start)
        return [{"id": f"call_{uuid.uuid4().hex[:24]}", **call} for call in calls]

    def _text(self, text: str) -> list[Delta]:
        self._position += len(text)
        if self._state == "reasoning":
            return self._emit("reasoning", text)
        if self._state == "calls":
            self._block += text
            self.ended = END_CALLS in self._block[-len(END_CALLS) - len(text) :]
            return []
        self._pending += text
        found = [at for at in map(self._pending.find, self._stop) if at >= 0]
        if found:
            self.ended, self._pending = True, self._pending[: min(found)]
            return self._release()
        held = max((_overlap(self._pending, guard) for guard in self._guards), default=0)
        return self._release(held)

    def _end_text(self) -> list[Delta]:
        """The part of a character that was left, as U+FFFD."""
        rest = self._decoder.decode(b"", final=True)
        return self._text(rest) if rest and not self.ended else []

    def _special(self, string: str) -> list[Delta]:
        at, self._position = self._position, self._position + len(string)
        if string == EOS:
            self.ended = True
            return []
        if self._state == "calls":
            self._block += string
            if string != DSML:
                self._fail(f"{string} inside a tool call", at)
            return []
        if self._state == "reasoning" and string == END_THINK:
            self._state = "content"
            return []
        if self._state == "content" and string == DSML and self._tools and self._pending.endswith(BLOCK):
            deltas = self._release(len(BLOCK))
            self._state, self._block, self._pending = "calls", self._pending + DSML, ""
            return deltas
        self._fail(f"{string} inside the text", at)
        return []

    def _fail(self, message: str, at: int | None = None) -> None:
        self.answer.error = self.answer.error or str(ChatFormatError(message, self._position if at is None else at))

    def _release(self, held: int = 0) -> list[Delta]:
        """All pending text but the last `held` characters."""
        end = len(self._pending) - held
        text, self._pending = self._pending[:end], self._pending[end:]
        return self._emit("content", text)

    def _emit(self, kind: Literal["reasoning", "content"], text: str) -> list[Delta]:
        if not text:
            return []
        setattr(self.answer, kind, getattr(self.answer, kind) + text)
        return [Delta(kind, text)]

    def _plain(self, text: str) -> str:
        """Text without special strings."""
        return re.sub("|".join(map(re.escape, self._tokenizer.special)), "", text)


def _overlap(text: str, guard: str) -> int:
    """How many last characters of the text are a beginning of the guard, not all of it."""
    return next((n for n in range(min(len(text), len(guard) - 1), 0, -1) if text.endswith(guard[:n])), 0)


def speak(
    voice: Voice,
    ids: list[int],
    reader: Reader,
    manner: Manner,
    constraint: "Constraint | None" = None,
    cache: "Cache | None" = None,
) -> Iterator[list[Delta]]:
    """Writes an answer into the reader: what each token adds (perhaps nothing), then what was held back.

    Args:
        cache: holds a beginning of `ids` and has room for all; None = a new one.

    Raises:
        ValueError: a setting of `manner` that is not allowed.
    """
    from ...model import generate

    tokens = cast(
        "Generation",
        generate(
            voice.model,
            ids,
            max_new_tokens=manner.max_new_tokens,
            temperature=manner.temperature,
            top_k=manner.top_k,
            top_p=manner.top_p,
            min_p=manner.min_p,
            seed=manner.seed,
            stop=[voice.tokenizer.eos],
            stream=True,
            constraint=constraint,
            cache=cache,
        ),
    )
    for token in tokens:
        yield reader.feed(token)
        if reader.ended:
            break
    yield reader.finish()
