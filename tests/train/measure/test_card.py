"""The model card: every number is the run's; what it says of the folder holds; what is another's stays."""

import json
import re

import pytest
import torch

from abyssal.model import ModelConfig, Transformer, load_pretrained, save_pretrained
from abyssal.train.cli import main
from abyssal.train.measure import card
from abyssal.train.run import metrics, opponents
from abyssal.train.start import train


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A run that was resumed, with a checkpoint at step 4 and one at its end."""
    out = tmp_path_factory.mktemp("card") / "run"
    recipe = tiny("model.engram=none", "train.checkpoint_every=4", "optim.rule='muon'")
    train(recipe, out, stop_at=4, shown=False)
    train(recipe, out, resume=out, shown=False)
    return out


def exported(source, target, capsys) -> tuple[str, str]:
    """The card, and what was said of it."""
    assert main(["convert", str(source), str(target)]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    return (target / card.FILE).read_text("utf-8"), said.removeprefix("model card").strip()


def values(text: str) -> dict[str, str]:
    """The rows of its tables of two columns."""
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE))


def test_its_numbers_are_the_runs(trained, tmp_path, capsys):
    text, said = exported(trained, tmp_path / "x", capsys)
    rows, records = values(text), metrics.read(trained)
    start = json.loads((trained / "run.json").read_text("utf-8"))["starts"][-1]
    model = load_pretrained(tmp_path / "x")
    parameters = sum(p.numel() for p in model.parameters())
    assert said == str(tmp_path / "x" / card.FILE)
    assert f": {parameters:,} parameters" in text and rows["parameters (computed)"].startswith(f"{parameters:,};")
    assert rows["held-out bytes"] == f"{records[-1]['held_out']:.4f}" != f"{records[3]['held_out']:.4f}"
    assert rows["trigram"] == f"{records[-1]['trigram']:.4f}"
    assert rows["steps"] == "6 of 6" and rows["tokens"].startswith(f"{records[-1]['tokens']:,}, 2 rows")
    assert float(rows["FLOPs (computed)"]) == pytest.approx(
        records[-1]["tokens"] * card.training_flops(model.config, 48), 1e-2
    )
    assert rows["digest (SHA-256)"] == f"`{start['data']['digest']}`" and start["source"]["digest"] in rows["code"]
    assert start["machine"]["name"] in rows["hardware"] and f"torch {torch.__version__}" in rows["versions"]
    assert rows["optimizer"].startswith("linear maps muon, embedding and head adamw")
    assert rows["began"].endswith("at step 4") and "learning rate had not fallen" not in text


def test_an_earlier_checkpoint_has_its_own_numbers(trained, tmp_path, capsys):
    text, _ = exported(trained / "checkpoints" / "step-000004", tmp_path / "x", capsys)
    rows, record = values(text), metrics.read(trained)[3]
    assert rows["held-out bytes"] == f"{record['held_out']:.4f}" and rows["tokens"].startswith(
        f"{record['tokens']:,}, "
    )
    assert rows["began"].endswith("at step 0") and "The run was left at step 4 of 6" in text


def test_opponents_of_the_same_step_stand_beside_the_model(trained, tmp_path, capsys, monkeypatch):
    scores = [
        {"name": "model", "training": "read", "held_out": 2.5, "clean": 2.75},
        {"name": "KN-5", "training": "all", "held_out": 2.125},
        {"name": "xz", "training": "all", "held_out": 2.0},
    ]
    training = {"all": 2_000_000, "read": 1_000_000, "corpus": 2_000_000}
    found = {"step": 6, "init": "", "bytes": {"held_out": 1200, "clean": 800}, "training": training}
    path = trained / opponents.FILE
    path.write_text(json.dumps({**found, "scores": scores}), "utf-8")
    try:
        text, _ = exported(trained, tmp_path / "x", capsys)
        earlier, _ = exported(trained / "checkpoints" / "step-000004", tmp_path / "y", capsys)
    finally:
        path.unlink()
    assert (
        "| **nano** | 1.00 MB | 2.5000 | 2.7500 |\n| KN-5 | 2.00 MB | 2.1250 |  |" in text and "| trigram |" not in text
    )
    assert "KN-5" not in earlier and "| trigram |" in earlier


def test_its_header_is_read_by_the_hub(trained, tmp_path, capsys):
    hub = pytest.importorskip("huggingface_hub")
    text, _ = exported(trained, tmp_path / "x", capsys)
    told = hub.ModelCard(text).data
    assert told.library_name == "transformers" and told.pipeline_tag == "text-generation"
    scores = {result.metric_type: result.metric_value for result in told.eval_results[:1]}
    assert scores == {"bits_per_byte": round(metrics.read(trained)[-1]["held_out"], 4)}


def test_no_folder_of_the_writers_is_told(trained, texts, tmp_path, capsys):
    text, _ = exported(trained, tmp_path / "x", capsys)
    assert texts.name in text and str(texts.parent) not in text


def test_how_to_load_it_follows_from_its_layout(tiny, tmp_path, capsys):
    train(tiny("train.steps=1"), tmp_path / "run", shown=False)
    text, _ = exported(tmp_path / "run", tmp_path / "x", capsys)
    assert 'library_name: "abyssal"' in text and "import abyssal.hf  #" in text
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "y"), "--layout", "abyssal"]) == 0
    script = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(script) == 2
    names: dict = {}
    exec(script[0].replace("FOLDER", str(tmp_path / "x")), names)
    assert names["model"].config.engram is not None


def test_what_no_run_made_has_no_card_and_another_card_stays(trained, tmp_path, capsys):
    save_pretrained(Transformer(ModelConfig.load("nano")), tmp_path / "plain")
    assert main(["convert", str(tmp_path / "plain"), str(tmp_path / "x")]) == 0
    assert "none: no run of ours made these weights" in capsys.readouterr().out
    assert not (tmp_path / "x" / card.FILE).exists()
    (tmp_path / "x" / card.FILE).write_text("mine", "utf-8")
    text, said = exported(trained, tmp_path / "x", capsys)
    assert text == "mine" and "another's" in said


def test_training_ends_with_the_exported_model(tiny, tmp_path, capsys, texts):
    keys = [f"data.source='{texts}'", "data.sequence_length=48", "data.batch_size=2", "data.held_out_rows=3"]
    keys += ["train.steps=2", "train.sample_tokens=0", "optim.warmup_steps=1", "train.device='cpu'"]
    words = [word for key in keys for word in ("--set", key)]
    assert main(["train", "nano", "--out", str(tmp_path / "run"), "--export", str(tmp_path / "x"), *words]) == 0
    assert f"model card            {tmp_path / 'x' / card.FILE}" in capsys.readouterr().out
    assert load_pretrained(tmp_path / "x").config == ModelConfig.load("nano")
