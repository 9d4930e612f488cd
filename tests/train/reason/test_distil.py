"""Distillation: the exact KL against torch's, a student that comes to its teacher, runs to the bit."""

import pytest
import torch
from reasoning import TINY
from safetensors.torch import load_file

from abyssal.train.reason.distil import DistilRun, reverse_kl
from abyssal.train.recipe import load_recipe
from abyssal.train.run import metrics
from abyssal.train.start import open_source, train


def recipe(*overrides, name="reason-distil"):
    distil = ["distil.prompts=6", "train.observe_every=1"] if "distil" in name else []
    return load_recipe(name, [*TINY, *distil, *overrides])


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    return train(recipe("train.steps=1", name="reason-sft"), tmp_path_factory.mktemp("sft") / "run", shown=False).out


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Of another width, and further on."""
    asked = recipe("model.hidden_size=48", "train.seed=7", "train.steps=25", "train.eval_every=0", name="reason-sft")
    return train(asked, tmp_path_factory.mktemp("teacher") / "run", shown=False).out


def started(tmp_path, tuned, teacher, *overrides) -> DistilRun:
    asked = recipe(f"train.init={tuned}", f"distil.teacher={teacher}", *overrides)
    return DistilRun(asked, open_source(asked), tmp_path / "run", None, False)


def test_the_kl_is_torchs_over_the_whole_vocabulary():
    log_pi, log_teacher = torch.randn(2, 3, 5, 11, dtype=torch.float64).log_softmax(-1)
    peer = torch.nn.functional.kl_div(log_teacher, log_pi, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(reverse_kl(log_pi, log_teacher), peer)
    assert (reverse_kl(log_pi, log_teacher) - reverse_kl(log_teacher, log_pi)).abs().min() > 1e-6
    assert not reverse_kl(log_pi, log_pi).any()


def test_the_loss_is_the_mean_over_what_the_student_wrote(tmp_path, tuned, teacher):
    run = started(tmp_path, tuned, teacher)
    rollouts = run.roll_out(run.questions(0), 0)
    found = run.update(rollouts, run.weigh(torch.zeros(len(rollouts))), run.schedule.phase(0))
    fresh = started(tmp_path / "fresh", tuned, teacher)
    total = 0.0
    for row, column in rollouts.written.nonzero().tolist():
        ids = rollouts.ids[row : row + 1, : column + 1]
        ours, theirs = (m(ids).logits[0, -1].double().log_softmax(-1) for m in (fresh.model, fresh.teacher))
        total += (ours.exp() * (ours - theirs)).sum().item()
    assert found["kl"] == found["loss"] == pytest.approx(total / int(rollouts.written.sum()), rel=1e-4)
    assert fresh.teacher.config.hidden_size == 48 and not any(p.requires_grad for p in fresh.teacher.parameters())
    run.close()
    fresh.close()


def test_a_student_comes_to_its_teacher(tmp_path, tuned, teacher):
    run = started(tmp_path, tuned, teacher, "train.steps=12", "optim.lr=1e-2")
    records = [run.step().record for _ in range(12)]
    run.close()
    kl = [record["kl"] for record in records]
    assert kl[0] > 0.15 and sum(kl[-3:]) / 3 < 0.6 * kl[0], kl
    assert records[0]["learnt_from"] == 1.0 and {"kl_kept", "kl_free", "reward"} <= records[0].keys()


def test_two_steps_and_two_resumed_equal_four(tmp_path, tuned, teacher):
    asked = recipe(f"train.init={tuned}", f"distil.teacher={teacher}")
    whole = train(asked, tmp_path / "whole", shown=False)
    train(asked, tmp_path / "run", stop_at=2, shown=False)
    torch.rand(3)
    again = train(asked, tmp_path / "run", resume=tmp_path / "run", shown=False)
    assert [r["kl"] for r in metrics.read(again.out)] == [r["kl"] for r in metrics.read(whole.out)]
    for file in ("model.safetensors", "random.safetensors"):
        old, new = (load_file(run.checkpoint / file) for run in (whole, again))
        assert all(torch.equal(old[name], new[name]) for name in old), file


def test_a_teacher_is_needed_and_reads_the_same_tokens(tmp_path, tuned):
    with pytest.raises(ValueError, match=r"distil\.teacher='': allowed is a trained run"):
        started(tmp_path, tuned, "")
    other = train(recipe("train.steps=1", "model.vocab_size=300", name="reason-sft"), tmp_path / "t", shown=False).out
    with pytest.raises(ValueError, match=r"has model\.vocab_size=300: allowed is the student's, 288"):
        started(tmp_path / "b", tuned, other)
