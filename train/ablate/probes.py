"""Probes: what is measured on a trained model when its run is over, beyond what the run's metrics hold.

A probe takes the model (ready for inference) and its recipe, and gives numbers by name.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from ...model import Transformer
from .. import own
from ..recipe import Recipe

PROMPTS, PROMPT_BYTES, TOKENS = 6, 64, 48


def acceptance(model: Transformer, recipe: Recipe) -> dict[str, float]:
    """Share of the MTP module's drafts that greedy decoding accepts, after held-out text; a model without a module is
    given an untrained one: what drafts are accepted by chance.
    """
    from ..data.corpus import load_corpus
    from ..data.source import open_tokenizer
    from ..evaluate.speculation import compare

    model = model if model.mtp else _with_untrained_module(model)
    corpus = load_corpus(recipe.data.source, recipe.data.held_out_fraction, text_key=recipe.data.text_key)
    documents, tokenizer = corpus.held_out, open_tokenizer(recipe.data.tokenizer, corpus)
    chosen = documents[:: max(1, len(documents) // PROMPTS)][:PROMPTS]
    prompts = [[tokenizer.bos, *tokenizer.encode_bytes(document.text[:PROMPT_BYTES])] for document in chosen]
    found = compare(model, prompts, TOKENS)
    return {"acceptance": found.acceptance_rate, "same_tokens": float(found.differs is None)}


def _with_untrained_module(model: Transformer) -> Transformer:
    """A copy of a model with an MTP module that has learned nothing, the same one each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drafting = Transformer(replace(model.config, num_nextn_predict_layers=1))
    drafting.load_state_dict(model.state_dict(), strict=False)
    return drafting.eval()


def opponents(model: Transformer, recipe: Recipe) -> dict[str, float]:
    """What n-gram models and compressors make of the held-out bytes that the model is scored on, with all training text
    and with what the run has read: `NAME.all.held_out`, `NAME.read.clean` and so on.
    """
    from ..data.opponents import opponents, training_text
    from ..data.source import TextSource
    from ..run.opponents import read_text
    from ..start import open_source

    source = open_source(recipe)
    if not isinstance(source, TextSource):
        raise ValueError(f"data.source={recipe.data.source!r}: allowed with the probe opponents is text")
    start = {"step": 0, "recipe": recipe.to_dict()}
    texts = {"all": training_text(source.corpus.train), "read": read_text(source, [start], recipe.train.steps)}
    found = {training: opponents(text, source.scored, source.clean) for training, text in texts.items()}
    return {
        f"{name}.{training}.{part}": value
        for training, by_name in found.items()
        for name, parts in by_name.items()
        for part, value in parts.items()
    }


PROBES: dict[str, Callable[[Transformer, Recipe], dict[str, float]]] = {
    "acceptance": acceptance,
    "opponents": opponents,
}


def probe_of(name: str) -> Callable[[Transformer, Recipe], dict[str, float]]:
    """One of ours, or a function of one's own by its reference (`train.own`)."""
    return PROBES[name] if name in PROBES else own.load(name)
