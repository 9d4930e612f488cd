"""What was tuned: the toy, for five minutes of two cores, and the dense transformer that is held against it.

A trial has the time of a hundred steps of START on one core, two minutes or so. Each axis starts from the best of those
before it; START is what the toy was before it was tuned. Rows of another length are other held-out rows: a 5-gram model
scores 2.14 on clean bytes of rows of 512 and 2.13 of 256.

The dense sweep ran twice: at first each learning rate was timed by itself, and timing's noise gave it other steps.
"""

from ..suite import Arm
from ..sweep import Axis, Sweep

START = (
    "data.batch_size=4",
    "data.sequence_length=512",
    "model.num_hidden_layers=5",
    "model.compress_ratios=[0, 4, 32, 4, 32]",
    "model.hidden_size=128",
    "model.num_nextn_predict_layers=1",
    "model.hc_mult=4",
    "model.engram.max_ngram=4",
    "optim.lr=6e-3",
    "optim.warmup_steps=40",
    "train.steps=100",
    "train.minutes=0",
    "train.eval_every=0",
    "train.checkpoint_every=0",
    "train.sample_tokens=0",
)
ROWS = Axis(
    "rows",
    (
        ("data.batch_size=4", "data.sequence_length=256"),
        ("data.batch_size=8", "data.sequence_length=256"),
        ("data.batch_size=2", "data.sequence_length=512"),
        ("data.batch_size=2", "data.sequence_length=256"),
    ),
)
RATE = Axis("learning rate", (("optim.lr=4e-3",), ("optim.lr=9e-3",)))
START_ARM = Arm("start", "as it was")

TOY = Sweep(
    name="toy",
    recipe="toy",
    set=START,
    clock=START_ARM,
    tuned=START_ARM,
    axes=(
        ROWS,
        Axis(
            "layers",
            (
                ("model.num_hidden_layers=3", "model.compress_ratios=[0, 4, 32]"),
                ("model.num_hidden_layers=2", "model.compress_ratios=[4, 32]"),
            ),
        ),
        Axis("width", (("model.hidden_size=64",), ("model.hidden_size=96",))),
        Axis(
            "prediction and streams",
            (
                ("model.num_nextn_predict_layers=0",),
                ("model.num_nextn_predict_layers=0", "model.hc_mult=2"),
            ),
        ),
        Axis("n-grams", (("model.engram.max_ngram=5",), ("model.engram.max_ngram=6",))),
        Axis(
            "table",
            (
                ("model.engram.vocab_size=100000",),
                ("model.engram.vocab_size=100000", "optim.engram_lr_scale=10"),
            ),
        ),
        RATE,
        Axis("smaller table", (("model.engram.vocab_size=10000",),)),
        Axis("layers again", (("model.num_hidden_layers=3", "model.compress_ratios=[0, 4, 32]"),)),
    ),
)

DENSE = Sweep(
    name="dense",
    recipe="toy",
    set=START,
    clock=START_ARM,
    tuned=Arm(
        "dense",
        "dense transformer",
        set=(
            "model.hc_mult=1",
            "model.num_nextn_predict_layers=0",
            "model.num_hidden_layers=4",
            "model.compress_ratios=[0, 0, 0, 0]",
            "model.n_shared_experts=6",
            "model.num_hash_layers=0",
        ),
        without=("model.engram",),
        variant="dense transformer",
    ),
    axes=(
        Axis(
            "layers",
            (
                ("model.num_hidden_layers=4", "model.compress_ratios=[0, 0, 0, 0]"),
                ("model.num_hidden_layers=3", "model.compress_ratios=[0, 0, 0]"),
                ("model.num_hidden_layers=2", "model.compress_ratios=[0, 0]"),
            ),
        ),
        ROWS,
        Axis(
            "width",
            (
                ("model.hidden_size=64", "model.n_shared_experts=3"),
                ("model.hidden_size=96", "model.n_shared_experts=4"),
            ),
        ),
        Axis(RATE.name, (*RATE.changes, ("optim.lr=1.3e-2",))),
    ),
)

FOUND = {  # what each sweep chose: the recipe `toy`, and its opponent
    "toy": (
        "data.batch_size=8",
        "data.sequence_length=256",
        "model.num_hidden_layers=2",
        "model.compress_ratios=[4, 32]",
        "model.hidden_size=64",
        "model.num_nextn_predict_layers=0",
        "model.hc_mult=2",
        "model.engram.max_ngram=6",
        "optim.lr=9e-3",
    ),
    "dense": (
        "model.num_hidden_layers=2",
        "model.compress_ratios=[0, 0]",
        "data.batch_size=8",
        "data.sequence_length=256",
        "model.hidden_size=96",
        "model.n_shared_experts=4",
        "optim.lr=4e-3",
    ),
}
SWEEPS = {sweep.name: sweep for sweep in (TOY, DENSE)}
