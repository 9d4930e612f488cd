"""What blind readers score on planted tasks: the table that stands before every verdict on them."""

from ..data.planted import TASKS, PlantedSource, planted_task
from ..data.planted.blind import octaves
from ..recipe import load_recipe
from ..settings import PLANTED, DataConfig, PlantedConfig

READERS = ("recency", "unasked", "frequency", "left", "position", "likeliest")
SHIPPED = {"recall": "indexer", "mqar": "mqar", "ruler": "ruler"}  # recipes of tasks; other tasks have their defaults
ROWS, LENGTH = 12, 4096


def floors() -> dict[str, dict[str, float]]:
    """Accuracy of every reader on each task's scored rows, and of the best one where it is best, `floor_at`: at
    distances from `at` to below its double, at which so many are `asked`.
    """
    found = {}
    for name in TASKS:
        if name in SHIPPED:
            recipe = load_recipe(SHIPPED[name])
            task, data = planted_task(recipe.data.source, recipe.planted), recipe.data
        else:
            task = planted_task(f"{PLANTED}{name}", PlantedConfig())
            data = DataConfig(sequence_length=LENGTH, held_out_rows=ROWS)
        source = PlantedSource(task, data, seed=0)
        found[name] = {reader: scores["accuracy"] for reader, scores in source.floors().items()}
        at, share = max(source.floor()["floor_at"].items(), key=lambda item: item[1])
        asked = [octaves(source.held_out(range(source.rows), n)[1].numpy()) == int(at) for n in source.eval_lengths]
        found[name] |= {"floor_at": share, "at": int(at), "asked": sum(int(some.sum()) for some in asked)}
    return found


def table() -> str:
    """As Markdown: tasks, their readers, and the best one at the distances where it is best."""
    lines = [
        "| task | " + " | ".join(READERS) + " | best reader, at its best octave of distances |",
        "| --- |" + " --- |" * (len(READERS) + 1),
    ]
    for name, scores in floors().items():
        cells = [f"{scores[reader]:.1%}" if reader in scores else "-" for reader in READERS]
        best = f"{scores['floor_at']:.1%} of {scores['asked']:,} at {scores['at']:,}+"
        lines.append(f"| {name} | {' | '.join(cells)} | {best} |")
    return "\n".join(lines)
