"""`abyssal recipe` and `recipes`: what is printed can be trained, and every key says what it is."""

import tomllib

import pytest

from abyssal.model.config import ModelConfig, read_recipe, shipped
from abyssal.train.cli import main, recipes, toml
from abyssal.train.recipe import Recipe, apply, load_recipe

TOMLS = [name for name, file in shipped().items() if file.name.endswith(".toml")]


def printed(capsys, *arguments: str) -> str:
    assert main(["recipe", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("more", [[], ["--all"]], ids=["given", "all"])
@pytest.mark.parametrize("name", TOMLS)
def test_what_is_printed_is_the_recipe(name, more, capsys, tmp_path):
    path = tmp_path / f"{name}.toml"
    path.write_text(text := printed(capsys, name, *more), "utf-8")
    assert max(map(len, text[text.index("\n[") :].splitlines())) <= 100
    if "model" in read_recipe(name):
        assert load_recipe(path) == load_recipe(name)
    assert ("observe_every = " in text) == bool(more)


def test_keys_stand_beside_their_meaning_in_one_column(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = printed(capsys, "toy")
    lines = text[text.index("[optim]") :].split("\n\n")[0].splitlines()
    assert 'rule = "muon"      # how linear maps learn: adamw, or muon' in "\n".join(lines)
    assert (
        len({line.index("# ") for line in lines}) == 1
        and max(map(len, text[text.index("[model]") :].splitlines())) <= 80
    )
    assert text.startswith("# The README's model: learns")


def test_overrides_and_removed_tables_are_printed(capsys):
    text = printed(
        capsys, "toy", "--set", "model.engram=none", "--set", "data.source='a \"b\"\\c'", "--set", "train.seed=\n3"
    )
    found = tomllib.loads(text)
    assert found["model"]["engram"] == "none" and found["data"]["source"] == 'a "b"\\c'
    assert "# changed: model.engram=none\n" in text and "[model.engram]" not in text
    assert Recipe.from_dict(found).model.engram is None


def test_a_released_configuration_is_printed_too(capsys, tmp_path):
    path = tmp_path / "pro.toml"
    path.write_text(printed(capsys, "v4-pro"), "utf-8")
    assert ModelConfig.load(path) == ModelConfig.load("v4-pro")


def test_stages_say_once_what_their_keys_mean(capsys):
    text = printed(capsys, "stages")
    assert text.count("[[stages]]") == 5 and text.count("# optimizer steps of the stage") == 1
    assert text.count("# peak learning rate in this stage") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tooy"], "'tooy' is no configuration: did you mean 'toy'? shipped are"),
        (["toy", "--set", "optim.lr=-1"], "toy: optim.lr=-1.0: allowed is above 0"),
        (["toy", "--set", "model.n_layer=4"], "'n_layer': none is near; abyssal recipe NAME --all lists them"),
        (["toy", "--set", "stabilty=none"], "unknown table 'stabilty': the nearest known table is 'stability'"),
        (["toy", "--set", "optim=none"], "allowed as none are stages, "),
        (["toy", "--set", "stability=3"], "allowed is table.key=value"),
        (["toy", "--set", "grpo=none", "--set", "grpo.group=4"], "'grpo' is left out (grpo=none)"),
        (["toy", "--set", "model.engram=none", "--set", "model.engram.heads=4"], "'engram' is left out (engram=none)"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    assert main(["recipe", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_optional_tables_can_be_left_out(tmp_path):
    assert load_recipe("stages").stability and load_recipe("stages", ["stability=none"]).stability is None
    assert load_recipe("stages", ["stages=none", "train.steps=3"]).stages == ()
    resumed = Recipe.from_dict(apply(load_recipe("stages").to_dict(), ["stability=none", "stages=none"]))
    assert resumed.stability is None and not resumed.stages and resumed.train.steps == 250
    (tmp_path / "a.toml").write_text('base = "stages"\nstability = "none"\nstages = "none"\ntrain.steps = 2\n', "utf-8")
    recipe = load_recipe(tmp_path / "a.toml")
    assert recipe.stability is None and not recipe.stages and recipe.train.steps == 2
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_all_that_is_shipped_is_listed_with_its_purpose(capsys):
    assert main(["recipes"]) == 0
    text = capsys.readouterr().out
    lines = {line.split()[0]: line for line in text.splitlines() if line[:3].strip()}
    assert {*shipped(), "v3", "v3.2"} <= lines.keys()
    assert lines["toy"].split()[:6] == ["toy", "10.22", "M", "5", "min", "The"]
    assert "DeepSeek-V4-Pro as released" in lines["v4-pro"]
    assert all(recipes._told(shipped()[name])[0] for name in TOMLS), "a recipe begins with a comment: its purpose"


def test_a_recipe_without_a_model_takes_that_of_its_start(capsys, tmp_path, monkeypatch):
    (tmp_path / "tuned.toml").write_text("# Tunes. Much.\n# minutes: 7\n\n[optim]\nlr = 1e-4\n", "utf-8")
    monkeypatch.setattr("abyssal.model.config.shipped", lambda: {"tuned": tmp_path / "tuned.toml"})
    assert main(["recipes"]) == 0
    assert "  tuned  that of train.init     7 min  Tunes.\n" in capsys.readouterr().out
    text = printed(capsys, "tuned", "--all")
    found = tomllib.loads(text)
    assert found["optim"]["lr"] == 1e-4 and found["data"]["batch_size"] == 8 and "model" not in found


def test_a_long_list_is_wrapped_and_strings_are_whole():
    text = toml.written({"reason": {"tasks": ["addition-2"] * 12}, "train": {"sample_prompt": "\x7f\n é" * 20}})
    assert max(map(len, text.splitlines()[:8])) <= 100
    found = tomllib.loads(text)
    assert found["reason"]["tasks"] == ["addition-2"] * 12 and found["train"]["sample_prompt"] == "\x7f\n é" * 20
