"""The offline benchmark: how fast a bundle answers on this machine. `edge-agent bench` runs the same.

    .venv/bin/python benchmarks/bench.py --bundle BUNDLE [--frames DIR|VIDEO] [-n 60]
    … --compare                                       beside llama-cpp-python's own vision chat, in turn, frame by frame
    … --compare --llama-server PATH --llama-mtmd-cli PATH --llama-bench PATH      and beside llama.cpp's programs
    … --compare --with ours,plain,action_tokens,server        plain: ours without drafts; action_tokens: the other codec

It prints a table and, as the last line, JSON. With --compare every contender is a process of its own, with the same
GGUF files, the same frames and prompt, a grammar of the same compact answers, and greedy decoding. Only one contender
works at a time. (The grammars that they make of a JSON schema allow endless white space and digits, which random
weights use.) With --still every frame is the first frame with another grey in one corner: answers repeat, and no server
can recognise the image as the previous image. Figures are medians; `times_ours` is a contender's time divided by ours.
The only network is the server's, on 127.0.0.1.
"""

from __future__ import annotations

import argparse
import base64
import functools
import http.client
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import msgspec
import numpy as np

from edge_agent.actions.prompt import describe_action_space
from edge_agent.actions.space import ActionSpace, ChoiceField, load_action_space
from edge_agent.board import health
from edge_agent.bundle.manifest import LANGUAGE, MMPROJ, read_manifest
from edge_agent.cli.daemon import bench_arguments, bench_config
from edge_agent.cli.daemon import run_bench as run_alone
from edge_agent.config import Config
from edge_agent.model.preprocess import Preprocessor
from edge_agent.model.prompt import ACTION_QUESTION, SYSTEM_PROMPT
from edge_agent.tools import bench
from edge_agent.tools.stills import Stills

# The releases' own chat template for one system text and one image with a text. IMAGE: the host program's expression
# for the image.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]"
    "{% else %}[INST]{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image_url' %}{{ IMAGE }}{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}[/INST]"
    "{% endif %}{% endfor %}"
)
CHAT_IMAGE = "part.image_url.url if part.image_url is mapping else part.image_url"


class Ours:
    """The model as the daemon runs it."""

    def __init__(self, config: Config, name: str) -> None:
        if name == "plain":
            advanced = msgspec.structs.replace(config.advanced, speculative=False)
            config = msgspec.structs.replace(config, advanced=advanced)
        if name == "action_tokens":
            space = msgspec.structs.replace(load_action_space(config.task.action_space), codec="action_tokens")
            self.folder = tempfile.TemporaryDirectory()
            path = Path(self.folder.name) / "space.yaml"
            path.write_bytes(msgspec.yaml.encode(space))
            config = msgspec.structs.replace(config, task=msgspec.structs.replace(config.task, action_space=str(path)))
        self.bench = bench.Bench(config, config.task.instruction)

    def answer(self, frame: np.ndarray) -> dict:
        timing = self.bench.time_frame(frame)
        return {"ms": timing.ms, "encode": timing.encode, "prefill": timing.prefill, "decode": timing.decode,
                "calls": timing.calls, "text": timing.text}  # fmt: skip


def gbnf(space: ActionSpace) -> str:
    """The answers of an action space as a GBNF grammar of llama.cpp: compact JSON, with the digits of each step."""
    action_types = []
    for name, action_type in space.actions.items():
        parts = [json.dumps(f'{{"action":"{name}"')]
        for key, field in action_type.fields.items():
            parts.append(json.dumps(f',"{key}":'))
            if isinstance(field, ChoiceField):
                parts.append("(" + " | ".join(json.dumps(f'"{word}"') for word in field.one_of) + ")")
                continue
            whole = len(str(int(max(abs(field.min), abs(field.max)))))
            decimals = len(f"{field.step:g}".partition(".")[2])
            parts.append(f'"-"? ("0" | [1-9] [0-9]{{0,{whole - 1}}})')
            if decimals:
                parts.append(f'("." [0-9]{{1,{decimals}}})?')
        action_types.append(" ".join([*parts, '"}"']))
    return f"root ::= {' | '.join(action_types)}"


def messages(config: Config, frame: np.ndarray) -> tuple[list[dict], str]:
    """(chat messages, grammar) with the same prompt and the same image, as PNG, for programs with a chat
    interface."""
    space = load_action_space(config.task.action_space)
    role = SYSTEM_PROMPT.format(space=describe_action_space(space), instruction=config.task.instruction)
    image = Preprocessor(read_manifest(config.bundle).manifest.vision, config.vision.max_image_tokens).image(frame)
    png = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 0])[1]
    url = "data:image/png;base64," + base64.b64encode(png.tobytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": ACTION_QUESTION}]
    return [{"role": "system", "content": role}, {"role": "user", "content": content}], gbnf(space)


class Chat:
    """llama-cpp-python's high-level vision chat."""

    def __init__(self, config: Config) -> None:
        import llama_cpp
        from llama_cpp.llama_chat_format import MTMDChatHandler

        class Handler(MTMDChatHandler):
            def _get_chat_template(self, llama: llama_cpp.Llama) -> str:
                return TEMPLATE.replace("IMAGE", CHAT_IMAGE)

        self.config, folder = config, Path(config.bundle)
        self.grammar = functools.partial(llama_cpp.LlamaGrammar.from_string, verbose=False)
        self.llama = llama_cpp.Llama(
            str(folder / LANGUAGE), chat_handler=Handler(str(folder / MMPROJ), verbose=False),
            n_ctx=2 * config.language.context, n_gpu_layers=config.language.gpu_layers, verbose=False,
        )  # fmt: skip

    def answer(self, frame: np.ndarray) -> dict:
        chat, grammar = messages(self.config, frame)
        grammar = self.grammar(grammar)
        start = time.monotonic()
        completion = self.llama.create_chat_completion(
            chat, grammar=grammar, temperature=0.0, max_tokens=160, repeat_penalty=1.0
        )
        ms = (time.monotonic() - start) * 1000
        return {
            "ms": ms,
            "text": completion["choices"][0]["message"]["content"],
            "tokens": completion["usage"]["completion_tokens"],
        }


class Server:
    """llama-server with its prompt cache and its grammar."""

    def __init__(self, config: Config, program: str) -> None:
        self.config, folder = config, Path(config.bundle)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [program, "-m", folder / LANGUAGE, "--mmproj", folder / MMPROJ, "--port", self.port,
                   "-c", 2 * config.language.context, "-np", 1, "-ngl", max(config.language.gpu_layers, 0) or 99,
                   "--chat-template", TEMPLATE.replace("IMAGE", "part.text"), "--no-webui"]  # fmt: skip
        self.process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 300
        while time.monotonic() < until:
            if self.process.poll() is not None:
                sys.exit(f"{program}: ended with status {self.process.returncode}")
            try:
                if self._get("GET", "/health", None).get("status") == "ok":
                    return
            except OSError:
                pass
            time.sleep(0.2)
        sys.exit(f"{program}: not ready in 300 s")

    def _get(self, method: str, path: str, body: dict | None) -> dict:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        connection.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
        return json.loads(connection.getresponse().read())

    def answer(self, frame: np.ndarray) -> dict:
        chat, grammar = messages(self.config, frame)
        body = {"messages": chat, "temperature": 0, "max_tokens": 160, "cache_prompt": True, "grammar": grammar}
        start = time.monotonic()
        completion = self._get("POST", "/v1/chat/completions", body)
        ms = (time.monotonic() - start) * 1000
        if "choices" not in completion:
            sys.exit(f"llama-server: {completion}")
        timings = completion.get("timings", {})
        return {"ms": ms, "text": completion["choices"][0]["message"]["content"], "decode": timings.get("predicted_ms"),
                "tokens": timings.get("predicted_n"), "pid": self.process.pid}  # fmt: skip


def still(frame: np.ndarray, i: int) -> np.ndarray:
    """The frame with another grey in one corner: the same scene, but not the same image for a server's cache."""
    frame = frame.copy()
    frame[: frame.shape[0] // 16, : frame.shape[1] // 16] = 100 + i % 100
    return frame


class Cli:
    """llama-mtmd-cli: one process per frame, which keeps nothing; loading is not counted."""

    LOADED = b"main: loading model"  # the line that it prints when the model is loaded

    def __init__(self, config: Config, program: str) -> None:
        self.config, folder = config, Path(config.bundle)
        self.folder = tempfile.TemporaryDirectory()
        self.picture = Path(self.folder.name) / "frame.png"
        template, gpu_layers = TEMPLATE.replace("IMAGE", "part.text"), max(config.language.gpu_layers, 0) or 99
        self.command = [program, "-m", folder / LANGUAGE, "--mmproj", folder / MMPROJ, "--temp", 0,
                        "-n", 160, "-c", 2 * config.language.context, "--jinja", "--chat-template", template,
                        "--image", self.picture, "-p", f"<__media__>{ACTION_QUESTION}", "-ngl", gpu_layers]  # fmt: skip

    def answer(self, frame: np.ndarray) -> dict:
        chat, grammar = messages(self.config, frame)
        self.picture.write_bytes(base64.b64decode(chat[1]["content"][0]["image_url"]["url"].partition(",")[2]))
        command = [*map(str, self.command), "-sys", chat[0]["content"], "--grammar", grammar]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            start, last_line = None, b""
            assert process.stdout is not None
            for line in process.stdout:
                last_line = last_line if line.isspace() else line
                start = time.monotonic() if self.LOADED in line else start
            ms = (time.monotonic() - (start or 0.0)) * 1000
        if process.returncode or start is None:
            sys.exit(f"{command[0]}: ended with status {process.returncode}: {last_line.decode(errors='replace')}")
        peak_mib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        return {"ms": ms, "text": last_line.decode(errors="replace").strip(), "peak_rss_mib": peak_mib}


def serve(name: str, config: Config, program: str, frames: list[np.ndarray]) -> None:
    """One contender: reads the number of a frame per line on stdin, prints its figures as a JSON line on stdout."""
    makers = {
        "chat": lambda: Chat(config),
        "server": lambda: Server(config, program),
        "cli": lambda: Cli(config, program),
    }
    contender = makers.get(name, lambda: Ours(config, name))()
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # output of native code must not mix with the JSON lines
    for line in sys.stdin:
        figures = contender.answer(frames[int(line)])
        pids = [os.getpid() if name != "server" else contender.process.pid]
        figures.setdefault("peak_rss_mib", sum(health.peak_rss_mib(pid) or 0.0 for pid in pids))
        print(json.dumps(figures), file=out)
    if name == "server":
        contender.process.send_signal(signal.SIGTERM)
        contender.process.wait()


def compare(options: argparse.Namespace) -> dict:
    """Every contender's figures, by its name."""
    programs = {"server": options.llama_server, "cli": options.llama_mtmd_cli}
    names = ["ours", "chat", *(name for name, path in programs.items() if path)]
    names = options.with_.split(",") if options.with_ else names
    timings = time_contenders(names, options.n)
    figures: dict = {"benchmark": "compare", "bundle": Path(options.bundle or "").name, "frames": options.n}
    figures |= {name: contender_figures(timings[name], timings["ours"]) for name in names}
    if options.llama_bench:
        figures["llama_bench_tg_tok_per_s"] = llama_bench(options)
    return figures


def time_contenders(names: list[str], n: int) -> dict[str, list[dict]]:
    """Each frame goes to every contender in turn -> figures of n frames, by name."""
    command = [sys.executable, __file__, *(word for word in sys.argv[1:] if word != "--compare")]
    children = {
        name: subprocess.Popen([*command, "--serve", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in names
    }
    timings: dict[str, list[dict]] = {name: [] for name in names}
    for i in range(-1, n):  # the first round is not counted: it allocates memory and fills caches
        for name, child in children.items():
            assert child.stdin is not None and child.stdout is not None
            child.stdin.write(f"{i % n}\n")  # the last frame first: no frame comes twice in a row
            child.stdin.flush()
            line = child.stdout.readline()
            if not line:
                sys.exit(f"{name}: ended with status {child.wait()}")
            if i >= 0:
                timings[name].append(json.loads(line))
        print(f"frame {i + 1} of {n}", file=sys.stderr)
    for child in children.values():
        child.communicate()
    return timings


def contender_figures(timings: list[dict], ours: list[dict]) -> dict:
    """Medians, and the comparison with our answers to the same frames."""
    figures: dict = {
        key: round(float(np.median([timing[key] for timing in timings])), 2)
        for key in ("ms", "encode", "prefill", "decode", "calls", "tokens", "peak_rss_mib")
        if all(timing.get(key) is not None for timing in timings)
    }
    figures["example"] = timings[-1]["text"]
    if all(timing.get("decode") and timing.get("tokens") for timing in timings):
        per_token = [timing["decode"] / timing["tokens"] for timing in timings]
        figures["decode_ms_per_token"] = round(float(np.median(per_token)), 2)
    pairs = list(zip(timings, ours, strict=True))
    figures["times_ours"] = round(float(np.median([theirs["ms"] / own["ms"] for theirs, own in pairs])), 2)
    figures["same_text"] = round(float(np.mean([theirs["text"] == own["text"] for theirs, own in pairs])), 3)
    return figures


def llama_bench(options: argparse.Namespace) -> float:
    path = Path(bench_config(options).bundle) / LANGUAGE
    done = subprocess.run(
        [options.llama_bench, "-m", path, "-p", "0", "-n", "48", "-o", "json"], capture_output=True, check=True
    )
    return round(json.loads(done.stdout)[0]["avg_ts"], 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bench_arguments(parser)
    add = parser.add_argument
    add("--compare", action="store_true", help="compare with llama-cpp-python's own vision chat")
    add("--llama-server", metavar="PATH", help="with --compare: this program too")
    add("--llama-mtmd-cli", metavar="PATH", help="with --compare: this program too, one process per frame")
    add("--llama-bench", metavar="PATH", help="with --compare: the decoding speed that this program measures")
    add("--with", dest="with_", metavar="NAMES", help="with --compare: the contenders, ours first")
    add("--still", action="store_true", help="with --compare: nearly the same frame every time")
    add("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        frames = list(Stills(options.frames, options.n)) if options.frames else bench.synthetic_frames(16)
        frames = [still(frames[0], i) if options.still else frames[i % len(frames)] for i in range(options.n)]
        program = options.llama_mtmd_cli if options.serve == "cli" else options.llama_server
        serve(options.serve, bench_config(options), program or "", frames)
        return 0
    if not options.compare:
        return run_alone(options)
    figures = compare(options)
    for name, value in figures.items():
        print(f"{name:8} {json.dumps(value)}", file=sys.stderr)
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
