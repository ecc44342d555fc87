"""Ctrl-C, a closed terminal and SIGTERM end the work as an exception, also while native code calls back into Python."""

from __future__ import annotations

import signal
import sys

_interrupted = False


def install() -> None:
    """Turn SIGINT, SIGTERM and SIGHUP into KeyboardInterrupt. An ignored signal, as under nohup, stays ignored."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)
    sys.unraisablehook = _swallow_interrupt


def raise_if_interrupted() -> None:
    """Raise the KeyboardInterrupt again that native code has lost. Every report of progress calls this."""
    if _interrupted:
        raise KeyboardInterrupt


def _interrupt(_signal: int, _frame: object) -> None:
    """In a callback from native code the exception is lost, so it is also recorded."""
    global _interrupted
    _interrupted = True
    raise KeyboardInterrupt


def _swallow_interrupt(lost: sys.UnraisableHookArgs) -> None:
    """Python would print a lost KeyboardInterrupt; it is raised again by raise_if_interrupted."""
    if lost.exc_type is not KeyboardInterrupt:
        sys.__unraisablehook__(lost)
