"""Values of the vehicle's state, as flight programs hold them -> values of the wire."""

from __future__ import annotations

from enum import Enum

from edge_agent.wire.control import StateValue


def plain_value(value: object) -> StateValue | None:
    """A value as flight programs hold it -> a value of the wire. None: unknown. Raises ValueError."""
    if isinstance(value, Enum):
        value = value.value
    try:
        if hasattr(value, "item"):  # a scalar of numpy; a masked one is not known
            value = None if getattr(value, "mask", False) else value.item()
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return value.encode().decode()
        is_wire_integer = isinstance(value, int) and abs(value) < 2**63
        return int(value) if is_wire_integer else float(value)  # type: ignore[call-overload, arg-type]  # Decimal
    except Exception:  # of any library
        raise ValueError(f"expected a number, a bool or a word; found {type(value).__name__}") from None
