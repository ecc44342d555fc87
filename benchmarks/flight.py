"""How well the demo model flies, through the real daemon: held-out frames, questions, whole flights, bad input.

    python benchmarks/flight.py                          # 1000 frames for every recipe, 200 flights; minutes
    python benchmarks/flight.py --frames 100 --flights 20 --recipes Q4_K_M
    python benchmarks/flight.py --photographs DIR        # these photographs as ground instead of the held-out ones
    python benchmarks/flight.py --through mavlink --flights 100       # flights alone: direct, and through the bridge

Every figure comes from answers on the wire: each frame is pushed over ZeroMQ under its own instruction. Frames, worlds
and missions are made from seeds that training never uses. Half of the grounds are synthetic, half are photographs that
training does not use, and the two halves are reported separately. Intervals are Wilson's, 95 %. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from edge_agent.actions.space import load_action_space  # noqa: E402
from edge_agent.wire.messages import Action  # noqa: E402
from models.pad_pilot import task  # noqa: E402
from models.pad_pilot.fly import DaemonLink, Result, Step, fly, random_mission  # noqa: E402
from models.pad_pilot.lessons import Exercise, Grounds, held_out_photographs, lesson  # noqa: E402
from models.pad_pilot.world import World  # noqa: E402

SEED = 50_000_000  # training's seeds are small
BIN = Path(sys.executable).parent
RECIPES = ("BF16", "Q8_0", "Q4_K_M", "Q4_K_S", "IQ4_XS", "Q4_0")
NAMES = {key: field.name or key for key, field in load_action_space("velocity_body").actions["move"].fields.items()}
SPEEDS = ("vx", "vy", "vz")  # yaw is always 0 here: with it, the mean error would be too small
PUSHES, PUSH_TIMEOUT_S = 12, 5.0  # a picture without an answer is pushed again: a busy machine can drop a frame
SIZES = ((64, 64), (96, 300), (480, 640), (720, 1280), (1080, 1920))
WITHIN_M_S = 0.05


Fly = Callable[[DaemonLink, World, list[tuple[str, task.Order]], Callable[[Step], None]], list[Result]]


class Frame(NamedTuple):
    picture: np.ndarray
    exercise: Exercise  # the instruction, the right action, questions with their answers
    photographed: bool


class Answer(NamedTuple):
    action: str  # empty: a refusal, or no answer
    values: dict[str, float]  # by the model's keys
    words: str


def frames(n: int, seed: int, photographs: list[np.ndarray]) -> list[Frame]:
    """n frames; every second frame is over a photograph."""
    grounds = [Grounds([], seed), Grounds(photographs, seed, only_photographs=True)]
    shown = []
    for i in range(n):
        example = lesson(np.random.default_rng([seed, i]), grounds[i % 2], n_orders=1, n_questions=1)
        shown += [Frame(example.picture, exercise, bool(i % 2)) for exercise in example.exercises]
    return shown


@contextlib.contextmanager
def pilot(bundle: Path, backend: str) -> Iterator[DaemonLink]:
    """A daemon on a bundle, and the vehicle's end of its sockets."""
    with tempfile.TemporaryDirectory(prefix="edge-agent-") as runtime:
        config = {
            "bundle": str(bundle),
            "camera": {"source": f"zmq:ipc://{runtime}/frames"},
            "vision": {"backend": backend, "max_image_tokens": 25},
            "task": {"deadline_ms": 10000},
            "runtime_dir": runtime,
        }
        path = Path(runtime) / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        log = (Path(runtime) / "log").open("wb")
        daemon = subprocess.Popen([BIN / "edge-agent", "run", "--config", path], stdout=log, stderr=log)
        try:
            with DaemonLink(runtime, f"ipc://{runtime}/frames") as link:
                try:
                    link.wait(np.random.default_rng(0).integers(0, 255, (140, 140, 3), np.uint8))
                except TimeoutError:
                    sys.exit(f"the daemon does not answer:\n{(Path(runtime) / 'log').read_text()}")
                yield link
        finally:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(10)
            log.close()


def answer(link: DaemonLink, picture: np.ndarray, instruction: str, question: str = "") -> Answer:
    link.client.instruct(instruction)
    for _ in range(PUSHES):
        reply = link.answer(picture, PUSH_TIMEOUT_S)
        if reply is not None:
            break
    words = link.client.ask(question, PUSHES * PUSH_TIMEOUT_S) if question else ""
    if not isinstance(reply, Action):
        return Answer("", {}, words)
    return Answer(reply.type, {key: reply.values[name] for key, name in NAMES.items() if name in reply.values}, words)


def interval(k: int, n: int) -> list[float | None]:
    """[share, low, high]: Wilson's score interval, 95 %. Of nothing the share is None."""
    if not n:
        return [None, 0.0, 1.0]
    z, p = 1.96, k / n
    middle, reach = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [round(x, 4) for x in (p, (middle - reach) / (1 + z * z / n), (middle + reach) / (1 + z * z / n))]


def against_the_rule(shown: list[Frame], answers: list[Answer]) -> dict:
    """The answers compared with the right answers."""
    pairs = list(zip(shown, answers, strict=True))
    moves = [(f, a) for f, a in pairs if a.action == f.exercise.action["action"] == "move"]
    errors_m_s = [abs(a.values[key] - f.exercise.action[key]) for f, a in moves for key in SPEEDS]
    with_question = [(f, a) for f, a in pairs if f.exercise.exchanges and a.words]
    n_right = sum(a.words.strip() == f.exercise.exchanges[0].answer for f, a in with_question)
    return {
        "n": len(pairs),
        "type_right": interval(sum(a.action == f.exercise.action["action"] for f, a in pairs), len(pairs)),
        "velocity_mae_m_s": round(float(np.mean(errors_m_s)), 4) if errors_m_s else None,
        "velocity_off_p99_m_s": round(float(np.quantile(errors_m_s, 0.99)), 4) if errors_m_s else None,
        "words_right": interval(n_right, len(with_question)),
        "wrong_land": sum(a.action == "land" != f.exercise.action["action"] for f, a in pairs),
    }


def agreement(answers: list[Answer], reference: list[Answer]) -> dict:
    """The answers of one bundle compared with those of another bundle to the same frames."""
    pairs = list(zip(answers, reference, strict=True))
    moves = [(a, b) for a, b in pairs if a.action == b.action == "move"]
    errors_m_s = [abs(a.values[key] - b.values[key]) for a, b in moves for key in a.values]
    return {
        "same_type": interval(sum(a.action == b.action for a, b in pairs), len(pairs)),
        "fields_within_0.05": interval(sum(x <= WITHIN_M_S + 1e-9 for x in errors_m_s), len(errors_m_s)),
        "same_answer": interval(sum(a[:2] == b[:2] for a, b in pairs), len(pairs)),
    }


def flights(link: DaemonLink, n: int, photographs: list[np.ndarray], label: str, fly: Fly = fly) -> dict:
    """Flights with one order each, most of them landings. The ground is painted and a photograph in turn. label: of the
    progress bar. fly: how a mission is flown."""
    grounds = [Grounds([], SEED + 7), Grounds(photographs, SEED + 7, only_photographs=True)]
    outcomes, steps, ages_ms, failed = Counter(), [], [], {}

    def note_age(step) -> None:
        if step.answer is not None:
            ages_ms.append(step.answer.age_ms)

    for i in track(range(n), label):
        world = World(SEED + i, grounds[i % 2])
        rng = np.random.default_rng([SEED, i, 1])
        mission = random_mission(rng, world.pads, 1 if i % 4 else 2)  # every fourth one goes somewhere else first
        results = fly(link, world, mission, note_age)
        done = len(results) == len(mission) and results[-1].outcome == "right"
        outcomes["right" if done else results[-1].outcome] += 1
        if not done:
            failed[i] = results[-1].outcome
        else:
            steps += [result.steps for result in results]
    return {
        "n": n,
        "success": interval(outcomes["right"], n),
        "outcomes": dict(outcomes),
        "failed_worlds": failed,
        "steps_p50": float(np.median(steps)) if steps else None,
        "steps_p95": float(np.quantile(steps, 0.95)) if steps else None,
        "age_ms_p50": round(float(np.median(ages_ms)), 1) if ages_ms else None,
        "age_ms_p99": round(float(np.quantile(ages_ms, 0.99)), 1) if ages_ms else None,
    }


def bad_input(link: DaemonLink, n: int, photographs: list[np.ndarray]) -> dict[str, dict]:
    """Answers to bad input, counted by action type, and the number of wrong landings."""
    rng = np.random.default_rng([SEED, 99])
    grounds = Grounds(photographs, SEED + 9)
    rows: dict[str, dict] = {}

    def count(name: str, answers: list[Answer], wrong_lands: int) -> None:
        rows[name] = {"answers": dict(Counter(a.action or "none" for a in answers)), "wrong_land": wrong_lands}

    shades = {
        "black frame": lambda: rng.integers(0, 3, (140, 140, 3), np.uint8),
        "white frame": lambda: rng.integers(253, 256, (140, 140, 3)).astype(np.uint8),
        "noise frame": lambda: rng.integers(0, 256, (140, 140, 3)).astype(np.uint8),
    }
    for name, make in shades.items():
        answers = []
        for _ in range(n):
            order = task.Order("land", str(rng.choice(list(task.COLOURS))), str(rng.choice(task.SHAPES)))
            answers.append(answer(link, make(), task.random_instruction(rng, str(rng.choice(task.LANGUAGES)), order)))
        count(name, answers, sum(a.action == "land" for a in answers))
    orders = {
        "a language that is not in the training data": lambda: str(rng.choice(UNSEEN)),
        "a pad that does not exist": lambda: task.random_instruction(
            rng, str(rng.choice(task.LANGUAGES)), task.random_absent_order(rng, "land")
        ),
    }
    for name, make_instruction in orders.items():
        answers = []
        for i in range(n):
            example = lesson(np.random.default_rng([SEED + 3, i]), grounds, n_orders=1)
            answers.append(answer(link, example.picture, make_instruction()))
        count(name, answers, sum(a.action == "land" for a in answers))
    for size in SIZES:
        answers, wrong, right = [], 0, 0
        for i in range(n):
            example = lesson(np.random.default_rng([SEED + 5, i]), grounds, n_orders=1, size_px=size)
            for exercise in example.exercises:
                answers.append(answer(link, example.picture, exercise.instruction))
                wrong += answers[-1].action == "land" != exercise.action["action"]
                right += answers[-1].action == exercise.action["action"]
        count(f"frame of {size[1]}x{size[0]}", answers, wrong)
        rows[f"frame of {size[1]}x{size[0]}"]["type_right"] = round(right / max(1, len(answers)), 3)
    return rows


# No sentence in any of these languages is in training.
UNSEEN = (
    "Idi na crveni krug.", "Sleti na plavi kvadrat.", "Gå til den gule trekant.", "Land på den røde cirkel.",
    "Farðu að rauðu skífunni.", "Mine punase ketta juurde.", "Nolaidies uz zilā kvadrāta.", "Ho'i i ka pōʻai ʻulaʻula.",
    "Nenda kwenye duara nyekundu.", "Tua kwenye mraba wa bluu.", "Pumunta sa pulang bilog.", "Cer at y cylch coch.",
    "Téigh go dtí an ciorcal dearg.", "לך לעיגול האדום.", "נחת על הריבוע הכחול.", "ลงจอดที่สี่เหลี่ยมสีน้ำเงิน",
    "برو به دایره قرمز", "Vai al disco ròs.", "Joan disko gorrira.", "Lur hartu karratu urdinean.",
)  # fmt: skip


def built(folder: Path, recipe: str) -> Path:
    bundle = folder / recipe
    checkpoint = ROOT / "models" / "pad_pilot" / "checkpoint"
    subprocess.run(
        [BIN / "edge-quantize", "build", checkpoint, bundle, "--recipe", recipe], check=True, capture_output=True
    )
    return bundle


def size_mib(bundle: Path) -> float:
    return round(sum(file.stat().st_size for file in bundle.iterdir()) / 2**20, 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=1000)
    parser.add_argument("--flights", type=int, default=200)
    parser.add_argument("--bad", type=int, default=100, help="frames of each kind of bad input (default 100)")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), help="the first is the reference (default: all)")
    parser.add_argument("--fly", nargs="*", default=["BF16", "Q4_K_M"], help="recipes that fly whole flights too")
    parser.add_argument("--photographs", type=Path, help="a folder of photographs for the ground")
    parser.add_argument("--through", choices=["mavlink"], help="fly the same worlds directly and through the bridge")
    parser.add_argument("--autopilot", choices=["px4", "ardupilot"], default="ardupilot", help="with --through mavlink")
    parser.add_argument("--pace", type=float, default=0.5, help="with --through mavlink: seconds of a step at least; "
                        "0.5 (default) is real time; with less, the bridge's telemetry is old")  # fmt: skip
    options = parser.parse_args()
    photographs = held_out_photographs() if options.photographs is None else folder_of(options.photographs)
    if options.through:
        return through_mavlink(options, photographs)
    shown = frames(options.frames, SEED + 1, photographs)
    result: dict = {"benchmark": "flight", "frames": len(shown), "recipes": {}, "photographs": len(photographs)}
    answers: dict[str, list[Answer]] = {}
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="edge-flight-") as folder:
        runs = [(recipe, "onnxruntime") for recipe in options.recipes]
        if "Q4_K_M" in options.recipes:
            runs.append(("Q4_K_M", "mtmd"))
        for recipe, backend in runs:
            name = recipe if backend == "onnxruntime" else f"{recipe} mtmd"
            bundle = Path(folder) / recipe
            if not bundle.is_dir():
                built(Path(folder), recipe)
            main_run = name == "Q4_K_M" or len(options.recipes) == 1
            with pilot(bundle, backend) as link:
                answers[name] = [
                    answer(
                        link,
                        f.picture,
                        f.exercise.instruction,
                        f.exercise.exchanges[0].question if main_run and f.exercise.exchanges else "",
                    )
                    for f in track(shown, f"{name}: frames")
                ]
                row = {"bundle_mib": size_mib(bundle), "all": against_the_rule(shown, answers[name])}
                for part, photographed in (("painted", False), ("photographs", True)):
                    which = [i for i, f in enumerate(shown) if f.photographed == photographed]
                    row[part] = against_the_rule([shown[i] for i in which], [answers[name][i] for i in which])
                row["against"] = agreement(answers[name], answers[options.recipes[0]])
                if options.flights and recipe in options.fly and backend == "onnxruntime":
                    row["flights"] = flights(link, options.flights, photographs, f"{name}: flights")
                if options.bad and main_run:
                    row["bad_input"] = bad_input(link, options.bad, photographs)
                row["model_rss_mib"] = link.client.status().model_worker.rss_mib
            result["recipes"][name] = row
            if backend == "onnxruntime" and recipe != "Q4_K_M":
                shutil.rmtree(bundle)
    if "Q4_K_M mtmd" in answers:
        result["onnx_against_mtmd"] = agreement(answers["Q4_K_M"], answers["Q4_K_M mtmd"])
    result["seconds"] = round(time.monotonic() - began_s)
    show(result)
    print(json.dumps(result))
    return 0


def through_mavlink(options: argparse.Namespace, photographs: list[np.ndarray]) -> int:
    """The same worlds with the same missions, flown directly and through edge-agent mavlink."""
    from mavlink_bridge import bridge_process, flown_through

    recipe, began_s = options.fly[-1], time.monotonic()
    result: dict = {"benchmark": "flight through mavlink", "recipe": recipe, "autopilot": options.autopilot}
    with (
        tempfile.TemporaryDirectory(prefix="edge-flight-") as folder,
        pilot(built(Path(folder), recipe), "onnxruntime") as link,
    ):
        result["direct"] = flights(link, options.flights, photographs, "direct: flights")
        with bridge_process(link.client.folder, options.autopilot, options.pace) as vehicle:
            fly_through = flown_through(vehicle, options.pace)
            result["mavlink"] = flights(link, options.flights, photographs, "through mavlink: flights", fly_through)
            result["bridge"] = vehicle.counts._asdict() | {"setpoints": len(vehicle.driver.setpoints)}
            result["pace_s"], result["offboard_losses"] = options.pace, vehicle.autopilot.losses
    result["seconds"] = round(time.monotonic() - began_s)
    print(json.dumps(result))
    return 0


def folder_of(path: Path) -> list[np.ndarray]:
    images = [cv2.imread(str(file), cv2.IMREAD_COLOR) for file in sorted(path.iterdir())]
    photographs = [np.ascontiguousarray(image[..., ::-1]) for image in images if image is not None]
    if not photographs:
        sys.exit(f"{path}: expected a folder of photographs; OpenCV can read no file in it")
    return photographs


def show(result: dict) -> None:
    console, table = Console(), Table(title="The demo model, through the daemon", title_justify="left")
    columns = (
        "bundle",
        "MiB",
        "type right",
        "photographs",
        "m/s off",
        "text",
        "same type",
        "within 0.05",
        "flights",
        "RSS MiB",
    )
    for name in columns:
        table.add_column(name, justify="right" if name != "bundle" else "left")
    percent = lambda share: "" if share[0] is None else f"{share[0]:.1%} ({share[1]:.1%} to {share[2]:.1%})"  # noqa: E731
    for name, row in result["recipes"].items():
        table.add_row(
            name, str(row["bundle_mib"]), percent(row["all"]["type_right"]),
            percent(row["photographs"]["type_right"]), str(row["all"]["velocity_mae_m_s"]),
            percent(row["all"]["words_right"]), percent(row["against"]["same_type"]),
            percent(row["against"]["fields_within_0.05"]),
            percent(row["flights"]["success"]) if "flights" in row else "",
            f"{row['model_rss_mib'] or 0:.0f}",
        )  # fmt: skip
    console.print(table)
    for row in result["recipes"].values():
        for name, counted in row.get("bad_input", {}).items():
            console.print(f"{name}: {counted}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
