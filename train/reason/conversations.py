"""Problems as conversations in V4's prompt format (spec E.3), one for each mode.

<bos><｜User｜>347+586<｜Assistant｜><think>7+6=13;4+8+1=13;3+5+1=9</think>933<eos>        thinking
<bos><｜User｜>347+586<｜Assistant｜></think>933<eos>                                     chat: the answer at once

The prompt ends after `<think>` or `</think>`; what follows is the completion, the only part that is learnt.
"""

from dataclasses import dataclass

from ...model.text.chat import MODES, encode_messages
from ..data.packed import Talk
from ..data.tokenizers import Tokenizer
from .tasks import Problem

__all__ = ["MODES", "Conversation", "conversation", "prompt"]


@dataclass(frozen=True)
class Conversation:
    """Token ids before and after the point at which the model takes over."""

    prompt: list[int]
    completion: list[int]

    @property
    def talk(self) -> Talk:
        """As a document of a row."""
        return Talk(self.prompt + self.completion, [False] * len(self.prompt) + [True] * len(self.completion))

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


def prompt(problem: Problem, mode: str, tokenizer: Tokenizer) -> list[int]:
    """The ids with which a model is asked."""
    return tokenizer.encode(encode_messages([_question(problem)], mode), special=True)


def conversation(problem: Problem, mode: str, tokenizer: Tokenizer) -> Conversation:
    """Question and model answer. Raises ValueError for an unknown mode."""
    asked = encode_messages([_question(problem)], mode)
    answered = {"role": "assistant", "content": problem.answer, "reasoning_content": problem.working}
    whole = encode_messages([_question(problem), answered], mode)
    return Conversation(tokenizer.encode(asked, special=True), tokenizer.encode(whole[len(asked) :], special=True))


def _question(problem: Problem) -> dict[str, str]:
    return {"role": "user", "content": problem.question}
