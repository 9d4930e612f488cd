"""Mechanisms of later releases that this project does not have, and by which names a checkpoint shows them."""

import re
from collections.abc import Iterable

_MECHANISMS = {
    "DSpark, which drafts in place of MTP": (
        r"dspark_\w+|mtp\.\d+\.(main_proj|main_norm|markov_head|confidence_head)\b.*"
    ),
    "V4.1's shared and pooled cache": r"(kv|index|candidate)_source_layer\w*|candidate_\w+",
    "V4.1's Engram": r"engram_\w+|.*\.engram\.(embed|[qk]_weight)\b.*",
    "vision": r"vision_\w+|image_\w+|(vision|aligner)\..*|.*\.bias_vl",
}


def refuse_foreign(where: str, names: Iterable[str]) -> None:
    """Raises ValueError, with the mechanism and up to five names, if these keys or tensors have one of these."""
    names = [str(name) for name in names]
    for mechanism, pattern in _MECHANISMS.items():
        found = [name for name in names if re.fullmatch(pattern, name)]
        if found:
            shown = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
            raise ValueError(f"{where} has {shown}: they are of {mechanism}, which this project does not have")
