"""Requests of OpenAI's API, read strictly: what is not understood is refused, because it would change the answer.

Accepted without effect are labels (`user`, `metadata`, ...) and parameters at the value that has none
(`frequency_penalty` 0, `logprobs` false, ...); anything else unknown is an error that names it.

    reasoning_effort   none, minimal: no thinking · low, medium, high: thinking · max, xhigh: thinking, maximal effort
    thinking           {"type": "enabled" | "disabled"}, as in DeepSeek's API; decides where both are given
    role "developer"   is the system's, as OpenAI means it (the model's own developer role is of another use)
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..dialogue import Manner
from .errors import ApiError, invalid
from .fields import Fields, anything, boolean, integer, number, objects, one_of, short, text, texts

ROLES = ("system", "user", "assistant", "tool", "developer", "latest_reminder")
EFFORTS = ("none", "minimal", "low", "medium", "high", "max", "xhigh")
LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
CHOICES, STOPS, TOOLS = 8, 16, 128  # most of each in a request
SEEDS = 2**63
TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


@dataclass(frozen=True)
class Common:
    """What both endpoints take. `max_tokens` None: as many as the server writes unless told."""

    model: str
    manner: Manner
    max_tokens: int | None
    choices: int
    stream: bool
    usage: bool  # a last chunk with the token counts


@dataclass(frozen=True)
class ChatRequest(Common):
    """`tools` are those that may be called; `must_call`: the answer is calls of them; `schema`: of the answer."""

    messages: list[dict[str, Any]]
    thinking: bool
    effort: str | None
    tools: tuple[Mapping[str, Any], ...]
    must_call: bool
    one_call: bool
    schema: Mapping[str, Any] | None
    shown: tuple[Mapping[str, Any], ...]  # the tools that the prompt lists

    @property
    def held_by(self) -> str:
        """The field that gives the answer a form, empty if none does."""
        return "tools" if self.tools else "" if self.schema is None else "response_format"


@dataclass(frozen=True)
class TextRequest(Common):
    """A text to write on."""

    prompt: str


def read_chat(body: Mapping[str, Any], thinks: bool = False) -> ChatRequest:
    """A request to /v1/chat/completions; `thinks`: whether to think where the request does not say. Raises ApiError."""
    fields = Fields(body)
    common = _common(fields)
    longest = fields.take("max_completion_tokens", integer(1, 2**31))
    if None not in (longest, common.max_tokens) and longest != common.max_tokens:
        raise invalid("max_tokens", f"{common.max_tokens}, but max_completion_tokens={longest}: one of them is enough")
    common = replace(common, max_tokens=longest or common.max_tokens)
    messages = _messages(fields)
    thinking, effort = _thinking(fields, thinks)
    shown, callable_, must = _tools(fields)
    one_call = not fields.take("parallel_tool_calls", boolean, True)
    schema = _format(fields)
    fields.neutral("functions")
    fields.neutral("function_call")
    fields.neutral("modalities", ["text"])
    fields.neutral("verbosity", "medium")
    fields.neutral("logprobs", False)
    fields.end()
    return ChatRequest(
        **vars(common),
        messages=messages,
        thinking=thinking,
        effort=effort,
        tools=callable_,
        must_call=must,
        one_call=one_call,
        schema=schema,
        shown=shown,
    )


def read_text(body: Mapping[str, Any]) -> TextRequest:
    """A request to /v1/completions. Raises ApiError."""
    fields = Fields(body)
    common = _common(fields)
    prompt = fields.take("prompt", _one_text, "")
    for key, *values in (("suffix", ""), ("echo", False), ("best_of", 1, common.choices), ("logprobs",)):
        fields.neutral(key, *values)
    fields.end()
    return TextRequest(**vars(common), prompt=prompt)


def _common(fields: Fields) -> Common:
    model = fields.need("model", text)
    manner = Manner(
        temperature=fields.take("temperature", number(0, 2), 1.0),
        top_k=fields.take("top_k", integer(0, 2**31), 0),
        top_p=fields.take("top_p", number(0, 1, above=True), 1.0),
        min_p=fields.take("min_p", number(0, 0.999), 0.0),
        seed=fields.take("seed", integer(-SEEDS, SEEDS - 1)),
        stop=fields.take("stop", texts(STOPS), ()),
    )
    stream = fields.take("stream", boolean, False)
    options = Fields(fields.take("stream_options", anything, {}), "stream_options")
    usage = options.take("include_usage", boolean, False)
    options.neutral("include_obfuscation", False)
    options.end()
    if usage and not stream:
        raise invalid("stream_options", "this needs stream: true")
    fields.ignore(*LABELS)
    neutral = {"frequency_penalty": 0, "presence_penalty": 0, "top_logprobs": 0, "logit_bias": {}, "store": False}
    for key, value in neutral.items():
        fields.neutral(key, value)
    fields.neutral("service_tier", "auto", "default")
    return Common(
        model,
        manner,
        max_tokens=fields.take("max_tokens", integer(1, 2**31)),
        choices=fields.take("n", integer(1, CHOICES), 1),
        stream=stream,
        usage=usage,
    )


def _one_text(value: Any) -> str:
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if not isinstance(value, str):
        raise ValueError("one text is needed")
    return value


def _thinking(fields: Fields, thinks: bool) -> tuple[bool, str | None]:
    """Whether to think, and the effort that the prompt names."""
    effort = fields.take("reasoning_effort", one_of(*EFFORTS))
    switch = Fields(fields.take("thinking", anything, {}), "thinking")
    kind = switch.take("type", one_of("enabled", "disabled"))
    switch.end()
    thinking = thinks if effort is None else effort not in ("none", "minimal")
    thinking = thinking if kind is None else kind == "enabled"
    return thinking, "max" if thinking and effort in ("max", "xhigh") else None


# messages ------------------------------------------------------------------------------------------------------------


def _messages(fields: Fields) -> list[dict[str, Any]]:
    listed = fields.need("messages", objects)
    if not listed:
        raise invalid("messages", "at least one message is needed")
    messages: list[dict[str, Any]] = []
    open_calls: set[str] = set()
    for i, value in enumerate(listed):
        message = _message(Fields(value, f"messages[{i}]"))
        if message["role"] == "assistant":
            open_calls = {call["id"] for call in message.get("tool_calls", ())}
        elif message["role"] == "tool" and message["tool_call_id"] not in open_calls:
            raise invalid(
                f"messages[{i}].tool_call_id",
                f"{short(message['tool_call_id'])}: the assistant's last message has no call with this id",
            )
        messages.append(message)
    if messages[-1]["role"] not in ("user", "tool"):
        raise invalid("messages", f"the last one is of role {listed[-1]['role']}: allowed are user and tool")
    return messages


def _message(fields: Fields) -> dict[str, Any]:
    role = fields.need("role", one_of(*ROLES))
    message: dict[str, Any] = {"role": "system" if role == "developer" else role}
    if role == "assistant":
        message["reasoning_content"] = fields.take("reasoning_content", text, "")
        message["tool_calls"] = _calls(fields)
        fields.neutral("annotations", [])
        for key in ("refusal", "audio", "function_call"):
            fields.neutral(key)
    if role == "tool":
        message["tool_call_id"] = fields.need("tool_call_id", text)
        fields.ignore("name")  # says again which tool was called
    if message.get("tool_calls"):
        message["content"] = fields.take("content", _content(fields), "")
    else:
        message["content"] = fields.need("content", _content(fields))
    fields.end()
    return message


def _content(fields: Fields) -> Any:
    def check(value: Any) -> Any:
        if isinstance(value, str):
            return value
        if not isinstance(value, list):
            raise ValueError("text or a list of parts is needed")
        path = fields.name("content")
        return [_part(Fields(part, f"{path}[{i}]")) for i, part in enumerate(value)]

    return check


def _part(fields: Fields) -> dict[str, str]:
    part = {"type": fields.need("type", one_of("text")), "text": fields.need("text", text)}
    fields.end()
    return part


def _calls(fields: Fields) -> list[dict[str, Any]]:
    calls = []
    for i, value in enumerate(fields.take("tool_calls", objects, [])):
        call = Fields(value, f"{fields.name('tool_calls')}[{i}]")
        call.take("type", one_of("function"))
        call.ignore("index")
        function = Fields(call.need("function", anything), call.name("function"))
        read = {"name": function.need("name", text), "arguments": function.need("arguments", text) or "{}"}
        function.end()
        calls.append({"id": call.need("id", text), "type": "function", "function": read})
        call.end()
    return calls


# tools and formats ---------------------------------------------------------------------------------------------------


def _tools(fields: Fields) -> tuple[tuple[Mapping[str, Any], ...], tuple[Mapping[str, Any], ...], bool]:
    """The tools that the prompt shows, those that may be called, and whether one must be."""
    tools = [_tool(Fields(value, f"tools[{i}]")) for i, value in enumerate(fields.take("tools", objects, []))]
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) < len(names) or len(names) > TOOLS:
        raise invalid("tools", f"{len(names)} tools: allowed are up to {TOOLS}, each with a name of its own")
    choice = fields.take("tool_choice", anything, "auto")
    if isinstance(choice, dict):
        name = _named(Fields(choice, "tool_choice"))
        if name not in names:
            raise invalid("tool_choice", f"no tool has the name {short(name)}")
        return tuple(tools), (tools[names.index(name)],), True
    if choice not in ("none", "auto", "required"):
        raise invalid("tool_choice", f"{short(choice)}: allowed are none, auto, required and a function by name")
    if choice == "required" and not tools:
        raise invalid("tool_choice", "required, but there are no tools")
    if choice == "none":
        return (), (), False
    return tuple(tools), tuple(tools), choice == "required"


def _named(fields: Fields) -> str:
    fields.need("type", one_of("function"))
    function = Fields(fields.need("function", anything), fields.name("function"))
    name = function.need("name", text)
    function.end()
    fields.end()
    return name


def _tool(fields: Fields) -> dict[str, Any]:
    """As it was given, once it is checked: the prompt shows the model these very fields, in their order."""
    fields.need("type", one_of("function"))
    given = fields.need("function", anything)
    fields.end()
    function = Fields(given, fields.name("function"))
    name = function.need("name", text)
    if not TOOL_NAME.fullmatch(name):
        raise invalid(function.name("name"), f"{short(name)}: allowed are 1 to 64 letters, digits, _ and -")
    function.take("description", text)
    function.take("parameters", _schema)
    function.take("strict", boolean)
    function.end()
    return {"type": "function", "function": given}


def _format(fields: Fields) -> Mapping[str, Any] | None:
    """The JSON schema that the answer must have, if any."""
    given = fields.take("response_format", anything)
    if given is None:
        return None
    form = Fields(given, "response_format")
    kind = form.need("type", one_of("text", "json_object", "json_schema"))
    if kind != "json_schema":
        form.end()
        return {"type": "object"} if kind == "json_object" else None
    named = Fields(form.need("json_schema", anything), form.name("json_schema"))
    named.need("name", text)
    named.take("description", text)
    named.take("strict", boolean)
    schema = named.need("schema", _schema)
    named.end()
    form.end()
    return schema


def _schema(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError("a JSON schema, which is an object, is needed")
    return value


def check_model(asked: str, served: str) -> None:
    """Raises ApiError 404 for another model than the one that is served."""
    if asked != served:
        raise ApiError(404, f"the model {short(asked)} is not here: {served} is", param="model", code="model_not_found")
