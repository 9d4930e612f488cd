"""What older drafts of JSON schema, and writers of null, say otherwise than draft 2020-12.

    items: [A, B], additionalItems: C         prefixItems: [A, B], items: C       draft 7; without such a list: nothing
    $id: "#a"                                 $anchor: "a"                        draft 6
    minimum: m, exclusiveMinimum: true        exclusiveMinimum: m                 draft 4; false: nothing
    properties: {a: {required: true}}         required: [a]                       draft 3; elsewhere, and false: nothing
    required: null, properties: null, ...     nothing                             Go's empty lists and maps

None of the forms on the left means anything in draft 2020-12, so none can be mistaken.
"""

from typing import Any

MAY_BE_NULL = ("required", "properties", "patternProperties", "$defs", "definitions")


def update(schema: dict[str, Any]) -> None:
    """Says the same as draft 2020-12 does, in place; the schemas within are to follow after it."""
    for key in MAY_BE_NULL:
        if schema.get(key, ()) is None:
            del schema[key]
    _update_items(schema)
    for bound in ("minimum", "maximum"):
        exclusive = f"exclusive{bound.title()}"
        strict = schema.get(exclusive)
        if strict is False or (strict is True and bound in schema):
            del schema[exclusive]
            schema.update({exclusive: schema.pop(bound)} if strict else {})
    if str(schema.get("$id", "")).startswith("#"):
        schema["$anchor"] = schema.pop("$id")[1:]
    _update_required(schema)


def _update_items(schema: dict[str, Any]) -> None:
    rest = schema.pop("additionalItems", True)
    if isinstance(schema.get("items"), list) and "prefixItems" not in schema:
        first = schema.pop("items")
        schema |= ({"prefixItems": first} if first else {}) | {"items": rest}


def _update_required(schema: dict[str, Any]) -> None:
    properties, required = schema.get("properties"), schema.get("required", [])
    if isinstance(required, bool):
        del schema["required"]
        required = []
    if isinstance(properties, dict) and isinstance(required, list):
        given = [name for name, part in properties.items() if isinstance(part, dict) and part.get("required") is True]
        if given:
            schema["required"] = [*required, *given]
