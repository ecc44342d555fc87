"""The model process's end of the socket to the supervisor: commands in, events out."""

from __future__ import annotations

import select
import socket
from collections import deque

from edge_agent.ipc.events import (
    AskQuestion,
    CancelQuestion,
    LimitLoad,
    ModelEvent,
    SetInstruction,
    SetPaused,
    decode_model_command,
)
from edge_agent.ipc.worker import MAX_EVENT_BYTES
from edge_agent.model.events import Events
from edge_agent.wire.codec import encode

LaneCommand = SetInstruction | SetPaused | CancelQuestion | LimitLoad


class SupervisorChannel:
    """Commands are read while a frame is answered too, but applied only between two frames."""

    def __init__(self, socket: socket.socket, *, trace: bool = False) -> None:
        """trace: `events` also sends spans."""
        self._socket = socket
        self.events = Events(self.send, trace=trace)
        self.pending_questions: deque[AskQuestion] = deque()
        self._pending_commands: deque[LaneCommand] = deque()

    def fileno(self) -> int:
        """For select.poll: readable when a command has arrived."""
        return self._socket.fileno()

    def send(self, event: ModelEvent) -> None:
        self._socket.send(encode(event))

    def take_commands(self) -> list[LaneCommand]:
        """The commands that have arrived, in order; questions go to `pending_questions`. Never waits."""
        self._read()
        commands = list(self._pending_commands)
        self._pending_commands.clear()
        return commands

    def has_urgent(self) -> bool:
        """True if a new instruction or a pause has arrived, so the current answer should be abandoned."""
        self._read()
        return any(
            isinstance(command, SetInstruction) or (isinstance(command, SetPaused) and command.paused)
            for command in self._pending_commands
        )

    def _read(self) -> None:
        while select.select([self._socket], [], [], 0)[0]:
            payload = self._socket.recv(MAX_EVENT_BYTES)
            if not payload:
                raise BrokenPipeError  # the supervisor is gone
            command = decode_model_command(payload)
            if isinstance(command, AskQuestion):
                self.pending_questions.append(command)
            else:
                self._pending_commands.append(command)
