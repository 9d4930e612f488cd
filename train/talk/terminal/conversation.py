"""A conversation that goes on: its messages, and a cache that is read only where the prompt has changed.

    turn 1   prompt                                      answer
    turn 2   prompt  answer  <｜User｜> ...
             ^^^^^^^^^^^^^^^ what the cache holds of it is not read again

In thinking mode a new question drops the reasoning of the answer before: the cache is cut back to the longest common
prefix, at most as far as an answer is long, and otherwise begun anew. Which of it happens has no effect on the tokens.
"""

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..dialogue import Answer, Delta, Manner, Reader, prompt, speak
from ..voice import Voice

if TYPE_CHECKING:
    from ....model.cache import Cache

MARGIN = 8  # special tokens around an answer


class Conversation:
    """Messages to and from a model.

    Args:
        voice: the model.
        manner: how it writes; with a seed, each answer has the next one.
        system: the system's message, which a reset keeps.
        thinking: whether it reasons first; `effort` as for `encode_messages`.
        tools: as in a request of OpenAI's API.

    Raises:
        ValueError: tools that have no form in the chat format, or a model without its special tokens.
        ModuleNotFoundError: tools, but llguidance is not installed.
    """

    def __init__(
        self,
        voice: Voice,
        manner: Manner,
        system: str = "",
        thinking: bool = False,
        effort: str | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        voice.check_chat()
        self.voice, self.manner, self.system = voice, manner, system
        self.thinking, self.effort, self.tools = thinking, effort, tools
        self.answers = 0
        self._constraint = _constraint(voice, tools, thinking)
        self._cache: Cache | None = None
        self._read: list[int] = []  # the tokens that the cache holds
        self.reset()

    def reset(self) -> None:
        """Forgets all but the system's message."""
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": self.system}] if self.system else []

    def ask(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})

    def give_result(self, call: Mapping[str, Any], result: str) -> None:
        """What came of a tool call: as much of it as leaves half of the room to what follows."""
        message = {"role": "tool", "tool_call_id": call["id"], "content": ""}
        self.messages.append(message)
        message["content"] = _cut(result, (self.voice.context - len(self._prompt())) // 2)

    def answer(self, answer: list[Answer]) -> Generator[list[Delta], None, None]:
        """Text of the next answer as it comes. At the end, or where the caller stops, what was said is a message; an
        answer that was stopped before its first word is none.

        Args:
            answer: the answer is appended to it.

        Raises:
            ValueError: a message that the format has no place for, or a conversation longer than the context.
        """
        ids = self._prompt()
        room = self.voice.context - len(ids)
        if room < 1:
            raise ValueError(f"the conversation has {len(ids)} tokens: the context is {self.voice.context}")
        seed = self.manner.seed
        manner = replace(
            self.manner,
            max_new_tokens=min(self.manner.max_new_tokens, room),
            seed=None if seed is None else seed + self.answers,
        )
        names = [tool["function"]["name"] for tool in self.tools]
        reader = Reader(self.voice.tokenizer, self.thinking, manner.stop, names)
        cache = self._cut_back(ids)
        try:
            yield from speak(self.voice, ids, reader, manner, self._constraint, cache)
        finally:
            self._read = [*ids, *reader.written][: int(cache.lengths[0])]
            if reader.written:
                reader.finish()
                self.answers += 1
                self.messages.append(reader.answer.message())
                answer.append(reader.answer)

    def _prompt(self) -> list[int]:
        return prompt(self.voice, self.messages, thinking=self.thinking, effort=self.effort, tools=self.tools)

    def _cut_back(self, ids: list[int]) -> "Cache":
        """A cache that holds a beginning of the prompt, but not its last token."""
        known = next((i for i, pair in enumerate(zip(self._read, ids)) if pair[0] != pair[1]), len(self._read))
        known = min(known, len(ids) - 1)
        if self._cache is not None and known:
            try:
                self._cache.truncate(known)
                return self._cache
            except ValueError:
                pass  # further back than it can
        rewind = min(self.manner.max_new_tokens + MARGIN, self.voice.context)
        self._cache = self.voice.model.new_cache(1, self.voice.context, rewind=rewind)
        return self._cache


def _cut(text: str, room: int) -> str:
    """The beginning of a text that takes at most `room` tokens (none is shorter than a byte), and what is missing."""
    data = text.encode()
    if len(data) <= room:
        return text
    kept = data[: max(room, 0)].decode(errors="ignore")
    return f"{kept}\n[cut: {len(text) - len(kept):,} of {len(text):,} characters are left out]"


def _constraint(voice: Voice, tools: Sequence[Mapping[str, Any]], thinking: bool) -> Any:
    """So that calls are of these tools and have the arguments that they take."""
    if not tools:
        return None
    from ....model.text.constrain import Constraint, tool_calls

    grammar = tool_calls(tools)
    return Constraint(grammar.after_thinking() if thinking else grammar, voice.tokenizer)
