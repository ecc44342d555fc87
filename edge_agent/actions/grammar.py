"""The action space as a JSON schema, which binds what the model can write."""

from __future__ import annotations

from edge_agent.actions.space import ActionSpace, ActionType


def json_schema(space: ActionSpace) -> dict:
    """The JSON schema of every answer the space allows: one compact object, `action` first, fields in their order."""
    return {"anyOf": [_action_schema(name, verb) for name, verb in space.actions.items()]}


def _action_schema(name: str, verb: ActionType) -> dict:
    properties: dict[str, dict] = {"action": {"const": name}}
    for key, field in verb.fields.items():
        if field.one_of is not None:
            properties[key] = {"enum": field.one_of}
        else:
            whole = all(float(n).is_integer() for n in (field.min, field.max, field.step))
            properties[key] = {
                "type": "integer" if whole else "number",
                "minimum": int(field.min) if whole else field.min,
                "maximum": int(field.max) if whole else field.max,
                "multipleOf": int(field.step) if whole else field.step,
            }
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
