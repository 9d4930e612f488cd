"""What was tuned: the toy, for five minutes of two cores, and the dense transformer that is held against it.

A trial has about two and a half minutes of one core, a quarter of the toy's own time. Each axis starts from the best of
those before it.
"""

from ..suite import Arm
from ..sweep import Axis, Sweep

BRIEF = (
    "train.steps=160",
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
        Axis("prediction", (("model.num_nextn_predict_layers=0",),)),
        Axis("streams", (("model.hc_mult=2",),)),
        Axis("experts", (("model.n_routed_experts=8",),)),
        Axis("n-grams", (("model.engram.max_ngram=5",), ("model.engram.max_ngram=6",))),
        Axis("table", (("model.engram.vocab_size=100000",), ("model.engram.heads=4",))),
        RATE,
        Axis("table's rate", (("optim.engram_lr_scale=2.5",), ("optim.engram_lr_scale=10",))),
        Axis("decay", (("optim.decay_share=0.7",),)),
        Axis("numbers", (("train.dtype=bfloat16",),)),
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
        Axis("decay", (("optim.decay_share=0.7",),)),
    ),
)

SWEEPS = {sweep.name: sweep for sweep in (TOY, DENSE)}
