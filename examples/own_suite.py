"""An ablation of one's own: does LayerNorm do better than RMSNorm here? `abyssal ablate examples/own_suite.py`

A suite is a baseline, arms that differ in one thing, measures, and claims with a verdict. An arm changes keys of the
recipe (`set`, `without`) or, as here, the model (`variant`, a function). Probes are functions too: numbers of a trained
model.
"""

import sys
from pathlib import Path

import torch

from abyssal.model import Transformer
from abyssal.train.ablate.suite import Arm, Claim, Measure, Panel, Suite
from abyssal.train.recipe import Recipe

sys.path.insert(0, str(Path(__file__).parent))
from own_mechanism import layer_norm


def mean_of_hidden(model: Transformer, recipe: Recipe) -> dict[str, float]:
    """How far from zero the mean of a hidden state lies, as a share of its length: what LayerNorm would take out."""
    ids = torch.arange(64)[None] % recipe.model.vocab_size
    with torch.no_grad():
        hidden = model(ids).hidden
    return {"mean_share": float(hidden.mean(-1).abs().mean() / hidden.square().mean().sqrt())}


NORMS = Suite(
    name="norms",
    title="LayerNorm in the place of RMSNorm",
    question="Does centring the input of every sublayer help?",
    caveat="A small model and a short run.",
    recipe="nano",
    set=("data.sequence_length=256", "data.batch_size=4", "train.steps=100", "train.eval_every=50"),
    arms=(Arm("rms", "RMSNorm"), Arm("layer", "LayerNorm", variant=layer_norm)),
    measures=(
        Measure("held_out", "held-out bits per byte", "lower"),
        Measure("mean_share", "mean of the hidden states / their length"),
    ),
    claims=(Claim("LayerNorm learns better than RMSNorm", "held_out", "layer", "rms"),),
    panels=(
        Panel("curve", "Held-out text over the steps", ("held_out",), "bits per byte"),
        Panel("bars", "Mean of the hidden states", ("mean_share",), "share of their length"),
    ),
    probes=(mean_of_hidden,),
)
