"""Errors that end a command with one line for the user and an exit status."""

from __future__ import annotations


class ConfigError(Exception):
    """One line: file, key, expected, found, and what to do."""


class BundleError(Exception):
    """One line: file, key, expected, found, what to do."""
