"""Conversations of one's own, for supervised fine-tuning: records in, packed rows in V4's prompt format out (spec E.3).

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}], "tools": [...]}
    {"prompt": "...", "completion": "..."}                                      the same, short

Messages are those of OpenAI's API, with `reasoning_content` where the assistant has thought. What is learnt is what the
assistant wrote, that is reasoning, answer, tool calls and the eos behind them, and nothing before it; a message with
`"weight": 0` is read and not learnt.

Each answer is learnt behind the prompt that the model gets when it is to write it: the messages before it, in thinking
mode if the answer has reasoning and in chat mode otherwise. An answer whose prompt begins with all of the talk so far
goes on with it, so that most conversations are one document. Where it does not, because the format drops the reasoning
of earlier turns, it begins another document, in which the turns before it are read and not learnt again.
"""

import functools
import hashlib
import json
from array import array
from bisect import bisect_right
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ...model.fields import shown
from ...model.text.chat import ASSISTANT, BOS, DSML, END_THINK, EOS, THINK, USER, encode_messages
from ...model.text.marked import marked
from ..settings import PLANTED, ChatConfig, DataConfig
from .bits import target_bits
from .packed import PackedRows, Talk, fill, pack, stack
from .places import STDLIB, locate
from .records import Record, held_out_by_key, key_of, no_field
from .rows import Batch
from .tokenizers import Tokenizer

CONTROL = (BOS, EOS, USER, ASSISTANT, THINK, END_THINK, DSML)  # of the chat format; the others are for tasks
FIELDS = ("messages", "prompt", "completion", "tools")
ASKING = ("user", "tool", "developer")  # roles behind whose messages it is the assistant's turn


def lacking(tokenizer: Tokenizer) -> str:
    """Which special tokens of the chat format a tokenizer does not have, in words; '' if it has all."""
    missing = [string for string in CONTROL if string not in tokenizer.special]
    return f"tokenizer={tokenizer.name!r} has no {', '.join(missing)}, which the chat format is made of" * bool(missing)


def are_conversations(source: str) -> bool:
    """Whether the first record of a source is one, and not a text."""
    if source == STDLIB or source.startswith(PLANTED):
        return False
    files = locate(source, (*FIELDS, "text", "content"))[1]
    first = next(iter(files[0]), None) if files else None
    return first is not None and ("messages" in first[1] or {"prompt", "completion"} <= first[1].keys())


@dataclass(frozen=True)
class Conversation:
    """Messages in OpenAI's form, checked, the first of which has the tools."""

    messages: list[dict[str, Any]]

    @property
    def key(self) -> int:
        """A hash of all that is said."""
        said = [
            {name: part for name, part in message.items() if part not in (None, "", [])} for message in self.messages
        ]
        return key_of(json.dumps(said, sort_keys=True).encode())


def read_conversation(record: Record) -> Conversation:
    """The conversation of a record. Raises ValueError, naming the message, for what the format has no place for."""
    messages, tools = record.get("messages"), record.get("tools")
    if messages is None and isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
        messages = [{"role": "user", "content": record["prompt"]}]
        messages.append({"role": "assistant", "content": record["completion"]})
    if messages is None:
        raise no_field("a conversation", ("messages", "prompt and completion as text"), record)
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages={shown(messages)}: allowed is a list of messages")
    for i, message in enumerate(messages):
        _check(i, message, messages[i - 1] if i else None)
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("messages: none is the assistant's, from whom the model learns")
    return Conversation(_with_tools(messages, tools) if tools else messages)


def _check(i: int, message: Any, before: Mapping[str, Any] | None) -> None:
    """That a message is in the format on its own, and an answer has a question before it."""
    if not isinstance(message, dict):
        raise ValueError(f"messages[{i}]={shown(message)}: allowed is an object with role and content")
    try:
        encode_messages([message])
    except ValueError as error:
        raise ValueError(str(error).replace("messages[0]", f"messages[{i}]")) from None
    if message["role"] != "assistant":
        return
    if before is None or before["role"] not in ASKING:
        there = "nothing" if before is None else f"one of {before['role']}"
        raise ValueError(f"messages[{i}] is the assistant's behind {there}: allowed is one of {', '.join(ASKING)}")
    content = message.get("content")
    if not content and not message.get("tool_calls"):
        raise ValueError(f"messages[{i}] is the assistant's without content: allowed is text, or tool_calls")
    if message.get("weight", 1) not in (0, 1):
        raise ValueError(f"messages[{i}].weight={shown(message['weight'])}: allowed are 1, learnt, and 0, only read")
    if "reasoning" in message:
        raise ValueError(f"messages[{i}] has reasoning: allowed is reasoning_content")
    if isinstance(content, str) and content.lstrip().startswith(THINK):
        raise ValueError(f"messages[{i}] has content that begins with {THINK}: reasoning belongs in reasoning_content")


def _with_tools(messages: list[dict[str, Any]], tools: Any) -> list[dict[str, Any]]:
    """The messages, the first of them the system's, with the tools, which may be JSON."""
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
        encode_messages([{"role": "system", "tools": tools}])
    except (ValueError, TypeError):
        allowed = "allowed is a list of {'type': 'function', 'function': {...}}"
        raise ValueError(f"tools={shown(tools)}: {allowed}") from None
    first = messages if messages[0]["role"] == "system" else [{"role": "system", "content": ""}, *messages]
    return [{**first[0], "tools": tools}, *first[1:]]


def talks(conversation: Conversation, tokenizer: Tokenizer, turns: str = "all") -> list[Talk]:
    """The conversation as documents, as the module's text says.

    turns: "all", or "last": the assistant's last turn alone is learnt.
    """
    messages, mark = marked(conversation.messages, tokenizer.special)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    found: list[Talk] = []
    written = ""
    for i in answers if turns == "all" else answers[-1:]:
        mode = "thinking" if messages[i].get("reasoning_content") else "chat"
        prompt, whole = (encode_messages(messages[:end], mode) for end in (i, i + 1))
        if not found or not prompt.startswith(written):
            found.append(Talk())
            written = ""
        is_learnt = messages[i].get("weight", 1) != 0
        for text, learnt in ((prompt[len(written) :], False), (whole[len(prompt) :], is_learnt)):
            ids = [token for part in text.split(mark) for token in tokenizer.encode(part, special=True)]
            found[-1].ids.extend(ids)
            found[-1].learnt.extend([learnt] * len(ids))
        written = whole
    return found


class Talks:
    """Documents in memory, five bytes a token: those of conversation `owner[i]` (int64 [talks])."""

    def __init__(self, found: Iterator[list[Talk]]) -> None:
        ids, learnt, starts, owner = array("i"), array("b"), array("q", [0]), array("q")
        for number, of_one in enumerate(found):
            for talk in of_one:
                ids.extend(talk.ids)
                learnt.extend(talk.learnt)
                starts.append(len(ids))
                owner.append(number)
        self.ids, self.learnt = np.asarray(ids), np.asarray(learnt).view(bool)
        self.starts, self.owner = np.asarray(starts), np.asarray(owner)
        ends = np.flatnonzero(self.learnt & ~np.append(self.learnt[1:], False)) + 1
        self.of_answer = np.searchsorted(self.starts, ends, "left") - 1  # the document that an answer is in
        self.ends = ends - self.starts[self.of_answer]  # and where in it the answer ends

    def sizes(self, length: int) -> np.ndarray:
        """int64 [talks]: tokens up to the last answer that ends within `length`; 0 = none does."""
        found, fits = np.zeros(len(self.owner), np.int64), self.ends <= length
        np.maximum.at(found, self.of_answer[fits], self.ends[fits])
        return found

    def talk(self, number: int, size: int) -> Talk:
        """The first tokens of a document."""
        span = slice(self.starts[number], self.starts[number] + size)
        return Talk(self.ids[span].tolist(), self.learnt[span].tolist())


class ChatSource:
    """Conversations in packed rows; scored by bits per token of held-out answers (see `train.data.source.Source`).

    Conversations are held out by a hash of what is said in them, and copies are left out. Answers that end beyond a row
    are left out, and so is what follows them in their document. Each epoch packs the documents anew.

    Args:
        lengths: of the rows that are asked for, in tokens.
        test: hold out every conversation, of a source that is not trained on.

    Raises:
        ValueError: a record is no conversation, which is named, or there are too few, or too few fit into a row.
    """

    def __init__(
        self,
        data: DataConfig,
        chat: ChatConfig,
        tokenizer: Tokenizer,
        seed: int,
        lengths: Collection[int],
        test: bool = False,
    ) -> None:
        self.data, self.tokenizer, self.seed, self.lengths = data, tokenizer, seed, sorted(lengths)
        self.vocabulary, keys = tokenizer.vocab_size, array("Q")
        self.talks = Talks(_read(data.source, chat.turns, tokenizer, keys))
        self.keys = np.array(keys, np.uint64)
        apart = np.ones(len(keys), bool) if test else held_out_by_key(self.keys, data.held_out_fraction)
        held_out = apart[self.talks.owner]
        self.train, self.apart = np.flatnonzero(~held_out), np.flatnonzero(held_out)
        self.counts = int((~apart).sum()), int(apart.sum())
        if not all(self.counts[test:]):
            raise ValueError(f"data.source={data.source!r}: found {len(keys)} conversations, at least 2 are needed")
        for length in [] if test else self.lengths:
            self._fitting(self.train, length)
        self.held_out, self.digest = self._held_out(), self._digest()
        self._rows = functools.lru_cache(maxsize=2)(self._pack)  # of an epoch
        self._ends: dict[tuple[int, int], list[int]] = {}  # for each length and stage: rows up to each epoch

    def describe(self) -> str:
        answers, learnt = len(self.talks.ends), int(self.talks.learnt.sum())
        text = f"conversations {self.data.source}: train {self.counts[0]:,}, held out {self.counts[1]:,};"
        text += f" {answers:,} answers, {learnt:,} of {len(self.talks.ids):,} tokens"
        for length in self.lengths:
            left = int((self.talks.ends > length).sum())
            text += f"; {left:,} answers that end beyond {length:,} tokens are left out" if left else ""
        return text

    def batch(self, rows: range, length: int, stage: int = 0) -> Batch:
        return stack(self._row(number, length, stage) for number in rows)

    def evaluate(self, model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
        batches = self.held_out.batches(self.data.batch_size)
        return {"answers": float(target_bits(model, batches, dtype).sum()) / self.held_out.learnt()}

    def report(self, scores: dict[str, Any]) -> dict[str, str]:
        return {"held-out bits per answer token": f"{scores['answers']:.4f}"}

    def _row(self, number: int, length: int, stage: int) -> tuple[list[int], list[int], list[int]]:
        """Row `number` of the epochs laid end to end, whose numbers of rows differ."""
        ends = self._ends.setdefault((length, stage), [0])
        while ends[-1] <= number:
            ends.append(ends[-1] + len(self._rows(length, stage, len(ends) - 1)))
        epoch = bisect_right(ends, number) - 1
        talks = self._rows(length, stage, epoch)[number - ends[epoch]]
        return pack([self.talks.talk(*talk) for talk in talks], length, self.tokenizer.pad)

    def _pack(self, length: int, stage: int, epoch: int) -> list[list[tuple[int, int]]]:
        """The rows of an epoch, as numbers and sizes of documents: a new order of these, and then of the rows."""
        random = np.random.default_rng([self.seed, epoch, stage])
        rows = self._filled(random.permutation(self._fitting(self.train, length)), length)
        return [rows[i] for i in random.permutation(len(rows))]

    def _held_out(self) -> PackedRows:
        """`data.held_out_rows` rows, evenly spaced; 0 = all."""
        length = self.data.sequence_length
        rows = self._filled(self._fitting(self.apart, length), length)
        count = min(self.data.held_out_rows or len(rows), len(rows))
        chosen = [[self.talks.talk(*talk) for talk in rows[i * len(rows) // count]] for i in range(count)]
        return PackedRows(chosen, length, self.tokenizer.pad)

    def _digest(self) -> str:
        sha = hashlib.sha256()
        for part in (self.talks.ids, self.talks.learnt, self.talks.starts, self.apart):
            sha.update(part.tobytes())
        return f"{sha.hexdigest()} {self.tokenizer.digest}"

    def _fitting(self, documents: np.ndarray, length: int) -> np.ndarray:
        """Those that fit into a row, in part at least. Raises ValueError where none does."""
        fitting = documents[self.talks.sizes(length)[documents] > 0]
        if not len(fitting):
            which = "held-out" if documents is self.apart else "training"
            raise ValueError(
                f"data.sequence_length={length}: allowed is a length that one of the {which} answers fits in"
            )
        return fitting

    def _filled(self, order: np.ndarray, length: int) -> list[list[tuple[int, int]]]:
        sizes = self.talks.sizes(length).tolist()
        return [[(i, sizes[i]) for i in row] for row in fill(sizes, order.tolist(), length)]


def _read(source: str, turns: str, tokenizer: Tokenizer, keys: array) -> Iterator[list[Talk]]:
    """The documents of each conversation, whose key is added to `keys`; of copies the first."""
    files, seen = locate(source, FIELDS)[1], set()
    if not files:
        raise ValueError(
            f"data.source={source!r} holds no conversations: allowed with [chat] are .jsonl and .parquet files, folders"
            " and globs with some, hf:NAME and hf:NAME:CONFIG"
        )
    for file in files:
        for place, record in file:
            try:
                conversation = read_conversation(record)
                key = conversation.key
                if key not in seen:
                    found = talks(conversation, tokenizer, turns)
                    seen.add(key)
                    keys.append(key)
                    yield found
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file.where(place)}: {error}") from None
