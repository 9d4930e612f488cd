"""Random schemas: what their grammars admit against jsonschema's verdicts, and broken ones that end in a GrammarError.

python tests/support/schemas.py agree 2000 0       schemas with references, as JSON answers and as tools' parameters
python tests/support/schemas.py mutate 10000 0     schemas that were valid, in children with limits of memory and time
"""

import collections
import copy
import itertools
import json
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

from abyssal.model.text.constrain import Constraint, GrammarError, json_schema, tool_calls
from abyssal.train.data.tokenizers import load_tokenizer
from abyssal.train.evaluate.constrained import SCHEMAS, TOOLS

BYTES = load_tokenizer("bytes")
DSML = "｜DSML｜"
SECONDS, MEMORY = 2.0, 500 << 20  # of one schema
NAMES = "abcd"
LEAVES = [
    {"type": "integer"}, {"type": "string"}, {"type": "null"}, {"type": "boolean"}, {"type": "number", "minimum": 0},
    {"type": "integer", "minimum": 1, "maximum": 5}, {"type": "string", "minLength": 2}, {"type": "string",
    "maxLength": 1}, {"type": "string", "pattern": "^a|b$"}, {"enum": ["a", "bb", 1, None]}, {"const": "bb"},
    {"const": 2}, {"const": True}, {"type": "string", "enum": ["a", None]}, {"type": ["string", "integer"], "enum":
    ["1", 1, None, True]}, {"type": ["string", "null"]}, {"enum": [1, True, 0, False]}, True, {}, False,
    {"multipleOf": 3}, {"type": "integer", "multipleOf": 2}, {"const": {"a": 1}}, {"enum": [[], ["a"]]}, {"minLength":
    1, "minimum": 1}, {"type": "string", "nullable": True}, {"const": {"$ref": "#"}}, {"type": "string", "default":
    {"pattern": 3}},
]  # fmt: skip
REFERENCES = [
    "#", "#/$defs/p", "#/$defs/q", "#/$defs/r~1s", "#/$defs/t%25u", "#/properties/a", "#/properties/b",
    "#/$defs/p/items", "#/$defs/q/anyOf/0", "#/properties/a/properties/c"
]  # fmt: skip
VALUES = [
    "", "a", "b", "bb", "ab", "1", "xyz", 0, 1, 2, 3, 4, 6, 2.5, -1, None, True, False, [], ["a"], [1], [[]], {},
    {"a": 1}, {"a": "a"}, {"$ref": "#"}, {"b": None}, {"a": {"a": 1}}
]  # fmt: skip


def some(r, depth):
    """A schema that may refer to others."""
    forms = ["leaf", "leaf", "ref", "ref"] + ["object", "array", "any", "one", "all", "typed", "tuple"] * (depth > 0)
    form = r.choice(forms)
    if form == "leaf":
        return copy.deepcopy(r.choice(LEAVES))
    if form == "ref":
        return {"$ref": r.choice(REFERENCES)}
    if form == "object":
        return {"type": "object", **fields(r, depth - 1)}
    if form == "array":
        return {"type": "array", "items": some(r, depth - 1), **r.choice([{}, {"minItems": 1}, {"maxItems": 1}])}
    if form == "tuple":
        return {"type": "array", "prefixItems": [some(r, depth - 1)], "items": r.choice([False, some(r, depth - 1)])}
    if form == "typed":
        return {"type": r.choice(["string", "integer", ["string", "null"]]), "anyOf": [some(r, 0), some(r, 0)]}
    key = {"any": "anyOf", "one": "oneOf", "all": "allOf"}[form]
    return {key: [some(r, depth - 1) for _ in range(r.choice([1, 2, 2]))]}


def fields(r, depth):
    names = sorted(r.sample(NAMES, r.randint(1, 3)))
    found = {"properties": {name: some(r, depth) for name in names}}
    if r.random() < 0.5:
        found["required"] = names[:1]
    if r.random() < 0.5:
        found["additionalProperties"] = r.choice([False, {"type": "integer"}])
    return found


def document(r):
    made = {"type": "object", **fields(r, 2), "$defs": {name: some(r, 2) for name in ("p", "q", "r/s", "t%u")}}
    for holder in places(made):
        if isinstance(holder, dict) and holder.keys() == {"$ref"} and r.random() < 0.99:
            while not leads_somewhere(made, holder["$ref"]):
                holder["$ref"] = r.choice(REFERENCES)
    return made


def leads_somewhere(root, reference):
    try:
        target(root, reference)
    except (KeyError, IndexError, TypeError, ValueError):
        return False
    return True


def target(root, reference):
    for step in reference.split("/")[1:]:
        step = step.replace("%25", "%").replace("~1", "/")
        root = root[int(step) if isinstance(root, list) else step]
    return root


def instance(r, schema, root, depth=5):
    """A value that follows a schema where it can."""
    if depth == 0 or isinstance(schema, bool):
        return copy.deepcopy(r.choice(VALUES))
    if "$ref" in schema:
        return instance(r, target(root, schema["$ref"]), root, depth - 1)
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return instance(r, r.choice(schema[key]), root, depth - 1)
    if "properties" in schema:
        required = schema.get("required", ())
        names = [name for name in schema["properties"] if name in required or r.random() < 0.6]
        return {name: instance(r, schema["properties"][name], root, depth - 1) for name in names}
    if schema.get("type") == "array":
        parts = [*schema.get("prefixItems", ()), *[schema.get("items", True)] * r.randint(0, 2)]
        return [instance(r, part, root, depth - 1) for part in parts]
    fitting = schema.get("enum") or ([schema["const"]] if "const" in schema else VALUES)
    kinds = {"string": str, "integer": int, "boolean": bool, "number": float}
    kind = kinds.get(schema.get("type")) if isinstance(schema.get("type"), str) else None
    return copy.deepcopy(r.choice([value for value in fitting if kind is None or type(value) is kind] or VALUES))


def instances(r, schema, count):
    """Values, most of which follow the schema, some changed in one place."""
    found = []
    for _ in range(count):
        try:
            value = instance(r, schema, schema)
        except (KeyError, IndexError, TypeError, ValueError):
            continue  # a reference that leads nowhere
        if isinstance(value, dict) and value and r.random() < 0.4:
            value[r.choice(list(value))] = copy.deepcopy(r.choice(VALUES))
        found += [value] if isinstance(value, dict) else []
    return found


def admits(constraint, text):
    matcher = constraint._start.deep_copy()
    ids = BYTES.encode(text, special=True)
    return matcher.validate_tokens(ids) == len(ids) and matcher.consume_tokens(ids) and matcher.is_accepting()


def call(arguments):
    lines = [
        f'<{DSML}parameter name="{name}" string="{"true" if isinstance(value, str) else "false"}">'
        f"{value if isinstance(value, str) else dumped(value)}</{DSML}parameter>\n"
        for name, value in arguments.items()
    ]
    body = "".join(lines) or "\n"
    return f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="f">\n{body}</{DSML}invoke>\n</{DSML}tool_calls>'


def dumped(value):
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def orders(value):
    """A value with the names of its objects in every order (a grammar takes them in its schema's)."""
    if isinstance(value, list):
        return [list(parts) for parts in itertools.islice(itertools.product(*map(orders, value)), 200)]
    if not isinstance(value, dict):
        return [value]
    found = []
    for names in itertools.permutations(value):
        choices = itertools.islice(itertools.product(*(orders(value[name]) for name in names)), 200)
        found += [dict(zip(names, parts)) for parts in choices]
    return found[:400]


def agree(count, seed):
    """How many instances were judged, and schemas refused; the instances that a grammar and jsonschema judge unlike."""
    import jsonschema

    r = random.Random(seed)
    counts, wrong = collections.Counter(), []
    for _ in range(count):
        schema = document(r)
        values = instances(r, schema, 12)
        judge = jsonschema.Draft202012Validator(schema)
        for form, make, write in (("json", json_schema, dumped), ("call", as_tool, call)):
            try:
                constraint = Constraint(make(schema), BYTES, finish=False)
            except GrammarError as error:
                counts[f"{form} refused"] += 1
                reason = str(error).split(": ")[-1][:60]
                counts[f"   {reason}"] += 1
                continue
            counts[f"{form} schemas"] += 1
            for value in values:
                try:
                    right = judge.is_valid(value)
                except Exception:  # a reference that leads nowhere, or for ever
                    continue
                if form == "call" and not value.keys() <= schema["properties"].keys() | set(schema.get("required", ())):
                    continue  # parameters that no schema names are not written
                got = admits(constraint, write(value)) or (
                    right and any(admits(constraint, write(v)) for v in orders(value))
                )
                counts[f"{form} {'valid' if right else 'invalid'}"] += 1
                wrong += [] if got == right else [(form, schema, value, right)]
    return counts, wrong


def as_tool(parameters, choice="required"):
    return tool_calls([{"type": "function", "function": {"name": "f", "parameters": parameters}}], choice)


# broken schemas ------------------------------------------------------------------------------------------------------

ODD = [
    None, True, 5, -1, 0, 2.5, "", "a", "foo", [], [1], {}, {"a": 1}, [None], float("nan"), float("inf"), 10**400,
    10**9, "\ud800", {"\ud800": 1}, {1: 2}, {"$ref": "#"}, {"$ref": 5}, "(a{1000}){1000}", "(", "a" * 3000, ["a"] *
    2000, {str(i): {} for i in range(1500)}, {"not": {}}, (1, 2), {1, 2}, b"x", 1e308, 5e-324, "[a&&b]",
    "\x00\n\r\u2028"
]  # fmt: skip
KEYS = [
    "type", "enum", "const", "properties", "items", "prefixItems", "anyOf", "oneOf", "allOf", "$ref", "$defs",
    "required", "minLength", "maxLength", "pattern", "format", "minimum", "maximum", "exclusiveMinimum", "multipleOf",
    "minItems", "maxItems", "minProperties", "maxProperties", "additionalProperties", "patternProperties", "$id",
    "$schema", "$anchor", "$dynamicRef", "if", "not", "uniqueItems", "dependentSchemas", "default", "title",
    "x-guidance"
]  # fmt: skip


def places(value):
    """Every object and list within a value."""
    if isinstance(value, dict | list):
        yield value
        for part in value.values() if isinstance(value, dict) else value:
            yield from places(part)


def mutated(r, valid):
    """A valid thing with one to three changes."""
    value = copy.deepcopy(r.choice(valid))
    for _ in range(r.randint(1, 3)):
        holder = r.choice(list(places(value)))
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        change = r.choice(("replace", "replace", "delete", "add", "wrap", "swap", "deep", "double"))
        if change == "add" and isinstance(holder, dict):
            holder[r.choice(KEYS)] = copy.deepcopy(r.choice(ODD))
        elif not keys:
            continue
        elif change == "replace":
            holder[r.choice(keys)] = copy.deepcopy(r.choice(ODD))
        elif change == "delete":
            del holder[r.choice(keys)]
        elif change == "wrap":
            key = r.choice(keys)
            holder[key] = r.choice([lambda v: [v], lambda v: {r.choice(KEYS): v}])(holder[key])
        elif change == "swap":
            one, other = r.choice(keys), r.choice(keys)
            holder[one], holder[other] = holder[other], holder[one]
        elif change == "deep":
            key = r.choice(keys)
            for _ in range(r.choice([3, 60, 600])):
                holder[key] = {"anyOf": [holder[key], {"type": "null"}]}
            break
        elif change == "double":
            key = r.choice(keys)
            holder[key] = {"allOf": [holder[key], copy.deepcopy(holder[key])]}
    return value


def attempt(i, seed):
    """What becomes of the i-th broken schema."""
    r = random.Random(f"{seed} {i}")
    began = time.perf_counter()
    try:
        if i % 2:
            grammar = tool_calls(mutated(r, [TOOLS, *([tool] for tool in TOOLS)]), r.choice(["auto", "required"]))
        else:
            grammar = json_schema(mutated(r, list(SCHEMAS.values())))
        Constraint(grammar, BYTES)
        outcome = "Constraint"
    except GrammarError as error:
        outcome = "GrammarError" if len(str(error).splitlines()) == 1 else "GrammarError of several lines"
    except BaseException as error:
        outcome = type(error).__name__
    return outcome, time.perf_counter() - began


def child(first, last, seed):
    """Attempts in this process, each said as it begins and when it is over."""
    Constraint(json_schema({}), BYTES)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for i in range(first, last):
        outcome, seconds = attempt(i, seed)
        slow = f"slower than {SECONDS} s: " if seconds > SECONDS else ""
        print(i, f"{slow}{outcome}", flush=True)


def mutate(count, seed, hang=20):
    """How many broken schemas end how, in children; one that dies costs the schema that it died of."""
    counts, odd, done = collections.Counter(), [], 0
    while done < count:
        given = [sys.executable, __file__, "child", str(done), str(min(done + 200, count)), str(seed)]
        with subprocess.Popen(given, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL) as process:
            assert process.stdout is not None
            begun = done
            for line in process.stdout:
                number, outcome = line.rstrip("\n").split(" ", 1)
                counts[outcome] += 1
                odd += [] if outcome in ("Constraint", "GrammarError") else [(int(number), outcome)]
                done = int(number) + 1
        if done < min(begun + 200, count):
            counts[f"the process died: {process.returncode}"] += 1
            odd.append((done, "died"))
            done += 1
    return counts, odd


if __name__ == "__main__":
    what, *numbers = sys.argv[1:]
    if what == "child":
        child(*map(int, numbers))
        raise SystemExit
    counts, wrong = {"agree": agree, "mutate": mutate}[what](*map(int, numbers))
    for name, number in counts.items():
        print(f"{number:8,} {name}")
    for each in wrong[:20]:
        print("WRONG", each)
    raise SystemExit(bool(wrong))
