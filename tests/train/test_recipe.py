"""Recipes: what ships loads, overrides land, and every mistake is named."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from abyssal.train import recipe as recipe_module
from abyssal.train.recipe import Recipe, apply, differences, load_recipe
from abyssal.train.settings import TABLES

SHIPPED = ("nano", "toy", "small", "long", "recall")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_load_and_round_trip(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert recipe.optim.warmup_steps < recipe.train.steps
    assert recipe.data.sequence_length <= recipe.model.max_position_embeddings


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_rows_are_long_enough_for_the_indexer_to_choose(name):
    recipe = load_recipe(name)
    sparse = [m for m, kind in zip(recipe.model.compress_ratios, recipe.model.layer_types) if kind.startswith("comp")]
    assert recipe.data.sequence_length > recipe.model.index_topk * min(sparse)


def test_overrides_are_toml_and_bare_words_are_strings():
    given = ["optim.lr=1e-3", "optim.betas=[0.8, 0.9]", "train.steps = 7", "train.dtype=bfloat16", "data.source='a b'"]
    recipe = load_recipe("nano", [*given, "model.rope_scaling.factor=8", "train.minutes=2"])
    assert recipe.optim.lr == 1e-3 and recipe.optim.betas == (0.8, 0.9)
    assert recipe.train.steps == 7 and recipe.train.dtype == "bfloat16" and recipe.train.minutes == 2.0
    assert recipe.data.source == "a b"
    assert recipe.model.rope_scaling.factor == 8
    assert load_recipe("nano").train.steps != 7


def test_a_file_is_a_recipe_and_missing_tables_take_defaults(tmp_path: Path):
    text = Path(recipe_module.__file__).parents[1].joinpath("configs", "nano.toml").read_text("utf-8")
    model_only = re.split(r"^\[data\]", text, flags=re.MULTILINE)[0]
    (tmp_path / "mine.toml").write_text(model_only + "\n[optim]\nlr = 0.5\n", "utf-8")
    recipe = load_recipe(tmp_path / "mine.toml")
    assert recipe.name == "mine" and recipe.optim.lr == 0.5 and recipe.data == TABLES["data"]()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "unknown key 'optim.lrr': the nearest known key is 'optim.lr'"),
        ("train.step=1", "'train.steps'"),
        ("data.sequence_lenght=8", "'data.sequence_length'"),
        ("model.hiden_size=8", "'hidden_size'"),
        ("optimm.lr=1", "unknown table 'optimm': the nearest known table is 'optim'"),
        ("lr=1", "allowed is table.key=value"),
        ("optim.lr", "allowed is table.key=value"),
        ("data.source=''", "data.source='': allowed is a name or a path"),
        ("optim.lr=-1", r"optim.lr=-1.0: allowed is above 0"),
        ("optim.betas=[0.9, 1.0]", r"optim.betas=\(0.9, 1.0\): allowed is two numbers"),
        ("data.held_out_fraction=1", "data.held_out_fraction=1.0"),
        ("train.dtype=float16", "train.dtype='float16': allowed is float32 or bfloat16"),
        ("model.vocab_size=200", "vocab_size"),
        ("model.bos_token_id=1", "model.bos_token_id=1: allowed is 256"),
        ("optim.lr.x=1", "'lr' is a value, not a table"),
        ("optim.lr=inf", "finite"),
    ],
)
def test_a_bad_override_is_named(override, message):
    with pytest.raises(ValueError, match=message):
        load_recipe("nano", [*(["optim.lr=1e-3"] if ".x" in override else []), override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=1.5", "train.steps=1.5: allowed is int, not float"),
        ("train.steps=true", "train.steps=True"),
        ("optim.lr=fast", "optim.lr='fast': allowed is float, not str"),
        ("optim.betas=0.9", "optim.betas=0.9: allowed is a list of 2 numbers"),
        ("data.source=3", "data.source=3: allowed is str, not int"),
    ],
)
def test_a_value_of_another_type_is_named(override, message):
    with pytest.raises(TypeError, match=message):
        load_recipe("nano", [override])


def test_unknown_tables_and_missing_models_in_a_file():
    values = load_recipe("nano").to_dict()
    with pytest.raises(ValueError, match=r"unknown table \[trian\]: the nearest known table is \[train\]"):
        Recipe.from_dict({**values, "trian": {}})
    del values["model"]
    with pytest.raises(ValueError, match=r"no table \[model\]"):
        Recipe.from_dict(values)


def test_apply_leaves_its_input_alone():
    values = {"model": {"rope_scaling": {"factor": 1}}}
    assert apply(values, ["model.rope_scaling.factor=2"])["model"]["rope_scaling"]["factor"] == 2
    assert values["model"]["rope_scaling"]["factor"] == 1


def test_differences_name_table_key_and_both_values():
    changed = load_recipe("nano", ["optim.lr=0.25", "model.hc_mult=2"])
    found = differences(load_recipe("nano", ["optim.lr=0.5"]), changed)
    assert sorted(found) == ["model.hc_mult: 4 -> 2", "optim.lr: 0.5 -> 0.25"]


@pytest.mark.parametrize("table", TABLES.values())
def test_every_key_is_documented_and_read_somewhere(table):
    folder = Path(recipe_module.__file__).parent
    code = "\n".join(
        path.read_text("utf-8") for path in folder.rglob("*.py") if path.name not in ("recipe.py", "settings.py")
    )
    for f in fields(table):
        assert len(f.metadata["meaning"]) > 5, f.name
        assert re.search(rf"\.{f.name}\b", code), f"{table.name}.{f.name} is read nowhere"
