"""A run is a model: every door opens a run, a checkpoint, and any folder of weights."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from abyssal.model import ModelConfig, Transformer, convert_pretrained, generate, load_pretrained, save_pretrained
from abyssal.train.cli import main
from abyssal.train.recipe import load_recipe
from abyssal.train.run import checkpoint
from abyssal.train.run.load import load_trained, open_model
from abyssal.train.start import train
from abyssal.train.talk.voice import open_voice

SIZES = (
    *("model.num_hidden_layers=3", "model.compress_ratios=[0,4,8]", "model.hidden_size=32", "model.vocab_size=288"),
    *("model.engram.layers=[1]", "model.engram.vocab_size=50", "data.sequence_length=64", "data.batch_size=2"),
    *("data.held_out_rows=2", "train.eval_every=0", "train.sample_tokens=0", "train.observe_every=0"),
)


def tiny(source, *more):
    return load_recipe("nano", [*SIZES, f"data.source={source}", *more])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    path.write_text("".join(f"line {i} of {i * i}\n" for i in range(400)), "utf-8")
    return path


@pytest.fixture(scope="module")
def run(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(tiny(text, "train.steps=4", "train.checkpoint_every=2"), folder, shown=False)
    return folder


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_checkpoint_is_a_model_folder(run):
    newest = checkpoint.find(run)
    config = json.loads((newest / "config.json").read_text("utf-8"))
    assert (config["model_type"], config["architectures"], config["dtype"]) == (
        *("abyssal", ["AbyssalForCausalLM"]),
        "float32",
    )
    generation = json.loads((newest / "generation_config.json").read_text("utf-8"))
    assert [generation[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [256, 257, 258]
    model, recipe = load_trained(run, "cpu")
    for folder in (run, newest):
        found = load_pretrained(folder)
        assert same(found, model) and ModelConfig.load(folder) == recipe.model == replace(found.config)
    older = load_pretrained(checkpoint.checkpoints(run)[0])
    assert not same(older, model)


@pytest.mark.parametrize("layout", ["huggingface", "official", "abyssal"])
def test_a_run_goes_out_and_comes_back_bit_for_bit(run, tmp_path, layout):
    convert_pretrained(run, tmp_path / "out", layout=layout)
    assert same(load_pretrained(tmp_path / "out"), load_pretrained(run))
    kept = {path.name for path in checkpoint.find(run).iterdir()} & {"tokenizer.json", "tokenizer_config.json"}
    assert kept < {path.name for path in (tmp_path / "out").iterdir()}


def test_a_checkpoint_of_an_early_version_is_one_too(run, tmp_path):
    shutil.copytree(run, tmp_path / "old")
    for name in ("config.json", "generation_config.json"):
        (checkpoint.find(tmp_path / "old") / name).unlink()
    assert same(load_pretrained(tmp_path / "old"), load_pretrained(run))
    assert ModelConfig.load(tmp_path / "old") == ModelConfig.load(run)


def test_the_stage_of_a_run_stays_with_its_model(text, tmp_path):
    values = load_recipe("nano", [*SIZES, f"data.source={text}"]).to_dict()
    values["stages"] = [{"steps": 2, "attention": "dense"}, {"steps": 2, "attention": "sparse"}]
    values["train"] = {**values["train"], "steps": 4, "checkpoint_every": 2}
    recipe = type(load_recipe("nano")).from_dict(values)
    train(recipe, tmp_path / "run", shown=False)
    first, last = checkpoint.checkpoints(tmp_path / "run")
    assert [load_pretrained(folder).attention_stage for folder in (first, last)] == ["dense", "sparse"]
    save_pretrained(load_pretrained(first), tmp_path / "out")
    assert load_pretrained(tmp_path / "out").attention_stage == "dense"
    with pytest.raises(ValueError, match="attention_stage='dense': allowed with layout='official' is 'sparse'"):
        save_pretrained(load_pretrained(first), tmp_path / "official", layout="official")
    (first / "config.json").unlink()  # an early version's
    assert load_pretrained(first).attention_stage == "dense"


def test_every_command_opens_every_folder(run, text, tmp_path, capsys, monkeypatch):
    convert_pretrained(run, tmp_path / "out")
    convert_pretrained(run, tmp_path / "official", layout="official")
    written = set()
    for folder in (run, checkpoint.find(run), tmp_path / "out", tmp_path / "official"):
        greedy = ["--max-new-tokens", "5", "--temperature", "0"]
        assert main(["generate", str(folder), "--prompt", "line ", *greedy]) == 0
        written.add(capsys.readouterr().out)
        assert main(["eval", str(folder), "--source", str(text), "--rows", "2", "--length", "64"]) == 0
        scores = capsys.readouterr().out.splitlines()
        written.add("\n".join(line for line in scores if " MB read " not in line))  # which a checkpoint alone knows
        assert main(["info", str(folder)]) == 0
        assert "values of the model" in capsys.readouterr().out
    assert len(written) == 2, "the same text and the same score from all of them"
    voice = open_voice(tmp_path / "out")
    assert voice.name == "out" and not voice.untaught and open_voice(run).untaught


def test_a_folder_of_nothing_is_told(tmp_path, capsys):
    for command in ("generate", "eval", "chat", "serve"):
        assert main([command, str(tmp_path)]) == 2
        assert "is no checkpoint and no model (it has no config.json)" in capsys.readouterr().err


def test_weights_of_any_folder_start_a_run(run, text, tmp_path):
    official = tmp_path / "official"
    save_pretrained(load_pretrained(run), official, layout="official")
    steps = ("train.steps=1", "optim.lr=1e-12", "optim.warmup_steps=0", "optim.weight_decay=0")
    done = [
        train(tiny(text, *steps, f"train.init={folder}"), tmp_path / f"run{number}", shown=False)
        for number, folder in enumerate((run, checkpoint.find(run), official))
    ]
    tensors = [load_file(summary.checkpoint / "model.safetensors") for summary in done]
    assert all(torch.equal(tensors[0][name], other[name]) for other in tensors for name in other)
    started = load_pretrained(run).state_dict()
    assert torch.allclose(tensors[0]["embed.weight"], started["embed.weight"], atol=1e-6)
    with pytest.raises(ValueError, match=r"is of another model: model.sliding_window: 16 -> 8"):
        train(tiny(text, f"train.init={official}", "model.sliding_window=8"), tmp_path / "other", shown=False)


def test_a_recipe_without_model_takes_that_of_its_start(run, text, tmp_path):
    recipe = tmp_path / "on.toml"
    recipe.write_text(
        f'[data]\nsource = "{text}"\ntokenizer = "init"\nsequence_length = 64\n[train]\nsteps = 1\n', "utf-8"
    )
    with pytest.raises(ValueError, match=r"'on' takes \[model\] from the model that it starts from: give train.init"):
        load_recipe(recipe)
    for folder in (run, checkpoint.find(run)):
        found = load_recipe(recipe, [f"train.init={folder}", "model.router_bias_update_speed=0.5"])
        assert found.model == replace(ModelConfig.load(run), router_bias_update_speed=0.5)
        assert found.data.tokenizer == "bytes"
    assert type(found).from_dict(found.to_dict()) == found


def test_a_run_goes_on_without_the_folder_that_it_started_from(text, tmp_path):
    pytest.importorskip("tokenizers")
    keys = ("data.tokenizer=bpe:300", "model.vocab_size=300")
    tokens = [f"model.{name}_token_id={268 + i}" for i, name in enumerate(("bos", "eos", "pad"))]
    train(tiny(text, *keys, *tokens, "train.steps=1"), tmp_path / "first", shown=False)
    recipe = tmp_path / "on.toml"
    recipe.write_text(f'[data]\nsource = "{text}"\ntokenizer = "init"\nsequence_length = 64\n', "utf-8")
    few = ("train.steps=2", "train.sample_tokens=0", "data.held_out_rows=1", f"train.init={tmp_path / 'first'}")
    on = load_recipe(recipe, few)
    assert on.data.tokenizer == str(checkpoint.find(tmp_path / "first"))
    train(on, tmp_path / "second", stop_at=1, shown=False)
    shutil.rmtree(tmp_path / "first")
    stored = checkpoint.read_state(checkpoint.find(tmp_path / "second"))[0]
    assert train(stored, tmp_path / "second", resume=tmp_path / "second", shown=False).progress.step == 2


def test_a_folder_is_no_recipe(run, capsys):
    assert main(["train", str(run)]) == 2
    assert f"to go on with a run give --resume {run}" in capsys.readouterr().err


def test_another_folder_is_found_where_the_newest_has_gone(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    from abyssal.model import interchange

    original, gone = interchange.Stored, []

    def stored(folder):
        if not gone:
            gone.append(shutil.rmtree(folder))
        return original(folder)

    monkeypatch.setattr(interchange, "Stored", stored)
    assert same(load_pretrained(tmp_path / "run"), load_pretrained(checkpoint.checkpoints(run)[0]))


def test_generation_of_a_loaded_run_is_that_of_the_run(run):
    ids = [256, *b"line 3"]
    a, b = (
        generate(model, ids, max_new_tokens=20, temperature=0)
        for model in (load_pretrained(run), open_model(run).model)
    )
    assert list(a) == list(b)


def test_a_checkpoint_is_not_converted_over_itself(run):
    for target in (checkpoint.find(run), run / "checkpoints" / ".." / "checkpoints" / checkpoint.find(run).name):
        with pytest.raises(ValueError, match="must not be written over"):
            convert_pretrained(run, target, layout="official")


def test_quantised_weights_beside_float32_compute_in_one_dtype(tmp_path, capsys):
    wide = load_recipe("nano", ["model.head_dim=80", "model.qk_rope_head_dim=16", "model.vocab_size=288"])
    torch.manual_seed(0)
    save_pretrained(Transformer(wide.model), tmp_path / "fp8", layout="official", weights="fp8")
    assert len({tensor.dtype for tensor in load_pretrained(tmp_path / "fp8").parameters()}) == 2
    assert main(["generate", str(tmp_path / "fp8"), "--tokenizer", "bytes", "--max-new-tokens", "2"]) == 0


def test_a_folder_of_a_shipped_name_is_in_nobodys_way(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nano").mkdir()
    assert main(["info", "nano"]) == 0
    assert load_recipe("nano").name == "nano"
    assert main(["train", "nano", "--set", "optim.lrr=1"]) == 2
    assert "optim.lr" in capsys.readouterr().err


def test_tokens_that_spell_nothing_go_into_no_text(text, tmp_path):
    few = ("data.source=planted:recall", "data.sequence_length=64", "data.held_out_rows=1", "train.steps=1")
    train(load_recipe("nano", [*few, "train.eval_every=0"]), tmp_path / "planted", shown=False)
    with pytest.raises(ValueError, match="was trained on planted:recall: its tokens spell no text"):
        load_recipe("finetune", [f"train.init={tmp_path / 'planted'}", f"data.source={text}"])
