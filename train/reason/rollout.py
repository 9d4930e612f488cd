"""Completions of many prompts at once, with all that an update needs to see them again as they were drawn.

    logits = prefill(prompts);   repeat:  token ~ pi(logits),  logits = model(token, cache)

Kept of each token: its log-probability, the experts and the compressed entries chosen at the position that predicted
it, and, where top-k or top-p cut the vocabulary, which tokens could be drawn. A row that has ended leaves the batch.
The random numbers are those of `generate`, so that a rollout is what `generate` writes with the same seed.

b rows · t positions of prompt and completion but each row's last, padded on the right · k experts per token, or picks ·
v vocabulary
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...model import Transformer
from ...model.generation.prefill import prefill
from ...model.generation.sampling import Draws, Sampling, pick
from ...model.routing import Picks, Routes, record_picks, record_routing
from ..data.rows import PADDING
from .policy import log_probabilities, of_tokens


@dataclass
class Rollouts:
    """What each position read, and what was written after it."""

    ids: Tensor  # int64 [b, t]
    next_ids: Tensor  # int64 [b, t]
    documents: Tensor  # int64 [b, t]: 0, and -1 where padded
    written: Tensor  # bool [b, t]: the next token is of the completion
    log_old: Tensor  # float32 [b, t] of the next token when it was drawn; 0 where not written
    experts: dict[int, Tensor]  # layer -> int64 [b, t, k], 0 where padded
    picks: dict[int, Tensor]  # CSA layer -> int64 [b, t, k], -1 where none
    kept: Tensor | None  # bool [b, t, v]: next tokens that could be drawn; None = all

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> Tensor:
        """int64 [b]: positions that are not padding."""
        return (self.documents != PADDING).sum(-1)

    def completions(self) -> list[list[int]]:
        """The ids that each row wrote."""
        return [row[mask].tolist() for row, mask in zip(self.next_ids, self.written)]

    def rows(self, which: Tensor) -> "Rollouts":
        """The rows `which`, without the columns that only longer rows need."""
        longest = int(self.lengths[which].max())
        return Rollouts(**{f.name: _rows(getattr(self, f.name), which, longest) for f in fields(self)})


def _rows(value: Any, which: Tensor, longest: int) -> Any:
    if isinstance(value, dict):
        return {layer: _rows(chosen, which, longest) for layer, chosen in value.items()}
    return None if value is None else value[which][:, :longest]


@torch.no_grad()
def roll_out(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    stop: int,
    keep_mask: bool = True,
) -> Rollouts:
    """A completion of every prompt, drawn until its `stop` token or `max_new_tokens`.

    Args:
        sampling: its temperature is above 0.
        seed: of the draws; a row's numbers depend on the seed and its place among the prompts only.
        keep_mask: record which tokens could be drawn, if top-k, top-p or min-p are on.

    Raises:
        ValueError: temperature 0, which has no log-probabilities.
    """
    if not sampling.temperature:
        raise ValueError(f"temperature={sampling.temperature}: allowed are positive numbers: greedy has no ratio")
    device = model.head.weight.device
    lengths = [len(prompt) for prompt in prompts]
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True).to(device)
    cache = model.new_cache(len(prompts), max(lengths) + max_new_tokens)
    draws, cuts = Draws(seed, len(prompts)), bool(sampling.top_k or sampling.top_p < 1 or sampling.min_p)
    notes = _Notes(prompts, max_new_tokens)
    with record_routing(model) as routes, record_picks(model) as picks:
        out = prefill(model, ids, cache, lengths if len(set(lengths)) > 1 else None, chunk=max(lengths))
        active, read = list(range(len(prompts))), [range(n) for n in lengths]
        for left in range(max_new_tokens, 0, -1):
            notes.choices(active, read, routes, picks)
            logits = out.logits[:, -1].float()
            p = sampling.probabilities(logits)
            tokens = pick(p, draws.uniform(active).to(device))
            possible = p > 0 if cuts else None
            drawn = of_tokens(log_probabilities(logits, sampling.temperature, possible), tokens)
            notes.tokens(active, tokens.tolist(), drawn.tolist(), possible if keep_mask else None)
            going = [place for place, token in enumerate(tokens.tolist()) if token != stop]
            if not going or left == 1:
                break
            if len(going) < len(active):
                cache.reorder(going)
            active = [active[place] for place in going]
            out = model(tokens[going, None], cache=cache)
            read = [range(n - 1, n) for n in map(notes.length, active)]
    return notes.rollouts(device)


class _Notes:
    """What has been written so far, on the host."""

    def __init__(self, prompts: Sequence[Sequence[int]], room: int) -> None:
        self.ids = [list(prompt) for prompt in prompts]
        self.first = [len(prompt) for prompt in prompts]
        self.log_old: list[list[float]] = [[] for _ in prompts]
        self.kept: list[list[Tensor]] = [[] for _ in prompts]
        self.experts: dict[int, Tensor] = {}
        self.picks: dict[int, Tensor] = {}
        self.room = max(self.first) + room

    def length(self, row: int) -> int:
        return len(self.ids[row])

    def choices(self, rows: list[int], read: list[range], routes: Routes, picks: Picks) -> None:
        """Takes in experts and picks of the last pass, in which rows[i] read the positions read[i]."""
        row = torch.tensor([row for row, positions in zip(rows, read) for _ in positions])
        column = torch.tensor([position for positions in read for position in positions])
        taken = [(self.experts, 0, layer, each.pop().unflatten(0, (len(rows), -1))) for layer, each in routes.items()]
        taken += [(self.picks, -1, layer, each.pop()) for layer, each in picks.items()]
        for kept, nothing, layer, chosen in taken:
            real = torch.cat([part[: len(positions)] for part, positions in zip(chosen.cpu(), read)])  # [tokens, k]
            before = kept.get(layer, torch.empty(len(self.ids), self.room, 0, dtype=torch.int64))
            wider = max(real.shape[-1] - before.shape[-1], 0)  # there are more picks as there are more entries
            kept[layer] = F.pad(before, (0, wider), value=nothing)
            kept[layer][row, column, : real.shape[-1]] = real

    def tokens(self, rows: list[int], tokens: list[int], log_old: list[float], kept: Tensor | None) -> None:
        """Takes in the next token of each row."""
        for place, row in enumerate(rows):
            self.ids[row].append(tokens[place])
            self.log_old[row].append(log_old[place])
            if kept is not None:
                self.kept[row].append(kept[place].cpu())

    def rollouts(self, device: torch.device) -> Rollouts:
        b, t = len(self.ids), max(map(len, self.ids)) - 1
        ids, next_ids = torch.zeros(2, b, t, dtype=torch.int64)
        documents = torch.full((b, t), PADDING)
        written, log_old = torch.zeros(b, t, dtype=torch.bool), torch.zeros(b, t)
        kept = torch.ones(b, t, len(self.kept[0][0]), dtype=torch.bool) if self.kept[0] else None
        for row, tokens in enumerate(self.ids):
            end, new = len(tokens) - 1, slice(self.first[row] - 1, len(tokens) - 1)
            ids[row, :end], next_ids[row, :end] = torch.tensor(tokens[:-1]), torch.tensor(tokens[1:])
            documents[row, :end], written[row, new] = 0, True
            log_old[row, new] = torch.tensor(self.log_old[row])
            if kept is not None:
                kept[row, new] = torch.stack(self.kept[row])
        experts, picks = (
            {layer: chosen[:, :t].to(device) for layer, chosen in found.items()} for found in (self.experts, self.picks)
        )
        ids, next_ids, documents, written, log_old = (
            x.to(device) for x in (ids, next_ids, documents, written, log_old)
        )
        kept = None if kept is None else kept.to(device)
        return Rollouts(ids, next_ids, documents, written, log_old, experts, picks, kept)
