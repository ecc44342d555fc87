"""NVML through ctypes, against a small library that we compile: one card, a card that tells little, no driver."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from edge_agent.board.nvml import Card, Nvml, throttle_reasons, visible_cards

LIBRARY = r"""
#include <stddef.h>
#include <string.h>
typedef struct { unsigned long long total, free, used; } Memory;
static int cards[] = {0, 1};
int nvmlInit_v2(void) { return INIT; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int status) { return status == 18 ? "Driver/library version mismatch" : NULL; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 13000; return 0; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **card) { *card = &cards[i]; return 0; }
int nvmlDeviceGetName(int *card, char *name, unsigned n) { strncpy(name, *card ? "Old" : "New", n); return 0; }
int nvmlDeviceGetUUID(int *card, char *name, unsigned n) { strncpy(name, *card ? "GPU-b" : "GPU-a", n); return 0; }
int nvmlDeviceGetPowerUsage(int *card, unsigned *mw) { *mw = 61500; return *card ? 3 : 0; }
int nvmlDeviceGetEnforcedPowerLimit(int *card, unsigned *mw) { *mw = 70000; return *card ? 3 : 0; }
int nvmlDeviceGetTemperature(int *card, int sensor, unsigned *c) { *c = 71; return *card ? 3 : sensor; }
int nvmlDeviceGetTemperatureThreshold(int *card, int kind, unsigned *c)
{ *c = kind == 3 ? 87 : 93; return *card ? 3 : 0; }
int nvmlDeviceGetClockInfo(int *card, int kind, unsigned *mhz) { *mhz = 1500 + kind; return *card ? 3 : 0; }
int nvmlDeviceGetCurrentClocksThrottleReasons(int *card, unsigned long long *bits)
{ *bits = 0x24; return *card ? 3 : 0; }
int nvmlDeviceGetMemoryInfo(int *card, Memory *m) { m->total = 8ull << 30; m->free = 5ull << 30; return *card ? 3 : 0; }
#ifdef CAPABILITY
int nvmlDeviceGetCudaComputeCapability(int *card, int *major, int *minor)
{ *major = 8; *minor = 6; return *card ? 3 : 0; }
#endif
"""
NEW = Card(0, "New", "GPU-a", 86, 61.5, 70.0, 71.0, 87.0, ("power limit", "temperature"), 1501.0, 8192.0, 5120.0)
OLD = Card(1, "Old", "GPU-b")


def compiled(folder: Path, *flags: str) -> str:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    (folder / "nvml.c").write_text(LIBRARY)
    command = ["cc", "-shared", "-fPIC", *flags, "-o", "libnvml.so", "nvml.c"]
    subprocess.run(command, cwd=folder, check=True)
    return str(folder / "libnvml.so")


def test_a_card_tells_what_it_knows_and_the_rest_is_unknown(tmp_path):
    nvml = Nvml(compiled(tmp_path, "-DINIT=0", "-DCAPABILITY"))
    assert nvml.cards("") == []
    assert nvml.cards("0,1") == [NEW, OLD]
    assert (nvml.cuda_version(), nvml.error) == (13, "")
    nvml.close()
    nvml.close()
    assert nvml.cards("0") == [] and nvml.cuda_version() is None


def test_a_library_without_a_function(tmp_path):
    nvml = Nvml(compiled(tmp_path, "-DINIT=0"))
    assert nvml.cards("0") == [NEW._replace(capability=None)]
    nvml.close()


def test_a_driver_that_does_not_answer_says_why(tmp_path):
    nvml = Nvml(compiled(tmp_path, "-DINIT=18"))
    assert (nvml.error, nvml.cards("0"), nvml.cuda_version()) == ("Driver/library version mismatch", [], None)


def test_a_driver_with_an_unknown_error(tmp_path):
    assert Nvml(compiled(tmp_path, "-DINIT=99")).error == "error 99"


@pytest.mark.parametrize("library", ["libnothing-of-this-name.so", "libc.so.6"])
def test_without_the_library_there_are_no_cards(library):
    nvml = Nvml(library)
    assert (nvml.cards("0"), nvml.error) == ([], "")
    nvml.close()


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, "ab"), ("", ""), ("0", "a"), ("1,0", "ba"), ("GPU-b", "b"), ("0,7,1", "a"), ("-1", ""), ("NoDevFiles", "")],
)
def test_the_cards_that_cuda_sees(visible, expected):
    cards = [Card(0, "a", "GPU-a"), Card(1, "b", "GPU-b")]
    assert "".join(card.name for card in visible_cards(cards, visible)) == expected


def test_reasons_of_throttling():
    assert throttle_reasons(0x1) == ()  # idle
    assert throttle_reasons(0x2 | 0x100) == ()  # a user's own choice
    assert throttle_reasons(0x8 | 0x40 | 0x80) == ("hardware slowdown", "temperature, by hardware", "power brake")
