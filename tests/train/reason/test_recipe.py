"""The recipes of reasoning and their tables [reason] and [grpo]."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from abyssal.train import recipe as recipe_module
from abyssal.train.reason.source import ReasonSource
from abyssal.train.recipe import Recipe, differences, load_recipe
from abyssal.train.settings import OPTIONAL, GrpoConfig, ReasonConfig
from abyssal.train.start import open_source


@pytest.mark.parametrize("name", ["reason-sft", "reason-grpo"])
def test_the_recipes_load_and_round_trip(name):
    recipe = load_recipe(name)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert (recipe.grpo is None) == (name == "reason-sft")
    assert recipe.optim.warmup_steps < recipe.train.steps
    assert isinstance(open_source(recipe), ReasonSource)


def test_rewards_go_on_with_the_model_that_was_tuned():
    tuned, rewarded = load_recipe("reason-sft"), load_recipe("reason-grpo")
    assert tuned.model == rewarded.model and tuned.reason == rewarded.reason


def test_without_the_tables_there_is_nothing_of_them():
    plain = load_recipe("nano")
    assert plain.reason is None and plain.grpo is None and not {"reason", "grpo"} & plain.to_dict().keys()
    found = differences(plain, load_recipe("nano", ["reason.exam_problems=3"]))
    assert "reason.exam_problems: None -> 3" in found


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("reason.tasks=[]", ValueError, r"reason.tasks=\(\): allowed is at least one task"),
        ("reason.tasks=addition-2", TypeError, "reason.tasks='addition-2': allowed is a list of str"),
        ("reason.tasks=[2]", TypeError, r"reason.tasks\[0\]=2: allowed is str, not int"),
        ("reason.modes=['chat', 'chat']", ValueError, "each at most once"),
        ("reason.modes=['talk']", ValueError, "thinking and chat"),
        ("reason.modes=[]", ValueError, "thinking and chat"),
        ("reason.task=['addition-2']", ValueError, "nearest known key is 'reason.tasks'"),
        ("grpo.group=1", ValueError, "grpo.group=1: allowed is at least 2"),
        ("grpo.top_p=0", ValueError, "grpo.top_p=0.0: allowed is above 0 up to 1"),
        ("grpo.temperature=0", ValueError, "grpo.temperature=0.0: allowed is above 0"),
        ("grpo.clip_low=1.5", ValueError, "grpo.clip_low=1.5: allowed is from 0 to 1"),
        ("grpo.keep_routing=1", TypeError, "grpo.keep_routing=1: allowed is bool"),
        ("grop.group=4", ValueError, "unknown table 'grop': the nearest known table is 'grpo'"),
    ],
)
def test_bad_values_are_named(override, error, message):
    with pytest.raises(error, match=message):
        load_recipe("reason-grpo", [override])


def test_rewards_need_problems():
    values = load_recipe("reason-grpo").to_dict()
    del values["reason"]
    with pytest.raises(ValueError, match=r"\[grpo\] without \[reason\]"):
        Recipe.from_dict(values)


@pytest.mark.parametrize("table", [ReasonConfig, GrpoConfig])
def test_every_key_is_documented_and_read_somewhere(table):
    folder = Path(recipe_module.__file__).parent / "reason"
    code = "\n".join(path.read_text("utf-8") for path in folder.glob("*.py"))
    for f in fields(table):
        assert len(f.metadata["meaning"]) > 5, f.name
        assert re.search(rf"\.{f.name}\b", code), f"{table.name}.{f.name} is read nowhere"


def test_help_lists_the_keys_of_tables_that_are_not_in_every_recipe(capsys):
    from abyssal.train.cli import main

    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    for name, table in OPTIONAL.items():
        assert f"[{name}] is not in every recipe" in text
        assert all(f"{name}.{f.name} " in text for f in fields(table))
