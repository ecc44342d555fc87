"""edge-agent listen: actions, text and status on a terminal, as any controller receives them through the client.

With the package rich, and stdout on a terminal: a live screen. Otherwise: one line per message.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from edge_agent.apps.wire_log import Message, WireLog, printable
from edge_agent.client import Client
from edge_agent.time_units import NS_PER_S
from edge_agent.wire.messages import Action, Refusal, TextMessage

if TYPE_CHECKING:
    from edge_agent.apps.screen import Screen

ANSWER_WAIT_S = 0.02
MAX_TEXT_MESSAGES = 200  # read in one turn; the next turn reads more
PRINTED_LANES = ("describe", "answer")  # the action lane repeats the action, the reasoning lane is long


def run(
    client: Client,
    *,
    seconds: float | None = None,
    as_json: bool = False,
    note: str = "",
    ended: Callable[[], bool] = lambda: False,
    clock: Callable[[], int] = time.monotonic_ns,
) -> WireLog:
    """Show what arrives for some seconds (None: no limit), or until ended() is true.

    note: a warning to print above everything else; not with as_json.
    Returns everything that was received, for its figures.
    """
    log = WireLog(clock)
    screen = None if as_json else _open_screen(note)
    if screen is None and note and not as_json:
        print(note, flush=True)
    end_ns = None if seconds is None else clock() + round(seconds * NS_PER_S)
    try:
        while (end_ns is None or clock() < end_ns) and not ended():
            for message in _receive(client):
                log.record(message)
                if screen is None:
                    print_message(message, as_json=as_json)
            if screen is not None:
                screen.show(log)
    finally:
        if screen is not None:
            screen.close()
    return log


def _open_screen(note: str) -> Screen | None:
    """None: rich is not installed, or stdout is not a terminal."""
    try:
        from rich.console import Console

        from edge_agent.apps.screen import Screen
    except ModuleNotFoundError:
        return None
    console = Console()
    return Screen(console, note) if console.is_terminal else None


def _receive(client: Client) -> list[Message]:
    """Everything that waits in the sockets. Waits at most ANSWER_WAIT_S."""
    messages: list[Message] = []
    answer = client.next_answer(ANSWER_WAIT_S)
    if answer is not None:
        messages.append(answer)
    for _ in range(MAX_TEXT_MESSAGES):
        text = client.next_text(0.0)
        if text is None:
            break
        messages.append(text)
    status = client.status(0.0)
    if status is not None:
        messages.append(status)
    return messages


def print_message(message: Message, *, as_json: bool = False) -> None:
    """One line per action or refusal. Text is printed as it arrives. Status is printed only as JSON."""
    if as_json:
        print(msgspec.json.encode(message).decode(), flush=True)
    elif isinstance(message, Action):
        values = " ".join(
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in message.values.items()
        )
        line = f"frame {message.frame_id}: {message.type} {values} (age {message.age_ms:.0f} ms)"
        print(printable(line), flush=True)
    elif isinstance(message, Refusal):
        print(printable(f"frame {message.frame_id}: no action: {message.reason} {message.detail}"), flush=True)
    elif isinstance(message, TextMessage) and message.lane in PRINTED_LANES:
        print(printable(message.text), end="\n" if message.final else "", flush=True)
