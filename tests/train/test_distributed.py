"""Several processes: two over gloo do what one does, to the order of sums; a run outlives its processes."""

import copy

import process_jobs as jobs
import pytest
import torch
from process_jobs import Job, together
from torch.nn import functional as F

CASES = {
    "experts": (torch.float32, None, (19, 5)),
    "experts, none here": (torch.float32, 3, (11, 4)),
    "experts, one token": (torch.float32, None, (1, 6)),
    "experts, bfloat16": (torch.bfloat16, None, (9, 9)),
}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """What two processes made of every job."""
    names = ("dtype", "only", "tokens")
    work = [Job(name, jobs.expert_pass, dict(zip(names, case))) for name, case in CASES.items()]
    work += [Job("sums", jobs.sums, {}), Job("odd share", jobs.odd_share, {}), Job("odd experts", jobs.odd_experts, {})]
    return together(work, tmp_path_factory.mktemp("two") / "jobs")


def expert_oracle(case: dict) -> dict[str, list[torch.Tensor]]:
    """Experts one pair at a time, in float64."""
    experts = copy.deepcopy(case["experts"]).double()
    found: dict[str, list[torch.Tensor]] = {name: [] for name in ("out", "dx", "dweights", "dshared")}
    for rank in range(2):
        x, weights, shared = (case[name][rank].double().requires_grad_() for name in ("x", "weights", "shared"))
        rows = []
        for token in range(len(x)):
            row = shared[token]
            for slot, expert in enumerate(case["chosen"][rank][token]):
                gate, up = (experts.w13[expert] @ x[token]).chunk(2)
                inner = F.silu(gate.clamp(max=case["limit"])) * up.clamp(-case["limit"], case["limit"])
                row = row + weights[token, slot] * (experts.w2[expert] @ inner)
            rows.append(row)
        out = torch.stack(rows)
        out.backward(case["dout"][rank].double())
        none = torch.zeros(())
        for name, value in (("out", out), ("dx", x.grad), ("dweights", weights.grad), ("dshared", shared.grad)):
            found[name].append(none if value is None else value.detach())
    return {**found, "dw13": [experts.w13.grad] * 2, "dw2": [experts.w2.grad] * 2}


@pytest.mark.parametrize("name", CASES)
def test_shared_out_experts_are_the_experts(done, name):
    expected = expert_oracle(jobs.expert_case(*CASES[name]))
    tolerance = 1e-5 if CASES[name][0] == torch.float32 else 3e-2
    for tensor, both in expected.items():
        for rank, value in enumerate(both):
            found = done[name][rank][tensor].double()
            error = (found - value).norm() / value.norm().clamp_min(1e-12) if found.numel() else torch.zeros(())
            assert error < tolerance, f"{tensor} of rank {rank}: {error}"


def test_a_world_adds_up_agrees_and_shares_out(done):
    for rank, found in enumerate(done["sums"]):
        assert found["norms"] == pytest.approx((found["expected"], 0.5, 0.5), rel=1e-5)
        assert found["rows"] == range(6 + 4 * rank, 10 + 4 * rank)
        assert found["total"] == [1, 2]
        assert found["agreed"] == "said by 0"
        assert found["first"] == (rank == 0)
        assert found["shape"] == (2, 2, (1, 2))


def test_what_does_not_divide_is_named(done):
    for rank in range(2):
        assert "5: allowed are multiples of 2" in str(done["odd share"][rank])
        assert "train.expert_parallel=3: allowed are divisors of 2" in str(done["odd experts"][rank])
