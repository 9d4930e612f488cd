"""Numbers of a folder that are believed only when its tensors bear them out: how many of what, and what indexes it."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .files import Header
from .names import is_shared_copy

_LAYER = re.compile(r"(?:model\.)?layers\.(\d{1,9})\.(.*)")
_GATES = ("ffn.gate.weight", "mlp.gate.weight")
_V3_MTP = re.compile(r"(eh_proj|enorm|hnorm|embed_tokens|shared_head)\b")  # which is stored as one more layer
_MTP = re.compile(r"mtp\.(\d{1,9})\.")


def check_counts(config: Any, headers: Mapping[str, Header]) -> None:
    """Layers, experts and MTP blocks are as many as are stored.

    The lengths of all lists of modules and names follow from these, so this comes before there is a list.

    Raises:
        ValueError: another number; the message names the key.
    """
    layers, drafts, mtp, experts = set[int](), set[int](), set[int](), 0
    for name, header in headers.items():
        if found := _LAYER.match(name):
            (drafts if _V3_MTP.match(found[2]) else layers).add(int(found[1]))
            experts = header.shape[0] if found[2] in _GATES and header.shape else experts
        elif (found := _MTP.match(name)) and not is_shared_copy(name):
            mtp.add(int(found[1]))
    counts = {"num_hidden_layers": len(layers - drafts), "num_nextn_predict_layers": len(mtp)}
    if config.num_hidden_layers > getattr(config, "first_k_dense_replace", 0):
        counts["n_routed_experts"] = experts
    for key, count in counts.items():
        said = getattr(config, key, count)
        if said != count:
            raise ValueError(f"{key}={said}: the checkpoint has tensors for {count}")


def check_numbers(name: str, table: Tensor, config: Any) -> None:
    """The numbers in one of our integer tables are of experts, or of classes of tokens, that there are.

    An expert may be in a row several times: transformers' tables are zeros before they are trained.

    Raises:
        ValueError: another number; the message says where the first one is.
    """
    if name.endswith(".tid2eid"):
        most = config.n_routed_experts
    else:
        most = config.engram.canonical_vocab_size or config.vocab_size
    wrong = ((table < 0) | (table >= most)).nonzero()
    if len(wrong):
        place = tuple(wrong[0].tolist())
        raise ValueError(f"{name}{list(place)} is {int(table[place])}: allowed is 0 to {most - 1}")
