"""Planted facts, needles, variables and common words, asked for at a distance: what an indexer's picks bring, and when
it should begin to learn.
"""

from ..suite import Arm, Claim, Measure, Panel, Suite

BINS = (512, 1024, 2048)
NEAR = (64, 128, 256, 512)  # of rows of 1,024 tokens
INDEX = (
    Measure("recall", "of attention's own top 16, picked by the indexer", "higher", percent=True),
    Measure("train.index", "indexer's KL, nats", "lower"),
)
FAR = f"accuracy_at.{BINS[-1]}"
KINDS = {
    "single": "one needle",
    "multikey": "needle among others",
    "multivalue": "needles of one key",
    "tracking-0": "variables, no hop",
    "tracking-2": "variables, two hops",
    "common": "common words",
}
LENGTHS = (1024, 4096)
NEEDLE_LENGTHS = (1024, 4096, 32768)


def accuracy(bins: tuple[int, ...]) -> tuple[Measure, ...]:
    """Of models and of the best blind readers, over all distances and by octave."""
    return tuple(
        Measure(f"{of}{name}", f"{text}, {which}", better, percent=True)
        for of, text, better in (("accuracy", "answers right", "higher"), ("floor", "the best blind reader", ""))
        for name, which in (("", "all distances"), *((f"_at.{n}", f"{n:,} to {2 * n - 1:,} tokens") for n in bins))
    )


def of_kind(kind: str, text: str, lengths: tuple[int, ...]) -> tuple[Measure, ...]:
    """Of models and of the best blind readers, in rows of each length."""
    return tuple(
        Measure(f"{of}_of.{kind}.{length}", f"{text}, {length:,} tokens{by}", better, percent=True)
        for length in lengths
        for of, by, better in (("accuracy", "", "higher"), ("floor", ": the best blind reader", ""))
    )


def stages(*attention: str) -> tuple[str, ...]:
    """What CSA layers read in each stage."""
    return tuple(f"stages.{number}.attention={kind}" for number, kind in enumerate(attention))


def arms(count: int) -> tuple[Arm, ...]:
    """A trained indexer against a random one, a window alone, and all entries, in a recipe of so many stages."""
    dense = stages(*["dense"] * count)
    frozen = ("model.index_loss_weight=0",)
    return (
        Arm("trained", "trained indexer"),
        Arm("random", "random indexer, frozen", set=frozen, variant="frozen indexer"),
        Arm("window", "window only", set=("model.compress_ratios=[0, 0]", *dense)),
        Arm("dense", "all entries", set=dense),
    )


FULL_RECALL = tuple(f"stages.{number}.steps={steps}" for number, steps in enumerate((400, 200, 200, 200, 400)))
RECALL = (
    "Few different tokens, facts that stand whole within one entry, few layers: the task is made so that one hop is"
    " enough. That an indexer can learn where to look says nothing about what looking is worth on natural text, which"
    " at this size hardly needs it."
)
PANELS = (
    Panel("distance", "Planted facts asked for at a distance", ("accuracy_at",), "answers right"),
    Panel("bars", "All distances", ("accuracy",), "answers right"),
    Panel("bars", "Picks that attention wants", ("recall",), "share of attention's own top 16"),
)

INDEXER = Suite(
    name="indexer",
    title="A trained indexer against a random one, none, and all entries",
    question="Facts are planted and asked for beyond the window, and a query may read 16 of up to 1,024 compressed"
    " entries: does it matter who picks them?",
    caveat=f"{RECALL} All models have an HCA layer too, which reads all of its coarse entries, so that a random"
    " indexer's model is not blind. All arms take the same steps, not the same time: reading all entries costs more.",
    recipe="indexer",
    full=FULL_RECALL,
    arms=arms(5),
    measures=(*accuracy(BINS), *INDEX),
    claims=(
        Claim("a trained indexer finds more than a random one", "accuracy", "trained", "random"),
        Claim("a random indexer finds more than a window alone", "accuracy", "random", "window"),
        Claim("a random indexer finds more than a blind reader", "accuracy", "random", "floor"),
        Claim("2,048 tokens and more back, a trained indexer finds more than a random one", FAR, "trained", "random"),
        Claim("2,048 tokens and more back, a random indexer finds more than a window", FAR, "random", "window"),
        Claim("reading all entries finds more than reading 16", "accuracy", "dense", "trained"),
    ),
    panels=PANELS,
    seeds=5,
)

WARMUP = Suite(
    name="warmup",
    title="Sparse from the start, or dense attention and an indexer warm-up first",
    question="When should attention begin to read the indexer's picks only, and why is earlier better, if it is:"
    " because the indexer has more steps to learn, or because attention learns to live with its picks?",
    caveat=f"{RECALL} On rows of 64 tokens 16 picks are all entries there are: what is sparse there reads as much as"
    " what is dense, but its indexer learns.",
    recipe="indexer",
    full=FULL_RECALL,
    arms=(
        Arm("trained", "sparse from the start"),
        Arm("warmup", "dense, warm-up, sparse", set=stages("dense", "dense", "dense", "warmup", "sparse")),
        Arm("none", "dense, sparse", set=stages("dense", "dense", "dense", "sparse", "sparse")),
        Arm("along", "learns along, warm-up, sparse", set=stages("sparse", "dense", "dense", "warmup", "sparse")),
    ),
    measures=(*accuracy(BINS), *INDEX),
    claims=(
        Claim("sparse from the start finds more than dense, warm-up, sparse", "accuracy", "trained", "warmup"),
        Claim(
            "an indexer that learns along on short rows finds more than one that does not",
            "accuracy",
            "along",
            "warmup",
        ),
        Claim("sparse from the start finds more than an indexer that learned along", "accuracy", "trained", "along"),
        Claim("a warm-up finds more than going from dense to sparse", "accuracy", "warmup", "none"),
    ),
    panels=PANELS,
    seeds=5,
)

MQAR = Suite(
    name="mqar",
    title="Multi-query associative recall, by a trained indexer, a random one, none, and all entries",
    question="A row begins with 128 pairs and asks for every key once: who picks the entries that a query reads?",
    caveat=f"{RECALL} Each pair is asked for once: a reader who leaves out what was asked for gains by that, towards"
    " the end of a row, as the best blind reader shows.",
    recipe="mqar",
    arms=arms(4),
    measures=(*accuracy(NEAR), *INDEX),
    claims=(
        Claim("a trained indexer finds more than a random one", "accuracy", "trained", "random"),
        Claim("a random indexer finds more than a window alone", "accuracy", "random", "window"),
        Claim("reading all entries finds more than reading 16", "accuracy", "dense", "trained"),
    ),
    panels=PANELS,
    seeds=3,
)

NEEDLES = Suite(
    name="needles",
    title="A needle among others, in rows of up to 32,768 tokens",
    question="Sixteen pairs are scattered in a row, however long it is, and eight are asked for at its end: who finds"
    " them eight times beyond the longest rows of training?",
    caveat=f"{RECALL} Of the tasks after RULER this is the one that a pilot learned alone in so short a run; `ruler`"
    " has them all. Rows of 4,096 tokens are the longest of training. As many pairs as an indexer picks: what"
    " grows is the hay. The last claim, and five seeds instead of three, were added after two, whose dense arm had lost"
    " what it finds in the longest rows.",
    recipe="ruler",
    set=(
        "data.source=planted:multikey",
        "data.held_out_rows=24",
        f"planted.eval_lengths={list(NEEDLE_LENGTHS)}",
    ),
    arms=arms(4),
    measures=(
        Measure("accuracy", "answers right, all lengths", "higher", percent=True),
        Measure("floor", "the best blind reader, all lengths", percent=True),
        *of_kind("multikey", "answers right", NEEDLE_LENGTHS),
        *INDEX,
    ),
    claims=(
        Claim("a trained indexer finds more than a random one", "accuracy", "trained", "random"),
        Claim(
            f"in rows of {NEEDLE_LENGTHS[-1]:,} tokens, a trained indexer finds more than a random one",
            f"accuracy_of.multikey.{NEEDLE_LENGTHS[-1]}",
            "trained",
            "random",
        ),
        Claim("a random indexer finds more than a window alone", "accuracy", "random", "window"),
        Claim("reading all entries finds more than reading 16", "accuracy", "dense", "trained"),
        Claim(
            f"in rows of {NEEDLE_LENGTHS[-1]:,} tokens, reading 16 finds more than reading all entries",
            f"accuracy_of.multikey.{NEEDLE_LENGTHS[-1]}",
            "trained",
            "dense",
        ),
    ),
    panels=(
        Panel("bars", "By length", tuple(f"accuracy_of.multikey.{n}" for n in NEEDLE_LENGTHS), "answers right"),
        Panel("bars", "Picks that attention wants", ("recall",), "share of attention's own top 16"),
    ),
    seeds=5,
)

RULER = Suite(
    name="ruler",
    title="Needles, variables and common words, by a trained indexer, a random one, none, and all entries",
    question="Which tasks after RULER does each kind of attention learn, and at which lengths?",
    caveat="One small model learns all kinds at once, in few steps: what it does not learn says nothing of the"
    " attention. Kinds differ in what blind readers find, which stands beside each.",
    recipe="ruler",
    set=("data.held_out_rows=160",),
    arms=arms(4),
    measures=(
        *(measure for kind, text in KINDS.items() for measure in of_kind(kind, text, LENGTHS)),
        Measure("accuracy", "all kinds and lengths", "higher", percent=True),
        *INDEX,
    ),
    claims=tuple(
        Claim(
            f"{KINDS[kind]}, 4,096 tokens: a trained indexer finds more than a random one",
            f"accuracy_of.{kind}.4096",
            "trained",
            "random",
        )
        for kind in KINDS
    ),
    panels=(
        *(
            Panel(
                "bars", f"{length:,} tokens", tuple(f"accuracy_of.{kind}.{length}" for kind in KINDS), "answers right"
            )
            for length in LENGTHS
        ),
    ),
    seeds=3,
)
