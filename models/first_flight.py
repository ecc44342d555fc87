"""make demo: checkpoint -> bundle -> daemon -> controller, on real parts, in about half a minute.

The weights are random: this shows that the chain works and what it costs, not what a trained model would do. Everything
lands in demo/; the daemon is a separate process, and what is shown came over ZeroMQ through edge_agent.client.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import skimage.data
from rich.console import Console
from rich.table import Table

from edge_agent import view
from edge_agent.client import Client, Refused

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "demo"
BIN = Path(sys.executable).parent
PHOTOGRAPHS = (skimage.data.coffee, skimage.data.astronaut, skimage.data.chelsea)
FPS, WIDTH, HEIGHT = 10, 640, 480
NOTE = (
    "UNTRAINED WEIGHTS: a toy model with random numbers. "
    "The actions below mean nothing; the timing and the path are real."
)
CONFIG = """\
bundle: {bundle}
camera: {{source: {video}, name: demo}}
vision: {{max_tokens: 64}}
language: {{context: 1024, describe: "What do you see?", max_words_tokens: 24}}
task: {{instruction: "Fly to the coffee cup."}}
runtime_dir: {runtime}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="how long to watch (default 20)")
    seconds = parser.parse_args().seconds
    console = Console()
    OUT.mkdir(exist_ok=True)
    say(console, "a toy checkpoint: Ministral 3's architecture, tiny, random weights -> demo/checkpoint")
    shutil.rmtree(OUT / "checkpoint", ignore_errors=True)
    call(sys.executable, ROOT / "tests" / "toy.py", OUT / "checkpoint", "--seed", 11)  # one whose answers differ
    say(console, "edge-quantize build demo/checkpoint demo/bundle --recipe Q4_K_M --force")
    call(BIN / "edge-quantize", "build", OUT / "checkpoint", OUT / "bundle", "--recipe", "Q4_K_M", "--force")
    say(console, "a video, panning over photographs -> demo/flight.avi")
    pan(OUT / "flight.avi", seconds=min(seconds, 20.0))
    with tempfile.TemporaryDirectory(prefix="edge-agent-") as runtime:  # short: a socket's path has 107 letters
        config = OUT / "edge-agent.yaml"
        config.write_text(CONFIG.format(bundle=OUT / "bundle", video=OUT / "flight.avi", runtime=runtime))
        say(console, "edge-agent check --config demo/edge-agent.yaml")
        call(BIN / "edge-agent", "check", "--config", config)
        say(
            console, "edge-agent run --config demo/edge-agent.yaml, log in demo/daemon.log; this screen is a controller"
        )
        with (OUT / "daemon.log").open("wb") as log:
            daemon = subprocess.Popen([BIN / "edge-agent", "run", "--config", config], stderr=log, stdout=log)
        try:
            heard = fly(runtime, daemon, seconds)
        finally:
            daemon.send_signal(signal.SIGTERM)
            stop_s = time.monotonic()
            status = daemon.wait(10)
    return summary(console, heard, status, time.monotonic() - stop_s)


def fly(runtime: str, daemon: subprocess.Popen, seconds: float) -> view.Heard:
    """Watch the daemon as a controller does; half-way it gets another instruction."""
    with Client(runtime) as client:
        until_s = time.monotonic() + 60
        while (status := client.status(0.5)) is None or status.state != "running":
            if daemon.poll() is not None or time.monotonic() > until_s:
                sys.exit(f"the daemon did not start:\n{(OUT / 'daemon.log').read_text()}")
        threading.Timer(seconds / 2, instruct, [runtime]).start()
        return view.watch(client, seconds, note=NOTE)


def instruct(runtime: str) -> None:
    with Client(runtime) as client:
        try:
            client.instruct("Hold position above the cat.")
        except (Refused, TimeoutError) as error:
            print(f"instruct: {error}", file=sys.stderr)


def pan(path: Path, seconds: float) -> None:
    """A slow flight over each photograph in turn, written as MJPG."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), FPS, (WIDTH, HEIGHT))
    if not writer.isOpened():
        sys.exit(f"{path}: OpenCV cannot write a video here")
    n_frames = round(seconds * FPS / len(PHOTOGRAPHS))
    for photograph in PHOTOGRAPHS:
        image = cv2.cvtColor(photograph(), cv2.COLOR_RGB2BGR)
        scale = 1.3 * max(WIDTH / image.shape[1], HEIGHT / image.shape[0])
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
        room = np.array(image.shape[:2]) - (HEIGHT, WIDTH)
        for i in range(n_frames):
            top, left = (room * i / max(1, n_frames - 1)).astype(int)
            writer.write(np.ascontiguousarray(image[top : top + HEIGHT, left : left + WIDTH]))
    writer.release()


def summary(console: Console, heard: view.Heard, status: int, stop_s: float) -> int:
    figures = heard.summary()
    table = Table(title="What the controller heard", title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in figures.items():
        table.add_row(name, str(value))
    if heard.status is not None:
        table.add_row("frames delivered / never looked at", f"{heard.status.frames} / {heard.status.frames_dropped}")
        table.add_row("model process resident, MiB", f"{heard.status.model_worker.rss_mib or 0:.0f}")
    table.add_row("daemon's exit status, seconds to stop", f"{status}, {stop_s:.2f}")
    console.print(table)
    console.print(NOTE, style="bold red")
    return 0 if figures["actions"] and status == 0 else 1


def say(console: Console, line: str) -> None:
    console.print(f"== {line}", style="bold", highlight=False)


def call(*command: object) -> None:
    done = subprocess.run([str(word) for word in command])
    if done.returncode:
        sys.exit(f"{command[0]}: exit status {done.returncode}")


if __name__ == "__main__":
    sys.exit(main())
