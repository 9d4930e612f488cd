"""LoRA on our models by peft: adapters do something wherever they are allowed, learn alone, are saved, and merge."""

import pytest
import torch
from lively import draw_ids, lively

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
from transformers import AutoModelForCausalLM

import abyssal.hf  # noqa: F401
from abyssal.model import decode, load_pretrained, save_pretrained

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 258, "max_new_tokens": 40}
LINEAR = ["wq_a", "wq_b", "attn.wkv", "wo_a", "wo_b", "compressor.wkv", "wgate", "weights_proj", "engram.wkv"]
LINEAR += ["shared_experts.w13", "shared_experts.w2", "e_proj", "h_proj"]


def adapted(folder, targets="all-linear", **options):
    """The folder's model with adapters that are not zero at first."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder)
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(base, config)


def in_lora(model) -> set[str]:
    return {name for name, module in model.named_modules() if hasattr(module, "base_layer")}


@pytest.mark.parametrize("target", LINEAR)
def test_an_adapter_does_what_merging_it_does(folder, target):
    """In every kind of linear layer, also those whose module is not called as peft expects: none is left out."""
    model = adapted(folder, rf".*{target.replace('.', '[.]')}", lora_alpha=64)
    ids = draw_ids(2, 40)
    model.train()
    with model.disable_adapter():
        before = model(ids, labels=ids).loss
    found = model(ids, labels=ids).loss  # of all: the indexer and MTP show in their losses alone
    merged = model.merge_and_unload()
    want = merged.train()(ids, labels=ids).loss
    assert not in_lora(merged)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    assert abs(found - before) > 1e-4


def test_all_linear_learns_and_leaves_the_base_alone(ours, folder, tmp_path):
    model = adapted(folder)
    layers = [name for name, x in ours.named_modules() if isinstance(x, torch.nn.Linear) and name != "head"]
    assert in_lora(model) == {f"base_model.model.model.{name}" for name in layers}
    model.train()
    ids = draw_ids(2, 40, top=30)
    learning = [x for x in model.parameters() if x.requires_grad]
    rule = torch.optim.Adam(learning, 1e-2)
    losses = []
    for _ in range(8):
        loss = model(ids, labels=ids).loss
        rule.zero_grad()
        loss.backward()
        assert all(x.grad is not None for x in learning)
        rule.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    model.eval()
    logits = model(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(again(ids).logits, logits)
    plain = {name.replace(".base_layer", ""): x for name, x in model.get_base_model().model.state_dict().items()}
    assert not [name for name, x in ours.state_dict().items() if not torch.equal(plain[name], x)]
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(load_pretrained(tmp_path / "merged")(ids).logits, logits, rtol=0, atol=2e-3)


def test_decoding_under_adapters_is_the_whole_pass(folder, monkeypatch):
    """Token by token, through the modules: numpy is for plain models. It comes back when the adapters are merged."""
    taken = []
    original = decode.Decoder.__call__
    monkeypatch.setattr(decode.Decoder, "__call__", lambda *given: taken.append(1) or original(*given))
    model = adapted(folder).eval()
    ids = draw_ids(1, 12)
    model.get_base_model().model(ids[:, :1], cache=model.get_base_model().model.new_cache(1, 4))
    found = model.generate(input_ids=ids, **GREEDY)
    assert not taken
    assert torch.equal(found, model.generate(input_ids=ids, use_cache=False, **GREEDY))
    assert torch.equal(found[:, 12:], model(found).logits.argmax(-1)[:, 11:-1])
    with model.disable_adapter():
        assert not torch.equal(found, model.generate(input_ids=ids, **GREEDY))
    merged = model.merge_and_unload()
    assert torch.equal(found, merged.generate(ids, **GREEDY)) and len(taken) == 39


def test_the_head_is_trained_whole_or_not_at_all(folder):
    ids = draw_ids(1, 12)
    for target in ("head", "engram.table"):
        with pytest.raises(ValueError, match=rf"target_modules has '.*{target}'"):
            adapted(folder, [target])(ids)
    model = adapted(folder, ["wq_a"], modules_to_save=["head"])
    model(ids, labels=ids).loss.backward()
    whole = model.get_base_model().model.head
    assert whole.modules_to_save["default"].weight.grad.abs().sum() > 0
    before = model(ids).logits
    with torch.no_grad():
        whole.modules_to_save["default"].weight.zero_()
    assert before.abs().max() > 0 and not model(ids).logits.any()


def test_experts_as_parameters(folder):
    """peft's LoRA on stacked matrices, `target_parameters`."""
    model = adapted(folder, [], target_parameters=["experts.w13", "experts.w2"]).eval()
    ids = draw_ids(1, 30)
    found = model(ids).logits
    with model.disable_adapter():
        assert (found - model(ids).logits).abs().max() > 1e-2
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, found, rtol=0, atol=2e-3)


def test_rounded_layers_may_have_adapters(tmp_path):
    aware = {"linears": "fp8"}
    save_pretrained(lively("nano", num_hidden_layers=2, compress_ratios=[0, 4], quantization_aware=aware), tmp_path)
    model = adapted(tmp_path, ["wq_a", "wo_a"]).eval()
    ids = draw_ids(1, 20)
    with model.disable_adapter():
        torch.testing.assert_close(model(ids).logits, load_pretrained(tmp_path)(ids).logits, rtol=0, atol=1e-3)
    assert (model(ids).logits - load_pretrained(tmp_path)(ids).logits).abs().max() > 1e-2
