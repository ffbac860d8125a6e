"""Schemas that bound their answers, and who says whether an answer is one."""

from __future__ import annotations

import json
from typing import Any

from jsonschema import Draft202012Validator

_LIST = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer", "minimum": -20, "maximum": 300},
                "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
            },
            "required": ["value", "next"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "optional fields": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 2, "maxLength": 12},
            "age": {"type": "integer", "minimum": 7, "maximum": 130},
            "member": {"type": "boolean"},
            "note": {"type": ["string", "null"], "maxLength": 20},
        },
        "required": ["age"],
        "additionalProperties": False,
    },
    "recursion": _LIST,
    "tree": {
        "type": "object",
        "properties": {
            "leaf": {"enum": [True, False, None]},
            "children": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2},
        },
        "required": ["leaf"],
        "additionalProperties": False,
    },
    "escapes": {
        "type": "array",
        "items": {"type": "string", "pattern": r'^["\\/a-c\n\t]{1,6}$'},
        "minItems": 2,
        "maxItems": 4,
    },
    "enums": {
        "type": "object",
        "properties": {
            "colour": {
                "enum": ["rot", 'a "quoted" one', "grün", "\u00e9\u4e2d\U0001f600", 7, None]
            },
            "kind": {"const": {"fixed": [1, 2]}},
        },
        "required": ["colour", "kind"],
        "additionalProperties": False,
    },
    "unicode": {"type": "string", "minLength": 5, "maxLength": 30},
    "numbers": {
        "type": "array",
        "prefixItems": [
            {"type": "number", "minimum": -1.5, "exclusiveMaximum": 2.25},
            {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 1000},
        ],
        "items": {"type": "integer", "exclusiveMinimum": 95, "maximum": 105},
        "minItems": 2,
        "maxItems": 5,
    },
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer", "minimum": 3}}},
            {"properties": {"a": {"maximum": 12}, "b": {"format": "date"}}, "required": ["a", "b"]},
        ],
        "properties": {"a": {}, "b": {"type": "string"}},
        "unknownToEveryDraft": "an annotation",
        "additionalProperties": {"type": "boolean"},
        "maxProperties": 3,
    },
}


def is_valid(text: str, schema: dict[str, Any]) -> bool:
    """Whether a text is JSON, in characters that can be sent, and matches the schema."""
    text.encode()
    return Draft202012Validator(schema).is_valid(json.loads(text))
