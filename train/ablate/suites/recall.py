"""Planted facts asked for at a distance: what compressed entries, their choice and the stages of training bring."""

from ..suite import Arm, Claim, Measure, Panel, Suite

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
