"""The action space as a JSON schema. The schema restricts what the model can write (codec json)."""

from __future__ import annotations

from typing import Any

from edge_agent.actions.decimals import has_exact_grammar, multiples
from edge_agent.actions.space import ActionField, ActionSpace, ActionType, ChoiceField


def json_schema(space: ActionSpace) -> dict[str, Any]:
    """The JSON schema of every answer: one object, first the key `action`, then the fields in the order of the file."""
    return {"anyOf": [_action_schema(name, action) for name, action in space.actions.items()]}


def _action_schema(name: str, action: ActionType) -> dict[str, Any]:
    properties: dict[str, Any] = {"action": {"const": name}}
    properties |= {key: _field_schema(field) for key, field in action.fields.items()}
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _field_schema(field: ActionField) -> dict[str, Any]:
    """An integer where min, max and step are whole numbers: the model then writes no decimal point. A list of all
    values where llguidance would allow others."""
    if isinstance(field, ChoiceField):
        return {"enum": field.one_of}
    if not has_exact_grammar(field.min, field.max, field.step):
        return {"enum": multiples(field.min, field.max, field.step)}
    whole = all(float(limit).is_integer() for limit in (field.min, field.max, field.step))
    return {
        "type": "integer" if whole else "number",
        "minimum": int(field.min) if whole else field.min,
        "maximum": int(field.max) if whole else field.max,
        "multipleOf": int(field.step) if whole else field.step,
    }
