"""Errors whose text is one line for the user. A command prints that line without a traceback and ends with its status.

Every error of this kind in `edge_agent` and `quantize` is a subclass of UserError, so that a command can catch them all
without importing the modules that raise them. An exception of another class is a defect and keeps its traceback. (The
client's RequestRefused is not a subclass: `edge_agent.client` imports only `edge_agent.wire`.)
"""

from __future__ import annotations

import os


class UserError(Exception):
    """One line: what is wrong, what was expected, what was found, and what to do.

    exit_status: the status of a command that ends with this error.
    """

    exit_status: int = 1


class ConfigError(UserError):
    """A wrong configuration. One line: file, key, expected, found, and what to do."""

    exit_status = os.EX_CONFIG


class BundleError(UserError):
    """A wrong or damaged bundle. One line: file, key, expected, found, and what to do."""

    exit_status = os.EX_CONFIG


def encodable(text: str) -> str:
    """The text in characters that UTF-8 can hold. The name of a file in another encoding has others (PEP 383), which
    cannot be printed or sent."""
    return text.encode(errors="backslashreplace").decode()
