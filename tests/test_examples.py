"""The examples run: the ten tasks at their smallest, and what the shown experiments of one's own do."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from abyssal.model import Transformer
from abyssal.train import own
from abyssal.train.ablate.suites import chosen
from abyssal.train.data.planted import planted_task
from abyssal.train.recipe import load_recipe
from abyssal.train.settings import PlantedConfig
from abyssal.train.start import train

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow("ten commands and what they train, about a minute and a half")
def test_ten_tasks(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = str(EXAMPLES.parent)
    settings = {**os.environ, "SMALL": "1", "PYTHON": sys.executable, "PORT": str(port), "PYTHONPATH": root}
    command = ["bash", str(EXAMPLES / "ten_tasks.sh"), str(tmp_path)]
    done = subprocess.run(command, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert done.stdout.count("\n== ") == 20, "each task begins and says its seconds"
    for name in ("compare.png", "exported/config.json", "runs/ablate/norms.json"):
        assert (tmp_path / name).is_file()


def test_brackets_are_nested_and_asked_for():
    reference = f"{EXAMPLES / 'own_task.py'}:Brackets"
    own.allow(reference)
    row = planted_task(f"planted:{reference}", PlantedConfig(values=3)).row(np.random.default_rng(0), 200)
    stack: list[int] = []
    for position, token in enumerate(row.ids[1:], 1):
        if token <= 3:
            stack.append(position)
            assert row.distances[position - 1] == -1
        else:
            opener = stack.pop()
            assert token == row.ids[opener] + 3 == row.targets[position - 1]
            assert row.distances[position - 1] == position - 1 - opener
    assert (row.targets >= 0).sum() > 50


def test_a_run_keeps_its_own_mechanism(tmp_path, capsys):
    from abyssal.model import load_pretrained
    from abyssal.train.cli import main
    from abyssal.train.run.load import load_trained

    reference = f"{EXAMPLES / 'own_mechanism.py'}:layer_norm"
    few = [
        "train.steps=2",
        "data.sequence_length=64",
        "data.batch_size=2",
        "data.held_out_rows=2",
        "train.eval_every=0",
    ]
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of {i * i}\n" for i in range(400)), "utf-8")
    more = [f"data.source={text}", f"train.prepare={reference}", "train.checkpoint_every=1", "train.sample_tokens=0"]
    run = tmp_path / "run"
    train(load_recipe("nano", [*few, *more]), run, shown=False)
    model, recipe = load_trained(run, "cpu")
    assert type(model.layers[0].attn_norm) is torch.nn.LayerNorm and recipe.train.prepare == reference
    ids = torch.randint(0, 256, (1, 70))
    cache, whole = model.new_cache(1, 100), model(ids).logits
    pieces = [model(ids[:, i : i + 1], cache=cache).logits for i in range(70)]
    assert torch.allclose(torch.cat(pieces, 1), whole, atol=1e-4), "decoding computes with the mechanism too"
    with pytest.raises(ValueError, match=r"its model was changed by .*own_mechanism.py:layer_norm"):
        load_pretrained(run)
    own.forget()
    assert main(["generate", str(run), "--max-new-tokens", "3"]) == 2
    assert f"its recipe runs the code {reference}: allow that with --trust-code" in capsys.readouterr().err
    assert main(["generate", str(run), "--max-new-tokens", "3", "--trust-code"]) == 0
    few = [word for key in ("data.sequence_length=64", "train.steps=1") for word in ("--set", key)]
    more = ["--set", f"train.init={run}", "--set", f"data.source={text}", *few, "--out", str(tmp_path / "on")]
    assert main(["train", "finetune", *more]) == 2
    assert "own_mechanism.py:layer_norm: give train.prepare too" in capsys.readouterr().err
    assert main(["train", "finetune", *more, "--set", f"train.prepare={reference}"]) == 0
    assert main(["info", str(run)]) == 0
    assert "its model was changed by" in capsys.readouterr().out
    assert main(["profile", str(run)]) == 2
    own.forget()
    assert main(["train", "--resume", str(run), "--set", "train.steps=3"]) == 2
    assert main(["train", "--resume", str(run), "--set", "train.steps=3", "--trust-code"]) == 0


def test_the_suite_differs_in_the_mechanism_alone():
    from abyssal.train.ablate.suite import jobs
    from abyssal.train.ablate.variants import variant_of

    (suite,) = chosen([str(EXAMPLES / "own_suite.py")])
    rms, layer = jobs(suite, [0])
    assert rms.recipe.model == layer.recipe.model and rms.key != layer.key
    own.allow(layer.variant)
    model = Transformer(layer.recipe.model)
    variant_of(layer.variant)(model)
    assert type(model.layers[0].ffn_norm) is torch.nn.LayerNorm
