"""The chat format of DeepSeek-V4: conversations to prompts and completions back to messages, byte for byte.

    <bos>{system}<｜User｜>{user}<｜Assistant｜></think>{answer}<eos>                          chat mode
    <bos>{system}<｜User｜>{user}<｜Assistant｜><think>{reasoning}</think>{answer}<eos>         thinking mode

Messages are dictionaries as in OpenAI's API: `role` (system, user, assistant, tool, developer, latest_reminder),
`content`, and where they apply `reasoning_content`, `tool_calls`, `tool_call_id`, `tools`, `response_format`, `task`
(a quick instruction, which asks for a classification or a title instead of an answer) and `wo_eos` (leave the answer
open). There is no tool turn: results stand in the user's turn. Tool calls are written in DSML, tags of their own whose
parameters are raw text (`string="true"`) or JSON (`string="false"`).
"""

import json
import math
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["ChatFormatError", "encode_messages", "parse_message_from_completion_text"]

Message = Mapping[str, Any]

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
USER, ASSISTANT, REMINDER = "<｜User｜>", "<｜Assistant｜>", "<｜latest_reminder｜>"
THINK, END_THINK = "<think>", "</think>"
DSML = "｜DSML｜"
TASKS = {name: f"<｜{name}｜>" for name in ("action", "query", "authority", "domain", "title", "read_url")}
ROLES = ("system", "user", "assistant", "tool", "developer", "latest_reminder")
MODES = ("chat", "thinking")
EFFORTS = (None, "high", "max")
NESTING = 128  # levels of lists and objects in a parameter that a model may write

CALLS, END_CALLS = f"<{DSML}tool_calls>", f"</{DSML}tool_calls>"
INVOKE, END_INVOKE = f"<{DSML}invoke", f"</{DSML}invoke>"
PARAMETER, END_PARAMETER = f"<{DSML}parameter", f"</{DSML}parameter>"

# The fixed strings below are part of the released format: a model was trained on these very bytes.

REASONING_EFFORT_MAX = """Reasoning Effort: Absolute maximum with no shortcuts permitted.
You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, \
rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.
Explicitly write out your entire deliberation process, documenting every intermediate step, considered alternative, \
and rejected hypothesis to ensure absolutely no assumption is left unchecked.

"""

TOOLS = f"""## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a "{CALLS}" \
block like the following:

{CALLS}
{INVOKE} name="$TOOL_NAME">
{PARAMETER} name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE{END_PARAMETER}
...
{END_INVOKE}
{INVOKE} name="$TOOL_NAME2">
...
{END_INVOKE}
{END_CALLS}

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, \
objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by {THINK}), you MUST output your complete reasoning inside \
{THINK}...{END_THINK} BEFORE any tool calls or final response.

Otherwise, output directly after {END_THINK} with tool calls or final response.

### Available Tool Schemas

%s

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""

RESPONSE_FORMAT = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"


class ChatFormatError(ValueError):
    """A completion that is not in the format. `position`: the character at which it stops being so."""

    def __init__(self, message: str, position: int) -> None:
        super().__init__(f"{message} (at character {position})")
        self.position = position


# conversations to prompts --------------------------------------------------------------------------------------------


def encode_messages(
    messages: Sequence[Message],
    thinking_mode: str = "chat",
    context: Sequence[Message] = (),
    drop_thinking: bool = True,
    add_default_bos_token: bool = True,
    reasoning_effort: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The prompt of a conversation, which ends where the model is to go on: after `</think>` or `<think>`.

    In thinking mode the reasoning of turns before the last question is left out, and so are developer messages there;
    not so where any message has tools, because a chain of calls is one train of thought. Tool results and user messages
    that follow each other make one turn, its results in the order of the calls. A task is one of the user message that
    begins a turn: on a tool's message, or on one that joins a turn, the released encoder does not see it. Names and
    order of the arguments are those of the released encoder.

    Args:
        messages: the conversation, or what follows `context`.
        thinking_mode: "chat" or "thinking".
        context: messages that come before and have been encoded: they have an effect but are not in the result.
        drop_thinking: leave out earlier reasoning, as above; False keeps all.
        add_default_bos_token: begin with the bos token, unless there is context.
        reasoning_effort: "max" puts a fixed text before everything, in thinking mode; None and "high" nothing.
        tools: as in a request of OpenAI's API; put into the first system message (an empty one, if there is none).

    Raises:
        ValueError: a message that the format has no place for; an unknown mode, effort, role or task.

    Source: spec E.3 to E.6; the release's encoding/encoding_dsv4.py.
    """
    if thinking_mode not in MODES:
        raise ValueError(f"thinking_mode={thinking_mode!r}: allowed are {', '.join(MODES)}")
    if reasoning_effort not in EFFORTS:
        raise ValueError(f"reasoning_effort={reasoning_effort!r}: allowed are None, 'high' and 'max'")
    before, new = list(context), list(messages)
    if tools:
        before, new = (_with_tools(before, tools), new) if before else (before, _with_tools(new, tools))
    for i, message in enumerate([*before, *new]):
        _check(i, message)
    turns = _turns(before)
    first = len(turns)
    turns = _in_call_order([*turns, *_turns(new)])
    thinking = thinking_mode == "thinking"
    drops = thinking and drop_thinking and not any(turn.get("tools") for turn in turns)
    if drops:
        last = _last_question(turns)
        dropped = [turn["role"] == "developer" and i < last for i, turn in enumerate(turns)]
        first -= sum(dropped[:first])
        turns = [turn for turn, drop in zip(turns, dropped) if not drop]
    effort = REASONING_EFFORT_MAX if thinking and reasoning_effort == "max" and turns and not first else ""
    bos = BOS if add_default_bos_token and not before else ""
    last = _last_question(turns)
    texts = (_render(i, turns, last, thinking, drops) for i in range(first, len(turns)))
    return bos + effort + "".join(texts)


def _with_tools(messages: list[Message], tools: Sequence[Mapping[str, Any]]) -> list[Message]:
    if any(message.get("tools") for message in messages):
        raise ValueError("tools: given apart, but a message has some too")
    if not messages or messages[0].get("role") not in ("system", "developer"):
        messages = [{"role": "system", "content": ""}, *messages]
    return [{**messages[0], "tools": tools}, *messages[1:]]


def _check(i: int, message: Message) -> None:
    role, task = message.get("role"), message.get("task")
    if role not in ROLES:
        raise ValueError(f"messages[{i}] has role {role!r}: allowed are {', '.join(ROLES)}")
    if task is not None and task not in TASKS:
        raise ValueError(f"messages[{i}] has task {task!r}: allowed are {', '.join(TASKS)}")
    if role in ("developer", "latest_reminder") and not message.get("content"):
        raise ValueError(f"messages[{i}] has no content: a {role} message needs some")
    if message.get("tools") and role not in ("system", "developer"):
        raise ValueError(f"messages[{i}] has tools, but role {role!r}: system and developer messages can have some")
    for key in ("tools", "tool_calls"):
        for entry in message.get(key) or ():
            if not isinstance(entry, Mapping) or not isinstance(entry.get("function"), Mapping):
                raise ValueError(
                    f"messages[{i}] has {key} with {entry!r}: expected {{'type': 'function', 'function': ...}}"
                )
    reasoning = message.get("reasoning_content")
    if reasoning is not None and not isinstance(reasoning, str):
        raise ValueError(f"messages[{i}] has reasoning_content {reasoning!r}: it must be text")


def _turns(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """The messages with user and tool messages in a row as one user turn: its `parts` are [call id or None, text]."""
    turns: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        role, text = message["role"], _text(i, message)
        if role not in ("user", "tool"):
            turns.append({**message, "content": text})
            continue
        part = [message.get("tool_call_id") or "", f"<tool_result>{text}</tool_result>"]
        part = [None, text] if role == "user" else part
        last: dict[str, Any] = turns[-1] if turns else {"role": None}
        if last["role"] == "user" and (role == "tool" or last["task"] is None):
            last["parts"].append(part)
        else:
            turns.append({"role": "user", "task": message.get("task") if role == "user" else None, "parts": [part]})
    return turns


def _text(i: int, message: Message) -> str:
    """A message's content as text. Of a tool's, other blocks and None are written as the released encoder does."""
    content, lenient = message.get("content", ""), message["role"] == "tool"
    if content is None or isinstance(content, str):
        return str(content) if lenient else content or ""
    parts = []
    for block in content if isinstance(content, (list, tuple)) else [content]:
        kind = block.get("type") if isinstance(block, Mapping) else None
        text = block.get("text", "" if lenient else None) if kind == "text" else f"[Unsupported {kind}]"
        if not isinstance(block, Mapping) or not isinstance(text, str) or not (kind == "text" or lenient):
            raise ValueError(f"messages[{i}] has content {block!r}: allowed are text and blocks of type 'text'")
        parts.append(text)
    return "\n\n".join(parts)


def _in_call_order(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tool results take the order of the calls they answer; text between them stays where it is."""
    order: dict[str, int] = {}
    for turn in turns:
        if turn["role"] == "assistant" and turn.get("tool_calls"):
            ids = [call.get("id") or call.get("function", {}).get("id") for call in turn["tool_calls"]]
            order = {call: i for i, call in enumerate(ids) if call}
        elif turn["role"] == "user":
            results = iter(
                sorted((p for p in turn["parts"] if p[0] is not None), key=lambda part: order.get(part[0], 0))
            )
            turn["parts"] = [part if part[0] is None else next(results) for part in turn["parts"]]
    return turns


def _last_question(turns: Sequence[Message]) -> int:
    return max((i for i, turn in enumerate(turns) if turn["role"] in ("user", "developer")), default=-1)


def _render(i: int, turns: list[dict[str, Any]], last: int, thinking: bool, drops: bool) -> str:
    """A turn, and the opening of the assistant's where that comes next; `last` is where the last question stands."""
    turn = turns[i]
    role, task = turn["role"], turn.get("task")
    thinks = thinking and (not drops or i >= last)
    if role == "assistant":
        asked = i > 0 and turns[i - 1].get("task") is not None  # a quick instruction's answer comes without reasoning
        text = (turn.get("reasoning_content") or "") + END_THINK if thinks and not asked else ""
        text += turn["content"] + _calls(i, turn.get("tool_calls")) + ("" if turn.get("wo_eos") else EOS)
    elif role == "user":
        text = USER + "\n\n".join(part for _, part in turn["parts"])
    elif role == "latest_reminder":
        text = REMINDER + turn["content"]
    else:
        text = (USER if role == "developer" else "") + turn["content"] + _sections(turn)
    if i + 1 < len(turns) and turns[i + 1]["role"] not in ("assistant", "latest_reminder"):
        return text
    opening = ASSISTANT + (THINK if thinks else END_THINK)
    if task is not None:
        return text + (ASSISTANT + (THINK if thinking else END_THINK) if task == "action" else "") + TASKS[task]
    return text + (opening if role in ("user", "developer") else "")


def _sections(turn: Message) -> str:
    """What a system or developer message says of tools and of the answer's form."""
    text = ""
    if turn.get("tools"):
        text += "\n\n" + TOOLS % "\n".join(_json(tool["function"]) for tool in turn["tools"])
    if turn.get("response_format"):
        text += "\n\n" + RESPONSE_FORMAT + _json(turn["response_format"])
    return text


def _json(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, default=_marked)
    except RecursionError:
        raise ValueError("a tool, a response format or arguments are nested too deeply to be written") from None
    return re.sub(f'"{MARK}([^"]*)"', r"\1", text)


@dataclass(frozen=True)
class Huge:
    """A number as JSON spells it, which float64 has none for: it would be written as Infinity, which is no JSON."""

    spelt: str


MARK = uuid.uuid4().hex  # which no text can know


def _marked(value: Any) -> str:
    if not isinstance(value, Huge):
        raise TypeError(f"{value!r} has no form in JSON")
    return MARK + value.spelt


def read_arguments(text: str) -> Any:
    """What JSON says, so that it can be written again. Raises ValueError or RecursionError for what is none."""
    return json.loads(text, parse_float=_number)


def _number(spelt: str) -> float | Huge:
    return Huge(spelt) if math.isinf(float(spelt)) else float(spelt)


# tool calls ----------------------------------------------------------------------------------------------------------


def _calls(i: int, calls: Sequence[Mapping[str, Any]] | None) -> str:
    if not calls:
        return ""
    invokes = []
    for call in calls:
        function = call["function"]
        if not isinstance(function.get("name"), str) or "arguments" not in function:
            raise ValueError(f"messages[{i}] has a tool call {function!r}: it needs a name and arguments")
        parameters = "\n".join(_parameter(*pair) for pair in _arguments(i, function["arguments"]).items())
        invokes.append(f'{INVOKE} name="{function["name"]}">\n{parameters}\n{END_INVOKE}')
    return "\n\n" + "\n".join([CALLS, *invokes, END_CALLS])


def _parameter(name: str, value: Any) -> str:
    is_text = isinstance(value, str)
    written = value if is_text else _json(value)
    return f'{PARAMETER} name="{name}" string="{"true" if is_text else "false"}">{written}{END_PARAMETER}'


def _arguments(i: int, arguments: Any) -> Mapping[str, Any]:
    """By name. A string that is no JSON becomes the one parameter `arguments`, as in the release."""
    if isinstance(arguments, str):
        try:
            arguments = read_arguments(arguments)
        except (ValueError, RecursionError):
            return {"arguments": arguments}
    if not isinstance(arguments, Mapping):
        raise ValueError(f"messages[{i}] has a tool call with arguments {arguments!r}: a JSON object is needed")
    return arguments


# completions to messages ---------------------------------------------------------------------------------------------


def parse_message_from_completion_text(text: str, thinking_mode: str = "chat") -> dict[str, Any]:
    """The assistant's message that a completion spells: `role`, `content`, `reasoning_content` and `tool_calls`.

    Strict: encoding the message again gives the completion, up to the JSON of parameters, which is written anew.

    Args:
        text: what the model wrote after the prompt, with its eos token (which may be missing after tool calls).
        thinking_mode: that of the prompt, "chat" or "thinking".

    Raises:
        ChatFormatError: the text is not in the format; says where.
        ValueError: unknown mode.

    Source: spec E.3, E.4; the release's encoding/encoding_dsv4.py.
    """
    if thinking_mode not in MODES:
        raise ValueError(f"thinking_mode={thinking_mode!r}: allowed are {', '.join(MODES)}")
    start, reasoning = 0, ""
    if thinking_mode == "thinking":
        end = text.find(END_THINK)
        if end < 0 or "\n\n" + CALLS[:-1] in text[:end]:
            raise ChatFormatError(f"the reasoning is not ended by {END_THINK}", len(text) if end < 0 else end)
        reasoning, start = text[:end], end + len(END_THINK)
        _plain(reasoning, 0)
    block, eos = text.find("\n\n" + CALLS[:-1], start), text.find(EOS, start)
    if block >= 0 and (eos < 0 or block < eos):
        content, reader = text[start:block], _Reader(text, block + 2)
        calls = _read_calls(reader)
        if reader.position < len(text):
            reader.expect(EOS)
    else:
        if eos < 0:
            raise ChatFormatError(f"the answer is not ended by {EOS}", len(text))
        content, calls, reader = text[start:eos], [], _Reader(text, eos + len(EOS))
    _plain(content, start)
    if reader.position < len(text):
        raise ChatFormatError("there is more after the end", reader.position)
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, "tool_calls": calls}


def _plain(text: str, offset: int) -> None:
    for token in (BOS, EOS, THINK, END_THINK, DSML):
        if token in text:
            raise ChatFormatError(f"{token} inside the text", offset + text.index(token))


class _Reader:
    """A place in a text, from which things are expected."""

    def __init__(self, text: str, position: int) -> None:
        self.text, self.position = text, position

    def at(self, token: str) -> bool:
        return self.text.startswith(token, self.position)

    def expect(self, token: str) -> None:
        if not self.at(token):
            found = self.text[self.position : self.position + len(token)]
            raise ChatFormatError(f"expected {token!r}, found {found!r}", self.position)
        self.position += len(token)

    def until(self, token: str) -> str:
        """The text before the next `token`, which is passed over."""
        end = self.text.find(token, self.position)
        if end < 0:
            raise ChatFormatError(f"expected {token!r}, which never comes", len(self.text))
        passed, self.position = self.text[self.position : end], end + len(token)
        return passed


def _read_calls(reader: _Reader) -> list[dict[str, Any]]:
    reader.expect(CALLS + "\n")
    calls: list[dict[str, Any]] = []
    while not calls or not reader.at(END_CALLS):
        reader.expect(INVOKE + ' name="')
        name = _name(reader, '">\n')
        arguments = _read_parameters(reader)
        reader.expect("\n")
        calls.append({"type": "function", "function": {"name": name, "arguments": arguments}})
    reader.expect(END_CALLS)
    return calls


def _read_parameters(reader: _Reader) -> str:
    """The arguments as a JSON object, up to the end of the call."""
    found: dict[str, str] = {}
    while reader.at(PARAMETER):
        start = reader.position
        reader.expect(PARAMETER + ' name="')
        name = _name(reader, '" string="')
        is_text = reader.at('true">')
        reader.expect('true">' if is_text else 'false">')
        value_start = reader.position
        value = reader.until(END_PARAMETER)
        reader.expect("\n")
        if DSML in value:
            raise ChatFormatError(f"{DSML} inside a parameter", value_start + value.index(DSML))
        if name in found:
            raise ChatFormatError(f"a second parameter {name!r}", start)
        found[name] = _json(value) if is_text else _checked_json(value, value_start)
    if not found and reader.at("\n"):  # how a call without parameters is written
        reader.expect("\n")
    reader.expect(END_INVOKE)
    return "{" + ", ".join(f"{_json(name)}: {value}" for name, value in found.items()) + "}"


def _name(reader: _Reader, end: str) -> str:
    start = reader.position
    name = reader.until(end)
    if DSML in name or "\n" in name:
        raise ChatFormatError(f"expected a name that ends in {end!r}", start)
    return name


def _checked_json(value: str, position: int) -> str:
    """The value, if it can also be written anew and read again: as arguments it comes back in the next prompt."""
    try:
        parsed = json.loads(value, parse_constant=_no_constant)
        level = [parsed]
        for _ in range(NESTING):
            level = [part for outer in level for part in _parts(outer)]
        if any(isinstance(part, (list, dict)) for part in level):
            raise ValueError(f"it is nested deeper than {NESTING} levels")
        written = _json(parsed)
        written.encode()
    except (ValueError, RecursionError) as error:
        raise ChatFormatError(f'a parameter with string="false" is no JSON: {error}', position) from None
    if DSML in written:
        raise ChatFormatError(f"{DSML} inside a parameter", position)
    return value


def _parts(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")
