"""`abyssal.hf`: what transformers loads, writes, computes and generates is what our own functions do, bit for bit where
it can be.
"""

import copy
import json
import shutil

import pytest
import torch
from lively import draw_ids, lively
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, GenerationConfig, pipeline

from abyssal.hf import AbyssalCache, AbyssalConfig, AbyssalForCausalLM
from abyssal.model import Transformer, decode, generate, load_pretrained, save_pretrained

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 258}


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def assert_equal(found: dict, want: dict) -> None:
    assert found.keys() == want.keys()
    assert not [k for k, x in want.items() if found[k].dtype != x.dtype or not torch.equal(found[k], x)]


# folders


@pytest.mark.parametrize("place", [{}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"low_cpu_mem_usage": True}])
def test_every_tensor_is_read_as_it_is(ours, folder, place):
    if "device_map" in place:
        pytest.importorskip("accelerate")
    found, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **place)
    assert type(found) is AbyssalForCausalLM and found.model.config == ours.config
    assert not any(told.values()), told
    assert not any(x.is_meta for x in (*found.parameters(), *found.buffers()))
    assert_equal(found.model.state_dict(), ours.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_those_of_our_loader(folder, dtype):
    """What is kept in float32 is so here, and in float64 all is."""
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    want = load_pretrained(folder, dtype=dtype)
    assert_equal(found.model.state_dict(), want.state_dict())
    ids = draw_ids(2, 40)
    assert torch.equal(found(ids).logits, want(ids).logits)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder).to(dtype)(ids).logits, want(ids).logits)


def test_what_it_writes_our_loader_reads(ours, model, folder, tmp_path):
    model.save_pretrained(tmp_path / "again", max_shard_size="300KB")
    again = load_pretrained(tmp_path / "again")
    assert again.config == ours.config and len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    assert_equal(again.state_dict(), ours.state_dict())
    model.bfloat16().save_pretrained(tmp_path / "half")
    model.float()
    with torch.no_grad():
        model.model.load_state_dict(ours.state_dict())
    assert load_pretrained(tmp_path / "half").embed.weight.dtype == torch.bfloat16
    assert json.loads((tmp_path / "half/config.json").read_text())["architectures"] == ["AbyssalForCausalLM"]


def test_a_checkpoint_of_a_run_is_a_model(ours, folder, tmp_path):
    """What else lies in it (moments, random generators) is not read."""
    step = tmp_path / "checkpoints/step-000001"
    shutil.copytree(folder, step)
    for name in ("optimizer", "random"):
        save_file({"embed.weight.exp_avg": torch.zeros(2)}, step / f"{name}.safetensors")
    (step / "checkpoint.json").write_text("{}")
    assert_equal(AutoModelForCausalLM.from_pretrained(step).model.state_dict(), ours.state_dict())


def test_the_attention_stage_comes_along(ours, tmp_path):
    dense = copy.deepcopy(ours)
    dense.attention_stage = "dense"
    save_pretrained(dense, tmp_path / "one")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    found.save_pretrained(tmp_path / "two")
    assert found.model.attention_stage == load_pretrained(tmp_path / "two").attention_stage == "dense"


def test_new_weights_are_those_of_our_model(ours):
    config = AbyssalConfig(**ours.config.to_dict())
    torch.manual_seed(3)
    found = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(3)
    assert_equal(found.model.state_dict(), Transformer(ours.config).state_dict())


def test_a_folder_is_whole_or_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "less")
    state = load_file(folder / "model.safetensors")
    save_file({k: x for k, x in state.items() if k != "layers.1.attn.wq_a.weight"}, tmp_path / "less/model.safetensors")
    with pytest.raises(ValueError, match="the folder lacks tensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "less")
    with pytest.raises(ValueError, match="num_experts_per_tok=99"):
        AutoModelForCausalLM.from_pretrained(folder, num_experts_per_tok=99)


def test_keys_may_be_changed_as_transformers_does(folder):
    assert AutoConfig.from_pretrained(folder, index_topk=2).ours().index_topk == 2
    assert AutoModelForCausalLM.from_pretrained(folder, mtp_loss_weight=0.0).model.config.mtp_loss_weight == 0


# passes


@pytest.mark.parametrize("mask", ["none", "ones", "left", "right"])
def test_loss_and_gradients(folder, mask):
    """Shifted labels; the whole objective in training, cross-entropy after eval()."""
    found = AutoModelForCausalLM.from_pretrained(folder)
    want = load_pretrained(folder)
    ids, real = draw_ids(2, 40), torch.ones(2, 40, dtype=torch.int64)
    if mask in ("left", "right"):
        real[1, :7] = 0
    real = real.flip(1) if mask == "right" else real
    labels = ids.clone()
    labels[:, 12] = -100
    targets = F.pad(labels.masked_fill(real == 0, -100)[:, 1:], (0, 1), value=-100)
    expected = want.train()(ids, targets=targets, documents=real - 1)
    out = found.train()(ids, attention_mask=None if mask == "none" else real, labels=labels)
    torch.testing.assert_close(out.loss, expected.loss)
    assert out.loss > found.eval()(ids, attention_mask=real, labels=labels).loss
    found.zero_grad()
    out.loss.backward()
    expected.loss.backward()
    for (name, x), (_, y) in zip(found.model.named_parameters(), want.named_parameters()):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-6, msg=name)
    targets = targets.masked_fill(real == 0, -100)  # padding predicts nothing
    plain = F.cross_entropy(out.logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    torch.testing.assert_close(found(ids, attention_mask=real, labels=labels).loss, plain)


def test_padding_is_no_part_of_a_pass(model, ours):
    ids = draw_ids(1, 30)
    want = ours(ids).logits
    for mask in (torch.tensor([[0] * 9 + [1] * 30]), torch.tensor([[1] * 30 + [0] * 9]), torch.ones(1, 30)):
        padded = torch.full(mask.shape, 258).masked_scatter(mask.bool(), ids)
        for cached in (False, True):
            found = model(padded, attention_mask=mask, use_cache=cached)
            torch.testing.assert_close(found.logits[mask.bool()], want[0], rtol=0, atol=1e-4)
            assert (found.past_key_values is not None) == cached


def test_logits_to_keep_and_tuples(model):
    ids = draw_ids(2, 20)
    whole = model(ids)
    assert torch.equal(model(ids, logits_to_keep=3).logits, whole.logits[:, -3:])
    assert torch.equal(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, whole.logits[:, [0, 5]])
    assert torch.equal(model(ids, return_dict=False)[0], whole.logits)


def test_a_cache_takes_any_chunks_and_is_cut_back(model):
    ids = draw_ids(1, 600)
    want = model(ids).logits
    past = AbyssalCache()
    past.activate_past_recording()
    parts = [model(ids[:, :100], past_key_values=past), model(ids[:, 100:140], past_key_values=past)]
    past.crop(-40)
    assert past.get_seq_length() == 100 and past.rows.max_length == 256
    parts[1:] = [model(part, past_key_values=past) for part in ids[:, 100:].split([1, 450, 49], 1)]
    torch.testing.assert_close(torch.cat([part.logits for part in parts], 1), want, rtol=0, atol=1e-4)
    assert past.rows.max_length == 2 * 551  # it has grown
    with pytest.raises(ValueError, match="rewind=64 was declared"):
        past.crop(-65)


def test_what_cannot_be_is_refused(model):
    ids = draw_ids(1, 8)
    for name in ("output_attentions", "output_hidden_states"):
        with pytest.raises(ValueError, match=f"{name} was given"):
            model(ids, **{name: True})
    with pytest.raises(ValueError, match="inputs_embeds was given"):
        model(ids, inputs_embeds=torch.zeros(1, 8, 64))
    with pytest.raises(TypeError, match="past_key_values is DynamicCache: allowed is AbyssalCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="labels cannot be given together with a cache"):
        model(ids, labels=ids, use_cache=True)
    with pytest.raises(ValueError, match=r"attention_mask has shape \[1, 7\]"):
        model(ids, attention_mask=torch.ones(1, 7))
    with pytest.raises(ValueError, match="cache_implementation='static'"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match="new_num_tokens=300: allowed is vocab_size=260"):
        model.resize_token_embeddings(300)
    assert model.resize_token_embeddings(260) is model.get_input_embeddings()


def test_checkpointing_is_recompute(folder):
    found = AutoModelForCausalLM.from_pretrained(folder).train()
    ids = draw_ids(1, 40)
    found(ids, labels=ids).loss.backward()
    want = {name: x.grad.clone() for name, x in found.named_parameters()}
    found.zero_grad()
    found.activation_checkpointing_enable()
    assert found.model.recompute == 1 and found.is_activation_checkpointing
    found(ids, labels=ids).loss.backward()
    assert not [name for name, x in found.named_parameters() if not torch.equal(x.grad, want[name])]
    found.activation_checkpointing_disable()
    assert found.model.recompute == 0 and not found.is_activation_checkpointing
    for options in ({"every_n_layers": 2}, {"offload": True}):
        with pytest.raises(ValueError, match="allowed are 1 and False"):
            found.activation_checkpointing_enable(**options)


# generation


@pytest.mark.parametrize("seed", range(5))
def test_generation_is_ours_with_engram(seed, tmp_path):
    """Greedily, 200 tokens, models with Engram, which transformers itself has not."""
    layers = [[0, 4, 16], [4, 16, 4], [16, 4, 0], [4, 4], [0, 16]][seed]
    lone = lively("nano", seed=seed, num_hidden_layers=len(layers), compress_ratios=layers, index_topk=4)
    save_pretrained(lone, tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = draw_ids(1, 5 + 20 * seed, seed=seed)
    want = generate(lone, ids, max_new_tokens=200, temperature=0.0, stop=())
    assert found.generate(ids, max_new_tokens=200, **GREEDY)[0, ids.shape[1] :].tolist() == want


@pytest.mark.parametrize("seed", range(5))
def test_generation_is_that_of_transformers_own_class(seed, tmp_path):
    """Greedily, 200 tokens, without Engram: layout "huggingface", `DeepseekV4ForCausalLM` and its cache.

    In float64: where two logits, routing or index scores are closer than rounding, either may be right.
    """
    layers = [[0, 4, 16], [4, 16, 4], [16, 4, 0], [4, 4], [0, 16]][seed]
    shape = {"num_hidden_layers": len(layers), "compress_ratios": layers, "engram": None}
    lone = lively("nano", seed=seed, **shape, index_n_heads=16, index_topk=6).double()
    save_pretrained(lone, tmp_path, layout="huggingface")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, experts_implementation="eager")
    assert type(theirs).__name__ == "DeepseekV4ForCausalLM"
    ids = draw_ids(1, 5 + 20 * seed, seed=seed)
    want = generate(lone, ids, max_new_tokens=200, temperature=0.0, stop=())
    assert theirs.generate(ids, max_new_tokens=200, **GREEDY)[0, ids.shape[1] :].tolist() == want


def test_prompts_of_a_batch_are_as_if_alone(model):
    prompts = [draw_ids(1, n, seed=n)[0] for n in (3, 17, 40)]
    alone = [model.generate(p[None], max_new_tokens=30, **GREEDY)[0, len(p) :].tolist() for p in prompts]
    ids, mask = torch.full((3, 45), 258), torch.zeros(3, 45, dtype=torch.int64)
    for row, p in enumerate(prompts):
        ids[row, 45 - len(p) :], mask[row, 45 - len(p) :] = p, 1
    for options in ({}, {"use_cache": False}, {"prefill_chunk_size": 11}):
        found = model.generate(ids, attention_mask=mask, max_new_tokens=30, **GREEDY, **options)
        assert found[:, 45:].tolist() == alone, options
    past = AbyssalCache()
    first = model.generate(ids, attention_mask=mask, past_key_values=past, max_new_tokens=11, **GREEDY)
    more = torch.cat([mask, mask.new_ones(3, 11)], 1)
    again = model.generate(first, attention_mask=more, past_key_values=past, max_new_tokens=19, **GREEDY)
    assert past.get_seq_length() == 45 + 30 - 1 and again[:, 45:].tolist() == alone


def test_beams_are_those_without_a_cache(model):
    ids = draw_ids(2, 12)
    found, want = (
        model.generate(ids, max_new_tokens=15, num_beams=3, num_return_sequences=2, use_cache=cached, **GREEDY)
        for cached in (True, False)
    )
    assert torch.equal(found, want)


def test_sampling_is_that_without_a_cache(model):
    ids = draw_ids(2, 12)
    drawn = []
    for cached in (True, False):
        torch.manual_seed(0)
        options = {"do_sample": True, "top_k": 0, "use_cache": cached, "eos_token_id": None, "pad_token_id": 258}
        drawn.append(model.generate(ids, max_new_tokens=20, **options))
    assert torch.equal(*drawn)


def test_assisted_generation_writes_the_same(model, folder):
    ids = draw_ids(1, 6).repeat(1, 4)
    want = model.generate(ids, max_new_tokens=40, **GREEDY)
    assert torch.equal(model.generate(ids, max_new_tokens=40, prompt_lookup_num_tokens=5, **GREEDY), want)
    other = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        other.model.head.weight.add_(0.02 * torch.randn(other.model.head.weight.shape))
    assert torch.equal(model.generate(ids, max_new_tokens=40, assistant_model=other, **GREEDY), want)


def test_a_conversation_goes_on_from_its_cache(model):
    ids, more = draw_ids(1, 20), draw_ids(1, 9, seed=1)
    first = model.generate(ids, max_new_tokens=10, return_dict_in_generate=True, **GREEDY)
    text = torch.cat([first.sequences, more], 1)
    again = model.generate(text, past_key_values=first.past_key_values, max_new_tokens=10, **GREEDY)
    assert torch.equal(again, model.generate(text, max_new_tokens=10, **GREEDY))


def test_one_token_at_a_time_runs_in_numpy(model, monkeypatch):
    taken = []
    original = decode.Decoder.__call__
    monkeypatch.setattr(decode.Decoder, "__call__", lambda *given: taken.append(1) or original(*given))
    model.generate(draw_ids(1, 9), max_new_tokens=10, **GREEDY)
    assert len(taken) == 9


def test_pipeline(model):
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    library = tokenizers.Tokenizer(tokenizers.models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=library)
    tokenizer.padding_side, tokenizer.pad_token = "left", alphabet[0]
    ask = pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = ["def f(x):", "import os, sys"]
    config = GenerationConfig(max_new_tokens=12, do_sample=False)
    alone = [ask(text, generation_config=config)[0]["generated_text"] for text in texts]
    together = ask(texts, batch_size=2, generation_config=config)
    assert [found[0]["generated_text"] for found in together] == alone
    assert all(found.startswith(text) and len(found) > len(text) for found, text in zip(alone, texts))


def test_a_trainer_takes_steps(folder, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    found = AutoModelForCausalLM.from_pretrained(folder)
    rows = [{"input_ids": ids, "labels": ids} for ids in draw_ids(4, 24, top=20)]
    how = TrainingArguments(
        tmp_path, max_steps=4, per_device_train_batch_size=2, learning_rate=1e-3, report_to=[], use_cpu=True,
        activation_checkpointing=True, logging_steps=1, disable_tqdm=True, save_steps=4,
    )  # fmt: skip
    trainer = Trainer(found, how, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert found.model.recompute == 1
    assert_equal(load_pretrained(tmp_path / "checkpoint-4").state_dict(), found.model.state_dict())
    assert "eval_loss" in trainer.evaluate(rows)
