"""Python's own sources, byte by byte: what each mechanism brings to a model of a million parameters.

All suites have the same baseline, the recipe nano with Muon, a larger n-gram table and no MTP module, so that each of
its runs is made once; and the same opponent, a dense transformer that trains as long.
"""

from ..suite import Arm, Claim, Measure, Panel, Suite

TEXT = (
    "data.sequence_length=256",
    "data.batch_size=4",
    "data.held_out_rows=64",
    "model.engram.vocab_size=8870",
    "model.num_nextn_predict_layers=0",
    "optim.rule=muon",
    "optim.lr=6e-3",
    "train.steps=160",
    "train.eval_every=40",
    "train.checkpoint_every=40",
    "train.keep=1",
    "train.sample_tokens=0",
    "train.observe_every=16",
)
FULL_TEXT = ("train.steps=2000", "train.eval_every=100", "train.checkpoint_every=200", "data.held_out_rows=128")
CLEAN = Measure("clean", "held-out bits per byte, clean bytes", "lower")
HELD_OUT = Measure("held_out", "held-out bits per byte, all bytes", "lower")
TRIGRAM = Measure("trigram", "a trigram model's, all bytes")
CURVE = Panel("curve", "Held-out text over the steps", ("clean",), "bits per byte, clean bytes")
END = Panel("bars", "Held-out text at the end", ("clean",), "bits per byte, clean bytes")
SHORT = "A small model and a short run: differences that need depth, long training or a large vocabulary cannot show."
SMALL = f"{SHORT} The learning rate is one for all arms, tuned for none."

BASE = Arm("v4", "baseline")
NO_ENGRAM = ("model.engram",)
PLAIN = Arm("plain", "plain residual", set=("model.hc_mult=1",), variant="plain residual")
IDENTITY = Arm("identity", "identity mixing", variant="identity mixing")
STATIC = Arm("static", "static mHC", variant="static mHC")
TRANSFORMER = Arm(
    "dense",
    "dense transformer",
    set=(
        "model.hc_mult=1",
        "model.num_hidden_layers=2",
        "model.compress_ratios=[0, 0]",
        "model.n_shared_experts=3",
    ),
    without=NO_ENGRAM,
    variant="dense transformer",
).in_equal_time()


def suite(
    name: str,
    title: str,
    question: str,
    arms: tuple[Arm, ...],
    claims: tuple[Claim, ...],
    measures: tuple[Measure, ...] = (),
    panels: tuple[Panel, ...] = (),
    caveat: str = "",
    **more: object,
) -> Suite:
    """A suite of text: the baseline first, the opponent last."""
    return Suite(
        name=name,
        title=title,
        question=question,
        caveat=f"{SMALL} {caveat}".strip(),
        recipe="nano",
        set=TEXT,
        full=FULL_TEXT,
        arms=(BASE, *arms, TRANSFORMER),
        measures=(CLEAN, HELD_OUT, TRIGRAM, *measures),
        claims=claims,
        panels=(CURVE, END, *panels),
        **more,  # type: ignore[arg-type]
    )


DENSE = suite(
    "dense",
    "The whole model against a dense transformer in the same time",
    "Does all of it together learn more in the same time than a dense transformer, and what do experts do for it?",
    arms=(
        Arm("networks", "dense networks", set=("model.n_shared_experts=3",), variant="dense networks").in_equal_time(),
    ),
    claims=(
        Claim("the model learns better than a dense transformer in equal time", "clean", "v4", "dense-time"),
        Claim("experts learn better than dense networks in equal time", "clean", "v4", "networks-time"),
    ),
    caveat="A dense network has the width of the two experts and the shared one that a token has. On a CPU small"
    " operations cost more than their products: time favours few large ones. The dense transformer"
    " has two layers, the best of 2, 4 and 6 in this time, and no n-gram table.",
)

STREAMS = suite(
    "streams",
    "Residual streams: mHC against identity mixing, static mixing and a plain residual",
    "Do several residual streams with mixing that each token computes learn better than one, or than streams whose"
    " mixing is the same for every token, or that never mix?",
    arms=(PLAIN, PLAIN.in_equal_time(), STATIC, IDENTITY),
    claims=(
        Claim("mHC learns better than a plain residual", "clean", "v4", "plain"),
        Claim("mHC learns better than a plain residual in equal time", "clean", "v4", "plain-time"),
        Claim("mixing that tokens compute learns better than static mixing", "clean", "v4", "static"),
        Claim("streams that mix learn better than streams that do not", "clean", "v4", "identity"),
    ),
    measures=(
        Measure("gain_backward", "composite gain, backward"),
        Measure("spread", "stream spread"),
        Measure("grad_norm", "gradient norm"),
    ),
    panels=(Panel("bars", "Spread of the streams", ("spread",), "rms deviation / rms mean"),),
    caveat="mHC is a remedy for deep models: so few layers hardly need one, whatever the verdict says (see `depth`).",
)

ENGRAM = suite(
    "engram",
    "Engram: a memory of n-grams against experts, a table without a memory, and n-grams in the logits",
    "Does a table of n-grams earn its parameters, or would more experts, the gate and the projections around a table"
    " that remembers nothing, or the same table added to the logits, do as well?",
    arms=(
        Arm("logits", "n-grams in the logits", variant="n-gram logits").in_equal_time(),
        Arm("experts", "13 experts, no Engram", set=("model.n_routed_experts=13",), without=NO_ENGRAM).in_equal_time(),
        Arm("one-row", "Engram, table of one row", variant="one-row table"),
        Arm("without", "neither", without=NO_ENGRAM),
        Arm("without", "neither", without=NO_ENGRAM).in_equal_time(),
    ),
    claims=(
        Claim("Engram learns better than the same table in the logits in equal time", "clean", "v4", "logits-time"),
        Claim("Engram learns better than the same parameters in experts in equal time", "clean", "v4", "experts-time"),
        Claim("Engram learns better than none in equal time", "clean", "v4", "without-time"),
        Claim("a table of one row learns better than no Engram", "clean", "one-row", "without"),
    ),
    measures=(
        Measure("gate", "mean gate"),
        Measure("collisions", "n-grams that share a row", percent=True),
        Measure("load_cv", "variation of the experts' load"),
    ),
    caveat="Bytes have few n-grams; facts about the world, which the memory is meant for, are not in this text. A short"
    " run favours what learns at once: a row learns its n-gram from a few occurrences, layers do not. The table learns"
    " at five times the learning rate, as in the paper; experts do not.",
)

MUON = suite(
    "muon",
    "Muon against AdamW: on all linear maps, on the experts, on the rest",
    "What does Muon bring, in equal steps and equal time, and where?",
    arms=(
        Arm("adamw", "AdamW", set=("optim.rule=adamw",)),
        Arm("adamw", "AdamW", set=("optim.rule=adamw",)).in_equal_time(),
        Arm("slow", "AdamW, a third of the rate", set=("optim.rule=adamw", "optim.lr=2e-3")).in_equal_time(),
        Arm("fast", "AdamW, three times the rate", set=("optim.rule=adamw", "optim.lr=1.8e-2")).in_equal_time(),
        Arm("experts", "Muon on the experts", set=("optim.muon_on=experts",)),
        Arm("rest", "Muon on the rest", set=("optim.muon_on=rest",)),
    ),
    claims=(
        Claim("Muon learns better than AdamW in the same steps", "clean", "v4", "adamw"),
        Claim("Muon learns better than AdamW in equal time", "clean", "v4", "adamw-time"),
        Claim("Muon learns better than AdamW at a third of the rate in equal time", "clean", "v4", "slow-time"),
        Claim("Muon learns better than AdamW at three times the rate in equal time", "clean", "v4", "fast-time"),
        Claim("Muon on the experts alone learns better than AdamW", "clean", "experts", "adamw"),
        Claim("Muon on the rest alone learns better than AdamW", "clean", "rest", "adamw"),
        Claim("Muon on the rest learns better than Muon on the experts", "clean", "rest", "experts"),
    ),
    measures=(Measure("grad_norm", "gradient norm"),),
    caveat="Muon's update has the size of AdamW's by construction, but that the same rate suits both is an assumption:"
    " AdamW has three, Muon's own is not tuned. The two arms of other rates came after the first four seeds.",
)

MTP = suite(
    "mtp",
    "Multi-token prediction against none",
    "Does predicting one more token help the next one, in equal steps and equal time, and how many of its drafts are"
    " accepted?",
    arms=(
        Arm("mtp", "MTP", set=("model.num_nextn_predict_layers=1",)),
        Arm("mtp", "MTP", set=("model.num_nextn_predict_layers=1",)).in_equal_time(),
    ),
    claims=(
        Claim("MTP lowers the loss of the next token in the same steps", "clean", "mtp", "v4"),
        Claim("MTP lowers the loss of the next token in equal time", "clean", "mtp-time", "v4"),
    ),
    caveat="The module is a large part of this model and of its time; in V4 it is one layer in dozens.",
)

QUANTILE = "model.router_bias_rule=quantile"
BALANCE = suite(
    "balance",
    "The router's bias: by the sign, by quantiles, none; and which picks the balance loss counts",
    "Does the bias that moves against the load even it out, and what does that cost? Does it matter whether the balance"
    " loss counts the picks with the bias or without?",
    arms=(
        Arm("none", "no bias", set=("model.router_bias_update_speed=0",)),
        Arm("quantile", "quantile bias", set=(QUANTILE, "model.router_bias_update_speed=1")),
        Arm("running", "running mean of quantiles", set=(QUANTILE, "model.router_bias_update_speed=0.1")),
        Arm("unbiased", "loss of unbiased picks", set=("model.balance_picks=unbiased",)),
    ),
    claims=(
        Claim("the bias evens out the load", "load_cv", "v4", "none"),
        Claim("the bias lowers the loss", "clean", "v4", "none"),
        Claim("quantiles even out the load better than the sign", "load_cv", "quantile", "v4"),
        Claim("their running mean evens out the load better than the sign", "load_cv", "running", "v4"),
        Claim("quantiles lower the loss", "clean", "quantile", "v4"),
        Claim("a balance loss of unbiased picks evens out the load better", "load_cv", "unbiased", "v4"),
        Claim("a balance loss of unbiased picks lowers the loss", "clean", "unbiased", "v4"),
    ),
    measures=(
        Measure("load_max", "load of the busiest expert / mean", "lower"),
        Measure("load_cv", "variation of the load", "lower"),
    ),
    panels=(Panel("bars", "Variation of the load", ("load_cv",), "standard deviation / mean"),),
    caveat="So few experts spread more evenly by themselves than hundreds do. All arms have V3's weak balance loss. The"
    " running mean is over ten steps.",
)

DEPTH = Suite(
    name="depth",
    title="Residual streams of a deep and narrow model",
    question="Do streams that mix help a model of 24 layers, where the residual is long?",
    caveat=f"{SMALL} Twenty-four layers of width 32 are deep for their width; the remedy was made for sixty.",
    recipe="nano",
    set=(
        *TEXT,
        "model.num_hidden_layers=24",
        f"model.compress_ratios={[0, *[4, 16] * 11, 4]}",
        "model.hidden_size=32",
        "model.moe_intermediate_size=32",
        "data.sequence_length=128",
        "train.steps=120",
    ),
    full=FULL_TEXT,
    arms=(BASE, PLAIN, IDENTITY),
    measures=(CLEAN, HELD_OUT, TRIGRAM, Measure("spread", "stream spread"), Measure("grad_norm", "gradient norm")),
    claims=(
        Claim("mHC learns better than a plain residual", "clean", "v4", "plain"),
        Claim("streams that mix learn better than streams that do not", "clean", "v4", "identity"),
    ),
    panels=(CURVE, END),
)
