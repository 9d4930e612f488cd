"""The suites that ship: questions about the architecture, asked at a size that two CPU cores answer.

Text suites share one baseline, the recipe nano with a larger n-gram table, so that each of its runs is made once.
"""

from collections.abc import Sequence

from ...model.fields import did_you_mean
from .. import own
from .suite import Arm, Claim, Measure, Panel, Suite

TEXT = (
    "data.sequence_length=256",
    "data.batch_size=4",
    "data.held_out_rows=32",
    "model.engram.vocab_size=8870",
    "train.steps=160",
    "train.eval_every=20",
    "train.checkpoint_every=40",
    "train.keep=1",
    "train.sample_tokens=0",
    "train.observe_every=16",
)
FULL_TEXT = ("train.steps=2000", "train.eval_every=100", "train.checkpoint_every=200", "data.held_out_rows=128")
HELD_OUT = Measure("held_out", "held-out bits per byte", "lower")
TRIGRAM = Measure("trigram", "a trigram model's, same bytes")
CURVE = Panel("curve", "Held-out text over the steps", ("held_out",), "bits per byte")
SMALL = (
    "A small model and a short run: differences that need depth, long training or a large vocabulary cannot show. The"
    " learning rate is the recipe's, tuned for no arm."
)

STREAMS = Suite(
    name="streams",
    title="Residual streams: mHC against a plain residual and static mixing",
    question="Do several residual streams with mixing that each token computes learn better than one, or than streams"
    " whose mixing is the same for every token?",
    caveat=f"{SMALL} mHC is a remedy for deep models: so few layers hardly need one, whatever the verdict says.",
    recipe="nano",
    set=TEXT,
    full=FULL_TEXT,
    arms=(
        Arm("mhc", "mHC"),
        Arm("plain", "plain residual", set=("model.hc_mult=1",), variant="plain residual"),
        Arm("static", "static mHC", variant="static mHC"),
    ),
    measures=(
        HELD_OUT,
        TRIGRAM,
        Measure("gain_forward", "composite gain, forward"),
        Measure("gain_backward", "composite gain, backward"),
        Measure("spread", "stream spread"),
        Measure("sinkhorn", "Sinkhorn residual"),
        Measure("grad_norm", "gradient norm"),
    ),
    claims=(
        Claim("mHC learns better than a plain residual", "held_out", "mhc", "plain"),
        Claim("mixing that tokens compute learns better than static mixing", "held_out", "mhc", "static"),
        Claim("static streams learn better than a plain residual", "held_out", "static", "plain"),
    ),
    panels=(
        CURVE,
        Panel("bars", "Held-out text at the end", ("held_out",), "bits per byte"),
        Panel("bars", "Composite gain of all sites", ("gain_forward", "gain_backward"), "largest sum"),
        Panel("bars", "Spread of the streams", ("spread",), "rms deviation / rms mean"),
    ),
)

ENGRAM = Suite(
    name="engram",
    title="Engram: a memory of n-grams against the same parameters in experts, and against a table of one row",
    question="Does a table of n-grams earn its parameters, or would more experts, or the gate and the projections"
    " around a table that remembers nothing, do as well?",
    caveat=f"{SMALL} Bytes have few n-grams; facts about the world, which the memory is meant for, are not in this"
    " text. So short a run favours what learns at once: a row learns its n-gram from a few occurrences, layers do not."
    " The table learns at five times the learning rate, as in the paper; experts do not.",
    recipe="nano",
    set=TEXT,
    full=FULL_TEXT,
    arms=(
        Arm("engram", "Engram"),
        Arm("experts", "12 experts, no Engram", set=("model.n_routed_experts=12",), without=("model.engram",)),
        Arm("one-row", "Engram, table of one row", variant="one-row table"),
        Arm("without", "neither", without=("model.engram",)),
    ),
    measures=(
        HELD_OUT,
        TRIGRAM,
        Measure("gate", "mean gate"),
        Measure("collisions", "n-grams that share a row", percent=True),
        Measure("load_cv", "variation of the experts' load"),
    ),
    claims=(
        Claim("Engram learns better than the same parameters in experts", "held_out", "engram", "experts"),
        Claim("Engram learns better than Engram with a table of one row", "held_out", "engram", "one-row"),
        Claim("a table of one row learns better than no Engram", "held_out", "one-row", "without"),
        Claim("four more experts a layer learn better than none", "held_out", "experts", "without"),
    ),
    panels=(
        CURVE,
        Panel("bars", "Held-out text at the end", ("held_out",), "bits per byte"),
        Panel("bars", "Engram's mean gate", ("gate",), "gate"),
    ),
)

MUON = Suite(
    name="muon",
    title="Muon against AdamW",
    question="How many of AdamW's steps does Muon need to reach AdamW's final loss, at the same learning rate?",
    caveat=f"{SMALL} One learning rate for both: Muon's update has the size of AdamW's by construction, but that the"
    " same rate suits both is an assumption.",
    recipe="nano",
    set=TEXT,
    full=FULL_TEXT,
    reach="held_out",
    arms=(Arm("adamw", "AdamW"), Arm("muon", "Muon (8 + 2)", set=("optim.rule=muon",))),
    measures=(
        HELD_OUT,
        TRIGRAM,
        Measure("reach", "share of the steps to AdamW's final score", "lower", percent=True),
        Measure("grad_norm", "gradient norm"),
    ),
    claims=(
        Claim("Muon learns better than AdamW in the same steps", "held_out", "muon", "adamw"),
        Claim("Muon reaches AdamW's final score within 70 % of the steps", "reach", "muon", 0.7),
    ),
    panels=(
        CURVE,
        Panel("bars", "Held-out text at the end", ("held_out",), "bits per byte"),
        Panel("bars", "Steps to AdamW's final score", ("reach",), "share of AdamW's steps"),
    ),
)

BIAS = Suite(
    name="bias",
    title="The router's bias against none",
    question="Does the bias that moves against the load even it out, and what does that cost?",
    caveat=f"{SMALL} So few experts spread more evenly by themselves than hundreds do."
    " Both arms have the weak balance loss of V3.",
    recipe="nano",
    set=TEXT,
    full=FULL_TEXT,
    arms=(
        Arm("bias", "bias"),
        Arm("none", "no bias", set=("model.router_bias_update_speed=0",)),
    ),
    measures=(
        Measure("load_max", "load of the busiest expert / mean", "lower"),
        Measure("load_cv", "variation of the load", "lower"),
        HELD_OUT,
        TRIGRAM,
    ),
    claims=(
        Claim("the bias lowers the busiest expert's load", "load_max", "bias", "none"),
        Claim("the bias evens out the load", "load_cv", "bias", "none"),
        Claim("the bias lowers the loss", "held_out", "bias", "none"),
    ),
    panels=(
        Panel("bars", "Load of the busiest expert over the mean", ("load_max",), "times the mean load"),
        Panel("bars", "Variation of the load", ("load_cv",), "standard deviation / mean"),
        Panel("bars", "Held-out text at the end", ("held_out",), "bits per byte"),
    ),
)

MTP = Suite(
    name="mtp",
    title="Multi-token prediction against none",
    question="Does predicting one more token help the next one, and how many of its drafts are accepted?",
    caveat=f"{SMALL} The module is a large part of this model and of its time; in V4 it is one layer"
    " in dozens. Without MTP, drafts are those of an untrained module. Drafts of bytes are easier to accept than drafts"
    " of words.",
    recipe="nano",
    set=TEXT,
    full=FULL_TEXT,
    probes=("acceptance",),
    arms=(
        Arm("mtp", "MTP"),
        Arm("none", "no MTP", set=("model.num_nextn_predict_layers=0",)),
    ),
    measures=(
        HELD_OUT,
        TRIGRAM,
        Measure("acceptance", "drafts accepted", "higher", percent=True),
        Measure("same_tokens", "drafts change no token", percent=True),
    ),
    claims=(
        Claim("MTP lowers the loss of the next token", "held_out", "mtp", "none"),
        Claim("its drafts are accepted more often than an untrained module's", "acceptance", "mtp", "none"),
    ),
    panels=(
        CURVE,
        Panel("bars", "Held-out text at the end", ("held_out",), "bits per byte"),
        Panel("bars", "Drafts accepted", ("acceptance",), "share"),
    ),
)

BINS = (32, 64, 128, 256, 512, 1024, 2048)
ACCURACY = (
    Measure("accuracy", "answers right, all distances", "higher", percent=True),
    *(
        Measure(f"accuracy_at.{n}", f"answers right, {n:,} to {2 * n - 1:,} tokens", "higher", percent=True)
        for n in BINS
    ),
)
INDEX = (
    Measure("recall", "of attention's own top 16, picked by the indexer", "higher", percent=True),
    Measure("train.index", "indexer's KL, nats", "lower"),
)
FAR = f"accuracy_at.{BINS[-1]}"
DENSE = tuple(f"stages.{number}.attention=dense" for number in range(5))
SPARSE = tuple(f"stages.{number}.attention=sparse" for number in range(5))
WINDOW = Arm("window", "window only", set=("model.compress_ratios=[0, 0]", *DENSE))
FULL_RECALL = (
    "stages.0.steps=400",
    "stages.1.steps=200",
    "stages.2.steps=200",
    "stages.3.steps=200",
    "stages.4.steps=400",
)
RECALL = (
    "Few different tokens, facts that stand whole within one entry, few layers: the task is made so that one hop is"
    " enough. That an indexer can learn where to look says nothing about what looking is worth on natural text, which"
    " at this size hardly needs it."
)
BY_DISTANCE = Panel("distance", "Planted facts asked for at a distance", ("accuracy_at",), "answers right")

INDEXER = Suite(
    name="indexer",
    title="A trained indexer against a random one and none",
    question="Facts are planted and asked for beyond the window, and a query may read 16 of up to 1,024 compressed"
    " entries: does it matter who picks them?",
    caveat=f"{RECALL} The random indexer's model has learned dense reading like the trained one's, and more of it: it"
    " learns while the other warms its indexer up. Both have an HCA layer, which reads all of its coarse entries, so"
    " that a random indexer's model is not blind.",
    recipe="indexer",
    full=FULL_RECALL,
    arms=(
        Arm("trained", "trained indexer"),
        Arm(
            "random",
            "random indexer, frozen",
            set=("model.index_loss_weight=0", "stages.3.attention=dense"),
            variant="frozen indexer",
        ),
        WINDOW,
    ),
    measures=(*ACCURACY, *INDEX),
    claims=(
        Claim("a trained indexer finds more than a random one", "accuracy", "trained", "random"),
        Claim("a random indexer finds more than a window alone", "accuracy", "random", "window"),
        Claim("2,048 tokens and more back, a trained indexer finds more than a random one", FAR, "trained", "random"),
        Claim("2,048 tokens and more back, a random indexer finds more than a window", FAR, "random", "window"),
    ),
    panels=(
        BY_DISTANCE,
        Panel("bars", "All distances", ("accuracy",), "answers right"),
        Panel("bars", "Picks that attention wants", ("recall",), "share of attention's own top 16"),
    ),
)

WARMUP = Suite(
    name="warmup",
    title="Dense training and an indexer warm-up first, or sparse from the start",
    question="Must attention learn densely and the indexer be warmed up before attention reads its picks only?",
    caveat=f"{RECALL} On the shortest rows 16 picks are all entries there are, so that both arms start densely; the"
    " longer the first rows, the more the order should matter.",
    recipe="indexer",
    full=FULL_RECALL,
    arms=(
        Arm("trained", "dense, warm-up, sparse"),
        Arm("never-dense", "sparse from the start", set=SPARSE),
    ),
    measures=(*ACCURACY, *INDEX),
    claims=(
        Claim("dense training and a warm-up find more than sparse training", "accuracy", "trained", "never-dense"),
        Claim(
            "2,048 tokens and more back, dense training and a warm-up find more than sparse",
            FAR,
            "trained",
            "never-dense",
        ),
    ),
    panels=(
        BY_DISTANCE,
        Panel("bars", "All distances", ("accuracy",), "answers right"),
        Panel("bars", "Picks that attention wants", ("recall",), "share of attention's own top 16"),
    ),
)

ATTENTION = Suite(
    name="attention",
    title="CSA and HCA against a window, and against reading everything",
    question="What do compressed entries and the choice of 16 of them cost and bring, against a window only, against"
    " all entries, and against all tokens uncompressed?",
    caveat=f"{RECALL} An entry holds key and value together; among uncompressed tokens an answer takes two hops, to the"
    " key and to the token after it, and two hops take many more steps to be learned: that arm tells of the steps, not"
    " of what such attention can do. All arms take the same steps, not the same time: reading all tokens costs more"
    " with every token of the row.",
    recipe="indexer",
    full=FULL_RECALL,
    arms=(
        Arm("hybrid", "CSA (16 entries) + HCA"),
        WINDOW,
        Arm("dense", "all entries", set=DENSE),
        Arm("full", "all tokens, uncompressed", set=(*WINDOW.set, "model.sliding_window=4096")),
    ),
    measures=ACCURACY,
    claims=(
        Claim("CSA and HCA find more than a window alone", "accuracy", "hybrid", "window"),
        Claim("2,048 tokens and more back, CSA and HCA find more than a window", FAR, "hybrid", "window"),
        Claim("reading all entries finds more than reading 16", "accuracy", "dense", "hybrid"),
        Claim("CSA and HCA find more than uncompressed attention in the same steps", "accuracy", "hybrid", "full"),
    ),
    panels=(BY_DISTANCE, Panel("bars", "All distances", ("accuracy",), "answers right")),
)

SUITES = {suite.name: suite for suite in (INDEXER, WARMUP, ATTENTION, STREAMS, ENGRAM, MUON, BIAS, MTP)}


def chosen(names: Sequence[str]) -> list[Suite]:
    """The suites of these names or files; none, or "all", are all that ship.

    Raises:
        ValueError: an unknown name, or a file without a suite.
        FileNotFoundError: no such file.
    """
    found: dict[str, Suite] = {}
    for name in names or ["all"]:
        if name.endswith(".py"):
            found |= own_suites(name)
        elif name in (*SUITES, "all"):
            found |= {key: suite for key, suite in SUITES.items() if name in (key, "all")}
        else:
            known = f"{', '.join(SUITES)}, all, and a FILE.py with suites of one's own"
            raise ValueError(f"suite {name!r}:{did_you_mean(name, SUITES)} allowed are {known}")
    return [suite for key, suite in SUITES.items() if key in found] + [
        suite for key, suite in found.items() if key not in SUITES
    ]


def own_suites(path: str) -> dict[str, Suite]:
    """All `Suite`s at the top of a file, by name."""
    values = vars(own.module_of(path)).values()
    found = {value.name: value for value in values if isinstance(value, Suite) and value not in SUITES.values()}
    if not found:
        raise ValueError(f"{path!r} has no Suite at the top (abyssal.train.ablate.suite)")
    taken = [name for name in found if name in SUITES]
    if taken:
        raise ValueError(f"{path!r}: suite {taken[0]!r}: allowed are names that no shipped suite has")
    return found


def listed(suites: Sequence[Suite]) -> str:
    """Every suite with its question and arms, as text."""
    lines = []
    for suite in suites:
        lines += [f"{suite.name:<10} {suite.question}"]
        lines += [f"  {arm.name:<12} {arm.label}" for arm in suite.arms]
    return "\n".join(lines)
