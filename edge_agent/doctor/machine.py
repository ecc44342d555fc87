"""The machine that is examined: its files, and what only a program on it can tell.

A check is a pure function of these. So another machine's files can be examined, a copy on a workstation or a table in a
test:

    saved/proc/meminfo, saved/sys/…, saved/etc/nv_tegra_release     copies of the files, below one folder
    saved/machine.json                                              the fields of Answers, as far as they are known
"""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol

import msgspec

from edge_agent.board.sensors import list_names
from edge_agent.config import Config
from edge_agent.errors import ConfigError

ANSWERS_FILE = "machine.json"
MAX_LINKS = 8
MAX_FILE_BYTES = 1 << 20


class CardAnswer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One NVIDIA card, by NVML."""

    name: str
    capability: int | None = None  # 87 is 8.7
    memory_total_mib: float | None = None
    memory_free_mib: float | None = None
    temperature_c: float | None = None
    throttle_at_c: float | None = None
    throttle_reasons: tuple[str, ...] | None = None
    power_w: float | None = None
    clock_mhz: float | None = None


class CudaAnswer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The CUDA code in a library: compute capabilities as numbers."""

    sass: tuple[int, ...] = ()
    ptx: tuple[int, ...] = ()
    runtime: int | None = None  # major version of CUDA


class LlamaAnswer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """llama.cpp, as it was loaded in a process of its own."""

    error: str = ""  # why it cannot be loaded
    version: str = ""  # of llama-cpp-python
    gpu_build: bool = False
    system_info: str = ""  # of llama_print_system_info
    cuda: CudaAnswer | None = None


class OnnxruntimeAnswer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """onnxruntime, as it ran a graph of one node in a process of its own."""

    error: str = ""  # why it cannot be loaded
    version: str = ""
    packages: tuple[str, ...] = ()  # installed ones that provide the module
    providers: dict[str, str] = {}  # execution provider -> "": it ran the graph; otherwise why it did not
    cuda: CudaAnswer | None = None  # of its CUDA provider


class DiskAnswer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file system behind a path, by statvfs."""

    total_mib: float
    free_mib: float
    free_files: int | None = None
    read_only: bool = False


class CameraAnswer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the probe of the camera said."""

    works: bool
    line: str
    formats: tuple[str, ...] = ()  # V4L2 pixel formats
    clock: str = ""  # driver, arrival or sender


class Answers(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What no file tells. None or empty: unknown, and what depends on it is not checked."""

    architecture: str = ""  # as uname -m says it
    python: tuple[int, int] | None = None
    pointer_bits: int | None = None  # of this Python
    n_cores: int | None = None  # that a process may use, by its affinity
    user: str = ""  # that runs the daemon, if no unit is installed
    may_open_cameras: bool | None = None  # this user; a desktop session may give it the right without a group
    largest_block_mib: float | None = None  # of memory, in one piece, that a process could allocate
    clock_synchronised: bool | None = None
    year: int | None = None  # by this machine's clock
    disks: dict[str, DiskAnswer] = {}  # path -> the file system behind it
    cards: tuple[CardAnswer, ...] | None = None  # empty: NVML finds none
    card_error: str = ""  # of NVIDIA's management library
    cuda_version: int | None = None  # newest major version of CUDA that the driver runs
    visible_devices: str | None = None  # $CUDA_VISIBLE_DEVICES
    llama: LlamaAnswer | None = None
    onnxruntime: OnnxruntimeAnswer | None = None
    camera: CameraAnswer | None = None
    bundle_error: str = ""
    has_vision_onnx: bool | None = None  # without it, the bundle is served by mtmd, or is text-only
    needed_mib: float | None = None  # memory that the bundle needs, by the memory plan
    reductions: tuple[str, ...] = ()  # what the memory plan reduces
    memory_error: str = ""  # why it does not fit
    tegrastats: str = ""  # one line of it
    own_pids: tuple[int, ...] = ()  # of this program
    listening: bool | None = None  # a daemon has the sockets of the runtime folder


class Files(Protocol):
    """Reads of one machine's files. Nothing here raises: what cannot be read is empty or None."""

    def read(self, path: str) -> str: ...

    def names(self, folder: str) -> list[str]: ...

    def mode(self, path: str) -> int | None:
        """st_mode, of what a link leads to; None: there is no such file."""

    def target(self, path: str) -> str | None:
        """Where a symbolic link leads; None: it is none."""


class LocalFiles:
    """Files below a folder: "/" is this machine."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root

    def read(self, path: str) -> str:
        """At most MAX_FILE_BYTES of a plain file: a pipe would block, and a device may have no end."""
        try:
            with os.fdopen(os.open(self._real(path), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    return ""
                return (file.read(MAX_FILE_BYTES) or b"").decode()  # None: EAGAIN, of a sensor that is switched off
        except (OSError, UnicodeDecodeError):
            return ""

    def names(self, folder: str) -> list[str]:
        return list_names(str(self._real(folder)))

    def mode(self, path: str) -> int | None:
        try:
            return self._real(path).stat().st_mode
        except OSError:
            return None

    def target(self, path: str) -> str | None:
        try:
            return os.readlink(self.root / path.lstrip("/"))
        except OSError:
            return None

    def _real(self, path: str) -> Path:
        """A saved machine's links lead to its own files, and never out of the folder."""
        if self.root == Path("/"):
            return Path(path)
        for _ in range(MAX_LINKS):
            link = self._first_link(path)
            if link is None:
                break
            path = link
        return self.root / path.lstrip("/")

    def _first_link(self, path: str) -> str | None:
        """The path with its first symbolic link replaced; None: it has none."""
        parts = [part for part in PurePosixPath(path).parts if part != "/"]
        for i in range(len(parts)):
            target = self.target("/".join(parts[: i + 1]))
            if target is not None:
                folder = "/" if target.startswith("/") else "/" + "/".join(parts[:i])
                return os.path.normpath("/".join([folder, target, *parts[i + 1 :]]))
        return None


class Machine(NamedTuple):
    """All that the checks know."""

    files: Files
    answers: Answers
    config: Config | None = None
    config_path: str = ""
    config_error: str = ""  # why there is none, although one was named

    def read(self, path: str) -> str:
        return self.files.read(path)

    def line(self, path: str) -> str:
        """A text of one line, as the kernel writes it: with a newline or a NUL at the end."""
        return self.files.read(path).strip("\0\n\r \t")

    def number(self, path: str) -> int | None:
        return to_number(self.line(path))

    def names(self, folder: str) -> list[str]:
        return self.files.names(folder)

    def exists(self, path: str) -> bool:
        return self.files.mode(path) is not None or self.files.target(path) is not None

    def is_open_to_all(self, path: str) -> bool:
        """Whether everybody may write to it."""
        mode = self.files.mode(path)
        return mode is not None and bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX


def to_number(text: str) -> int | None:
    """A whole number as the kernel writes it; None: it is none."""
    digits = text.removeprefix("-")
    return int(text) if digits.isascii() and digits.isdigit() and len(digits) < 19 else None


def to_numbers(text: str) -> list[int]:
    return [number for word in text.split() if (number := to_number(word)) is not None]


def saved_answers(folder: Path) -> Answers:
    """machine.json in the folder of a saved machine; without one, nothing is known. Raises ConfigError."""
    path = folder / ANSWERS_FILE
    if not folder.is_dir():
        raise ConfigError(f"{folder}: expected a folder with a copy of a machine's files, found none")
    try:
        return msgspec.json.decode(path.read_bytes(), type=Answers)
    except FileNotFoundError:
        return Answers()
    except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: {error}") from None
