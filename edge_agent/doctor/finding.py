"""The result of one check."""

from __future__ import annotations

from typing import Literal

import msgspec

State = Literal["pass", "warn", "fail"]


class Finding(msgspec.Struct, frozen=True):
    """One line: what was checked, what was found, and what to do."""

    check: str
    state: State
    found: str
    remedy: str = ""  # never empty unless it passed


def passed(check: str, found: str) -> Finding:
    return Finding(check, "pass", found)


def warned(check: str, found: str, remedy: str) -> Finding:
    return Finding(check, "warn", found, remedy)


def failed(check: str, found: str, remedy: str) -> Finding:
    return Finding(check, "fail", found, remedy)
