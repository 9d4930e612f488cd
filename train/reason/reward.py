"""A reward that needs no judge: the completion is in V4's format and its answer is the problem's, to the letter.

R = 1 if parse(completion).content = answer, else 0         nothing in between, nothing for the working
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ...model.text.chat import ChatFormatError, parse_message_from_completion_text
from ..data.tokenizers import Tokenizer
from .tasks import Problem


@dataclass(frozen=True)
class Verdict:
    """`well_formed`: the strict parser took it (thinking is closed, the answer ended, no stray tags, no tool calls)."""

    well_formed: bool
    right: bool

    @property
    def reward(self) -> float:
        return float(self.right)


def judge(problem: Problem, mode: str, completion: Sequence[int], tokenizer: Tokenizer) -> Verdict:
    """The verdict on what a model wrote after the prompt, its eos included; a completion cut off has none."""
    try:
        message = parse_message_from_completion_text(tokenizer.decode(completion, special=True), mode)
    except ChatFormatError:
        return Verdict(False, False)
    return Verdict(not message["tool_calls"], not message["tool_calls"] and problem.accepts(message["content"]))
