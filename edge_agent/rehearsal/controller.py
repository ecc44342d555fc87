"""The controller under test as a process: starts it, reads its commands, ends it.

result = rehearse("expired", ["python", "examples/controller.py", "--runtime-dir", "{dir}"])
assert result.faults == []
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from edge_agent.errors import UserError
from edge_agent.rehearsal.judge import hold_delays_ms, judge
from edge_agent.rehearsal.records import Command, Event, Note, Sent, parse_command
from edge_agent.rehearsal.scenarios import SCENARIOS, play

END_S = 5.0  # from SIGTERM to SIGKILL


class CommandError(UserError):
    """The controller cannot be started. One line."""


class Result(NamedTuple):
    """What a rehearsal of one scenario found."""

    scenario: str
    faults: list[str]  # one line each; empty: the controller did right
    notes: list[str]  # what could not be judged
    hold_delays_ms: list[float]  # from when a hold was due to the hold
    n_messages: int
    n_commands: int


class Controller:
    """Owns the process. The commands grow while it runs."""

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        """`{dir}` in the command is replaced by the runtime folder. Raises CommandError."""
        self.commands: list[Command] = []
        words = [word.replace("{dir}", str(folder)) for word in command]
        environment = os.environ | {"RUNTIME_DIRECTORY": str(folder), "PYTHONUNBUFFERED": "1"}
        try:
            self._process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment, start_new_session=True
            )
        except OSError as error:
            raise CommandError(f"{words[0]}: cannot be started: {error.strerror}; expected a program") from None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                command = parse_command(line.decode(errors="replace"), time.monotonic_ns())
                if command is not None:
                    self.commands.append(command)

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def why_ended(self) -> str:
        """Why it has ended by itself; "": it runs."""
        status = self._process.poll()
        if status is None:
            return ""
        how = f"exit status {status}" if status >= 0 else signal.Signals(-status).name
        return f"the controller ended by itself: {how}"

    def end(self) -> None:
        """End it with everything that it started, and read what it had printed."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_S)
        self._reader.join(END_S)


@contextlib.contextmanager
def _folder_of(configured: str) -> Iterator[Path]:
    """The configured folder, or one of this rehearsal alone."""
    if configured:
        yield Path(configured)
        return
    with tempfile.TemporaryDirectory(prefix="edge-agent-rehearsal-") as folder:
        yield Path(folder)


def rehearse(name: str, command: Sequence[str], runtime_dir: str = "", space: str = "velocity_body") -> Result:
    """Play a scenario to a new process of the controller. runtime_dir: empty: a temporary folder.

    Raises CommandError, EndpointError.
    """
    with _folder_of(runtime_dir) as folder:
        controller = Controller(command, folder)
        try:
            has_ended = controller.has_ended
            events = play(SCENARIOS[name], folder, controller.commands, space=space, has_ended=has_ended)
            ended = controller.why_ended()
        finally:
            controller.end()
    return _result(name, events, controller.commands, ended)


def _result(name: str, events: Sequence[Event], commands: Sequence[Command], ended: str) -> Result:
    faults = judge(events, commands) + ([ended] if ended else [])
    return Result(
        scenario=name,
        faults=faults,
        notes=[event.text for event in events if isinstance(event, Note)],
        hold_delays_ms=hold_delays_ms(events, commands),
        n_messages=sum(isinstance(event, Sent) for event in events),
        n_commands=len(commands),
    )
