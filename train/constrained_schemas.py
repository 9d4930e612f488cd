"""Twenty JSON schemas and four tools as programs have them, to write answers for."""

from typing import Any

ADDRESS = {
    "type": "object",
    "properties": {
        "street": {"type": "string", "minLength": 1, "maxLength": 40},
        "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
        "country": {"enum": ["DE", "FR", "日本"]},
    },
    "required": ["street", "zip"],
    "additionalProperties": False,
}

SCHEMAS: dict[str, dict[str, Any]] = {
    "nested objects": {
        "type": "object",
        "properties": {"name": {"type": "string"}, "home": ADDRESS, "work": ADDRESS},
        "required": ["name", "home"],
        "additionalProperties": False,
    },
    "enum and const": {
        "type": "object",
        "properties": {"kind": {"const": "reading"}, "level": {"enum": ["low", "high", 3, None, True]}},
        "required": ["kind", "level"],
    },
    "integer bounds": {
        "type": "object",
        "properties": {
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "year": {"type": "integer", "exclusiveMinimum": 1899, "exclusiveMaximum": 2101},
            "balance": {"type": "integer", "minimum": -5000},
        },
        "required": ["age", "year", "balance"],
        "additionalProperties": False,
    },
    "number bounds": {
        "type": "object",
        "properties": {
            "share": {"type": "number", "minimum": 0, "maximum": 1},
            "celsius": {"type": "number", "minimum": -273.15, "exclusiveMaximum": 1000.5},
        },
        "required": ["share", "celsius"],
        "additionalProperties": False,
    },
    "multiples": {"type": "array", "items": {"type": "integer", "multipleOf": 5, "minimum": 0}, "minItems": 1},
    "array lengths": {"type": "array", "items": {"type": "string", "maxLength": 8}, "minItems": 2, "maxItems": 4},
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": "string"}, {"type": "number"}, {"type": "boolean"}],
        "items": False,
        "minItems": 3,
    },
    "matrix": {
        "type": "array",
        "items": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
        "minItems": 1,
    },
    "optional properties": {
        "type": "object",
        "properties": {
            "title": {"type": "string"},
            "subtitle": {"type": ["string", "null"]},
            "pages": {"type": "integer", "minimum": 1},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["title"],
        "additionalProperties": False,
    },
    "map": {"type": "object", "additionalProperties": {"type": "integer"}},
    "keys by pattern": {
        "type": "object",
        "patternProperties": {"^x-[a-z]+$": {"type": "boolean"}},
        "additionalProperties": False,
    },
    "recursion": {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "value": {"type": "integer"},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}},
                },
                "required": ["value", "children"],
                "additionalProperties": False,
            }
        },
    },
    "shared definitions": {
        "type": "object",
        "properties": {"from": {"$ref": "#/$defs/point"}, "to": {"$ref": "#/$defs/point"}},
        "required": ["from", "to"],
        "additionalProperties": False,
        "$defs": {
            "point": {
                "type": "object",
                "properties": {"x": {"type": "number"}, "y": {"type": "number"}},
                "required": ["x", "y"],
                "additionalProperties": False,
            }
        },
    },
    "alternatives": {
        "anyOf": [
            {"type": "string", "maxLength": 20},
            {"type": "array", "items": {"anyOf": [{"type": "integer"}, {"type": "null"}]}},
            {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]},
        ]
    },
    "one of several shapes": {
        "oneOf": [
            {
                "type": "object",
                "properties": {"shape": {"const": "circle"}, "radius": {"type": "number", "minimum": 0}},
                "required": ["shape", "radius"],
                "additionalProperties": False,
            },
            {
                "type": "object",
                "properties": {"shape": {"const": "box"}, "sides": {"type": "array", "items": {"type": "number"}}},
                "required": ["shape", "sides"],
                "additionalProperties": False,
            },
        ]
    },
    "all of several": {
        "allOf": [
            {"type": "object", "properties": {"id": {"type": "integer", "minimum": 1}}, "required": ["id"]},
            {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]},
        ]
    },
    "patterns": {
        "type": "object",
        "properties": {
            "phone": {"type": "string", "pattern": "^\\+[1-9][0-9]{6,14}$"},
            "code": {"type": "string", "pattern": "^([A-Z]{2}|[a-z]{4})-[0-9]+$"},
            "path": {"type": "string", "pattern": "/v[0-9]+/"},
        },
        "required": ["phone", "code", "path"],
        "additionalProperties": False,
    },
    "formats": {
        "type": "object",
        "properties": {
            "id": {"type": "string", "format": "uuid"},
            "born": {"type": "string", "format": "date"},
            "seen": {"type": "string", "format": "date-time"},
            "host": {"type": "string", "format": "ipv4"},
        },
        "required": ["id", "born"],
        "additionalProperties": False,
    },
    "unicode": {
        "type": "object",
        "properties": {
            "größe": {"type": "number"},
            "名前": {"type": "string", "minLength": 2, "maxLength": 6},
            "🙂": {"enum": ["ja", "はい", "да"]},
        },
        "required": ["größe", "名前", "🙂"],
        "additionalProperties": False,
    },
    "anything": {"type": "object"},
}

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer", "minimum": 1, "maximum": 14},
                    "unit": {"enum": ["celsius", "fahrenheit"]},
                },
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now", "description": "The time of day."}},
    {
        "type": "function",
        "function": {
            "name": "send_mail",
            "parameters": {
                "type": "object",
                "properties": {
                    "to": {"type": "array", "items": {"type": "string", "format": "email"}, "minItems": 1},
                    "subject": {"type": "string", "minLength": 3, "maxLength": 60},
                    "priority": {"type": ["integer", "string", "null"], "minimum": 1, "maxLength": 5},
                    "when": {"anyOf": [{"type": "string", "pattern": "^(mon|tue|fri)$"}, {"type": "null"}]},
                    "options": {"$ref": "#/$defs/options"},
                },
                "required": ["to", "subject", "priority"],
                "$defs": {
                    "options": {
                        "type": "object",
                        "properties": {"html": {"type": "boolean"}, "copies": {"type": "integer", "minimum": 0}},
                        "required": ["html"],
                        "additionalProperties": False,
                    }
                },
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "search",
            "parameters": {
                "type": "object",
                "properties": {
                    "query": {"type": "string", "minLength": 1},
                    "filter": {},
                    "since": {"type": "string", "format": "date"},
                },
            },
        },
    },
]
