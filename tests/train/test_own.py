"""Code of one's own: whose is run, what a run or a suite remembers of it, and what opens a model that it changed."""

import sys

import pytest

from abyssal.model import load_pretrained, save_pretrained
from abyssal.train import own
from abyssal.train.ablate.run import run_suite
from abyssal.train.ablate.suite import Arm, Measure, Panel, Suite
from abyssal.train.recipe import load_recipe
from abyssal.train.run import checkpoint
from abyssal.train.run.load import load_trained, open_model
from abyssal.train.start import train

CODE = """
from abyssal.train.data.planted import Row, Task

class Copy(Task):
    name, options = "copy", ("values",)

    def __init__(self, config):
        super().__init__(config)
        self.vocabulary = 1 + config.values

    def row(self, draw, length):
        row = Row.blank(draw.integers(1, self.vocabulary, length))
        for i in range(1, length - 1, 2):
            row.ids[i + 1] = row.ids[i]
            row.ask(i, int(row.ids[i]), 0)
        return row

def probe(model, recipe):
    return {"probed": 1.0}

def wider(model):
    model.norm.forward = lambda x, old=model.norm.forward: 2 * old(x)

def swap(model):
    old = model.norm.forward
    model.norm.forward = lambda x: -old(x)
"""
FEW = (
    *("data.sequence_length=32", "data.batch_size=2", "data.held_out_rows=2", "train.steps=2", "train.eval_every=0"),
    *("train.sample_tokens=0", "train.observe_every=0", "train.checkpoint_every=1"),
)


@pytest.fixture(autouse=True)
def nothing_allowed():
    own.forget()
    yield
    own.forget()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(CODE, "utf-8")
    return path


def test_code_that_a_checkpoint_names_is_run_for_nobody_but_who_allows_it(file, tmp_path, monkeypatch):
    run = tmp_path / "run"
    train(load_recipe("nano", [*FEW, f"data.source=planted:{file}:Copy"]), run, shown=False)
    own.forget()
    monkeypatch.chdir(tmp_path)
    load_recipe("nano", ["data.source=*"])  # a glob, and no leave for all
    (tmp_path / "as.toml").write_text('base = "nano"\n[data]\nsource = "*"\n', "utf-8")
    load_recipe("as.toml")
    for opened in (open_model, load_trained, load_recipe, checkpoint.read_state):
        with pytest.raises(PermissionError, match=r"runs the code .*mine.py:Copy: allow that with --trust-code"):
            opened(checkpoint.find(run))
    own.allow(f"{file}:Copy")
    assert open_model(run).recipe.data.source == f"planted:{file}:Copy"


def test_a_model_that_code_changed_is_opened_with_the_code_alone(file, tmp_path):
    named, given = tmp_path / "named", tmp_path / "given"
    train(load_recipe("nano", [*FEW, f"train.prepare={file}:swap"]), named, shown=False)
    swap = own.load(f"{file}:swap")
    train(load_recipe("nano", FEW), given, shown=False, prepare=swap)
    model, _ = load_trained(named)
    with pytest.raises(ValueError, match=r"the model was changed by .*mine.py:swap: a folder of weights does not hold"):
        save_pretrained(model, tmp_path / "out")
    for run in (named, given):
        with pytest.raises(ValueError, match="its model was changed by"):
            load_pretrained(run)
        with pytest.raises(ValueError, match=r"was changed by .*swap: give train.prepare too"):
            train(load_recipe("nano", [*FEW, f"train.init={run}"]), tmp_path / "other", shown=False)
    with pytest.raises(ValueError, match="its model was changed by swap, which its recipe does not name"):
        load_trained(given)
    longer = load_recipe("nano", [*FEW, "train.steps=3"])
    with pytest.raises(ValueError, match=r"its model was changed by swap: go on with train.prepare, or that code"):
        train(longer, given, resume=given, shown=False)
    assert train(longer, given, resume=given, shown=False, prepare=swap).progress.step == 3
    both = load_recipe("nano", [*FEW, f"train.prepare={file}:swap"])
    train(both, tmp_path / "both", shown=False, prepare=own.module_of(str(file)).wider)
    with pytest.raises(ValueError, match=r"changed by .*mine.py:swap and wider, which its recipe does not name"):
        load_trained(tmp_path / "both")
    transformers = pytest.importorskip("transformers")
    import abyssal.hf  # noqa: F401

    with pytest.raises(ValueError, match="the model was changed by"):
        transformers.AutoModelForCausalLM.from_pretrained(checkpoint.find(named))


def suite_of(file) -> Suite:
    arms = Arm("base", "as it is"), Arm("set", "as the recipe says", set=(f"train.prepare={file}:swap",))
    return Suite(
        **{"name": "own", "title": "", "question": "", "caveat": "", "recipe": "nano", "claims": (), "arms": arms},
        set=(*FEW, f"data.source=planted:{file}:Copy"),
        measures=(Measure("probed", "of the probe"),),
        panels=(Panel("bars", "", ("probed",)),),
        probes=(own.module_of(str(file)).probe,),
    )


def test_a_suite_runs_again_what_its_code_has_changed(file, tmp_path):
    def run():
        own.forget()
        found = run_suite(suite_of(file), tmp_path / "out", seeds=[0], workers=1, shown=False)
        runs = {path.name for path in (tmp_path / "out/runs").iterdir() if path.is_dir()}
        return found["arms"]["base"]["runs"][0]["measures"]["probed"], runs

    first, before = run()
    assert first == 1.0 and run() == (first, before), "nothing is run twice"
    file.write_text(CODE.replace("1.0", "2.0"), "utf-8")
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]
    second, after = run()
    assert second == 2.0 and len(after) == 2 * len(before)
