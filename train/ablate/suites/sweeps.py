"""What was tuned: the toy, for five minutes of two cores, and the dense transformer that is held against it.

A trial has the time of a hundred of the toy's steps on one core, a quarter of its own. Each axis starts from the best
of those before it.
"""

from ..suite import Arm
from ..sweep import Axis, Sweep

BRIEF = (
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
TOY_ARM = Arm("toy", "toy")

TOY = Sweep(
    name="toy",
    recipe="toy",
    set=BRIEF,
    clock=TOY_ARM,
    tuned=TOY_ARM,
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
    ),
)

DENSE = Sweep(
    name="dense",
    recipe="toy",
    set=BRIEF,
    clock=TOY_ARM,
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
        RATE,
    ),
)

SWEEPS = {sweep.name: sweep for sweep in (TOY, DENSE)}
