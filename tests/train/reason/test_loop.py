"""Rollouts against `generate`; replayed choices and sampling masks; GRPO runs to the bit; a reward that must rise."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from reasoning import TINY
from safetensors.torch import load_file

from abyssal.model import Transformer, generate
from abyssal.model.generation.sampling import Sampling
from abyssal.model.routing import record_picks, record_routing
from abyssal.train.reason.drift import drift, flipped
from abyssal.train.reason.grpo import GrpoRun
from abyssal.train.reason.loop import RolloutRun, passes
from abyssal.train.reason.policy import of_tokens
from abyssal.train.reason.rollout import roll_out
from abyssal.train.recipe import load_recipe
from abyssal.train.run import metrics
from abyssal.train.start import open_source, train

GRPO = ["grpo.prompts=4", "grpo.group=3", "grpo.skip_settled=false"]  # without skill, all groups are settled
CLOCK = {"seconds", "tokens_per_second", "peak_memory_gib", "rollout_seconds"}


def recipe(*overrides, name="reason-grpo"):
    return load_recipe(name, [*TINY, *(GRPO if "grpo" in name else []), *overrides])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = Transformer(recipe().model).eval()
    with torch.no_grad():
        made.head.weight.mul_(20)  # a distribution with favourites, so that stops and masks come up
        for block in made.layers:
            block.ffn.gate.weight.mul_(20)
        made.layers[1].attn.indexer.wq_b.weight.mul_(50)
    return made


PROMPTS = [[256, 5, 6], [256, 9], [256, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [256, 70, 80], [256, 11], [256, 12]]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, top_k=5), Sampling(top_p=0.7)])
def test_rollouts_are_what_generate_writes_with_the_same_random_numbers(model, sampling):
    stop = _common_token(model, sampling)
    found = roll_out(model, PROMPTS, max_new_tokens=9, sampling=sampling, seed=3, stop=stop)
    settings = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    written = generate(model, PROMPTS, max_new_tokens=9, seed=3, stop=[stop], **settings)
    assert found.completions() == written
    assert len({len(row) for row in written}) > 1 and any(len(row) == 9 for row in written)
    for row, prompt in enumerate(PROMPTS):
        whole = prompt + written[row]
        n = len(whole) - 1
        assert found.ids[row, :n].tolist() == whole[:-1] and found.next_ids[row, :n].tolist() == whole[1:]
        assert found.documents[row].tolist() == [0] * n + [-1] * (found.ids.shape[1] - n)
        assert found.written[row].nonzero().flatten().tolist() == list(range(len(prompt) - 1, n))
        assert not found.log_old[row][~found.written[row]].any()


def _common_token(model, sampling):
    """A token that ends some rows early and others not."""
    settings = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    written = generate(model, PROMPTS, max_new_tokens=9, seed=3, stop=(), **settings)
    for token in sorted({token for row in written for token in row[:-2]}):
        holders = [token in row for row in written]
        if any(holders) and not all(holders):
            return token
    raise AssertionError("no such token: choose another seed")


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, top_k=5), Sampling(top_p=0.7)])
def test_recorded_log_probabilities_are_those_of_a_pass_over_the_whole(model, sampling):
    found = roll_out(model, PROMPTS, max_new_tokens=9, sampling=sampling, seed=3, stop=-1)
    assert (found.kept is None) == (sampling == Sampling())
    logits = model(found.ids, documents=found.documents).logits.detach().double()
    for row, column in found.written.nonzero().tolist():
        p = sampling.probabilities(logits[row, column][None].float())[0]
        expected = math.log(p[found.next_ids[row, column]])
        assert found.log_old[row, column].item() == pytest.approx(expected, abs=2e-5)
        if found.kept is not None:
            assert torch.equal(found.kept[row, column], p > 0)
    unmasked = roll_out(model, PROMPTS, max_new_tokens=9, sampling=sampling, seed=3, stop=-1, keep_mask=False)
    assert unmasked.kept is None and torch.equal(unmasked.log_old, found.log_old)


def test_recorded_choices_are_those_of_each_token_on_its_own_row(model):
    found = roll_out(model, PROMPTS, max_new_tokens=5, sampling=Sampling(), seed=3, stop=-1)
    assert sorted(found.experts) == [0, 1] and sorted(found.picks) == [1]
    later = 0
    for row in range(len(PROMPTS)):
        n = int(found.lengths[row])
        with record_routing(model) as routes, record_picks(model) as picks:
            model(found.ids[row : row + 1, :n])
        for layer, (experts,) in routes.items():
            assert torch.equal(found.experts[layer][row, :n].sort(-1).values, experts.sort(-1).values)
        assert torch.equal(found.picks[1][row, :n], picks[1][0][0])
        assert not found.experts[1][row, n:].any() and (found.picks[1][row, n:] == -1).all()
        later += int((picks[1][0] > 0).sum())
    assert later, "some query picks another entry than the first"


def test_rows_keep_what_belongs_to_them(model):
    found = roll_out(model, PROMPTS, max_new_tokens=3, sampling=Sampling(top_k=3), seed=3, stop=-1)
    part = found.rows(torch.tensor([4, 1]))
    assert part.ids.shape == (2, 4) and len(part) == 2 and part.lengths.tolist() == [4, 4]
    assert part.completions() == [found.completions()[4], found.completions()[1]]
    assert torch.equal(part.log_old[1], found.log_old[1, :4]) and torch.equal(part.kept[0], found.kept[4, :4])
    assert torch.equal(part.experts[1][0], found.experts[1][4, :4])
    assert torch.equal(part.picks[1][1], found.picks[1][1, :4])


def test_greedy_rollouts_are_refused(model):
    with pytest.raises(ValueError, match=r"temperature=0\.0: allowed are positive numbers"):
        roll_out(model, PROMPTS, max_new_tokens=2, sampling=Sampling(0.0), seed=0, stop=-1)


def test_passes_go_by_length_within_the_budget():
    lengths = torch.tensor([5, 3, 9, 3, 20, 4])
    found = passes(lengths, 15)
    assert [rows.tolist() for rows in found] == [[1, 3, 5], [0], [2], [4]]
    assert [rows.tolist() for rows in passes(lengths, 10**6)] == [[1, 3, 5, 0, 2, 4]]


# runs ----------------------------------------------------------------------------------------------------------------


def without_clock(folder: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in CLOCK} for record in metrics.read(folder)]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    return train(recipe(name="reason-sft"), tmp_path_factory.mktemp("sft") / "run", shown=False)


@pytest.fixture(scope="module")
def whole(tuned, tmp_path_factory):
    out = tmp_path_factory.mktemp("grpo") / "run"
    return train(recipe(f"train.init={tuned.out}"), out, shown=False)


def started(tmp_path: Path, tuned, *overrides) -> GrpoRun:
    asked = recipe(f"train.init={tuned.out}", *overrides)
    run = GrpoRun(asked, open_source(asked), tmp_path / "run", None, False)
    with torch.no_grad():
        for name, parameter in run.model.named_parameters():
            if name == "head.weight" or name.endswith("gate.weight"):
                parameter.mul_(20)
    return run


def log_ratio(run: RolloutRun, rollouts) -> float:
    with run.choosing(rollouts):
        log_pi, _ = run.log_policy(run.model, rollouts)
    return (of_tokens(log_pi, rollouts.next_ids) - rollouts.log_old)[rollouts.written].abs().max().item()


def keeping(run: RolloutRun, **kept: bool) -> None:
    run.rollouts = replace(run.rollouts, **kept)


def test_ratios_are_one_before_any_update_and_replay_keeps_them_so_when_choices_move(tmp_path, tuned):
    run = started(tmp_path, tuned, "grpo.top_k=40", "reason.max_new_tokens=20")
    rollouts = run.roll_out(run.questions(0), 0)
    run.model.train()
    assert log_ratio(run, rollouts) < 2e-5
    keeping(run, keep_routing=False, keep_picks=False)
    assert log_ratio(run, rollouts) < 2e-5
    rollouts_kept, rollouts.kept = rollouts.kept, None
    assert log_ratio(run, rollouts) > 1e-2, "the sampling mask is part of what drew the tokens"
    rollouts.kept = rollouts_kept
    block = run.model.layers[1]
    assert not block.ffn.gate.is_hash and set(rollouts.picks) == {1}
    with torch.no_grad():  # the weights of attention and experts are the same, the choices are not
        block.ffn.gate.bias.copy_(torch.linspace(-3, 3, len(block.ffn.gate.bias)))
        block.attn.indexer.weights_proj.weight.neg_()
    for kept in ({"keep_routing": True}, {"keep_picks": True}):
        keeping(run, **{"keep_routing": False, "keep_picks": False, **kept})
        assert log_ratio(run, rollouts) > 1e-4, f"{kept} is not enough"
    keeping(run, keep_routing=True, keep_picks=True)
    assert log_ratio(run, rollouts) < 2e-5
    run.close()


def test_drift_tells_choices_from_weights(tmp_path, tuned):
    run = started(tmp_path, tuned, "reason.max_new_tokens=20")
    rollouts = run.roll_out(run.questions(0), 0)
    still = drift(run, rollouts)
    assert still["flipped_experts"] == still["flipped_picks"] == 0.0
    assert abs(still["kl_kept"]) < 1e-9 > abs(still["kl_free"])
    with torch.no_grad():
        run.model.layers[1].attn.indexer.weights_proj.weight.neg_()
    moved = drift(run, rollouts)
    assert moved["flipped_picks"] > 0.3 and moved["flipped_experts"] < 0.5
    assert abs(moved["kl_kept"]) < 1e-9 and moved["kl_free"] > 1e-6
    keeping(run, keep_picks=False)
    assert drift(run, rollouts)["kl_kept"] > 1e-6
    run.close()


def test_flips_are_counted_where_there_was_a_choice():
    old, now = {0: torch.tensor([[[1, 2], [3, 4], [5, 6]]])}, {0: torch.tensor([[[2, 7], [4, 3], [0, 9]]])}
    assert flipped(old, now, {0: torch.tensor([[True, True, False]])}) == 0.25
    assert flipped(old, now, {0: torch.zeros(1, 3, dtype=torch.bool)}) is None and flipped(old, now, {}) is None


def test_questions_take_turns_of_tasks_then_modes_and_never_come_again(tmp_path, tuned):
    run = started(tmp_path, tuned)
    first, second = run.questions(0), run.questions(1)
    assert [(p.task, mode) for p, mode in first] == [
        ("addition-1", "thinking"), ("sorting-2", "thinking"), ("addition-1", "chat"), ("sorting-2", "chat"),
    ]  # fmt: skip
    assert not {p.question for p, _ in first if p.task == "sorting-2"} & {p.question for p, _ in second}
    assert not any(p.held_out for p, _ in first + second)
    run.close()


def test_an_update_of_parts_equals_one_of_the_whole(tmp_path, tuned):
    grads = []
    for most in (10**6, 12):
        run = started(tmp_path / str(most), tuned, f"grpo.tokens_per_pass={most}")
        rollouts = run.roll_out(run.questions(0), 0)
        run.optimizer.step = lambda model=run.model: grads.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
        found = run.update(rollouts, torch.tensor([0.5, -0.5, 1.0, -0.25]), run.schedule.phase(0))
        grads[-1]["found"] = torch.tensor([found[name] for name in sorted(found)])
        run.close()
    whole, parts = grads
    assert whole.keys() == parts.keys()
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-3, atol=1e-5, msg=name)


def test_settled_groups_are_left_out_if_asked(tmp_path, tuned):
    advantage = torch.tensor([0.0, 0.0, 0.0, 0.5, 0.5, -1.0, 0.0, 0.0, 0.0, 0.25, 0.0, -0.25])
    for skip, rows in ((True, [3, 4, 5, 9, 10, 11]), (False, list(range(12)))):
        run = started(tmp_path / str(skip), tuned, f"grpo.skip_settled={str(skip).lower()}", "grpo.updates=3")
        asked = [question for question in run.questions(0) for _ in range(3)]
        rollouts, seen = run.roll_out(asked, 0), []
        update = run.update

        def spy(part, gains, phase, seen=seen, update=update):
            seen.append((part.completions(), gains.tolist()))
            return update(part, gains, phase)

        run.update = spy
        measured = run.learn(rollouts, advantage, run.schedule.phase(0))
        written = rollouts.completions()
        pairs = [pair for part, gains in seen for pair in zip(part, gains)]
        assert sorted(pairs, key=repr) == sorted(((written[i], advantage[i].item()) for i in rows), key=repr)
        assert len(seen) == 3 and measured["learnt_from"] == len(rows) / 12
        before = {name: p.clone() for name, p in run.model.named_parameters()}
        nothing = run.learn(rollouts, torch.zeros(12), run.schedule.phase(1))
        same = all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())
        assert same == skip and nothing["learnt_from"] == (not skip)
        assert (nothing["grad_norm"] == 0.0) == skip
        run.close()


def test_a_run_starts_from_the_weights_it_is_given(tuned, whole):
    given, reference = load_file(tuned.checkpoint / "model.safetensors"), load_file(whole.out / "reference.safetensors")
    assert given.keys() == reference.keys() and all(torch.equal(given[name], reference[name]) for name in given)
    last = load_file(whole.checkpoint / "model.safetensors")
    assert not torch.equal(last["head.weight"], given["head.weight"])
    first = metrics.read(whole.out)[0]
    assert first["kl"] < 1e-2 and first["clip_fraction"] == first["off_policy"] == 0
    with pytest.raises(ValueError, match=r"train\.init='': allowed is a trained run"):
        train(recipe(), whole.out.parent / "other", shown=False)
    with pytest.raises(ValueError, match=r"is of another model: model\.hc_mult: 2 -> 4"):
        train(recipe(f"train.init={tuned.out}", "model.hc_mult=4"), whole.out.parent / "other", shown=False)


def test_metrics_of_a_run(whole):
    records = metrics.read(whole.out)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    for record in records:
        assert record["reward"] == pytest.approx((record["reward_thinking"] + record["reward_chat"]) / 2)
        assert 0 < record["entropy"] < math.log(288) and 1 <= record["length_chat"] <= 6
        assert record["length"] == pytest.approx((record["length_thinking"] + record["length_chat"]) / 2)
        assert record["kl"] >= 0 and record["grad_norm"] >= 0
    assert [("accuracy" in record) for record in records] == [False, True, False, True]
    assert set(records[1]["accuracy"]["chat"]) == {"addition-1", "sorting-2"}
    assert records[-1]["tokens"] == pytest.approx(sum(record["length"] * 12 for record in records))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_two_steps_and_two_resumed_equal_four(tuned, whole, tmp_path, elsewhere):
    out = tmp_path / "run"
    train(recipe(f"train.init={tuned.out}"), out, stop_at=2, shown=False)
    torch.rand(3)
    end = tmp_path / "end" if elsewhere else out
    resumed = train(recipe(f"train.init={tuned.out}"), end, resume=out, shown=False)
    assert without_clock(end) == without_clock(whole.out)
    for file in ("model.safetensors", "optimizer.safetensors", "random.safetensors"):
        old, new = load_file(whole.checkpoint / file), load_file(resumed.checkpoint / file)
        assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old), file
    old, new = load_file(whole.out / "reference.safetensors"), load_file(end / "reference.safetensors")
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_recomputed_layers_take_the_experts_of_the_rollout_too(tuned, whole, tmp_path):
    again = train(recipe(f"train.init={tuned.out}", "train.recompute=1"), tmp_path / "run", shown=False)
    assert without_clock(again.out) == without_clock(whole.out)


def test_another_seed_asks_and_draws_otherwise(tuned, whole, tmp_path):
    other = train(recipe(f"train.init={tuned.out}", "train.seed=1", "train.steps=1"), tmp_path / "run", shown=False)
    assert metrics.read(other.out)[0]["length"] != metrics.read(whole.out)[0]["length"]


def test_the_reward_of_an_easy_task_rises(tmp_path, tuned, monkeypatch):
    """A bandit: any completion that begins with a byte below 128 is right; half are at the start, nearly all later."""
    from abyssal.train.reason import loop
    from abyssal.train.reason.reward import Verdict

    monkeypatch.setattr(loop, "judge", lambda problem, mode, ids, tokenizer: Verdict(True, ids[0] < 128))
    changes = ["grpo.prompts=4", "grpo.group=16", "reason.max_new_tokens=1", "optim.lr=2e-2", "grpo.kl_weight=0"]
    asked = recipe(f"train.init={tuned.out}", *changes, "train.steps=14")
    run = GrpoRun(asked, open_source(asked), tmp_path / "run", None, False)
    rewards = [run.step().record["reward"] for _ in range(14)]
    run.close()
    assert rewards[0] < 0.6 and sum(rewards[-3:]) / 3 > 0.9, rewards


def test_examinations_count_right_answers(model, monkeypatch):
    from abyssal.train.data.tokenizers import ByteTokenizer
    from abyssal.train.reason import exam
    from abyssal.train.reason.conversations import conversation

    tokenizer, tasks = ByteTokenizer(), ("addition-3", "sorting-2")
    known = {}
    for task in tasks:
        for number, found in enumerate(exam.questions(task, 4)):
            for mode in ("thinking", "chat"):
                talk = conversation(found, mode, tokenizer)
                spoilt = [*talk.completion[:-2], 0, tokenizer.eos]
                lost = number == 0 or (mode == "chat" and task == "sorting-2")
                known[tuple(talk.prompt)] = spoilt if lost else talk.completion
    seen = []

    def written(model, prompts, **settings):
        seen.append(settings)
        return [known[tuple(prompt)] for prompt in prompts]

    monkeypatch.setattr(exam, "generate", written)
    monkeypatch.setattr(exam, "ROWS", 5)
    model.train()
    scores = exam.examine(model, tokenizer, tasks, ("thinking", "chat"), 4, 6, temperature=0.5, seed=2)
    assert model.training and not model.eval().training
    right = {mode: [scores[mode][task].share for task in tasks] for mode in scores}
    assert right == {"thinking": [0.75, 0.75], "chat": [0.75, 0.0]}
    assert scores["chat"]["sorting-2"].well_formed == 1.0 and scores["chat"]["sorting-2"].length == 3.0
    assert exam.mean_right(scores["chat"]) == 0.375
    assert len(seen) == 4 and {s["temperature"] for s in seen} == {0.5} and len({s["seed"] for s in seen[:2]}) == 2
    assert all(s["max_new_tokens"] == 6 and s["stop"] == [tokenizer.eos] for s in seen)


def test_any_seed_that_torch_takes_is_one(tiny):
    """Each of them gives every step another generator; of small ones the numbers are as they were."""
    assert tiny("train.seed=3000000000").train.seed == 3_000_000_000
    for seed in (7, 3_000_000_000, 2**62):
        run = SimpleNamespace(recipe=SimpleNamespace(train=SimpleNamespace(seed=seed)))
        found = [GrpoRun._seed(run, step) for step in range(3)]
        assert len(set(found)) == 3 and all(torch.Generator().manual_seed(each) for each in found)
        assert seed > 7 or found[2] == 7 << 32 | 2
