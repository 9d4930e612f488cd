"""lm-eval on our models: its numbers are our own sums of log-probabilities, on a task and data written here."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from lively import lively

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from abyssal.model import generate, save_pretrained
from abyssal.train.cli import main
from abyssal.train.data.tokenizers import ByteTokenizer, load_tokenizer
from abyssal.train.evaluate.harness import AbyssalLM

CHOICE = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: " "
metric_list: [{{metric: acc}}]
"""
ROLLING = """
task: pages
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
DOCS = [
    {"question": f"The {thing} is", "choices": ["red", "green", "rather blue"], "answer": number % 3}
    for number, thing in enumerate(["sky", "grass under the old tree", "rose", "sea", "fire"])
]


@pytest.fixture(scope="module")
def ours():
    return lively("nano", num_hidden_layers=3, compress_ratios=[0, 4, 16], index_topk=4)


@pytest.fixture(scope="module")
def folder(ours, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_pretrained(ours, path, layout="official")
    return path


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    for name, text in {"colours": CHOICE, "pages": ROLLING}.items():
        (tmp_path / "tasks").mkdir(exist_ok=True)
        (tmp_path / f"tasks/{name}.yaml").write_text(text.format(data=data))
    return tmp_path / "tasks"


@torch.no_grad()
def log_likelihood(model, before: list[int], text: list[int]) -> float:
    """Token by token, of the definition: sum of log p(token | all before)."""
    ids = torch.tensor([before + text])
    logs = model(ids[:, :-1]).logits[0].double().log_softmax(-1)
    return sum(logs[len(before) - 1 + i, token].item() for i, token in enumerate(text))


def test_a_task_gives_our_own_numbers(ours, folder, tasks):
    spell = ByteTokenizer()
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    model = AbyssalLM(folder, "bytes", "cpu", batch_size=4)
    found = lm_eval.simple_evaluate(model, tasks=["colours", "pages"], task_manager=manager, bootstrap_iters=0)
    right = 0
    for doc, sample in zip(DOCS, found["samples"]["colours"]):
        before = [spell.bos, *spell.encode(doc["question"])]
        want = [log_likelihood(ours, before, spell.encode(" " + choice)) for choice in doc["choices"]]
        got = [response[0][0] for response in sample["resps"]]
        assert got == pytest.approx(want, abs=1e-4)
        right += want.index(max(want)) == doc["answer"]
    assert found["results"]["colours"]["acc,none"] == right / len(DOCS)
    texts = [doc["question"] for doc in DOCS]
    nats = sum(log_likelihood(ours, [spell.bos], spell.encode(text)) for text in texts)
    bits = -nats / math.log(2) / sum(map(len, texts))
    assert found["results"]["pages"]["bits_per_byte,none"] == pytest.approx(bits, abs=1e-4)


def asked(*arguments):
    return SimpleNamespace(args=arguments)


def test_long_texts_lose_their_beginning_and_are_scored_in_windows(ours, folder):
    spell, text = ByteTokenizer(), "All that is gold does not glitter, not all those who wander are lost"
    model = AbyssalLM(folder, "bytes", "cpu", max_length=16)
    ids = spell.encode(text)
    [(got, greedy)] = model.loglikelihood([asked(text, " today")], disable_tqdm=True)
    assert got == pytest.approx(log_likelihood(ours, ids[-11:], spell.encode(" today")), abs=1e-4) and not greedy
    windows = [([spell.bos], ids[:16])]
    windows += [(ids[start - 1 : start], ids[start : start + 16]) for start in range(16, 64, 16)]
    windows += [(ids[51:64], ids[64:])] if len(ids) > 64 else []
    want = sum(log_likelihood(ours, *window) for window in windows)
    assert model.loglikelihood_rolling([asked(text)])[0] == pytest.approx(want, abs=1e-4)
    with pytest.raises(ValueError, match="a continuation has 17 tokens: allowed is max_length=16"):
        model.loglikelihood([asked("a", "b" * 17)], disable_tqdm=True)


def test_an_empty_context_is_bos(ours, folder):
    [(got, _)] = AbyssalLM(folder, "bytes", "cpu").loglikelihood([asked("", "red")], disable_tqdm=True)
    assert got == pytest.approx(log_likelihood(ours, [256], list(b"red")), abs=1e-4)


def test_texts_are_written_until_a_string(ours, folder):
    spell = ByteTokenizer()
    model = AbyssalLM(folder, "bytes", "cpu", batch_size=2, max_gen_toks=9)
    prompts = ["def", "import os", "x"]
    want = [
        spell.decode(generate(ours, [spell.bos, *spell.encode(p)], max_new_tokens=24, temperature=0.0, stop=[257]))
        for p in prompts
    ]
    assert model.generate_until([asked(p, {"max_gen_toks": 24}) for p in prompts]) == want
    assert model.generate_until([asked(prompts[0], {"until": ["\n\n"]})])[0] == want[0][:9]
    stop = want[1][3:5]
    got = model.generate_until([asked(p, {"until": [stop], "max_gen_toks": 24}) for p in prompts])
    assert got == [text.partition(stop)[0] for text in want]
    with pytest.raises(ValueError, match="num_beams=2: allowed in generation_kwargs are temperature"):
        model.generate_until([asked("x", {"num_beams": 2})])
    with pytest.raises(ValueError, match="max_gen_toks=9000: allowed are numbers below max_length=8192"):
        model.generate_until([asked("x", {"max_gen_toks": 9000})])


def test_it_is_registered_and_takes_strings(folder):
    model = get_model("abyssal").create_from_arg_string(
        f"pretrained={folder},tokenizer=bytes,dtype=bfloat16", {"batch_size": "2", "device": "cpu"}
    )
    assert model.model.embed.weight.dtype == torch.bfloat16 and model.batch_size == 2
    with pytest.raises(ValueError, match=r"tokenizer=None: .* has none; allowed are 'bytes'"):
        AbyssalLM(folder)


def test_the_command_reads_a_run(tiny, tasks, tmp_path, capsys):
    source = f"data.source={tiny().data.source}"
    small = [source, "data.sequence_length=48", "data.batch_size=2", "train.steps=1", "data.held_out_rows=1"]
    few = [part for text in (*small, "train.sample_tokens=1", "optim.warmup_steps=1") for part in ("--set", text)]
    assert main(["train", "nano", "--out", str(tmp_path / "run"), *few]) == 0
    given = ["eval", "lm", str(tmp_path / "run"), "--include", str(tasks), "--limit", "2"]
    assert main([*given, "--tasks", "colours"]) == 0
    assert "colours" in capsys.readouterr().out
    assert main(given) == 2
    assert "--tasks is missing" in capsys.readouterr().err
    assert main([*given, "--tasks", "nothing-like-it"]) == 2
    assert "nothing-like-it" in capsys.readouterr().err


def test_a_tokenizer_is_an_argument_too(folder):
    assert AbyssalLM(folder, load_tokenizer("bytes")).tok_encode("a") == [256, 97]
