"""make demo: the trained pilot flies a mission on this machine, from checkpoint to landing.

Builds a 4-bit bundle of models/pad_pilot/checkpoint, starts the daemon with it, and starts the simulated world (fly.py)
as a second process, which pushes the camera's frames and follows the actions. This terminal shows the messages. At the
end it prints a table of results. The flight is in demo/flight/ as an image and a video, the logs are in demo/.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from edge_agent.apps import terminal
from edge_agent.apps.wire_log import WireLog, printable
from edge_agent.client import Client, RequestRefused

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = Path(__file__).parent / "checkpoint"
OUT = ROOT / "demo"
BIN = Path(sys.executable).parent
QUESTIONS = ("What do you see?", "Combien de plateformes vois-tu ?", "Was siehst du?", "무엇이 보이나요?")
QUESTION_EVERY_S = 3.0
CONFIG = """\
bundle: {bundle}
camera: {{source: "zmq:ipc://{runtime}/frames", name: down}}
vision: {{max_image_tokens: 25}}
task: {{instruction: "Hold position.", deadline_ms: 1000}}
runtime_dir: {runtime}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=11, help="of world and mission (default 11)")
    parser.add_argument("--pace", type=float, default=0.25, help="seconds a step takes at least (default 0.25)")
    options = parser.parse_args()
    console = Console()
    OUT.mkdir(exist_ok=True)
    shutil.rmtree(OUT / "flight", ignore_errors=True)  # files of an earlier flight
    bundle = OUT / "bundle"
    run(console, BIN / "edge-quantize", "build", CHECKPOINT, bundle, "--recipe", "Q4_K_M", "--force")
    with tempfile.TemporaryDirectory(prefix="edge-agent-") as runtime:  # a socket's path has at most 107 bytes
        config = OUT / "edge-agent.yaml"
        config.write_text(CONFIG.format(bundle=bundle, runtime=runtime))
        print_command(console, BIN / "edge-agent", "run", "--config", config)
        with (OUT / "daemon.log").open("wb") as daemon_log, (OUT / "world.log").open("wb") as world_log:
            daemon = subprocess.Popen(
                [BIN / "edge-agent", "run", "--config", config], stdout=daemon_log, stderr=daemon_log
            )
            fly = [sys.executable, "-m", "models.pad_pilot.fly", "--runtime", runtime]
            command = [*fly, "--frames", f"ipc://{runtime}/frames", "--out", OUT / "flight"]
            command += ["--seed", options.seed, "--pace", options.pace]
            print_command(console, *command)
            world = subprocess.Popen([str(word) for word in command], cwd=ROOT, stdout=world_log, stderr=world_log)
            try:
                received, exchanges = watch(runtime, daemon, world)
            finally:
                world.terminate()
                world.wait(10)
                daemon.send_signal(signal.SIGTERM)
                status = daemon.wait(10)
    return summary(console, received, exchanges, world.returncode, status)


def watch(runtime: str, daemon: subprocess.Popen, world: subprocess.Popen) -> tuple[WireLog, list[tuple[str, str]]]:
    """Show the messages of the daemon until the flight ends. Another thread asks a question every few seconds.

    Returns the received messages, and the questions with their answers.
    """
    exchanges: list[tuple[str, str]] = []
    with Client(runtime) as client:
        until_s = time.monotonic() + 60
        while (status := client.status(0.5)) is None or status.state != "running":
            if daemon.poll() is not None or world.poll() is not None or time.monotonic() > until_s:
                logs = (OUT / "daemon.log").read_text() + (OUT / "world.log").read_text()
                sys.exit(f"the daemon or the world did not start:\n{logs}")
        landed = threading.Event()
        questioner = threading.Thread(target=ask, args=(runtime, landed, exchanges))
        questioner.start()
        received = terminal.run(client, ended=lambda: world.poll() is not None or daemon.poll() is not None)
        landed.set()
        questioner.join()
    return received, exchanges


def ask(runtime: str, landed: threading.Event, exchanges: list[tuple[str, str]]) -> None:
    with Client(runtime) as client:
        while not landed.wait(QUESTION_EVERY_S):
            question = QUESTIONS[len(exchanges) % len(QUESTIONS)]
            try:
                exchanges.append((question, client.ask(question, 5.0)))
            except (RequestRefused, TimeoutError) as error:
                exchanges.append((question, f"no answer: {error}"))


def summary(
    console: Console, received: WireLog, exchanges: list[tuple[str, str]], world_status: int, status: int
) -> int:
    """Print the tables. Returns the exit status: 0 if the flight succeeded."""
    record = OUT / "flight" / "flight.json"
    if world_status not in (0, 1) or not record.is_file():
        console.print((OUT / "world.log").read_text(), style="red", markup=False)
        return 1
    results = json.loads(record.read_text())
    orders = Table(title=f"The flight, wind {results['wind_m_s']} m/s", title_justify="left")
    for name in ("instruction", "outcome", "steps", "m off the pad's middle"):
        orders.add_column(name)
    for result in results["results"]:
        orders.add_row(result["instruction"], result["outcome"], str(result["steps"]), f"{result['off_m']:.2f}")
    console.print(orders)
    answers = Table(title="Questions and answers", title_justify="left")
    answers.add_column("question")
    answers.add_column("answer")
    for question, answer in exchanges:
        answers.add_row(question, printable(answer))
    console.print(answers)
    figures = Table(title="Figures", title_justify="left")
    figures.add_column("figure")
    figures.add_column("value", justify="right")
    for name, value in received.summary().items():
        figures.add_row(name, str(value))
    if received.status is not None:
        figures.add_row("model process resident, MiB", f"{received.status.model_worker.rss_mib or 0:.0f}")
    console.print(figures)
    console.print(f"picture: {OUT / 'flight' / 'flight.png'}\nfilm:    {OUT / 'flight' / 'flight.mp4'}")
    return 0 if world_status == 0 and status == 0 else 1


def print_command(console: Console, *command: object) -> None:
    words = [str(word).removeprefix(f"{BIN}/") for word in command]
    console.print("==", shlex.join(words), style="bold", highlight=False, markup=False)


def run(console: Console, *command: object) -> None:
    print_command(console, *command)
    done = subprocess.run([str(word) for word in command])
    if done.returncode:
        sys.exit(f"{command[0]}: exit status {done.returncode}")


if __name__ == "__main__":
    sys.exit(main())
