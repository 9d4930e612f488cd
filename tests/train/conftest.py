"""A corpus of a dozen small files, and the nano recipe cut down to run in a moment."""

import random
from pathlib import Path

import pytest
import torch

from abyssal.train.recipe import Recipe, load_recipe

torch.set_num_threads(1)

SENTENCE = "the stream of tokens runs through windows and compressed entries while experts are chosen by score"


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    words = random.Random(0)
    for i in range(12):
        lines = [" ".join(words.choices(SENTENCE.split(), k=8)) for _ in range(20 + 3 * i)]
        (folder / f"text{i:02d}.txt").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny(texts: Path):
    """`tiny("train.steps=3", ...)`: a recipe that reads `texts` in rows of 48 tokens."""

    def make(*overrides: str) -> Recipe:
        small = [
            f"data.source='{texts}'",
            *("data.sequence_length=48", "data.batch_size=2", "data.held_out_rows=3"),
            *("optim.warmup_steps=2", "train.steps=6", "train.eval_every=2", "train.checkpoint_every=0"),
            *("train.sample_tokens=4", "train.log_every=1", "train.device='cpu'"),
        ]
        return load_recipe("nano", [*small, *overrides])

    return make
