"""Who watches is told of every op and of nothing else; results are the same; compiled graphs go unwatched."""

import contextlib

import pytest
import torch

from abyssal.kernels import index_loss, moe_route, rms_norm
from abyssal.kernels.watch import is_watched, told, watched
from abyssal.model import ModelConfig, Transformer


class Diary:
    def __init__(self):
        self.lines, self.open = [], []

    def begins(self, what):
        self.lines.append(what)
        self.open.append(what)

    def ends(self, what):
        assert self.open.pop() is what


def test_ops_are_told_by_name_and_compute_the_same():
    x, diary = torch.randn(3, 8), Diary()
    plain = rms_norm(x, torch.ones(8), 1e-6), moe_route(x, top_k=2, scale=1.0)
    with watched(diary):
        seen = rms_norm(x, torch.ones(8), 1e-6), moe_route(x, top_k=2, scale=1.0)
    rms_norm(x, torch.ones(8), 1e-6)
    assert diary.lines == ["rms_norm", "moe_route"] and not diary.open
    assert torch.equal(plain[0], seen[0]) and all(map(torch.equal, plain[1], seen[1]))


def test_a_call_that_fails_has_ended_and_so_has_the_watch():
    diary = Diary()
    with pytest.raises(TypeError), watched(diary):
        told(lambda: None, "none")(1)
    assert diary.lines == ["none"] and not diary.open and not is_watched()
    assert told(index_loss, "index_loss") is index_loss


def test_several_watch_and_one_leaves_first():
    first, second = Diary(), Diary()
    x = torch.randn(2, 4)
    with watched(first):
        with watched(second):
            rms_norm(x, torch.ones(4), 1e-6)
        rms_norm(x, torch.ones(4), 1e-6)
    assert len(first.lines) == 2 and len(second.lines) == 1


def test_calls_end_in_the_order_in_which_they_began():
    told_of = []

    class Named:
        def __init__(self, name):
            self.name = name

        def begins(self, what):
            told_of.append(f"{self.name} begins")

        def ends(self, what):
            told_of.append(f"{self.name} ends")

    with watched(Named("outer")), watched(Named("inner")):
        told(lambda: None, "call")()
    assert told_of == ["outer begins", "inner begins", "inner ends", "outer ends"]


def test_who_joins_during_a_call_is_not_told_of_its_end():
    late, entered = Diary(), contextlib.ExitStack()
    with watched(Diary()):
        told(lambda: entered.enter_context(watched(late)), "call")()
    entered.close()
    assert not late.lines and not is_watched()


@pytest.mark.parametrize("early", [False, True])
def test_a_compiled_graph_is_whole_and_not_watched(early):
    """Whether it was compiled while somebody watched or before."""
    x, diary = torch.randn(2, 4), Diary()
    expected = rms_norm(x, torch.ones(4), 1e-6)
    torch._dynamo.reset()
    norm = lambda x: told(rms_norm, "norm")(x, torch.ones(4), 1e-6)  # noqa: E731
    compiled = torch.compile(norm, fullgraph=True, backend="eager")
    if not early:
        compiled(x)
    with watched(diary):
        assert torch.equal(compiled(x), expected)
    assert torch.equal(compiled(x), expected) and diary.lines == []


def test_the_numpy_decoder_tells_the_modules_that_its_parts_stand_for():
    torch.manual_seed(0)
    model, diary = Transformer(ModelConfig.load("nano")).eval(), Diary()
    cache, ids = model.new_cache(1, 120, rewind=1), torch.randint(0, 256, (1, 101))
    with torch.no_grad():
        model(ids[:, :100], cache=cache)
        plain = model(ids[:, 100:], cache=cache).hidden
        cache.truncate(100)
        with watched(diary):
            seen = model(ids[:, 100:], cache=cache).hidden
    assert torch.equal(plain, seen)
    modules = [what for what in diary.lines if not isinstance(what, str)]
    for block in model.layers:
        parts = [block, block.hc_attn, block.attn_norm, block.attn, block.hc_ffn, block.ffn_norm, block.ffn]
        parts += [block.ffn.experts, block.ffn.shared_experts]
        parts += [block.engram] if block.engram else []
        parts += [block.attn.compressor] if block.attn.ratio else []
        assert all(modules.count(part) == 1 for part in parts)
    assert diary.lines.count("attention") == len(model.layers) and diary.lines.count("hyper_recombine") == 10
    assert modules[-2:] == [model.hc_head, model.norm] and "index_topk" in diary.lines
