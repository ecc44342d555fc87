"""What NVIDIA's management library says of the cards in this machine: power, temperature, clocks, memory.

The library comes with the driver of desktop cards. It is loaded by name, and never needed: without it there are no
cards. A value that a card does not tell is None. Calls go into the driver: a broken card can make one hang.
"""

from __future__ import annotations

import ctypes
import os
from typing import NamedTuple

LIBRARY = "libnvidia-ml.so.1"
MIB = 1 << 20
SENSOR_GPU, THRESHOLD_SLOWDOWN, THRESHOLD_GPU_MAX, CLOCK_SM = 0, 1, 3, 1
NAME_BYTES = 96
# Bits of nvmlDeviceGetCurrentClocksThrottleReasons. Not in the table: idle, a clock that a user chose, and display.
REASONS = {
    0x4: "power limit",
    0x8: "hardware slowdown",
    0x10: "other card of a group",
    0x20: "temperature",
    0x40: "temperature, by hardware",
    0x80: "power brake",
}


class Card(NamedTuple):
    """One card now. None: it does not tell."""

    number: int  # by NVML's order
    name: str
    uuid: str = ""
    capability: int | None = None  # 87 is 8.7
    power_w: float | None = None
    power_limit_w: float | None = None
    temperature_c: float | None = None
    throttle_at_c: float | None = None
    throttle_reasons: tuple[str, ...] | None = None
    clock_mhz: float | None = None
    memory_total_mib: float | None = None
    memory_free_mib: float | None = None


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class Nvml:
    """Owns the open library; close() ends it. `error` says why there are no cards, "" if there is no library."""

    def __init__(self, library: str = LIBRARY) -> None:
        self.error = ""
        self._library: ctypes.CDLL | None = None
        try:
            opened = ctypes.CDLL(library)
            status = opened.nvmlInit_v2()
            opened.nvmlErrorString.restype = ctypes.c_char_p
        except (OSError, AttributeError):  # no driver; or a library of another kind
            return
        if status:
            self.error = (opened.nvmlErrorString(status) or b"").decode(errors="replace") or f"error {status}"
        else:
            self._library = opened

    def close(self) -> None:
        if self._library is not None:
            self._library.nvmlShutdown()
            self._library = None

    def cuda_version(self) -> int | None:
        """The newest major version of CUDA that the driver runs."""
        version = self._number("nvmlSystemGetCudaDriverVersion_v2", ctypes.c_int, None)
        return None if version is None else int(version) // 1000

    def cards(self, visible: str | None = None) -> list[Card]:
        """The cards that a CUDA program of this user sees. visible: $CUDA_VISIBLE_DEVICES; None: of this process."""
        if self._library is None:
            return []
        n_cards = int(self._number("nvmlDeviceGetCount_v2", ctypes.c_uint, None) or 0)
        cards = [card for i in range(n_cards) if (card := self._card(i)) is not None]
        return visible_cards(cards, os.environ.get("CUDA_VISIBLE_DEVICES") if visible is None else visible)

    def _card(self, index: int) -> Card | None:
        handle = ctypes.c_void_p()
        if self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle)):
            return None
        milliwatts, limit_mw = (
            self._number(name, ctypes.c_uint, handle)
            for name in ("nvmlDeviceGetPowerUsage", "nvmlDeviceGetEnforcedPowerLimit")
        )
        reasons = self._number("nvmlDeviceGetCurrentClocksThrottleReasons", ctypes.c_ulonglong, handle)
        memory = _Memory()
        memory_known = not self._call("nvmlDeviceGetMemoryInfo", handle, ctypes.byref(memory))
        return Card(
            number=index,
            name=self._text("nvmlDeviceGetName", handle),
            uuid=self._text("nvmlDeviceGetUUID", handle),
            capability=self._capability(handle),
            power_w=None if milliwatts is None else milliwatts / 1000,
            power_limit_w=None if not limit_mw else limit_mw / 1000,
            temperature_c=self._number("nvmlDeviceGetTemperature", ctypes.c_uint, handle, SENSOR_GPU),
            throttle_at_c=self._threshold(handle),
            throttle_reasons=None if reasons is None else throttle_reasons(int(reasons)),
            clock_mhz=self._number("nvmlDeviceGetClockInfo", ctypes.c_uint, handle, CLOCK_SM),
            memory_total_mib=memory.total / MIB if memory_known else None,
            memory_free_mib=memory.free / MIB if memory_known else None,
        )

    def _threshold(self, handle: ctypes.c_void_p) -> float | None:
        """Where the clocks go down: the highest temperature of normal work, if the card has one, else the slowdown."""
        found = [
            self._number("nvmlDeviceGetTemperatureThreshold", ctypes.c_uint, handle, kind)
            for kind in (THRESHOLD_GPU_MAX, THRESHOLD_SLOWDOWN)
        ]
        return min((value for value in found if value), default=None)

    def _capability(self, handle: ctypes.c_void_p) -> int | None:
        major, minor = ctypes.c_int(), ctypes.c_int()
        if self._call("nvmlDeviceGetCudaComputeCapability", handle, ctypes.byref(major), ctypes.byref(minor)):
            return None
        return 10 * major.value + minor.value

    def _text(self, name: str, handle: ctypes.c_void_p) -> str:
        buffer = ctypes.create_string_buffer(NAME_BYTES)
        failed = self._call(name, handle, buffer, ctypes.c_uint(NAME_BYTES))
        return "" if failed else buffer.value.decode(errors="replace")

    def _number(
        self, name: str, kind: type[ctypes.c_uint | ctypes.c_int | ctypes.c_ulonglong],
        handle: ctypes.c_void_p | None, *more: int,
    ) -> float | None:  # fmt: skip
        value = kind()
        first = () if handle is None else (handle,)
        failed = self._call(name, *first, *map(ctypes.c_int, more), ctypes.byref(value))
        return None if failed else float(value.value)

    def _call(self, name: str, *arguments: object) -> int:
        """The status of one call; 0: it succeeded. An older library lacks some functions."""
        try:
            function = getattr(self._library, name)
        except AttributeError:
            return -1
        status: int = function(*arguments)
        return status


def throttle_reasons(bits: int) -> tuple[str, ...]:
    return tuple(word for bit, word in REASONS.items() if bits & bit)


def visible_cards(cards: list[Card], visible: str | None) -> list[Card]:
    """visible: as in $CUDA_VISIBLE_DEVICES: indices or the beginnings of UUIDs; None: all. Everything behind a name
    that is not there counts as hidden, as CUDA does it."""
    if visible is None:
        return cards
    found: list[Card] = []
    for word in (part.strip() for part in visible.split(",")):
        card = next((card for card in cards if word and (word == str(card.number) or card.uuid.startswith(word))), None)
        if card is None:
            break
        found.append(card)
    return found
