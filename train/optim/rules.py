"""Which parameter learns by which rule, and why (V4 2.4; Engram 1.5; V4.1 2.5).

muon       linear maps: "everything else", which by the wording takes in the gates, the indexer and mHC's `fn`
adamw      embedding, head, norm weights, mHC's `base` and `scale`; of what the paper does not name: the sinks (a logit
           per head), `ape` (a matrix by shape, a bias by role), the convolution (a short filter per channel)
adam       Engram tables: learning rate x 5, no decay
balanced   V4.1's rule for Engram tables, embedding and head

Decay goes to linear maps and the head, never to a table (a row that is not read must not shrink), a norm or a bias.

Muon takes each *logically independent* matrix by itself. A parameter that stores several stacks them along its rows:

w13          W1 above W3, in every expert                    fn      pre above post above comb, [n | n | n^2, n d]
engram.wkv   W_K of each stream above W_V

Whether the heads of `wq_b`, the groups of `wo_a` and the two halves of CSA's compressor count as several, V4 does not
say: they are one, and several with `optim.head_wise` (V4.1: "head-wise Muon" for queries and keys).
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ...model.tables import RowTable
from ..settings import OptimConfig

STATIC = {
    "base": "static bias of mHC",
    "scale": "gating factor of mHC",
    "attn_sink": "a logit per head",
    "ape": "a matrix by shape, a bias by role: added to the gate's logits",
    "conv": "depthwise: a short filter per channel",
}
MAPS = {
    "wq_a": "queries down to their latent",
    "wq_b": "latent to the heads' queries",
    "wkv": "keys, which are the values",
    "wo_a": "outputs of each group of heads, down",
    "wo_b": "outputs of all groups to the width",
    "wgate": "logits of the pooling",
    "weights_proj": "weights of the index heads",
    "gate": "scores of the experts",
    "fn": "maps to pre, post and comb: linear, though skinny",
    "w13": "W1 and W3 apart",
    "w2": "down-projection",
    "e_proj": "embedding into the MTP module",
    "h_proj": "streams into the MTP module",
}


class Rule(NamedTuple):
    """How a parameter learns."""

    name: str  # muon, adamw, adam or balanced
    group: str  # of parameters that share decay and learning rate: muon, matrices, vectors, balanced or tables
    rows: tuple[int, ...]  # of the matrices that are stacked along the axis before the last; () for a vector
    reason: str


class Widths(NamedTuple):
    """Rows of one head or group where a parameter stacks several; 0 = all of its rows."""

    hidden: int = 0
    head: int = 0
    index_head: int = 0
    group: int = 0

    @classmethod
    def of(cls, config: Any, head_wise: bool) -> "Widths":
        """Those of a `ModelConfig`; None has none."""
        if config is None:
            return cls()
        if not head_wise:
            return cls(config.hidden_size)
        return cls(config.hidden_size, config.head_dim, config.index_head_dim, config.o_lora_rank)


def rule_of(name: str, shape: Sequence[int], optim: OptimConfig, widths: Widths) -> Rule:
    """The rule of the parameter of that name and shape.

    Raises:
        ValueError: Muon would take a tensor of three or more axes of which we do not know the matrices.
    """
    words = name.split(".")
    leaf = words[-2] if words[-1] == "weight" and len(words) > 1 else words[-1]
    whole = (shape[-2],) if len(shape) > 1 else ()
    if "engram" in words and leaf == "table":
        return Rule(optim.engram_rule, "tables", whole, f"rows of n-grams: x {optim.engram_lr_scale:g}, no decay")
    if leaf in ("embed", "head"):
        if optim.embedding_rule == "balanced":
            return Rule("balanced", "balanced", whole, f"{leaf}: a row per token (V4.1)")
        decays = "matrices" if leaf == "head" else "vectors"
        return Rule("adamw", decays, whole, "prediction head" if leaf == "head" else "embedding, no decay")
    if leaf in STATIC or "norm" in leaf or len(shape) < 2:
        return Rule("adamw", "vectors", whole, STATIC.get(leaf, "norm weight" if "norm" in leaf else "a vector"))
    reason = _reason(words, leaf, shape)
    if optim.rule == "adamw" or optim.muon_on == ("rest" if "experts" in words else "experts"):
        return Rule("adamw", "matrices", whole, reason)
    if len(shape) > 2 and leaf not in ("w13", "w2"):
        raise ValueError(f"{name} {tuple(shape)}: optim.rule='muon' knows no matrices in it; name them in rules.py")
    return Rule("muon", "muon", _rows(words, leaf, shape[-2], widths), reason)


def parameter_rules(model: nn.Module, optim: OptimConfig) -> dict[str, Rule]:
    """The rule of every parameter that learns; the rows that a `RowTable` holds count as its table."""
    widths = Widths.of(getattr(model, "config", None), optim.head_wise)
    held = {table.rows: table for table in row_tables_of(model)}
    rules = {}
    for name, parameter in model.named_parameters():
        if parameter in held:
            table = name.removesuffix("rows") + "weight"
            rules[table] = rule_of(table, held[parameter].size, optim, widths)
        elif parameter.requires_grad:
            rules[name] = rule_of(name, parameter.shape, optim, widths)
    return rules


def row_tables_of(model: nn.Module) -> list[RowTable]:
    return [module for module in model.modules() if isinstance(module, RowTable)]


class Line(NamedTuple):
    """A line of the table: parameters that differ in their layer's number only."""

    parameter: str
    copies: int
    rule: str
    matrices: str
    reason: str


def rule_lines(model: nn.Module, optim: OptimConfig) -> list[Line]:
    """Every parameter of a model, those of a kind together, in the model's order."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, RowTable):
            shapes[f"{name}.weight"] = module.size
    kinds: dict[tuple[str, Rule, tuple[int, ...]], int] = {}
    for name, rule in parameter_rules(model, optim).items():
        kind = re.sub(r"\.\d+\.", ".*.", name), rule, shapes[name]
        kinds[kind] = kinds.get(kind, 0) + 1
    return [
        Line(name, count, rule.name, _matrices(rule, shape), rule.reason)
        for (name, rule, shape), count in kinds.items()
    ]


def rule_table(lines: Iterable[Line]) -> str:
    """The lines as text: parameter, how many of it, rule, the matrices of one, why."""
    cells = [("parameter", "of it", "rule", "matrices", "why")]
    cells += [(line.parameter, str(line.copies), *line[2:]) for line in lines]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in cells)


def _rows(words: list[str], leaf: str, rows: int, widths: Widths) -> tuple[int, ...]:
    """Rows of each logically independent matrix."""
    if leaf == "fn" and "hc_head" not in words:
        n = math.isqrt(rows + 1) - 1  # rows = n^2 + 2n
        return (n, n, n * n)
    head = widths.index_head if "indexer" in words else widths.head
    one = {"w13": rows // 2, "wq_b": head, "wo_a": widths.group}.get(leaf, 0)
    if leaf in ("wkv", "wgate"):
        one = widths.hidden if "engram" in words else head
    return (one,) * (rows // one) if one else (rows,)


def _reason(words: list[str], leaf: str, shape: Sequence[int]) -> str:
    if leaf == "fn" and "hc_head" in words:
        return "map to the collapse's weights: linear, though skinny"
    if leaf == "wkv" and "engram" in words:
        return "keys of each stream, and the values"
    reason = MAPS.get(leaf, "linear map")
    return f"{reason}, each expert by itself" if len(shape) > 2 else reason


def _matrices(rule: Rule, shape: Sequence[int]) -> str:
    if rule.name != "muon":
        return " x ".join(map(str, shape))
    stack = math.prod(shape[:-2])
    counts = {rows: stack * rule.rows.count(rows) for rows in rule.rows}
    return ", ".join(f"{count} of {rows} x {shape[-1]}" for rows, count in counts.items())


def parameters_by_name(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that learn, without the rows that a `RowTable` holds, which are new in each step."""
    held = {table.rows for table in row_tables_of(model)}
    return {name: p for name, p in model.named_parameters() if p.requires_grad and p not in held}
