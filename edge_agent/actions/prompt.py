"""The action space in words, for the system prompt."""

from __future__ import annotations

from edge_agent.actions.space import ActionSpace


def describe_action_space(space: ActionSpace) -> str:
    """The space in the model's words, for the pinned prefix."""
    lines = [space.about] if space.about else []
    for name, verb in space.actions.items():
        fields = []
        for key, field in verb.fields.items():
            if field.one_of is not None:
                what, join = [field.about, " or ".join(field.one_of)], ": "
            else:
                what, join = [field.about, field.unit, f"{field.min:g} to {field.max:g}"], ", "
            fields.append(f"{key} ({join.join(filter(None, what))})")
        said = "; ".join(part for part in (verb.about, ", ".join(fields)) if part)
        lines.append(f"{name}: {said}" if said else name)
    return "\n".join(lines)
