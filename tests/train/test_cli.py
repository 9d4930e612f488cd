"""The command line: help that helps, a whole round of commands, and errors in one line."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

import abyssal
from abyssal.train.cli import COMMANDS, main

ROOT = Path(abyssal.__file__).resolve().parents[1]


def settings(tiny_recipe, *more: str) -> list[str]:
    given = [f"data.source={tiny_recipe.data.source}", "data.sequence_length=48", "data.batch_size=2"]
    given += ["data.held_out_rows=3", "train.steps=2", "train.sample_tokens=4", "optim.warmup_steps=1", *more]
    return [part for text in given for part in ("--set", text)]


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", "nano", "--out", str(out), *settings(tiny())]) == 0
    return out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_types_defaults_and_an_example(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert re.search(rf"example:\n  abyssal {command}\b", text)
    options = re.findall(r"^  (--[a-z-]+)", text, flags=re.MULTILINE)
    assert options and text.count("default:") >= len(options)
    assert re.search(r"\((str|int|float|path)\b", text) or options == ["--traceback"]


def test_help_of_train_lists_every_recipe_key(capsys):
    from dataclasses import fields

    from abyssal.train.settings import TABLES

    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    for table, kind in TABLES.items():
        for f in fields(kind):
            assert f"{table}.{f.name} " in text


def test_help_of_train_keeps_to_the_terminal_in_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    keys = text[text.index("recipe keys") : text.index("\nexample:")].splitlines()
    assert max(map(len, keys[1:])) <= 80
    (column,) = {
        line.index(words) for line in keys for words in ("peak learning rate", "tokens of a row") if words in line
    }
    assert {len(line) - len(line.lstrip()) for line in keys if line.startswith("    ")} == {column}


def test_an_unknown_command_says_what_is_near(capsys):
    for word, says in (
        ("trian", "'trian': did you mean 'train'?"),
        ("frobnicate", "'frobnicate': abyssal --help lists"),
    ):
        with pytest.raises(SystemExit) as end:
            main([word, "toy"])
        assert end.value.code == 2 and f"unknown command {says}" in capsys.readouterr().err


def test_help_waits_for_no_library():
    code = "import sys; sys.modules['torch'] = None; from abyssal.train.cli import build_parser; build_parser()"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_every_command_is_listed(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(re.search(rf"\n    {command}\s", text) for command in COMMANDS)


def test_training_ends_with_the_numbers_and_the_files(tiny, tmp_path, capsys):
    assert main(["train", "nano", "--out", str(tmp_path / "run"), *settings(tiny())]) == 0
    text = capsys.readouterr().out
    for pattern in (
        r"held-out bits per byte +\d\.\d{4}",
        r"trigram, same bytes +\d\.\d{4} +\(the model is \d\.\d{4} (better|worse)\)",
        r"on clean bytes alone +(\d\.\d{4} +\(\d+\.\d% of all, in no match of 32 bytes with .*\)|no byte is)",
        r"bits per byte of +\d+ bytes +\d+ clean ones\nmodel +\d\.\d{4} +(\d\.\d{4}|-)\nKN-3, all 0\.02 MB +\d\.\d{4}",
        r"xz, the 0\.00 MB read +\d\.\d{4}",
        r"trained +2 steps, [\d,]+ tokens in \d+ s, [\d,]+ tokens/s",
        r"curves +.*curves\.png",
        r"checkpoint +.*step-000002",
        r"sample:\ndef ",
    ):
        assert re.search(pattern, text), pattern
    assert {"run.json", "metrics.jsonl", "opponents.json", "curves.png", "sample.txt", "checkpoints"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }


def test_the_default_folder_carries_name_and_time(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "nano", *settings(tiny(), "train.steps=1")]) == 0
    (out,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"nano-\d{8}-\d{6}", out.name)


def test_resume_without_a_recipe_takes_the_stored_one(tiny, tmp_path, capsys):
    out = str(tmp_path / "run")
    main(["train", "nano", "--out", out, *settings(tiny())])
    assert main(["train", "--resume", out, "--set", "train.steps=3"]) == 0
    assert "step 3: held-out" in capsys.readouterr().out


def test_generate_writes_the_prompt_and_is_seeded(run, capsys):
    command = ["generate", str(run), "--prompt", "def ", "--max-new-tokens", "6", "--top-k", "20"]
    texts = []
    for seed in ("1", "1", "2"):
        assert main([*command, "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("def ")
    assert main([*command, "--temperature", "0"]) == 0
    assert re.search(r"6 new tokens, .* s after the first .*cache [\d.]+ MiB", capsys.readouterr().err)


def test_generate_stops_at_a_text_and_speculates(run, capsys):
    command = ["generate", str(run), "--prompt", "def ", "--max-new-tokens", "9", "--temperature", "0"]
    texts = []
    for more in ([], ["--speculative"]):
        assert main([*command, *more]) == 0
        captured = capsys.readouterr()
        texts.append(captured.out)
    assert texts[0] == texts[1] and "drafts accepted" in captured.err
    written = texts[0][4:-1]
    assert main([*command, "--stop", written[2], "--stop", "never written"]) == 0
    assert capsys.readouterr().out == "def " + written[: written.index(written[2]) + 1] + "\n"
    assert main([*command, "--stop", ""]) == 2


def test_speculation_is_compared(run, capsys):
    assert main(["eval", "speculative", str(run), "--prompts", "1", "--tokens", "10", "--prompt-bytes", "20"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"tokens +10 of each, the same\naccepted +[\d.]+% of the drafts\nplain", text)
    assert main(["eval", "speculative", str(run), "--prompts", "0"]) == 2
    assert "prompts=0" in capsys.readouterr().err


def test_benchmarks_name_what_they_need(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "abyssal.train.evaluate.harness", raising=False)
    assert main(["eval", "lm", "nowhere", "--tasks", "any"]) == 2
    assert capsys.readouterr().err == "abyssal eval lm: benchmarks need lm-eval: pip install 'abyssal[eval]'\n"


def test_eval_repeats_the_training_number(run, capsys):
    from abyssal.train.run import metrics, opponents

    assert main(["eval", str(run)]) == 0
    text = capsys.readouterr().out
    last = metrics.read(run)[-1]
    assert f"held-out bits per byte   {last['held_out']:.4f}" in text
    assert f"trigram, same bytes      {last['trigram']:.4f}" in text
    assert text.endswith(f"\n\n{opponents.table(opponents.read(run))}\n")
    assert main(["eval", str(run), "--rows", "0"]) == 0


def test_plot_and_info_print_what_they_made(run, tmp_path, capsys):
    assert main(["plot", str(run), "--out", str(tmp_path / "a.png")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "a.png")
    assert main(["info", "nano", "--context", "1000"]) == 0
    assert "param" in capsys.readouterr().out.lower()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("file", "'{0}/file' is no folder (nothing was changed)"),
        ("file/x", "'{0}/file' is no folder (nothing was changed)"),
        (".", "choose a folder in it"),
        ("source", "target='source': the checkpoint that is read must not be written over"),
    ],
)
def test_convert_says_where_it_cannot_write(target, message, capsys, tmp_path, monkeypatch):
    from abyssal.model import ModelConfig, Transformer, save_pretrained

    monkeypatch.chdir(tmp_path)
    values = ModelConfig.load("nano").to_dict()
    del values["engram"]
    save_pretrained(Transformer(ModelConfig.from_dict(values)), "source", "official")
    Path("file").touch()
    assert main(["convert", "source", target]) == 2
    captured = capsys.readouterr().err
    assert message.format(tmp_path).lower() in captured.lower() and captured.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"source", "file"}
    assert main(["convert", "source", "new", "--max-shard-size", "inf"]) == 0


def test_info_of_a_broken_checkpoint_is_one_line(capsys, tmp_path):
    from abyssal.model import ModelConfig, Transformer, save_pretrained

    save_pretrained(Transformer(ModelConfig.load("nano")), tmp_path / "x", "official")
    whole = (tmp_path / "x/model.safetensors").read_bytes()
    for size in (0, 7, 100, len(whole) - 1):
        (tmp_path / "x/model.safetensors").write_bytes(whole[:size])
        assert main(["info", str(tmp_path / "x")]) == 2
        captured = capsys.readouterr().err
        assert "model.safetensors is broken or cut off" in captured and captured.count("\n") == 1


@pytest.mark.parametrize("words", ["DefaultCPUAllocator: can't allocate memory: you\ntried", "CUDA out of memory."])
def test_a_full_memory_is_one_line(words, capsys, monkeypatch):
    def refuse(path):
        raise RuntimeError(words)

    monkeypatch.setattr("abyssal.train.run.load.located", refuse)
    assert main(["generate", "somewhere"]) == 2
    said = capsys.readouterr().err
    assert said == f"abyssal generate: not enough memory: {words}\n".replace("you\n", "you ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nanoo"], "'nanoo' is no configuration: did you mean 'nano'? shipped are"),
        (["train"], "RECIPE is missing"),
        (["train", "nano", "--set", "optim.lrr=1"], "the nearest known key is 'optim.lr'"),
        (["train", "nano", "--set", "data.source=nowhere"], "data.source='nowhere'"),
        (["train", "nano", "--set", "data.source=~no-such-user"], "data.source='~no-such-user': no such file"),
        (["train", "nano", "--set", "data.tokenizer=~no-such-user"], "tokenizer='~no-such-user': no such file"),
        (["train", "--resume", "nowhere"], "is no checkpoint"),
        (["generate", "nowhere"], "is no checkpoint"),
        (["chat", "--random", "nowhere"], "'nowhere' is no configuration"),
        (["ablate", "indexer", "--out", __file__], "test_cli.py/runs': not a directory"),
        (["eval", "nowhere"], "is no checkpoint"),
        (["plot", "nowhere"], "holds no metrics.jsonl"),
        (["info", "v5"], "'v5' is no configuration"),
        (["info", "nano", "--context", "9" * 400], "is no number of tokens"),
        (["train", "nano", "--out", "/proc/self/fd/self"], "'/proc/self/fd/self'"),
        (["serve", "--random", "nano", "--max-body", "inf"], "max-body=inf: allowed are positive"),
        (
            ["train", "nano", "--out", f"{__file__}/run"],
            "test_cli.py/run': not a directory; a part of the path is a file",
        ),
        (["train", "nano", "--out", __file__], "test_cli.py': file exists; choose another name"),
        (["train", "nano", "--out", "n" * 300], "n': file name too long; choose a shorter one"),
        (["train", "nano", "--out", "\udcff"], "out='\\udcff': allowed are names in UTF-8"),
        (["train", "nano", "--out", "/proc/run"], "'/proc/run': no such file or directory"),
        (["train", "--resume", __file__], "is no checkpoint"),
        (["train", "."], "'.'"),
        (["train", "nano", "--set", "data.source=/dev/null"], "'/dev/null': neither a file nor a folder"),
        (["eval", __file__], "is no checkpoint"),
    ],
)
def test_a_mistake_is_one_line_on_stderr(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert captured.err.startswith(f"abyssal {arguments[0]}: ") and not captured.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a\nb"), r"'a\nb': no space left on device; make room there"),
        (
            OSError(errno.EROFS, "Read-only file system", b"\xff"),
            r"'\udcff': read-only file system; choose",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk quota exceeded; make room there, or choose another place"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), "'a': permission denied; change its permissions"),
        (OSError(errno.EMFILE, "Too many open files", "a"), "'a': too many open files; close some, or raise the limit"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a"), "'a': is a directory; give a file"),
        (OSError(errno.EIO, "Input/output error", "a"), "'a': input/output error"),
        (BlockingIOError("'a' is being written by process 7"), "'a' is being written by process 7"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "broken pipe"),
        (
            SafetensorError("I/O error: No space left on device (os error 28)"),
            "no space left on device; make room there",
        ),
        (SafetensorError("header too small"), "header too small"),
    ],
)
def test_the_systems_errors_say_where_and_what_to_do(error, said, monkeypatch, capsys):
    def fails(_):
        raise error

    error.add_note("go on with --resume x")
    monkeypatch.setitem(COMMANDS, "info", COMMANDS["info"]._replace(run=fails))
    assert main(["info", "nano"]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"abyssal info: {said}") and told.endswith("; go on with --resume x\n")
    assert told.count("\n") == 1
    with pytest.raises(type(error)):
        main(["info", "nano", "--traceback"])


def test_a_stdout_that_takes_nothing_is_one_line():
    """A full disk behind it."""
    command = [sys.executable, "-m", "abyssal.train", "info", "nano"]
    with open("/dev/full", "wb") as full:
        result = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    said = "abyssal info: no space left on device; make room there, or choose another place\n"
    assert (result.returncode, result.stderr) == (2, said)


SHELL = 'set -o pipefail; abyssal() { "$PYTHON" -m abyssal.train "$@"; }; '


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("PYTHONUNBUFFERED=1 abyssal info v4-pro --context 1M | true", 141),
        ("abyssal plot nowhere 2>&1 | true", 141),
        ("abyssal nothing 2>&1 | true", 2),
        ("abyssal info nano >&-", 0),
        ("abyssal plot nowhere >&- 2>&-", 2),
    ],
)
def test_streams_that_nobody_reads_or_that_are_closed(line, code):
    """`true` has ended long before the first word; who reads a pipe's beginning alone gets no complaint."""
    environment = {**os.environ, "PYTHON": sys.executable}
    result = subprocess.run(["bash", "-c", SHELL + line], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (code, "")


def test_generate_refuses_a_bad_setting(run, capsys):
    assert main(["generate", str(run), "--top-p", "2"]) == 2
    assert "top_p=2" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["abyssal", "abyssal.train"])
def test_the_module_is_the_command(module):
    result = subprocess.run([sys.executable, "-m", module, "--version"], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"abyssal {abyssal.__version__}\n")


@pytest.mark.slow("a process that trains a tokenizer and a model")
def test_a_locale_of_ascii_alone_changes_no_file(tiny, tmp_path):
    """Files are UTF-8, as the special tokens in a run's tokenizer need it; what a terminal cannot show is escaped."""
    ascii_alone = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "abyssal.train", "train", "nano", "--out", str(tmp_path / "run")]
    environment = {**os.environ, **ascii_alone, "PYTHONPATH": str(ROOT), "ABYSSAL_CACHE": str(tmp_path / "cache")}
    special = ("bos_token_id=288", "eos_token_id=289", "pad_token_id=290", "engram.pad_token_id=290")
    tokens = ("data.tokenizer=bpe:320", "model.vocab_size=320", *(f"model.{key}" for key in special))
    words = settings(tiny(), "train.steps=1", *tokens)
    result = subprocess.run([*command, *words], env=environment, capture_output=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "run" / "sample.txt").read_text("utf-8").startswith("def ")
