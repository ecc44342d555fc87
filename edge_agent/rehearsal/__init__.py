"""Scripted streams on the daemon's own sockets, to test a controller without a camera and a model.

commands: list[Command] = []                    # another thread appends what the controller commands
events = play(SCENARIOS["expired"], folder, commands)
assert judge(events, commands) == []
"""

from edge_agent.rehearsal.controller import Result, rehearse
from edge_agent.rehearsal.judge import judge
from edge_agent.rehearsal.records import Command, parse_command
from edge_agent.rehearsal.scenarios import SCENARIOS, Scenario, play

__all__ = ["SCENARIOS", "Command", "Result", "Scenario", "judge", "parse_command", "play", "rehearse"]
