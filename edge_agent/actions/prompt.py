"""The description of an action space for the system prompt: one line for each action type."""

from __future__ import annotations

from edge_agent.actions.space import ActionField, ActionSpace, ChoiceField


def describe_action_space(space: ActionSpace) -> str:
    """Describe every action type, field, unit, range and word to the model. The text is part of the prompt prefix.

    A trained model depends on every character of this text.
    """
    lines = [space.about] if space.about else []
    for name, action in space.actions.items():
        fields = ", ".join(_describe_field(key, field) for key, field in action.fields.items())
        description = "; ".join(part for part in (action.about, fields) if part)
        lines.append(f"{name}: {description}" if description else name)
    return "\n".join(lines)


def _describe_field(key: str, field: ActionField) -> str:
    """For example `vx (forward, m/s, -2 to 2)` or `pace (how fast: slow or normal)`."""
    if isinstance(field, ChoiceField):
        parts, separator = [field.about, " or ".join(field.one_of)], ": "
    else:
        parts, separator = [field.about, field.unit, f"{field.min:g} to {field.max:g}"], ", "
    return f"{key} ({separator.join(part for part in parts if part)})"
