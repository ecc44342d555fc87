"""The timeline: JSON that a viewer can open, also if it was not closed, and what a real run writes into it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_agent.errors import ConfigError
from edge_agent.supervisor.trace import Trace
from tests.harness import rig


def events_of(path: Path) -> list[dict]:
    text = path.read_text()
    return json.loads(text if text.rstrip().endswith("]") else text + "]")  # viewers close it themselves


def test_spans_are_complete_events_in_microseconds_on_named_threads(tmp_path):
    timeline = Trace(str(tmp_path / "t.json"))
    timeline.span("encode", "vision", 5_000_000, 5_250_500)
    timeline.span('a "name"', "language", 6_000_000, 6_000_000)
    timeline.span("again", "vision", 7_000_000, 6_999_999)  # a clock that is read in two processes
    timeline.close()
    timeline.close()
    events = events_of(tmp_path / "t.json")
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    spans = [(e["name"], names[e["tid"]], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert spans == [("encode", "vision", 5000, 250.5), ('a "name"', "language", 6000, 0), ("again", "vision", 7000, 0)]


def test_a_timeline_of_a_daemon_that_was_killed_can_be_read(tmp_path):
    timeline = Trace(str(tmp_path / "t.json"))
    timeline.span("encode", "vision", 1, 2)
    assert len(events_of(tmp_path / "t.json")) == 3, "every event is in the file as soon as it is written"
    timeline.close()


def test_it_stops_at_its_limit_and_does_nothing_without_a_path(tmp_path, monkeypatch):
    monkeypatch.setattr("edge_agent.supervisor.trace.MAX_EVENTS", 5)
    timeline = Trace(str(tmp_path / "t.json"))
    for n in range(50):
        timeline.span("encode", "vision", n, n + 1)
    timeline.close()
    assert sum(event["ph"] == "X" for event in events_of(tmp_path / "t.json")) == 5
    none = Trace("")
    none.span("encode", "vision", 1, 2)
    none.close()


def test_a_file_that_cannot_be_written_is_reported_before_anything_starts(tmp_path):
    with pytest.raises(ConfigError, match=r"--trace: .*/none/t\.json: cannot be written: No such file"):
        Trace(str(tmp_path / "none" / "t.json"))


@pytest.mark.parametrize("overlap", [False, True])
def test_a_run_shows_what_was_done_when(toy_bundle, tmp_path_factory, overlap):
    """The real model. Without overlap no frame is encoded while another one is answered; with overlap one can be."""
    runtime = tmp_path_factory.mktemp("r")
    path = runtime / "trace.json"
    config = {
        "bundle": str(toy_bundle), "camera": {"source": f"zmq:ipc://{runtime}/frames"},
        "vision": {"max_image_tokens": 64}, "language": {"gpu_layers": 0},
        "advanced": {"overlap": overlap, "speculative": False},
        "task": {"deadline_ms": 600_000}, "watchdog": {"model_stall_s": 60.0},
    }  # fmt: skip
    with (
        rig.Pusher(f"ipc://{runtime}/frames", rate_hz=100.0, height=240, width=320),
        rig.daemon(runtime, config, trace=path) as run,
    ):
        with run.client() as client:
            for _ in range(10):
                assert client.next_answer(60.0) is not None
        assert run.stop() == 0
    events = events_of(path)
    threads = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    spans = [(e["name"], threads[e["tid"]], e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X"]
    assert "supervisor" in threads.values() and len(threads) >= 4
    assert {"resize", "encode", "prefill", "decode"} <= {name for name, *_ in spans}
    encodes = [(thread, start, stop) for name, thread, start, stop in spans if name == "encode"]
    answering = [(thread, start, stop) for name, thread, start, stop in spans if name in ("prefill", "decode")]
    assert {thread for thread, *_ in encodes}.isdisjoint(thread for thread, *_ in answering)
    together = sum(any(a < stop and start < b for _, a, b in answering) for _, start, stop in encodes)
    assert together > 0 if overlap else together == 0


def test_a_full_disk_ends_the_timeline_and_not_the_daemon(capfd):
    trace = Trace("/dev/full")
    for i in range(10_000):
        trace.span(f"frame {i}", "model", 0, 1)
    assert not trace.is_on and "the timeline ends here" in capfd.readouterr().err
    trace.close()
