"""Constrained decoding: only tokens that a grammar allows are drawn; any model writes valid JSON and tool calls.

    p(token) = softmax(logits + mask)      mask: 0 where the grammar can go on with the token, -inf elsewhere

A `Grammar` says what may be written (a JSON schema, any JSON, a regular expression, tool calls); a `Constraint` is one
made ready for a tokenizer, and `generate(..., constraint=...)` follows it. The grammars themselves are the work of
llguidance (extra `serve`); what is ours is their text, V4's tool calls, and that every answer ends in time (`ending`).

    constraint = Constraint(json_schema({"type": "object", ...}), tokenizer)
    ids = generate(model, prompt, constraint=constraint, max_new_tokens=200)
"""

from .grammar import Grammar, json_object, json_schema, regex
from .schema import GrammarError
from .tools import tool_calls
from .walk import Constraint, DeadEndError

__all__ = [
    "Constraint",
    "DeadEndError",
    "Grammar",
    "GrammarError",
    "json_object",
    "json_schema",
    "regex",
    "tool_calls",
]
