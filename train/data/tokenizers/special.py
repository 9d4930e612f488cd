"""The special tokens of every toy vocabulary: V4's strings (spec E.2), in a fixed order, at the end of the vocabulary.

    bos eos pad, then what the chat format uses, then reserved ids up to COUNT, so that a later string moves no id

They stand for no bytes: text that spells one of them is ordinary text unless it is encoded with `special=True`. Bars
are U+FF5C, the gap within a word is U+2581. `｜DSML｜` is a token without its angle brackets, as in the release.
"""

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
STRINGS = (
    BOS,
    EOS,
    PAD,
    "<｜System｜>",
    "<｜fim▁hole｜>",
    "<｜fim▁begin｜>",
    "<｜fim▁end｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
    "｜DSML｜",
    "<｜latest_reminder｜>",
    "<｜action｜>",
    "<｜query｜>",
    "<｜authority｜>",
    "<｜domain｜>",
    "<｜title｜>",
    "<｜extracted_url｜>",
    "<｜read_url｜>",
)
COUNT = 32  # ids at the end of a vocabulary


def special_ids(first: int) -> dict[str, int]:
    """Every special string with its id, counted from `first`."""
    return {string: first + i for i, string in enumerate(STRINGS)}
