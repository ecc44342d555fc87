"""What the daemon adds to a frame: the time from capture to publication that is not the model's.

    python benchmarks/daemon_path.py BUNDLE                              # a minute
    python benchmarks/daemon_path.py BUNDLE --source gst                 # a pipeline in place of pushed frames
    python benchmarks/daemon_path.py BUNDLE --beside CHECKOUT            # another checkout by turns, to compare with

Frames of 640x480, 20 times a second. The model waits for each frame, so that nothing is hidden behind the answer to the
frame before. Pushed frames are rgb8, from the FramePusher of the checkout that is measured, and are stamped before they
are sent. The daemon stamps the frames of a pipeline when they have arrived, as it stamps those of a camera.

    queue     capture to the model process: pushed frames are sent; the resize in the camera process; the wake-up
    resize    in the model process: the copy out of the slot. Of a run of its own, with --trace
    post      the model's answer to its publication: message to the supervisor, check, stamp

"Sum" adds the median of "resize". The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from edge_agent.client import Client, FramePusher
from edge_agent.tools.bench import synthetic_frames
from edge_agent.wire.messages import Action, Refusal

HEIGHT, WIDTH, RATE_HZ, IMAGE_TOKENS = 480, 640, 20, 25
PIPELINE = f"gst:videotestsrc is-live=true pattern=ball ! video/x-raw,framerate={RATE_HZ}/1"
N_WARM_UP, START_S, WAIT_S = 20, 120.0, 0.5

Times = dict[str, list[float]]  # name -> milliseconds


def answers_to_pushed(client: Client, endpoint: str) -> Iterator[Action | Refusal | None]:
    """Push a frame, wait for its answer, and so on."""
    frames = [cv2.resize(frame, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC) for frame in synthetic_frames(8)]
    with FramePusher(endpoint) as pusher:
        frame_id = 0
        while True:
            start_s, frame_id = time.monotonic(), frame_id + 1
            pusher.push(frames[frame_id % 8], frame_id=frame_id, t_capture_ns=time.monotonic_ns())
            while (answer := client.next_answer(WAIT_S)) is not None and answer.frame_id < frame_id:
                pass  # to a frame before, which took too long
            yield answer
            time.sleep(max(0.0, start_s + 1 / RATE_HZ - time.monotonic()))


def answers_to_pipeline(client: Client) -> Iterator[Action | Refusal | None]:
    while True:
        yield client.next_answer(WAIT_S)


def run_daemon(bundle: Path, source: str, n_frames: int, *, trace: bool) -> Times:
    """Start a daemon with the edge_agent that Python finds; the times of its answers."""
    took: Times = {"queue": [], "post": [], "resize": []}
    with tempfile.TemporaryDirectory(prefix="edge-path-") as runtime:
        endpoint, timeline = f"ipc://{runtime}/frames", Path(runtime) / "trace.json"
        camera = {"source": PIPELINE, "width": WIDTH, "height": HEIGHT, "fps": RATE_HZ}
        config = {
            "bundle": str(bundle),
            "camera": camera if source == "gst" else {"source": f"zmq:{endpoint}"},
            "vision": {"max_image_tokens": IMAGE_TOKENS},
            "task": {"instruction": "Land on the red disc."},
            "runtime_dir": runtime,
        }
        path, log = Path(runtime) / "config.yaml", Path(runtime) / "log"
        path.write_text(json.dumps(config))  # JSON is YAML
        command = [sys.executable, "-m", "edge_agent.cli.main", "run", "--config", str(path)]
        command += ["--trace", str(timeline)] if trace else []
        with log.open("wb") as out:
            daemon = subprocess.Popen(command, stdout=out, stderr=out)
        try:
            with Client(runtime) as client:
                end_s = time.monotonic() + START_S
                answers = answers_to_pipeline(client) if source == "gst" else answers_to_pushed(client, endpoint)
                while len(took["queue"]) < n_frames + N_WARM_UP:
                    if time.monotonic() > end_s or daemon.poll() is not None:
                        sys.exit(f"the daemon does not answer:\n{log.read_text()}")
                    answer = next(answers)
                    if isinstance(answer, Action):
                        stages = answer.stages_ms
                        took["queue"].append(stages.queue)
                        model_ms = stages.encode + stages.prefill + stages.decode
                        took["post"].append(answer.age_ms - stages.queue - model_ms)
        finally:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(30)
        if trace:
            spans = json.loads(timeline.read_text())
            took["resize"] = [span["dur"] / 1000 for span in spans if span["name"] == "resize"]
    return {name: values[N_WARM_UP:] for name, values in took.items()}


def measured(checkout: Path, options: argparse.Namespace, *, trace: bool) -> Times:
    """run_daemon() with the code of a checkout, in a process of its own."""
    command = [sys.executable, __file__, str(options.bundle), "--source", options.source, "-n", str(options.n), "--one"]
    done = subprocess.run(
        [*command, *(["--trace"] if trace else [])],
        env=os.environ | {"PYTHONPATH": str(checkout)},
        check=True,
        stdout=subprocess.PIPE,
    )
    return json.loads(done.stdout.splitlines()[-1])


def percentiles(values: list[float]) -> dict[str, float]:
    return {f"p{p}": round(float(np.percentile(values, p)), 3) for p in (10, 50, 90, 99)}


def summary(runs: list[Times], traced: Times) -> dict[str, dict[str, float]]:
    queue, post = ([value for run in runs for value in run[name]] for name in ("queue", "post"))
    resize_ms = float(np.median(traced["resize"]))
    return {
        "queue_ms": percentiles(queue),
        "resize_ms": percentiles(traced["resize"]),
        "post_ms": percentiles(post),
        "sum_ms": percentiles([a + resize_ms + b for a, b in zip(queue, post, strict=True)]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="a bundle of the demo model")
    parser.add_argument("--source", choices=("push", "gst"), default="push", help="where frames come from")
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT", help="measure this checkout too, by turns")
    parser.add_argument("-n", type=int, default=100, help="frames of a run (default 100)")
    parser.add_argument("--runs", type=int, default=4, help="runs of each checkout (default 4)")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--trace", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_daemon(options.bundle, options.source, options.n, trace=options.trace)))
        return 0
    options.bundle = options.bundle.resolve()
    here = Path(__file__).resolve().parents[1]
    checkouts = {"before": options.beside.resolve(), "now": here} if options.beside else {"now": here}
    runs: dict[str, list[Times]] = {name: [] for name in checkouts}
    for _ in range(options.runs):
        for name, checkout in checkouts.items():
            runs[name].append(measured(checkout, options, trace=False))
    result: dict[str, object] = {"benchmark": "daemon_path", "source": options.source, "size": f"{WIDTH}x{HEIGHT}",
                                 "image_tokens": IMAGE_TOKENS, "frames": options.n * options.runs}  # fmt: skip
    for name, checkout in checkouts.items():
        found = result[name] = summary(runs[name], measured(checkout, options, trace=True))
        print(name, found, file=sys.stderr)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
