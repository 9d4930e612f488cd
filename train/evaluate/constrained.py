"""Answers in JSON and tool calls from any model, trained or not: how many are valid, and what the constraint costs.

Every answer is judged by others than those who made it: `jsonschema` for JSON, the chat format's strict parser and then
`jsonschema` for calls. Batches mix schemas; tool calls are asked for in all ways (a choice of the model's, required, a
tool by name), with and without reasoning before them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from ...model import Transformer
    from ...model.generation.generate import Generation
    from ...model.text.constrain import Constraint
    from ..data.tokenizers import Tokenizer

_DATA: dict[str, Any] = json.loads(Path(__file__).with_name("schemas.json").read_text("utf-8"))
SCHEMAS: dict[str, dict[str, Any]] = _DATA["schemas"]  # to write answers for, as programs have them
TOOLS: list[dict[str, Any]] = _DATA["tools"]
CHOICES = ("auto", "required", *(tool["function"]["name"] for tool in TOOLS))


@dataclass
class Task:
    """A kind of answer: what constrains it, and what judges it."""

    name: str
    constraint: "Constraint"
    schema: Mapping[str, Any] | None = None  # None: tool calls
    thinking: bool = False

    def judge(self, text: str) -> str | None:
        """What is wrong with an answer, None if nothing is."""
        return self._judge_json(text) if self.schema is not None else self._judge_calls(text)

    def _judge_json(self, text: str) -> str | None:
        assert self.schema is not None
        return _judge(text, self.schema)

    def _judge_calls(self, text: str) -> str | None:
        from ...model.text.chat import ChatFormatError, parse_message_from_completion_text

        try:
            message = parse_message_from_completion_text(text, "thinking" if self.thinking else "chat")
        except ChatFormatError as error:
            return str(error)
        parameters = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in TOOLS}
        choice = self.name.split()[0]
        if choice != "auto" and not message["tool_calls"]:
            return "no call"
        for call in message["tool_calls"]:
            name = call["function"]["name"]
            if name not in parameters or (choice in parameters and name != choice):
                return f"call of {name}"
            wrong = _judge(call["function"]["arguments"], parameters[name])
            if wrong is not None:
                return wrong
        return None


@dataclass(frozen=True)
class Report:
    """What came out; the seconds are those of masks and of everything, prompts left out."""

    vocabulary: int
    answers: int
    failures: list[str]
    tokens: int
    mask_seconds: float
    seconds: float

    @property
    def valid(self) -> int:
        return self.answers - len(self.failures)

    def __str__(self) -> str:
        each = 1e6 / max(self.tokens, 1)
        return "\n".join(
            [
                f"answers     {self.answers:,}, {self.valid:,} of them valid",
                f"vocabulary  {self.vocabulary:,} tokens, {self.tokens:,} written",
                f"constraint  {each * self.mask_seconds:,.0f} us per token (masks, applied; an end in reach)",
                f"model       {each * (self.seconds - self.mask_seconds):,.0f} us per token",
                *(f"INVALID     {failure}" for failure in self.failures[:10]),
            ]
        )


def json_tasks(tokenizer: "Tokenizer") -> list[Task]:
    """One for each schema."""
    from ...model.text.constrain import Constraint, json_schema

    return [Task(name, Constraint(json_schema(schema), tokenizer), schema) for name, schema in SCHEMAS.items()]


def tool_tasks(tokenizer: "Tokenizer") -> list[Task]:
    """One for each choice of tools, without and with reasoning."""
    from ...model.text.constrain import Constraint, tool_calls

    tasks = []
    for choice in CHOICES:
        grammar = tool_calls(TOOLS, choice)
        tasks.append(Task(choice, Constraint(grammar, tokenizer)))
        tasks.append(Task(f"{choice} thinking", Constraint(grammar.after_thinking(), tokenizer), thinking=True))
    return tasks


def run(
    model: "Transformer",
    tokenizer: "Tokenizer",
    tasks: Sequence[Task],
    answers: int,
    tokens: int = 256,
    batch: int = 50,
    seed: int = 0,
) -> Report:
    """Writes `answers` answers of at most `tokens` tokens, the tasks in turn, and judges them.

    Raises:
        ValueError: numbers below 1, or a task for which `tokens` are too few.
        ModuleNotFoundError: jsonschema or llguidance is not installed.
    """
    from ...model import generate

    _validator()
    for name, value in (("answers", answers), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name}={value}: allowed are positive numbers")
    failures: list[str] = []
    written, mask_seconds, seconds = 0, 0.0, 0.0
    for number, part in enumerate(_parts(tasks, answers, batch)):
        stream = cast(
            "Generation",
            generate(
                model,
                [[tokenizer.bos]] * len(part),
                max_new_tokens=tokens,
                constraint=[task.constraint for task in part],
                seed=seed + number,
                stop=(),
                stream=True,
            ),
        )
        steps = list(stream)
        for row, task in enumerate(part):
            ids = [step[row] for step in steps if step[row] is not None]
            wrong = _wrong(tokenizer, task, ids, stream.stats.complete[row])
            failures += [] if wrong is None else [f"{task.name}: {wrong}"]
        written += stream.stats.new_tokens
        mask_seconds += stream.stats.mask_seconds_per_token * stream.stats.new_tokens
        seconds += stream.stats.prefill_seconds + stream.stats.decode_seconds
    return Report(tokenizer.vocab_size, answers, failures, written, mask_seconds, seconds)


def _parts(tasks: Sequence[Task], answers: int, batch: int) -> Iterator[list[Task]]:
    for start in range(0, answers, batch):
        yield [tasks[i % len(tasks)] for i in range(start, min(start + batch, answers))]


def _wrong(tokenizer: "Tokenizer", task: Task, ids: list[int], complete: bool | None) -> str | None:
    if not complete or ids[-1] != tokenizer.eos:
        return "not complete"
    try:
        text = tokenizer.decode_bytes(ids if task.schema is None else ids[:-1], special=True).decode()
    except UnicodeDecodeError as error:
        return str(error)
    return task.judge(text)


def _judge(text: str, schema: Mapping[str, Any]) -> str | None:
    try:
        value = json.loads(text)
    except ValueError as error:
        return f"{error}: {text}"
    wrong = next(_validator()(schema).iter_errors(value), None)
    return None if wrong is None else f"{wrong.message}: {text}"


def _validator() -> Any:
    try:
        from jsonschema import Draft202012Validator
    except ModuleNotFoundError:
        raise ModuleNotFoundError("judging JSON needs jsonschema: pip install 'abyssal[test]'") from None
    return Draft202012Validator


def open_model(
    checkpoint: "Path | None", random: str, tokenizer: str | None, seed: int
) -> "tuple[Transformer, Tokenizer]":
    """A trained model and its tokenizer, or one of random weights whose vocabulary is the tokenizer's.

    Raises:
        ValueError, FileNotFoundError: no such configuration, checkpoint or tokenizer.
    """
    import torch

    from ...model import ModelConfig, Transformer
    from ..data.tokenizers import load_tokenizer
    from ..talk.voice import open_voice

    if checkpoint is not None:
        voice = open_voice(checkpoint, tokenizer)
        voice.check_chat()
        return voice.model, voice.tokenizer
    tokens = load_tokenizer(tokenizer or "bytes")
    torch.manual_seed(seed)
    config = replace(
        ModelConfig.load(random),
        vocab_size=tokens.vocab_size,
        bos_token_id=tokens.bos,
        eos_token_id=tokens.eos,
        pad_token_id=tokens.pad,
    )
    return Transformer(config).eval(), tokens
