"""What blind readers score on planted tasks: the table that stands before every verdict on them."""

from typing import Any

from ..data.planted import TASKS, PlantedSource, planted_task
from ..recipe import load_recipe
from ..settings import PLANTED, DataConfig, PlantedConfig

READERS = ("recency", "unasked", "frequency", "position", "likeliest")
SHIPPED = {"recall": "indexer", "ruler": "ruler"}  # tasks with a recipe; the others by their defaults, 12 rows of 4,096
ROWS, LENGTH = 12, 4096
OPTIONS: dict[str, dict[str, Any]] = {"mqar": {"keys": 1024}}


def floors() -> dict[str, dict[str, float]]:
    """Accuracy of every reader on each task's scored rows, and of the best one at its best distance, `floor_at`."""
    found = {}
    for name in TASKS:
        if name in SHIPPED:
            recipe = load_recipe(SHIPPED[name])
            task, data = planted_task(recipe.data.source, recipe.planted), recipe.data
        else:
            task = planted_task(f"{PLANTED}{name}", PlantedConfig(**OPTIONS.get(name, {})))
            data = DataConfig(sequence_length=LENGTH, held_out_rows=ROWS)
        source = PlantedSource(task, data, seed=0)
        accuracy = {reader: scores["accuracy"] for reader, scores in source.floors().items()}
        found[name] = accuracy | {"floor_at": max(source.floor()["floor_at"].values())}
    return found


def table() -> str:
    """As Markdown: tasks, their readers, and the distance at which a blind reader does best."""
    lines = [
        "| task | " + " | ".join(READERS) + " | best reader at its best distance |",
        "| --- |" + " --- |" * (len(READERS) + 1),
    ]
    for name, scores in floors().items():
        cells = [f"{scores[reader]:.1%}" if reader in scores else "-" for reader in (*READERS, "floor_at")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
