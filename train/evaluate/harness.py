"""Benchmarks of lm-eval (EleutherAI's harness) on any of our models.

    python    lm_eval.simple_evaluate(model=AbyssalLM("runs/toy"), tasks=["lambada_openai"], limit=100)
    shell     abyssal eval lm runs/toy --tasks lambada_openai --limit 100

As its own models do: what is longer than the model reads loses its beginning, and texts are scored in windows that do
not overlap. Every text begins with bos, as documents do in training.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...model import Output, generate, load_pretrained
from ...model.folders import STATE, model_folder
from ..data.tokenizers import Tokenizer, load_tokenizer
from ..distributed.world import choose_device
from ..run.checkpoint import tokenizer_of

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table
except ModuleNotFoundError as error:
    if error.name != "lm_eval":
        raise
    raise ModuleNotFoundError("benchmarks need lm-eval: pip install 'abyssal[eval]'", name="lm_eval") from None

SAMPLING = ("temperature", "top_k", "top_p", "min_p")
Windows = tuple[list[int], list[int]]  # what is read, and what is scored after it


@register_model("abyssal")
class AbyssalLM(TemplateLM):
    """A model and its tokenizer, as lm-eval asks them.

    Args:
        pretrained: the folder of a model, in any layout, or of a run.
        tokenizer: as of `load_tokenizer`, or one of those; None = that of the run, or the folder's.
        device: "auto", "cpu", "cuda".
        dtype: of the weights, None = the file's.
        batch_size: texts side by side.
        max_length: tokens that are read at most; None = `max_position_embeddings`.
        max_gen_toks: tokens to write where a task does not say.

    Raises:
        FileNotFoundError, ValueError: as `load_pretrained` and `load_tokenizer`; a folder without a tokenizer.
    """

    def __init__(
        self,
        pretrained: str | Path,
        tokenizer: str | Path | Tokenizer | None = None,
        device: str = "auto",
        dtype: str | torch.dtype | None = None,
        batch_size: int | str = 8,
        max_length: int | None = None,
        max_gen_toks: int = 256,
    ) -> None:
        super().__init__()
        named = tokenizer if isinstance(tokenizer, Tokenizer | None) else load_tokenizer(tokenizer)
        self.spelling = named or _tokenizer(pretrained)
        kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        self._device = choose_device(device)
        self.model = cast(Any, load_pretrained(pretrained, self._device, kind)).eval()
        self.batch_size, self.max_gen_toks = int(batch_size), max_gen_toks
        self.max_length = max_length or self.model.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        return self.spelling.eos

    @property
    def prefix_token_id(self) -> int:
        return self.spelling.bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text, after bos unless that is not wanted."""
        return [self.spelling.bos] * (add_special_tokens is not False) + self.spelling.encode(string)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each whole text, in nats."""
        owner: list[int] = []
        windows: list[Windows] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                owner.append(number)
                windows.append(make_disjoint_window(window))
        found = [0.0] * len(requests)
        for number, (value, _) in zip(owner, self._scores(windows)):
            found[number] += value
        return found

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        return self._scores([(context, continuation) for _, context, continuation in requests])

    def _scores(self, windows: Sequence[Windows]) -> list[tuple[float, bool]]:
        """Of each continuation its log-likelihood, and whether the model would have written it greedily."""
        order = sorted(range(len(windows)), key=lambda i: -sum(map(len, windows[i])))
        found: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            found |= zip(batch, self._batch([windows[i] for i in batch]))
        return [found[i] for i in range(len(windows))]

    @torch.no_grad()
    def _batch(self, windows: Sequence[Windows]) -> list[tuple[float, bool]]:
        """As `_scores`, in one pass. Padding on the right is seen by nobody."""
        rows = [self._cut(*window) for window in windows]
        ids = pad_sequence([torch.tensor(row, device=self._device) for row in rows], batch_first=True)
        out = self.model(ids)
        scores = []
        for hidden, row, (_, wanted) in zip(out.hidden, rows, windows):
            logits = Output(hidden[None, len(row) - len(wanted) : len(row)], out.head).logits[0]
            scores.append(_score(logits, torch.tensor(wanted, dtype=torch.int64, device=self._device)))
        return scores

    def _cut(self, context: list[int], wanted: list[int]) -> list[int]:
        """What is read to score `wanted`: the end of the context, and all but the last token."""
        if len(wanted) > self.max_length:
            raise ValueError(f"a continuation has {len(wanted)} tokens: allowed is max_length={self.max_length}")
        return (context + wanted)[-(self.max_length + 1) :][:-1]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to the first of the strings that end it.

        Raises:
            ValueError: a setting of the sampling that ours does not have.
        """
        written = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        for numbers in groups.values():
            how = dict(normalize_gen_kwargs(requests[numbers[0]].args[1], self.max_gen_toks))
            until, count = cast(list[str], how.pop("until", [])), cast(int, how.pop("max_gen_toks"))
            how["temperature"] = how.get("temperature", 1.0) if how.pop("do_sample") else 0.0
            for name, value in how.items():
                if name not in SAMPLING:
                    raise ValueError(f"{name}={value!r}: allowed in generation_kwargs are {', '.join(SAMPLING)}")
            if count >= self.max_length:
                raise ValueError(f"max_gen_toks={count}: allowed are numbers below max_length={self.max_length}")
            for start in range(0, len(numbers), self.batch_size):
                batch = numbers[start : start + self.batch_size]
                prompts = [self.tok_encode(requests[i].args[0])[-(self.max_length - count) :] for i in batch]
                for i, text in zip(batch, self._write(prompts, until, count, how)):
                    written[i] = text
        return written

    def _write(self, prompts: list[list[int]], until: list[str], count: int, how: dict[str, Any]) -> list[str]:
        tokens: list[list[int]] = [[] for _ in prompts]
        going = set(range(len(prompts)))
        for step in generate(self.model, prompts, max_new_tokens=count, stop=[self.eot_token_id], stream=True, **how):
            for row in list(going):
                if step[row] is not None:
                    tokens[row].append(step[row])
                if step[row] is None or _end(self.spelling.decode(tokens[row]), until) is not None:
                    going.remove(row)
            if not going:
                break
        texts = [self.spelling.decode(row) for row in tokens]
        return [text[: _end(text, until)] for text in texts]


def _score(logits: Tensor, wanted: Tensor) -> tuple[float, bool]:
    logs = logits.log_softmax(-1)
    return logs.gather(1, wanted[:, None]).sum().item(), bool((logs.argmax(-1) == wanted).all())


def _end(text: str, until: list[str]) -> int | None:
    """Where the first of the strings begins; None where there is none of them."""
    return min((place for place in (text.find(string) for string in until if string) if place >= 0), default=None)


def _tokenizer(path: str | Path) -> Tokenizer:
    folder = model_folder(path)
    if (folder / STATE).is_file():
        return tokenizer_of(folder)
    if (folder / "tokenizer.json").is_file():
        return load_tokenizer(folder)
    raise ValueError(f"tokenizer=None: {folder} has none; allowed are 'bytes' and folders with a tokenizer.json")


def run(
    model: AbyssalLM, tasks: Sequence[str], limit: int | None = None, shots: int | None = None, include: Any = None
) -> str:
    """A table of the tasks' results; `include` is a folder of task files that is read instead of lm-eval's own.

    Raises:
        ValueError: a task that is not there.
    """
    manager = TaskManager(include_path=None if include is None else str(include), include_defaults=include is None)
    for task in tasks:
        if not manager.match_tasks([task]):
            raise ValueError(f"tasks has {task!r}: allowed are names that `lm-eval ls tasks` prints, or of {include}")
    found = simple_evaluate(model, tasks=list(tasks), limit=limit, num_fewshot=shots, task_manager=manager)
    return make_table(found)
