"""`abyssal chat`: turns, the cache between them, tools that need a yes, and what the terminal shows."""

import io
import itertools
import json
import os
import pty
import re
import sys
import time
import unicodedata
from pathlib import Path

import pytest
from lively import lively

from abyssal.model import generate, save_pretrained
from abyssal.train.cli import main
from abyssal.train.data.tokenizers import ByteTokenizer
from abyssal.train.run.load import Loaded
from abyssal.train.start import train
from abyssal.train.talk.dialogue import Answer, Delta, Manner, prompt
from abyssal.train.talk.terminal.conversation import Conversation
from abyssal.train.talk.terminal.screen import Screen, visible
from abyssal.train.talk.terminal.talk import DECLINED, ROUNDS, Talk, read_line
from abyssal.train.talk.terminal.tools import load_tools
from abyssal.train.talk.voice import Voice, open_voice

BYTES = ByteTokenizer()
TOOLS = '''
"""Tools for tests."""
from pathlib import Path
from textwrap import dedent
from typing import Literal

LOG = Path(__file__).with_suffix(".log")

def add(a: int, b: float = 0.5, how: Literal["up", "down"] = "up") -> float:
    """Adds two numbers.

    The second may be left out.

    Args:
        a: the first,
            which is whole.
        b (float): the second.

    Returns:
        the sum: a number
    """
    with LOG.open("a") as log:
        log.write(f"{a} {b} {how}\\n")
    return a + b

def names(of: list[str], ages: dict[str, int], nick: str | None = None) -> dict:
    return {"é": of, "ages": ages, "nick": nick}

def fails(why: str):
    raise OSError(why)

def long() -> str:
    return dedent("x" * 5000)

def _hidden(x): ...
'''


@pytest.fixture(scope="module")
def voice():
    model = lively(vocab_size=288, eos_token_id=257, num_hidden_layers=3, compress_ratios=[0, 4, 16])
    return Voice(model, BYTES, "tiny", 4096)


@pytest.fixture
def tools(tmp_path):
    (tmp_path / "tools.py").write_text(TOOLS, "utf-8")
    return load_tools(tmp_path / "tools.py")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def talk(voice, lines, tools=None, out=None, **options):
    """A session with those lines typed: the Talk, what stdout got, what stderr got."""
    manner, seconds = options.pop("manner", Manner(12, temperature=0)), options.pop("seconds", 60)
    tools = tools or {}
    conversation = Conversation(voice, manner, tools=[tool.schema for tool in tools.values()], **options)
    screen, waiting = Screen(out or io.StringIO(), io.StringIO()), iter(lines)
    session = Talk(conversation, tools, screen, lambda question: next(waiting, None), seconds)
    session.run()
    return session, screen.out.getvalue(), screen.remarks.getvalue()


def scripted(monkeypatch, *completions):
    """Answers that are given instead of the model's: their tokens, one completion after the other."""
    waiting = iter(completions)

    def write(voice, ids, reader, manner, constraint=None, cache=None):
        for token in BYTES.encode(next(waiting), special=True):
            yield reader.feed(token)
        yield reader.finish()

    monkeypatch.setattr("abyssal.train.talk.terminal.conversation.speak", write)


def call(name, **arguments):
    lines = "".join(
        f'<｜DSML｜parameter name="{key}" string="{"true" if isinstance(value, str) else "false"}">'
        f"{value if isinstance(value, str) else json.dumps(value)}</｜DSML｜parameter>\n"
        for key, value in arguments.items()
    )
    return f'<｜DSML｜invoke name="{name}">\n{lines or chr(10)}</｜DSML｜invoke>\n'


def calling(*calls):
    return "\n\n<｜DSML｜tool_calls>\n" + "".join(calls) + "</｜DSML｜tool_calls>"


# the cache between turns


@pytest.mark.parametrize("thinking", [False, True])
def test_answers_are_those_of_a_conversation_read_from_scratch(voice, thinking, monkeypatch):
    manner = Manner(20, temperature=0.8, seed=3)
    conversation = Conversation(voice, manner, "Be brief.", thinking)
    passes, original = [], voice.model.forward

    def counting(ids, **options):
        passes.append(ids.shape[1])
        return original(ids, **options)

    for turn in range(3):
        conversation.ask(f"question {turn}")
        ids = prompt(voice, conversation.messages, thinking=thinking)
        want = generate(voice.model, ids, max_new_tokens=20, temperature=0.8, seed=3 + turn, stop=[BYTES.eos])
        known = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(conversation._read, ids))))
        passes.clear()
        with monkeypatch.context() as patch:
            patch.setattr(voice.model, "forward", counting)
            list(conversation.answer([]))
        assert conversation._read == [*ids, *want][:-1]
        assert passes[0] == len(ids) - known and known >= 15 * turn
    assert conversation.answers == 3 and len(conversation.messages) == 7


def test_a_prompt_that_differs_further_back_than_the_cache_can_go(voice):
    conversation = Conversation(voice, Manner(8, temperature=0))
    for text in ("first " * 20, "second"):
        conversation.ask(text)
        list(conversation.answer([]))
    conversation.reset()
    conversation.ask("other")
    answers = []
    list(conversation.answer(answers))
    ids = prompt(voice, [{"role": "user", "content": "other"}])
    assert conversation._read == [*ids, *generate(voice.model, ids, max_new_tokens=8, temperature=0)][:-1]


def test_the_same_question_after_a_reset(voice):
    _, out, remarks = talk(voice, ["hi", "/reset", "hi"])
    first, second = out.splitlines()
    assert first == second and "not sent" not in remarks


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_an_interruption_leaves_the_conversation_going(voice, monkeypatch, when, count):
    """Ctrl-C before or after a pass of the model: what was said stays, and the next answer is right."""
    passes, original = [], voice.model.forward

    def interrupted(ids, **options):
        passes.append(ids)
        if len(passes) == count and when == "before":
            raise KeyboardInterrupt
        out = original(ids, **options)
        if len(passes) == count:
            raise KeyboardInterrupt
        return out

    def lines():
        yield "a question"
        monkeypatch.setattr(voice.model, "forward", interrupted)
        yield "another"
        monkeypatch.undo()
        yield "a third"

    session, _, remarks = talk(voice, lines(), manner=Manner(8, temperature=0))
    assert "stopped" in remarks and len(passes) == count
    messages = session.conversation.messages
    roles = [message["role"] for message in messages]
    said = ["assistant"] if count > 1 else []
    assert roles == ["user", "assistant", "user", *said, "user", "assistant"]
    ids = prompt(voice, messages[:-1])
    want = generate(voice.model, ids, max_new_tokens=8, temperature=0)
    assert session.conversation._read == [*ids, *want][:-1]


# turns and commands


def test_a_session(voice, tmp_path):
    saved = tmp_path / "talk.json"
    lines = ["hi", "", "/what", f"/save {saved}", f"/save {saved}", "/reset", "/help", "again", "/quit", "never read"]
    session, out, remarks = talk(voice, lines, system="Be brief.")
    messages = json.loads(saved.read_text("utf-8"))["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert [message["content"] for message in session.conversation.messages[:2]] == ["Be brief.", "again"]
    assert out == messages[-1]["content"] + "\n" + session.conversation.messages[-1]["content"] + "\n"
    for part in ("/what: no such command", f"saved: {saved}", "not saved:", "a new conversation", "Ctrl-C", "cut off"):
        assert part in remarks
    assert "never read" not in out


def test_a_question_that_does_not_fit_is_taken_back(voice):
    session, out, remarks = talk(voice, ["x" * 5000, "hi"])
    assert "not sent: the conversation has 50" in remarks
    assert [message["content"] for message in session.conversation.messages[:1]] == ["hi"] and out.count("\n") >= 1


def test_interrupts_at_the_prompt_are_answered(voice):
    lines = iter([KeyboardInterrupt, None])

    def ask(question):
        line = next(lines)
        if line is KeyboardInterrupt:
            raise line
        return line

    screen = Screen(io.StringIO(), io.StringIO())
    Talk(Conversation(voice, Manner()), {}, screen, ask).run()
    assert "/quit or the end of input leaves" in screen.remarks.getvalue()


@pytest.fixture
def keyboard(monkeypatch):
    """What is typed at the terminal that is standard input."""
    outer, inner = pty.openpty()
    with open(inner, encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        yield lambda text: os.write(outer, text.encode())
    os.close(outer)


def test_what_was_pasted_before_a_tool_is_shown_does_not_allow_it(keyboard, voice, tools, monkeypatch):
    scripted(monkeypatch, calling(call("add", a=1)), "no<｜end▁of▁sentence｜>")
    asked = []

    def ask(question):
        if question == "> " and asked:
            return None
        asked.append(question)
        if question != "> ":
            keyboard("n\n")
        return read_line("")

    keyboard("hi\ny\n")
    session = Talk(Conversation(voice, Manner(), tools=[tools["add"].schema]), tools, Screen(*2 * [io.StringIO()]), ask)
    session.run()
    assert asked == ["> ", "run it? y/N "] and session.conversation.messages[2]["content"] == DECLINED


def test_lines_of_a_terminal(keyboard, capsys):
    """Its longest is the beginning of a longer one; and a question is seen wherever answers go."""
    keyboard("short\n")
    assert read_line("? ") == "short" and capsys.readouterr() == ("", "? ")
    keyboard("x" * 3000)
    keyboard("x" * 3000 + "\n")
    with pytest.raises(ValueError, match="not sent: a terminal lets 4095 bytes of a line through"):
        read_line("? ")


@pytest.mark.parametrize(("out", "want"), [
    (io.StringIO, "[thinking]\n1+1\x1b[2m\n[answer]\ntwo\n"),
    (Terminal, "\x1b[2m1+1\\x1b[2m\x1b[22m\ntwo\n"),
])  # fmt: skip
def test_reasoning_is_dimmed_or_marked(voice, monkeypatch, out, want):
    monkeypatch.delenv("NO_COLOR", raising=False)
    scripted(monkeypatch, "1+1\x1b[2m</think>two<｜end▁of▁sentence｜>")
    assert talk(voice, ["hi"], out=out(), thinking=True)[1] == want


def test_no_colours_where_the_user_wants_none(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    screen = Screen(Terminal(), io.StringIO())
    screen.show(Delta("reasoning", "hm"))
    screen.end()
    assert screen.out.getvalue() == "[thinking]\nhm\n"


def test_what_would_move_the_cursor_is_written_out():
    assert visible("a\n\tb\x1b[2Jé\r\u202e") == "a\n\tb\\x1b[2Jé\\x0d\\x202e"
    kept = "\u3000\xa0🏳\ufe0f\u200d🌈e\u0301中"
    assert visible(kept) == kept
    odd = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
    assert [c for c in odd if visible(c) == c] == ["\t", "\n", "\u200c", "\u200d"]
    assert visible("\x7f\x85\x9b0m\ud800\u2028") == "\\x7f\\x85\\x9b0m\\xd800\\x2028"


def test_an_answer_out_of_format_is_remarked(voice, monkeypatch):
    scripted(monkeypatch, "two<think><｜end▁of▁sentence｜>")
    _, out, remarks = talk(voice, ["hi"])
    assert out == "two\n" and "not in the chat format: <think> inside the text (at character 3)" in remarks


# tools


def test_the_schemas_of_functions(tools):
    assert list(tools) == ["add", "names", "fails", "long"]
    assert tools["add"].schema == {"type": "function", "function": {
        "name": "add",
        "description": "Adds two numbers.\n\nThe second may be left out.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "description": "the first, which is whole."},
                "b": {"type": "number", "description": "the second."},
                "how": {"enum": ["up", "down"]},
            },
            "required": ["a"],
            "additionalProperties": False,
        },
    }}  # fmt: skip
    assert tools["names"].schema["function"]["parameters"]["properties"] == {
        "of": {"type": "array", "items": {"type": "string"}},
        "ages": {"type": "object", "additionalProperties": {"type": "integer"}},
        "nick": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    }
    assert tools["fails"].schema["function"]["description"] == ""


@pytest.mark.parametrize(("name", "arguments", "result"), [
    ("add", '{"a": 1, "b": 2}', "3"),
    ("add", '{"a": 1}', "1.5"),
    ("names", '{"of": ["x"], "ages": {"x": 3}, "nick": null}', '{"é": ["x"], "ages": {"x": 3}, "nick": null}'),
    ("fails", '{"why": "because"}', "error: OSError: because"),
    ("add", "{}", "error: TypeError: parameter 'a' is missing"),
    ("add", '{"a": 1, "c": 2}', "error: TypeError: there is no parameter 'c'"),
    ("add", '{"a": true}', 'error: TypeError: a=True: {"type": "integer"} is needed'),
    ("add", '{"a": 1, "b": true}', 'error: TypeError: b=True: {"type": "number"} is needed'),
    ("add", '{"a": 1, "how": "left"}', 'error: TypeError: how=\'left\': {"enum": ["up", "down"]} is needed'),
    ("names", '{"of": [1], "ages": {}}', "error: TypeError: of=[1]"),
    ("names", '{"of": [], "ages": {"x": "y"}}', "error: TypeError: ages={'x': 'y'}"),
    ("add", "[1]", "error: TypeError: arguments [1]: an object is needed"),
    ("add", "{", "error: JSONDecodeError"),
])  # fmt: skip
def test_calls_and_what_goes_wrong_in_them(tools, name, arguments, result):
    assert tools[name].run(arguments).startswith(result)


@pytest.mark.parametrize(("code", "message"), [
    ("x = 1", "defines no public function"),
    ("def f(x): ...", r"f\(x\): a type hint is needed"),
    ("def f(*x: int): ...", r"f\(x\): parameters need a name"),
    ("def f(x: int, /): ...", r"f\(x\): parameters need a name"),
    ("def f(x: set[int]): ...", r"f\(x\): set\[int\] has no JSON schema"),
    ("def f(x: dict[int, int]): ...", r"f\(x\): dict\[int, int\] has no JSON schema"),
    *[(f"import typing\ndef f(x: {hint}): ...", "has no JSON schema") for hint in
      ("typing.List", "typing.Dict", "list[typing.Dict]", "typing.Literal[b'x']", "()", "[]", "None")],
    ("def f(x: 'nothing'): ...", "NameError: name 'nothing' is not defined"),
    ("def f(): yield 1", "f: a generator is no tool"),
    ("async def f(): yield 1", "f: a generator is no tool"),
    ("def f():\n  '\\ud800'", "surrogates not allowed"),
    ("import none_such", r"tools='.*bad.py': ModuleNotFoundError: No module named 'none_such'$"),
    ("raise OSError('two\\nlines')", "OSError: two lines$"),
    ("import sys; sys.exit('bye')", "SystemExit: bye$"),
    ("def f(:", "SyntaxError: "),
    ("\x00", "null bytes"),
])  # fmt: skip
def test_files_without_tools(tmp_path, code, message):
    (tmp_path / "bad.py").write_text(code, "utf-8")
    with pytest.raises(ValueError, match=message):
        load_tools(tmp_path / "bad.py")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_tools(tmp_path / "none.py")


@pytest.mark.parametrize(("said", "runs"), [("y", 1), ("YES", 1), ("n", 0), ("", 0), ("yep", 0), (None, 0)])
def test_a_tool_runs_only_after_a_yes(voice, tools, tmp_path, monkeypatch, said, runs):
    scripted(monkeypatch, "so" + calling(call("add", a=1, b=2, how="down")), "three<｜end▁of▁sentence｜>")
    session, out, remarks = talk(voice, ["add", said] if said is not None else ["add"], tools)
    log = tmp_path / "tools.log"
    assert (log.read_text("utf-8") if log.exists() else "") == "1 2 down\n" * runs
    assert 'the model wants to call add({"a": 1, "b": 2, "how": "down"})' in remarks
    results = [message["content"] for message in session.conversation.messages if message["role"] == "tool"]
    assert results == (["3"] if runs else [DECLINED])
    assert out == ("so\nthree\n" if said is not None else "so\n")  # without an answer the model does not go on


def test_every_call_is_asked_for_and_its_result_goes_to_the_model(voice, tools, tmp_path, monkeypatch):
    twice = calling(call("add", a=1), call("fails", why="no\x1b[A"))
    scripted(monkeypatch, twice, "done<｜end▁of▁sentence｜>")
    session, _, remarks = talk(voice, ["add", "y", "y"], tools)
    calls, one, two = session.conversation.messages[1:4]
    assert [one["tool_call_id"], two["tool_call_id"]] == [call["id"] for call in calls["tool_calls"]]
    assert (one["content"], two["content"]) == ("1.5", "error: OSError: no\x1b[A")
    assert "\x1b" not in remarks
    assert "<tool_result>1.5</tool_result>\n\n<tool_result>error" in BYTES.decode(
        prompt(voice, session.conversation.messages[:4], tools=session.conversation.tools)
    )


# Bodies of tools, and the beginnings of their results: whatever a tool returns or raises, the turn goes on.
ODD = {
    "return {(1, 2): 3}": "{(1, 2): 3}",
    "a = []; a.append(a); return a": "[[...]]",
    "return [float('nan'), float('-inf')]": "[NaN, -Infinity]",
    "return {1, 2}": '"{1, 2}"',
    "return b'\\xff'": '"b',
    "return (x for x in 'ab')": '"<generator object',
    "return 10 ** 5000": "error: the result, a int, cannot be written: ValueError: Exceeds the limit",
    "return functools.reduce(lambda a, _: [a], range(100_000))": "error: the result, a list, cannot be written: Recurs",
    "return Odd()": "error: the result, a Odd, cannot be written: OSError: no text",
    "return {'a': Odd()}": "{'a': <Odd>}",
    "return dataclasses.make_dataclass('Point', ['x'])(3)": '"Point(x=3)"',
    "return numpy.float32(1.5)": '"1.5"',
    "return torch.ones(2)": '"tensor([1., 1.])"',
    "return '\\ud800 \\U0001f642'": "\\ud800 \U0001f642",
    "return ['\\ud800']": '["\\ud800"]',
    "return Text('ab')": "ab",
    "return None": "null",
    "sys.exit(3)": "error: SystemExit: 3",
    "raise KeyboardInterrupt": "error: KeyboardInterrupt",
    "raise GeneratorExit('x')": "error: GeneratorExit: x",
    "raise Silent": "error: Silent, whose message cannot be written",
    "raise OSError('two\\nlines \\x1b[2J')": "error: OSError: two\nlines \x1b[2J",
    "raise ValueError('\\udc80')": "error: ValueError: \\udc80",
    "raise ExceptionGroup('both', [OSError(), ValueError()])": "error: ExceptionGroup: both",
    "return later()": "done",
    "print('on stdout \\x1b[2J'); print('and stderr', file=sys.stderr); return 1": "1",
    "t = threading.Thread(target=list); t.start(); t.join(); return 2": "2",
    "while True: pass": "error: Stopped: it took longer than 0.3 s",
    "time.sleep(100)": "error: Stopped: it took longer than 0.3 s",
    "while True:\n  try: time.sleep(100)\n  except Exception: pass": "error: Stopped: it took longer",
    "return asyncio.sleep(100)": "error: Stopped: it took longer than 0.3 s",
    "return 'x' * 50_000_000": "x" * 1000,
    "return list(range(1_000_000))": "[0, 1, 2",
}
HEAD = """
import asyncio, dataclasses, functools, sys, threading, time
import numpy, torch

class Odd:
    def __str__(self): raise OSError("no text")
    def __repr__(self): return "<Odd>"
class Text(str):
    def __str__(self): raise OSError("no text")
class Silent(Exception):
    def __str__(self): sys.exit(1)
async def _later(): return await asyncio.sleep(0, "done")
later = _later
def tool():
"""


@pytest.mark.parametrize("body", ODD)
def test_a_tool_that_has_run_keeps_its_turn(voice, tmp_path, monkeypatch, body):
    (tmp_path / "odd.py").write_text(HEAD + "".join(f"  {line}\n" for line in body.splitlines()), "utf-8")
    tools = {"tool": load_tools(tmp_path / "odd.py")["tool"]}
    scripted(monkeypatch, calling(call("tool")), "done<｜end▁of▁sentence｜>")
    started = time.monotonic()
    session, out, remarks = talk(voice, ["go", "y"], tools, seconds=0.3 if "sleep" in body or "while" in body else 60)
    assert out == "done\n" and time.monotonic() - started < 30
    roles = [message["role"] for message in session.conversation.messages]
    assert roles == ["user", "assistant", "tool", "assistant"]
    result = session.conversation.messages[2]["content"]
    assert result.startswith(ODD[body])
    assert len(result) < 4096 and "\x1b" not in remarks and max(map(len, remarks.splitlines())) < 300
    if "50_000_000" in body:
        assert re.search(r"\n\[cut: 49,99\d,\d{3} of 50,000,000 characters are left out\]$", result)
        assert "... (50,000,000 characters)" in remarks
    if "print" in body:
        assert "on stdout \\x1b[2J\nand stderr\n" in remarks


@pytest.mark.parametrize("head", ["async def tool():\n  _c()\n  try: await ", "def tool():\n  _c()\n  try: "])
def test_ctrl_c_stops_a_tool_and_not_the_chat(voice, tmp_path, monkeypatch, head):
    code = "import os, threading\nfrom %s import sleep\n" % ("asyncio" if "async" in head else "time")
    code += "def _c(): threading.Timer(0.2, os.kill, (os.getpid(), 2)).start()\n"
    code += head + "sleep(50)\n  finally: open(__file__ + '.end', 'w').close()\n"
    (tmp_path / "slow.py").write_text(code, "utf-8")
    scripted(monkeypatch, calling(call("tool")), "done<｜end▁of▁sentence｜>", "hello<｜end▁of▁sentence｜>")
    session, out, _ = talk(voice, ["go", "y", "hi"], load_tools(tmp_path / "slow.py"))
    assert out == "done\nhello\n" and (tmp_path / "slow.py.end").exists()
    assert session.conversation.messages[2]["content"].startswith("error: KeyboardInterrupt")


def test_results_leave_room_for_an_answer(voice, tools, monkeypatch):
    scripted(monkeypatch, calling(*[call("long")] * 3), "done<｜end▁of▁sentence｜>")
    session, out, _ = talk(voice, ["go", *"yyy"], {"long": tools["long"]})
    assert out == "done\n" and len(session.conversation.messages) == 6
    results = [message["content"] for message in session.conversation.messages[2:5]]
    assert all(re.fullmatch(r"x+\n\[cut: [\d,]+ of 5,000 characters are left out\]", result) for result in results)
    assert len(results[0]) > len(results[1]) > len(results[2])


def test_the_lines_of_a_question_are_ours(voice, tools, monkeypatch):
    """Line ends between the parts of JSON arguments cannot write a line that the user takes for the program's."""
    asked = call("names", of=["x", "y"], ages={}).replace('"x", "y"', '"x",\n  \r\n\t"y"')
    scripted(monkeypatch, calling(asked), "hi<｜end▁of▁sentence｜>")
    remarks = talk(voice, ["go", "n"], tools)[2]
    assert [line[:6] for line in remarks.splitlines()] == ["the mo", "  erro"]


def test_a_turn_stays_if_its_tool_has_run_and_the_context_is_full(voice, tools, tmp_path, monkeypatch):
    scripted(monkeypatch, calling(*[call("add", a=1)] * 10), "hi<｜end▁of▁sentence｜>")
    lines = ["x" * 700, *["y"] * 10, "more", "/reset", "hi"]
    session, _, remarks = talk(Voice(voice.model, BYTES, "small", 3300), lines, tools)
    assert re.search(r"stopped: the conversation has \d+ tokens: .*; /save FILE keeps", remarks)
    assert "not sent: the conversation has" in remarks  # what was asked next
    assert (tmp_path / "tools.log").read_text("utf-8").count("\n") == 10
    assert [message["content"] for message in session.conversation.messages] == ["hi", "hi"]


def test_calls_that_are_left_after_an_interruption_are_declined(voice, tools, monkeypatch):
    scripted(monkeypatch, calling(call("add", a=1), call("add", a=2)))
    said = iter(["go", "y", KeyboardInterrupt, None])

    def ask(question):
        line = next(said)
        if line is KeyboardInterrupt:
            raise line
        return line

    conversation = Conversation(voice, Manner(), tools=[tool.schema for tool in tools.values()])
    Talk(conversation, tools, Screen(io.StringIO(), io.StringIO()), ask).run()
    assert [message["content"] for message in conversation.messages[2:]] == ["1.5", DECLINED]


def test_a_model_that_only_calls_tools_is_stopped(voice, tools, monkeypatch):
    scripted(monkeypatch, *[calling(call("add", a=1))] * 20)
    remarks = talk(voice, ["go", *["n"] * 20], tools)[2]
    assert f"stopped after {ROUNDS} answers with tool calls" in remarks


def test_a_random_model_calls_as_the_tools_are(voice, tools):
    """What it writes is constrained: a text, or calls that the tools take."""
    conversation = Conversation(voice, Manner(40, seed=1), tools=[tools["add"].schema])
    conversation.ask("go")
    answers: list[Answer] = []
    list(conversation.answer(answers))
    assert answers[0].error is None


# the command


def test_the_command_with_piped_input(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n/quit\n"))
    arguments = ["chat", "--random", "nano", "--max-new-tokens", "6", "--temperature", "0", "--thinking"]
    assert main(arguments) == 0
    out, remarks = capsys.readouterr()
    assert out.startswith("[thinking]\n") and "nano: RANDOM WEIGHTS" in remarks


def test_the_model_of_a_run_and_of_a_folder(tiny, tmp_path, monkeypatch, capsys):
    special = [f"model.{name}_token_id={getattr(BYTES, name)}" for name in ("bos", "eos", "pad")]
    quick = ("train.steps=1", "train.sample_tokens=0", "data.held_out_rows=1", "model.vocab_size=288")
    train(tiny(*quick, *special), tmp_path / "run", shown=False)
    voice = open_voice(tmp_path / "run")
    assert (voice.name, voice.context) == ("run", 8192)
    save_pretrained(voice.model, tmp_path / "folder", layout="official")
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json: say which"):
        open_voice(tmp_path / "folder")
    again = open_voice(tmp_path / "folder", "bytes", context=100, name="mine")
    assert (again.name, again.context) == ("mine", 100)
    ids = prompt(voice, [{"role": "user", "content": "hi"}])
    written = [generate(v.model, ids, max_new_tokens=8, temperature=0) for v in (voice, again)]
    assert written[0] == written[1]
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    assert main(["chat", str(tmp_path / "run"), "--max-new-tokens", "8", "--temperature", "0"]) == 0
    assert "RANDOM" not in capsys.readouterr().err


@pytest.mark.parametrize("command", [
    ["chat", "--random", "nano", "--max-new-tokens", "40"], ["info", "nano"], ["--help"],
])  # fmt: skip
def test_a_reader_that_leaves_ends_a_command_in_silence(monkeypatch, capsys, command):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", encoding="utf-8") as out:
        monkeypatch.setattr("sys.stdout", out)
        monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
        assert main(command) == 141
    assert "pipe" not in capsys.readouterr().err


@pytest.mark.parametrize(("out", "want"), [
    (io.StringIO, "\x1b]0;a\x1b[2J\r\x9b0m é🙂\n\u202e\n"),
    (Terminal, "\\x1b]0;a\\x1b[2J\\x0d\\x9b0m é🙂\n\\x202e\n"),
])  # fmt: skip
def test_what_generate_writes_moves_the_cursor_of_no_terminal(voice, monkeypatch, out, want):
    class Said(list):
        stats = "6 tokens"

    said = Said(BYTES.encode("a\x1b[2J\r\x9b0m é🙂\n\u202e"))
    monkeypatch.setattr("abyssal.model.generate", lambda *_, **__: said)
    loaded = Loaded(Path("run"), voice.model, BYTES, None)
    monkeypatch.setattr("abyssal.train.run.load.open_model", lambda *_, **__: loaded)
    monkeypatch.setattr("sys.stdout", out())
    assert main(["generate", "run", "--prompt", "\x1b]0;"]) == 0
    assert sys.stdout.getvalue() == want


def test_input_that_is_no_text_ends_nothing(monkeypatch, capsys):
    typed = b"h\xffi\n/save a\x00b\n/reset now\n/" + b"x" * 9999 + b"\nok\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed), "utf-8"))
    assert main(["chat", "--random", "nano", "--max-new-tokens", "5", "--temperature", "0"]) == 0
    remarks = capsys.readouterr().err
    for part in (
        r"not sent: messages: '\udcff' is no character",
        "not saved: embedded null",
        "/reset now: no such command",
    ):
        assert part in remarks
    assert "... (10,000 characters): no such command" in remarks and "cut off after 5 tokens" in remarks


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "either RUN or --random PRESET is needed"),
    (["runs/x", "--random", "nano"], "RUN with --random"),
    (["runs/none"], "is no checkpoint"),
    (["--random", "none"], "none"),
    (["--random", "nano", "--tokenizer", "x"], "tokenizer='x' with --random"),
    (["--random", "nano", "--context", "9000"], "context=9000: allowed are 2 to"),
    (["--random", "nano", "--max-new-tokens", "0"], "max-new-tokens=0"),
    (["--random", "nano", "--temperature", "-1"], "temperature=-1"),
    (["--random", "nano", "--max-effort"], "--max-effort without --thinking"),
    (["--random", "nano", "--tools", "none.py"], "no such file"),
    *[(["--random", "nano", "--tool-timeout", text], f"tool-timeout={float(text)}: allowed are numbers above 0")
      for text in ("0", "-1", "nan", "inf")],
])  # fmt: skip
def test_what_a_user_can_get_wrong(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["chat", *arguments]) == 2
    assert message in capsys.readouterr().err
