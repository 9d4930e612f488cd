"""Conversations of one's own: which tokens are learnt, behind which prompts; rows; the split; runs; what is wrong."""

import json
import re
from pathlib import Path

import pytest
import torch

from abyssal.model.config import read_recipe
from abyssal.train.cli import main
from abyssal.train.data.conversations import ChatSource, read_conversation, talks
from abyssal.train.data.packed import Talk, fill
from abyssal.train.data.tokenizers import ByteTokenizer
from abyssal.train.recipe import Recipe, load_recipe
from abyssal.train.run.checkpoint import read_state
from abyssal.train.settings import ChatConfig, DataConfig
from abyssal.train.start import open_source, train
from abyssal.train.talk.dialogue import prompt
from abyssal.train.talk.voice import random_voice

TOKENIZER = ByteTokenizer()
EOS = "<｜end▁of▁sentence｜>"
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def said(text: str | None, reasoning: str | None = None, **more) -> dict:
    return {"role": "assistant", "content": text, "reasoning_content": reasoning, **more}


CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": "<think>"}'}}
TALKS = {
    "chat": [{"role": "system", "content": "Be brief."}, user("a"), said("b"), user("c"), said("d"), user("e")],
    "thinking": [user("a"), said("b", "why b"), user("c"), said("d", "why d"), user("e"), said("f")],
    "mixed": [user("a"), said("b"), user("c"), said("d", "why d")],
    "calls": [user("a"), said(None, "why", tool_calls=[CALL]), {"role": "tool", "content": "2"}, said("b", "so")],
    "spelt": [user("what is <｜User｜> and <think>?"), said("a <｜Assistant｜> tag " + EOS), user("x"), said("y")],
    "reminded": [{"role": "latest_reminder", "content": "Monday"}, user("a"), said("b")],
    "blocks": [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), said("c")],
}  # fmt: skip


def of(messages: list[dict], tools: object = None, turns: str = "all") -> list[Talk]:
    return talks(read_conversation({"messages": messages, "tools": tools}), TOKENIZER, turns)


def spans(talk: Talk) -> list[tuple[int, int]]:
    """Where answers begin and end."""
    edges = [i for i in range(len(talk) + 1) if [False, *talk.learnt, False][i] != [False, *talk.learnt, False][i + 1]]
    return list(zip(edges[::2], edges[1::2]))


def texts(found: list[Talk]) -> list[list[str]]:
    return [[TOKENIZER.decode(talk.ids[a:b], special=True) for a, b in spans(talk)] for talk in found]


@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["", "tools"])
@pytest.mark.parametrize("name", TALKS)
def test_each_answer_is_learnt_once_behind_the_prompt_it_is_asked_with(name, tools):
    messages, voice = TALKS[name], random_voice("reason-sft")
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    found = of(messages, tools)
    learnt = [(talk, *span) for talk in found for span in spans(talk)]
    assert len(learnt) == len(answers)
    for i, (talk, start, end) in zip(answers, learnt):
        thinking = bool(messages[i].get("reasoning_content"))
        extra = {"tools": tools} if tools else {}
        assert talk.ids[:start] == prompt(voice, messages[:i], thinking=thinking, **extra)
        assert talk.ids[end - 1] == TOKENIZER.eos and TOKENIZER.eos not in talk.ids[start : end - 1]
    assert all(spans(talk)[-1][1] == len(talk) for talk in found), "nothing behind the last answer"


def test_answers_share_a_document_where_the_format_lets_them():
    assert texts(of(TALKS["chat"])) == [["b" + EOS, "d" + EOS]]
    assert texts(of(TALKS["mixed"])) == [["b" + EOS, f"why d</think>d{EOS}"]]
    assert texts(of(TALKS["thinking"])) == [[f"why b</think>b{EOS}"], [f"why d</think>d{EOS}"], ["f" + EOS]]
    kept = of(TALKS["thinking"][:4], [TOOL])
    assert texts(kept) == [[f"why b</think>b{EOS}", f"why d</think>d{EOS}"]], "with tools reasoning is kept"
    assert texts(of(TALKS["thinking"], turns="last")) == [["f" + EOS]]
    assert "why" not in TOKENIZER.decode(of(TALKS["thinking"])[1].ids[: spans(of(TALKS["thinking"])[1])[0][0]])


def test_tool_calls_are_learnt_and_results_are_not():
    ((called,), (answered,)) = texts(of(TALKS["calls"]))
    assert called.startswith("why</think>\n\n<｜DSML｜tool_calls>") and called.endswith(f"</｜DSML｜tool_calls>{EOS}")
    assert '<｜DSML｜parameter name="b" string="true"><think></｜DSML｜parameter>' in called
    assert answered == f"so</think>b{EOS}" and "tool_result" not in called + answered


def test_a_pair_and_tools_as_json_say_the_same():
    pair, whole = {"prompt": "a", "completion": "b"}, {"messages": [user("a"), said("b")]}
    assert read_conversation(pair).key == read_conversation(whole).key, "what is null is not said"
    assert of(TALKS["chat"], json.dumps([TOOL])) == of(TALKS["chat"], [TOOL]) != of(TALKS["chat"])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, "it has 'text': allowed is messages or prompt and completion as text"),
        ({"messages": []}, r"messages=\[\]: allowed is a list of messages"),
        ({"messages": "a"}, "messages='a': allowed is a list"),
        ({"messages": ["a"]}, r"messages\[0\]='a': allowed is an object with role and content"),
        ({"messages": [user("a"), {"role": "bot", "content": "b"}]}, r"messages\[1\] has role 'bot': allowed are sys"),
        ({"messages": [user("a"), said("b"), user(5)]}, r"messages\[2\] has content 5: allowed are text"),
        ({"messages": [user("a"), said({"b": 1})]}, r"messages\[1\] has content {'b': 1}"),
        ({"messages": [user("a"), said("")]}, r"messages\[1\] is the assistant's without content: allowed is text, or"),
        ({"messages": [user("a"), said("b", 5)]}, r"messages\[1\] has reasoning_content 5"),
        ({"messages": [user("a"), said("b", tool_calls=["f"])]}, r"messages\[1\] has tool_calls with 'f'"),
        ({"messages": [user("a"), said("b", tool_calls=[{"function": {}}])]}, r"messages\[1\] has a tool call {}"),
        ({"messages": [user("a"), said("\n<think>x</think>b")]}, r"messages\[1\] has content that begins with <think>"),
        ({"messages": [user("a")]}, "none is the assistant's"),
        ({"messages": [said("a")]}, r"messages\[0\] is the assistant's behind nothing: allowed is one of user"),
        ({"messages": [user("a"), said("b"), said("c")]}, r"messages\[2\] is the assistant's behind one of assistant"),
        ({"messages": [user("a"), said("b")], "tools": [5]}, r"tools=\[5\]: allowed is a list of {'type': 'function'"),
        ({"messages": [user("a"), said("b")], "tools": "{"}, r"tools='{': allowed is"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_told_with_line_and_message(tmp_path, record, message):
    lines = [{"prompt": str(i), "completion": "a"} for i in range(3)]
    path = written(tmp_path / "mine.jsonl", [*lines, record])
    with pytest.raises(ValueError, match=rf"^{re.escape(path)}:4: .*{message}"):
        source(path)


# rows ----------------------------------------------------------------------------------------------------------------


def written(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return str(path)


def source(path: str, length: int = 64, test: bool = False, turns: str = "all", **data) -> ChatSource:
    data = DataConfig(source=path, sequence_length=length, batch_size=2, **data)
    return ChatSource(data, ChatConfig(turns), TOKENIZER, data.sequence_length, [length], test)


@pytest.fixture(scope="module")
def pairs() -> list[dict]:
    return [{"prompt": f"q{i}", "completion": f"answer {i} " + "x" * (i * i % 37)} for i in range(60)]


@pytest.fixture(scope="module")
def mine(tmp_path_factory, pairs) -> str:
    return written(tmp_path_factory.mktemp("chat") / "mine.jsonl", pairs)


def answers(batch) -> list[str]:
    """What is learnt, document by document."""
    found = []
    for targets, documents in zip(batch.targets, batch.documents):
        for number in range(int(documents.max()) + 1):
            chosen = targets[documents == number]
            found.append(TOKENIZER.decode(chosen[chosen != -100].tolist()))
    return found


def test_an_epoch_has_every_training_answer_once_in_a_new_order_each_time(mine, pairs):
    data = source(mine)
    held_out = [text for batch in data.held_out.batches(3) for text in answers(batch)]
    everything = sorted(pair["completion"] for pair in pairs)
    counts = [len(data._rows(64, 0, epoch)) for epoch in range(5)]
    assert len(set(counts)) > 1, "epochs of different numbers of rows"
    rows = [answers(data.batch(range(n, n + 1), 64)) for n in range(sum(counts))]
    epochs = [rows[sum(counts[:e]) : sum(counts[: e + 1])] for e in range(5)]
    for epoch in epochs:
        assert sorted([text for row in epoch for text in row] + held_out) == everything
    assert {frozenset(row) for row in epochs[0]} != {frozenset(row) for row in epochs[1]}
    assert 1 <= len(held_out) < 15 and min(counts) > 5
    assert (data.batch(range(counts[0]), 64).documents >= 0).double().mean() > 0.8


def test_rows_are_what_their_numbers_say(mine):
    data, other = source(mine), source(mine)
    later = other.batch(range(70, 73), 64)
    assert torch.equal(data.batch(range(71, 72), 64).ids, later.ids[1:2])
    assert later.ids.shape == later.targets.shape == later.documents.shape == (3, 64)
    assert not torch.equal(other.batch(range(70, 73), 64, stage=1).ids, later.ids)
    row, targets, documents = (column[0].tolist() for column in (later.ids, later.targets, later.documents))
    for t, target in enumerate(targets):
        assert target == -100 or (target == row[t + 1] and documents[t] == documents[t + 1])
    assert all(row[t] == TOKENIZER.bos for t in range(64) if documents[t] >= 0 and documents[t] not in documents[:t])
    assert all(row[t] == TOKENIZER.pad and targets[t] == -100 for t in range(64) if documents[t] < 0)


def test_rows_are_filled_as_they_fit_best():
    assert fill([5, 3, 4, 2, 1, 8], range(6), 8) == [[0, 1], [2, 3, 4], [5]]
    assert fill([5, 3, 4, 2, 1, 8], [5, 2, 0, 1, 3], 8) == [[5], [2, 3], [0, 1]]


def test_conversations_stay_on_their_side(tmp_path, mine, pairs):
    def held_out(data: ChatSource) -> set[str]:
        return {text for batch in data.held_out.batches(9) for text in answers(batch)}

    more = [{"prompt": f"more {i}", "completion": f"more {i}"} for i in range(60)]
    one = source(mine, held_out_fraction=0.2)
    two = source(written(tmp_path / "b.jsonl", [*more, *pairs[::-1], *pairs[:9]]), held_out_fraction=0.2)
    assert held_out(one) == {text for text in held_out(two) if not text.startswith("more")} and one.digest != two.digest
    assert sum(two.counts) == 120, "copies are left out"
    assert len(source(mine, held_out_rows=1, held_out_fraction=0.2).held_out.rows) == 1 < len(one.held_out.rows)
    every = source(mine, test=True)
    assert every.counts == (0, 60) and every.held_out.learnt() == every.talks.learnt.sum()


def test_answers_beyond_a_row_are_left_out_and_told(tmp_path):
    long = [user("a"), said("first"), user("b"), said("second" * 9), user("c"), said("third")]
    records = [{"messages": long}, {"prompt": "x" * 60, "completion": "y"}]
    records += [{"prompt": str(i), "completion": f"short {i}"} for i in range(8)]
    path = written(tmp_path / "mine.jsonl", records)
    data = source(path, 40, test=True)
    assert "held out 10; 12 answers" in data.describe()
    assert "; 3 answers that end beyond 40 tokens are left out" in data.describe()
    found = [text for batch in data.held_out.batches(9) for text in answers(batch)]
    assert sorted(found) == sorted(["first", *(f"short {i}" for i in range(8))])
    assert "left out" not in source(path, 400).describe()
    with pytest.raises(
        ValueError, match=r"data\.sequence_length=9: allowed is a length that one of the training answers"
    ):
        source(path, 9)
    with pytest.raises(ValueError, match=r"found 1 conversations, at least 2"):
        source(written(tmp_path / "one.jsonl", records[:1]))


@pytest.mark.parametrize("name", ["stdlib", "notes"])
def test_a_source_without_conversations_is_named(tmp_path, name):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("text", "utf-8")
    with pytest.raises(ValueError, match=r"holds no conversations: allowed with \[chat\] are .jsonl"):
        source(name if name == "stdlib" else str(tmp_path / name))


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_tables_hold_conversations_too(tmp_path, mine, pairs, kind):
    datasets = pytest.importorskip("datasets")
    messages = [
        [user(p["prompt"]), {"role": "assistant", "content": p["completion"], "tool_calls": None}] for p in pairs
    ]
    data = datasets.Dataset.from_list([{"messages": m, "source": "me"} for m in messages])
    if kind == "parquet":
        data.to_parquet(str(tmp_path / "a.parquet"))
    else:
        data.save_to_disk(tmp_path / "saved")
    assert source(str(tmp_path)).digest == source(mine).digest


# runs ----------------------------------------------------------------------------------------------------------------


def recipe(path: str, *overrides: str) -> Recipe:
    given = [
        *("chat.turns=all", f"data.source='{path}'", "data.sequence_length=64", "data.batch_size=2"),
        *("model.vocab_size=288", "optim.warmup_steps=1", "optim.lr=0.01", "train.steps=4", "train.eval_every=2"),
        *("train.sample_tokens=0", "train.checkpoint_every=2", "train.log_every=1", "train.device='cpu'"),
    ]
    return load_recipe("nano", [*given, *overrides])


@pytest.fixture(scope="module")
def run(mine, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "sft"
    summary = train(recipe(mine), out, shown=False)
    assert list(summary.report) == ["held-out bits per answer token"]
    return out


def test_a_run_learns_resumes_to_the_same_bits_and_is_drawn(run, mine, tmp_path):
    pytest.importorskip("matplotlib")
    from abyssal.train.plots.curves import plot

    train(recipe(mine), tmp_path / "cut", stop_at=2, shown=False)
    train(recipe(mine), tmp_path / "cut", resume=tmp_path / "cut", shown=False)
    files = [out / "checkpoints" / "step-000004" / "model.safetensors" for out in (run, tmp_path / "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert lines[-1]["answers"] < lines[1]["answers"] < 9
    assert plot(run).is_file()


def test_eval_scores_held_out_answers_or_all_of_another_source(run, mine, tmp_path, capsys, pairs, monkeypatch):
    assert main(["eval", str(run)]) == 0
    last = json.loads((run / "metrics.jsonl").read_text("utf-8").splitlines()[-1])
    assert f"held-out bits per answer token {last['answers']:.4f}" in capsys.readouterr().out
    other = written(tmp_path / "other.jsonl", pairs[:9])
    assert main(["eval", str(run), "--source", other]) == 0
    learnt = sum(len(pair["completion"]) + 1 for pair in pairs[:9])
    assert f"held-out answers         {learnt} tokens in" in capsys.readouterr().out
    monkeypatch.chdir(Path(mine).parent)
    assert main(["eval", str(run), "--source", "mine.jsonl"]) == 0
    assert f"held-out bits per answer token {last['answers']:.4f}" in capsys.readouterr().out, "the run's own source"
    assert main(["eval", str(run), "--source", "stdlib", "--rows", "1"]) == 0
    assert "held-out bits per byte" in capsys.readouterr().out, "a text is scored as one"


def test_a_run_goes_on_as_the_kind_that_it_is(run, mine, tmp_path):
    plain = load_recipe("nano", ["model.vocab_size=288", "data.sequence_length=64", "train.steps=5"])
    with pytest.raises(ValueError, match=r"is of a run with \[chat\]: start a new one with train.init instead"):
        train(plain, tmp_path / "run", resume=run, shown=False)
    tuned = train(recipe(mine, f"train.init='{run}'", "train.steps=1"), tmp_path / "again", shown=False)
    assert tuned.scores["answers"] < 9


def test_only_the_assistants_tokens_have_a_gradient(mine):
    from abyssal.model import Transformer

    asked = recipe(mine)
    batch, model = open_source(asked).batch(range(2), 64), Transformer(asked.model)
    logits = model(batch.ids, documents=batch.documents).logits
    logits.retain_grad()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()).backward()
    assert torch.equal(logits.grad.abs().sum(-1) > 0, batch.targets >= 0)


@pytest.mark.parametrize("name", ["sft", "finetune"])
def test_shipped_recipes_need_a_model_alone(name):
    model = load_recipe("reason-sft").to_dict()["model"]
    values = {**read_recipe(name), "model": model}
    assert values["data"].pop("tokenizer") == "init"
    asked = Recipe.from_dict(values)
    assert (asked.chat is None) == (name == "finetune") and Recipe.from_dict(asked.to_dict()) == asked
    assert asked.optim.warmup_steps < asked.train.steps


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("reason.exam_problems=2", r"\[reason\] beside \[chat\]: allowed is one of them"),
        ("planted.keys=4", r"\[planted\] beside \[chat\]"),
        ("data.source=planted:recall", r"data.source='planted:recall': allowed with \[chat\] are conversations"),
        ("data.tokenizer=bpe:999", r"data.tokenizer='bpe:999': allowed with \[chat\] is bytes"),
        ("chat.turns=first", "chat.turns='first': allowed is all or last"),
    ],
)
def test_what_does_not_go_together_is_told(override, message):
    with pytest.raises(ValueError, match=message):
        recipe("mine.jsonl", override)


def test_a_vocabulary_without_the_formats_tokens_is_told(mine):
    with pytest.raises(ValueError, match=r"model.vocab_size=260: allowed with \[chat\] is at least 276"):
        open_source(recipe(mine, "model.vocab_size=260"))


# paths ---------------------------------------------------------------------------------------------------------------


def test_a_run_can_be_read_from_any_folder(run, mine, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(Path(mine).parent)
    train(recipe("mine.jsonl", "train.steps=2", f"train.init='{run}'"), tmp_path / "run", shown=False)
    stored = read_state(tmp_path / "run" / "checkpoints" / "step-000002")[0]
    assert (stored.data.source, stored.data.tokenizer, stored.train.init) == (mine, "bytes", str(run))
    begun = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))["starts"][0]
    assert begun["recipe"]["data"]["source"] == mine
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "run"]) == 0
    assert main(["train", "--resume", "run", "--set", "train.steps=3"]) == 0
    assert capsys.readouterr().out.count("changed") == 1, "the steps"


def test_a_run_of_relative_paths_goes_on_where_it_began(mine, tmp_path, monkeypatch):
    monkeypatch.setattr(Recipe, "with_absolute_paths", lambda self: self)
    monkeypatch.chdir(Path(mine).parent)
    train(recipe("mine.jsonl"), tmp_path / "run", stop_at=2, shown=False)
    monkeypatch.undo()
    monkeypatch.chdir(Path(mine).parent)
    summary = train(recipe("mine.jsonl"), tmp_path / "run", resume=tmp_path / "run", shown=False)
    starts = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))["starts"]
    assert summary.progress.step == 4 and starts[1]["changed"] == []


def test_names_are_not_taken_for_paths(tmp_path, monkeypatch):
    for name in ("stdlib", "bytes", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    kept = load_recipe("nano").with_absolute_paths()
    assert kept == load_recipe("nano")
    there = load_recipe("nano", ["data.source=there", "data.tokenizer=./there", "train.init=there"])
    stored = there.with_absolute_paths()
    assert {stored.data.source, stored.data.tokenizer, stored.train.init} == {str(tmp_path / "there")}
    pattern = load_recipe("nano", ["data.source='th*'"]).with_absolute_paths()
    assert pattern.data.source == str(tmp_path / "th*")
    assert load_recipe("nano", ["data.source='no*'"]).with_absolute_paths().data.source == "no*"


def test_a_message_of_weight_0_is_read_and_not_learnt():
    (talk,) = of([user("a"), said("no", weight=0), user("b"), said("yes", weight=1)])
    assert texts([talk]) == [["yes" + EOS]] and "no" in TOKENIZER.decode(talk.ids)
    for part, words in (
        ({"weight": 0.5}, r"weight=0.5: allowed are 1"),
        ({"reasoning": "x"}, "allowed is reasoning_con"),
    ):
        with pytest.raises(ValueError, match=words):
            of([user("a"), said("b") | part])


def test_a_tokenizer_without_the_formats_tokens_is_refused(mine, tmp_path):
    pytest.importorskip("tokenizers")
    from foreign import foreign

    qwen = foreign(tmp_path / "qwen", "qwen")
    keys = [f"model.vocab_size={qwen.vocab_size}", f"data.tokenizer='{tmp_path / 'qwen'}'"]
    keys += [f"model.{name}_token_id={getattr(qwen, name)}" for name in ("bos", "eos", "pad")]
    with pytest.raises(ValueError, match=r"has no .*<｜User｜>.* which the chat format is made of: give a model whose"):
        open_source(recipe(mine, *keys, f"model.engram.pad_token_id={qwen.pad}"))


def test_what_only_other_rows_have_is_not_learnt(tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    calls = [{"a": 1, "b": "x"}, {"c": 2}]
    records = []
    for given in calls:
        call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": given}}
        records.append({"messages": [user("go"), {"role": "assistant", "content": "", "tool_calls": [call]}]})
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "calls.parquet")
    from abyssal.train.data.places import locate

    (file,) = locate(str(tmp_path / "calls.parquet"), ("messages",))[1]
    for (_, record), expected in zip(file, records):
        assert texts(talks(read_conversation(record), TOKENIZER)) == texts(of(expected["messages"]))


def test_what_is_not_said_makes_no_other_conversation():
    one = read_conversation({"messages": [user("a"), said("b")]})
    other = read_conversation({"messages": [user("a"), {**said("b"), "reasoning_content": "", "tool_calls": []}]})
    assert one.key == other.key
