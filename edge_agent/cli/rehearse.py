"""edge-agent rehearse: plays scenarios to a controller, and prints what it did wrong.

It needs the base install only.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from edge_agent.cli.commands import EX_FAILED, EX_USAGE, CommandFailed
from edge_agent.rehearsal.controller import Result, rehearse
from edge_agent.rehearsal.records import Due, Event, Note, Sent
from edge_agent.rehearsal.scenarios import SCENARIOS, play
from edge_agent.time_units import NS_PER_S

ALL = "all"


def rehearse_scenarios(arguments: argparse.Namespace) -> int:
    """Returns the exit status: 1 if the controller did something wrong. Raises CommandFailed, UserError."""
    if not arguments.scenarios:
        _print_table(arguments.json)
        return 0
    names = _named(arguments.scenarios)
    if not arguments.controller:
        if not arguments.runtime_dir:
            raise CommandFailed(
                "rehearse moves every controller that is connected: name the folder that it reads, with --runtime-dir "
                "DIR, or give the command of the controller after --",
                EX_USAGE,
            )
        for name in names:
            _show(name, arguments)
        return 0
    results = []
    for name in names:
        result = rehearse(name, arguments.controller, arguments.runtime_dir, arguments.action_space)
        _print_result(result, arguments.json)
        results.append(result)
    n_failed = sum(bool(result.faults) for result in results)
    if not arguments.json:
        print(f"{len(results) - n_failed} of {len(results)} passed")
    return EX_FAILED if n_failed else 0


def _named(scenarios: list[str]) -> list[str]:
    """Raises CommandFailed."""
    if scenarios == [ALL]:
        return list(SCENARIOS)
    unknown = [name for name in scenarios if name not in SCENARIOS]
    if unknown:
        expected = f"expected {ALL}, or some of {', '.join(SCENARIOS)}"
        raise CommandFailed(f"rehearse: no scenario {unknown[0]!r}; {expected}", EX_USAGE)
    return scenarios


def _print_table(as_json: bool) -> None:
    width = max(map(len, SCENARIOS))
    for name, scenario in SCENARIOS.items():
        if as_json:
            print(json.dumps({"scenario": name, "about": scenario.about, "right": scenario.right}))
        else:
            print(f"{name:{width}}  {scenario.about}\n{'':{width}}  A right controller {scenario.right}.")


def _print_result(result: Result, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"scenario": result.scenario, "passed": not result.faults} | result._asdict()), flush=True)
        return
    delays = f"  hold after at most {max(result.hold_delays_ms):.1f} ms" if result.hold_delays_ms else ""
    counts = f"{result.n_messages} messages, {result.n_commands} commands"
    width = max(map(len, SCENARIOS))
    print(f"{'FAIL' if result.faults else 'PASS'}  {result.scenario:{width}}  {counts}{delays}", flush=True)
    for line in (*result.faults, *result.notes):
        print(f"      {line}", flush=True)


def _show(name: str, arguments: argparse.Namespace) -> None:
    """Play to whatever controller is connected, and print what is sent and what it should do."""
    scenario = SCENARIOS[name]
    if not arguments.json:
        print(f"{name}: {scenario.about}\n  A right controller {scenario.right}.", flush=True)
        print(f"  waits for a controller at {arguments.runtime_dir}", file=sys.stderr, flush=True)
    report = _reporter(name, time.monotonic_ns(), arguments.json)
    play(scenario, Path(arguments.runtime_dir), space=arguments.action_space, report=report)


EXPECTED = {"follow": "may be followed", "discard": "to discard", "none": ""}


def _reporter(name: str, start_ns: int, as_json: bool) -> Callable[[Event], None]:
    def report(event: Event) -> None:
        at_s = (event.t_ns - start_ns) / NS_PER_S
        text, expected, values = _in_words(event)
        if as_json:
            line = {"scenario": name, "at_s": round(at_s, 3), "text": text, "expected": expected, "values": values}
            print(json.dumps(line), flush=True)
        else:
            printed = " ".join(f"{key}={value}" for key, value in values.items())
            print("  " + "  ".join(filter(None, (f"{at_s:8.3f} s", text, printed, expected))), flush=True)

    return report


def _in_words(event: Event) -> tuple[str, str, dict[str, object]]:
    if isinstance(event, Sent):
        return event.text, EXPECTED[event.rule], dict(event.steps[0]) if event.steps else {}
    return (event.text if isinstance(event, Note) else event.why), "hold" if isinstance(event, Due) else "", {}


HANDLERS = {"rehearse": rehearse_scenarios}
