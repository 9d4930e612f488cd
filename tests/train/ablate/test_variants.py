"""Variants are what they say, against the plain maths; arms differ in nothing but what they name."""

import pytest
import torch

from abyssal.model import Transformer
from abyssal.model.hyper import HyperConnection
from abyssal.model.layout import make_layout
from abyssal.train.ablate.suite import jobs
from abyssal.train.ablate.suites import SUITES
from abyssal.train.ablate.variants import VARIANTS, OneRow
from abyssal.train.optim import build_optimizer
from abyssal.train.recipe import differences, load_recipe


def built(variant: str, *overrides: str) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(
        load_recipe("nano", ["model.num_hidden_layers=3", "model.compress_ratios=[0, 4, 16]", *overrides]).model
    )
    VARIANTS[variant](model)
    return model


def ids(t: int = 40, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (2, t), generator=torch.Generator().manual_seed(seed))


def test_a_plain_residual_is_the_pre_norm_loop():
    model = built("plain residual", "model.hc_mult=1")
    tokens = ids()
    layout = make_layout(tokens, None)
    x = model.embed(tokens)
    for block in model.layers:
        if block.engram is not None:
            x = x + block.engram(x[:, :, None], tokens, layout)[:, :, 0]
        x = x + block.attn(block.attn_norm(x), layout)[0]
        x = x + block.ffn(block.ffn_norm(x), tokens, layout)[0]
    expected = model.norm(x) @ model.head.weight.T
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-6)


def test_a_plain_residual_trains_and_is_observed_like_any_model():
    from abyssal.train.run.observe import Observer

    model = built("plain residual", "model.hc_mult=1")
    look = Observer(model)
    with look.watching():
        out = model(ids(), targets=ids())
    out.loss.backward()
    assert look.record["gain"] == [1.0, 1.0] and max(look.record["sinkhorn"]) == 0.0
    assert not any(".hc_" in name for name, _ in model.named_parameters())
    assert torch.isfinite(out.losses["mtp"])


def test_static_mixing_does_not_depend_on_the_token_and_still_learns():
    model = built("static mHC")
    optimizer = build_optimizer(model, load_recipe("nano").optim)
    before = model.layers[1].hc_ffn.base.clone()
    for _ in range(2):
        model(ids(), targets=ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    site = model.layers[1].hc_ffn
    streams = torch.randn(5, site.streams, model.config.hidden_size)
    _, mix = site(streams)
    for part in (mix.pre, mix.post, mix.comb):
        torch.testing.assert_close(part, part[:1].expand_as(part), rtol=0, atol=1e-7)
    assert (site.base - before).abs().max() > 1e-4
    assert all(m.fn.abs().max() == 0 for m in model.modules() if isinstance(m, HyperConnection))
    weights = torch.randn(7, site.streams, model.config.hidden_size)
    head = model.hc_head(weights)
    per_stream = torch.sigmoid(model.hc_head.base) + model.config.hc_eps
    torch.testing.assert_close(head, torch.einsum("n,tnd->td", per_stream, weights))


def test_a_frozen_indexer_stays_as_it_was_initialised():
    model, optim = built("frozen indexer", "model.index_loss_weight=0"), load_recipe("nano").optim
    start = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = build_optimizer(model, optim)
    for _ in range(3):
        model(ids(80), targets=ids(80)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
    assert not any(".indexer." in name for name in moved)
    assert {name for name in start if ".indexer." in name} and "layers.1.attn.wq_b.weight" in moved
    torch.manual_seed(0)
    fresh = Transformer(model.config).layers[1].attn.indexer.state_dict()
    assert all(torch.equal(fresh[name], p) for name, p in model.layers[1].attn.indexer.state_dict().items())


def test_a_table_of_one_row_says_the_same_after_any_n_gram():
    full, one = built("as configured"), built("one-row table")
    engram = one.layers[1].engram
    assert isinstance(engram, OneRow) and engram.table.weight.shape == (2 * 2, 8)
    streams = torch.randn(2, 40, full.config.hc_mult, full.config.hidden_size)
    a, b = ids(seed=1), ids(seed=2)
    layout = make_layout(a, None)
    assert torch.equal(engram(streams, a, layout), engram(streams, b, layout))
    assert not torch.equal(full.layers[1].engram(streams, a, layout), full.layers[1].engram(streams, b, layout))
    assert torch.equal(full.embed.weight, one.embed.weight)  # everything else starts as in the baseline
    one(a, targets=a).loss.backward()
    assert engram.table.weight.grad.abs().sum(1).min() > 0  # every head has its own row


def test_identity_mixing_hands_every_stream_on_as_it_is():
    model = built("identity mixing")
    site = model.layers[1].hc_ffn
    torch.nn.init.normal_(site.base)
    streams = torch.randn(2, 5, site.streams, model.config.hidden_size)
    y = torch.randn(2, 5, model.config.hidden_size)
    _, mix = site(streams)
    wanted = streams + mix.post[..., None] * y[..., None, :]
    torch.testing.assert_close(site.recombine(y, mix.streams, mix), wanted, rtol=1e-5, atol=1e-6)
    model(ids(), targets=ids()).loss.backward()
    n = site.streams
    pre_post, comb = site.base.grad.split([2 * n, n * n])
    assert pre_post.abs().min() > 0 and comb.abs().max() == 0


def test_n_grams_in_the_logits_are_the_tables_rows_through_a_map():
    model, same = built("n-gram logits"), built("as configured")
    tokens = ids()
    engram = model.norm.engram
    assert torch.equal(
        engram.rows(tokens, make_layout(tokens, None)), same.layers[1].engram.rows(tokens, make_layout(tokens, None))
    )
    for block in same.layers:
        block.engram = None
    same.load_state_dict({k.replace("norm.norm.", "norm."): v for k, v in model.state_dict().items()}, strict=False)
    rows = engram.table(engram.rows(tokens, make_layout(tokens, None)))
    wanted = same(tokens).logits + rows @ engram.wkv.weight.T @ model.head.weight.T
    torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-5, atol=1e-5)
    model(tokens, targets=tokens).loss.backward()
    assert engram.table.weight.grad.abs().sum() > 0 and all(p.grad is not None for p in model.norm.parameters())
    build_optimizer(model, load_recipe("nano", ["optim.rule=muon"]).optim).step()


def dense(*overrides: str) -> Transformer:
    one = ["model.hc_mult=1", "model.compress_ratios=[0, 0, 0]", "model.engram=none", "model.n_shared_experts=3"]
    return built("dense transformer", *one, "model.num_nextn_predict_layers=0", *overrides)


def test_a_dense_transformer_is_the_plain_maths():
    model, tokens = dense(), ids()
    documents = torch.tensor([[0] * 15 + [1] * 25, [0] * 30 + [-1] * 10])
    x = model.embed(tokens)
    c = model.config
    angles = torch.outer(
        torch.arange(40.0), c.rope_theta ** (-torch.arange(0, c.qk_rope_head_dim, 2) / c.qk_rope_head_dim)
    )
    starts = torch.tensor([[0] * 15 + [15] * 25, [0] * 40])
    positions = torch.arange(40) - starts

    def turned(heads):  # [b, t, h, c]: pairs of the last channels, interleaved
        heads = heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + c.rms_norm_eps)
        plain, rotary = heads.split([c.head_dim - c.qk_rope_head_dim, c.qk_rope_head_dim], -1)
        pairs = torch.view_as_complex(rotary.unflatten(-1, (-1, 2)).contiguous())
        turns = torch.polar(torch.ones_like(angles), angles)[positions][:, :, None]
        return torch.cat([plain, torch.view_as_real(pairs * turns).flatten(-2)], -1)

    rms = lambda x, norm: norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + c.rms_norm_eps)  # noqa: E731
    for block in model.layers:
        u = rms(x, block.attn_norm)
        q, k, v = (
            (u @ w.weight.T).unflatten(-1, (-1, c.head_dim))
            for w in (block.attn.q_proj, block.attn.k_proj, block.attn.v_proj)
        )
        scores = torch.einsum("bshc,bthc->bhst", turned(q), turned(k)) / c.head_dim**0.5
        seen = (torch.arange(40)[:, None] >= torch.arange(40)) & (torch.arange(40) >= starts[..., None])
        mass = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
        x = x + torch.einsum("bhst,bthc->bshc", mass, v).flatten(-2) @ block.attn.o_proj.weight.T
        u, shared = rms(x, block.ffn_norm), block.ffn.shared_experts
        gate, up = (u @ shared.w13.weight.T).chunk(2, -1)
        hidden = torch.nn.functional.silu(gate.clamp(max=c.swiglu_limit)) * up.clamp(-c.swiglu_limit, c.swiglu_limit)
        x = x + hidden @ shared.w2.weight.T
    real, wanted = documents >= 0, rms(x, model.norm) @ model.head.weight.T
    torch.testing.assert_close(model(tokens, documents=documents).logits[real], wanted[real], rtol=1e-4, atol=1e-5)
    alone = model(tokens[:1, 15:])
    torch.testing.assert_close(model(tokens, documents=documents).logits[:1, 15:], alone.logits, rtol=1e-4, atol=1e-5)


def test_a_dense_transformer_trains_and_is_observed_like_any_model():
    from abyssal.train.run.observe import Observer

    model = dense()
    look = Observer(model)
    with look.watching():
        out = model(ids(), targets=ids(), documents=torch.zeros_like(ids()))
    out.loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert out.losses["balance"] == 0 and out.metrics["load"].tolist() == [[1.0]] * 3
    model.update_router_bias()
    build_optimizer(model, load_recipe("nano", ["optim.rule=muon"]).optim).step()


@pytest.mark.parametrize(
    "variant, overrides, message",
    [
        ("dense transformer", ["model.hc_mult=1"], "compress_ratios and model.engram"),
        ("plain residual", [], "hc_mult=4"),
        ("frozen indexer", [], "index_loss_weight=0.01"),
    ],
)
def test_a_variant_refuses_a_configuration_that_it_does_not_fit(variant, overrides, message):
    with pytest.raises(ValueError, match=message):
        built(variant, *overrides)


def test_one_row_needs_a_table():
    model = built("as configured")
    bare = Transformer(load_recipe("indexer").model)
    VARIANTS["one-row table"](model)
    for name in ("one-row table", "n-gram logits"):
        with pytest.raises(ValueError, match="engram"):
            VARIANTS[name](bare)


def one(suite: str, arm: str, *overrides: str):
    return next(job for job in jobs(SUITES[suite], [0], overrides=overrides) if job.arm == arm)


def test_window_only_never_sees_beyond_its_windows():
    a = torch.randint(0, 100, (1, 90), generator=torch.Generator().manual_seed(0))
    b = a.clone()
    b[0, 4] = (b[0, 4] + 1) % 100  # four tokens in, so that a first entry is complete behind it
    changed = {}
    for arm in ("window", "trained"):
        torch.manual_seed(0)
        model = Transformer(one("indexer", arm).recipe.model).eval()
        gap = (model(a).logits - model(b).logits).abs().amax(-1)[0]
        changed[arm] = set(gap.nonzero().flatten().tolist())
    reach = 2 * (one("indexer", "window").recipe.model.sliding_window - 1)
    assert changed["window"] and max(changed["window"]) <= 4 + reach
    assert max(changed["trained"]) > 4 + reach


def test_facts_are_asked_for_beyond_two_windows():
    recipe = one("indexer", "trained").recipe
    reach = recipe.model.num_hidden_layers * (recipe.model.sliding_window - 1)
    assert recipe.planted.eval_nearest > reach
    assert (
        recipe.data.sequence_length // recipe.model.compress_ratios[0] > 32 * recipe.model.index_topk
    )  # a real choice


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_arms_differ_from_the_baseline_only_in_what_they_name(suite):
    planned = jobs(suite, [0])
    base = planned[0]
    for job, arm in zip(planned, suite.arms):
        named = {entry.partition("=")[0] for entry in arm.set} | set(arm.without)
        parts = {name.split(".")[0] for name in named if name.startswith("stages")}
        for change in differences(base.recipe, job.recipe):
            key = change.partition(":")[0]
            also = ("model.layer_types", "model.compress_ratios") if "model.compress_ratios" in named else ()
            also += ("model.compress_ratios", "model.layer_types") if "model.num_nextn_predict_layers" in named else ()
            assert key in named | parts or key in also, (arm.name, change)
        assert job is base or job.key != base.key
        assert [(s.steps, s.sequence_length, s.batch_size, s.lr) for s in job.recipe.stages] == [
            (s.steps, s.sequence_length, s.batch_size, s.lr) for s in base.recipe.stages
        ]


@pytest.mark.parametrize("size", ["quick", "full"])
@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_every_arm_builds_with_its_variant(suite, size):
    for job in jobs(suite, [0], size):
        with torch.device("meta"):
            VARIANTS[job.variant](Transformer(job.recipe.model))


def test_tables_and_experts_have_the_same_parameters_and_dense_networks_those_of_a_token():
    counts = {}
    for job in [*jobs(SUITES["engram"], [0]), *jobs(SUITES["dense"], [0])]:
        with torch.device("meta"):
            model = Transformer(job.recipe.model)
            VARIANTS[job.variant](model)
        counts[job.arm] = sum(p.numel() for p in model.parameters())
    assert abs(counts["experts-time"] / counts["v4"] - 1) < 0.02 and 0.94 < counts["logits-time"] / counts["v4"] < 1
    assert 0.2 < 1 - counts["without"] / counts["v4"] < 0.3  # the share that the paper finds best
    c = jobs(SUITES["dense"], [0])[1].recipe.model
    assert c.n_shared_experts == 1 + c.num_experts_per_tok


def test_text_suites_share_their_baseline_and_a_seed_is_the_same_data():
    keys = {jobs(SUITES[name], [1])[0].key for name in ("dense", "streams", "engram", "muon", "mtp", "balance")}
    assert len(keys) == 1
    from abyssal.train.start import open_source

    rows = [open_source(job.recipe).batch(range(2), 64).ids for job in jobs(SUITES["indexer"], [1])]
    other = open_source(jobs(SUITES["indexer"], [2])[0].recipe).batch(range(2), 64).ids
    assert all(torch.equal(rows[0], row) for row in rows) and not torch.equal(rows[0], other)


def test_an_override_reaches_all_arms_and_undoes_none():
    muon, adamw, *_ = jobs(SUITES["muon"], [0], overrides=["optim.rule=muon", "optim.lr=1e-3", "train.steps=20"])
    assert (adamw.recipe.optim.rule, muon.recipe.optim.rule) == ("adamw", "muon")
    assert {(j.recipe.optim.lr, j.recipe.train.steps, j.recipe.train.seed) for j in (adamw, muon)} == {(1e-3, 20, 0)}
