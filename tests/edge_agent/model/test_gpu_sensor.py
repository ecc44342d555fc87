"""The cards' own values, once a second, from the model process."""

from __future__ import annotations

import threading

import pytest

from edge_agent.board.nvml import Card
from edge_agent.ipc.events import GpuReading
from edge_agent.model.events import Events
from edge_agent.model.gpu_sensor import reading_of, start_gpu_sensor
from tests.harness.fake_nvml import FakeNvml

SMALL = Card(0, "small", power_w=20.0, temperature_c=80.0, throttle_at_c=90.0, throttle_reasons=(), clock_mhz=1500.0)
LARGE = Card(1, "large", power_w=90.0, temperature_c=85.0, throttle_at_c=105.0, throttle_reasons=("temperature",))


@pytest.mark.parametrize(
    ("cards", "expected"),
    [
        ([], GpuReading()),
        ([Card(0, "tells nothing")], GpuReading()),
        (
            [SMALL],
            GpuReading(power_w=20.0, temperature_c=80.0, throttle_at_c=90.0, throttle_reasons=(), clock_mhz=1500.0),
        ),
        ([Card(0, "no limit", temperature_c=60.0), Card(1, "none")], GpuReading(temperature_c=60.0)),
        (
            [LARGE, SMALL, Card(2, "off")],
            GpuReading(
                power_w=110.0,
                temperature_c=80.0,
                throttle_at_c=90.0,
                throttle_reasons=("temperature",),
                clock_mhz=1500.0,
            ),
        ),
    ],
)
def test_a_reading_of_several_cards(cards, expected):
    assert reading_of(cards) == expected


def test_without_a_card_there_is_no_thread():
    nvml = FakeNvml()
    assert start_gpu_sensor(Events(lambda event: None), nvml, threading.Event()) is None
    assert nvml.closed


def test_readings_are_sent_until_it_is_stopped_or_the_supervisor_is_gone():
    sent: list[GpuReading] = []
    stop = threading.Event()

    def send(reading: GpuReading) -> None:
        sent.append(reading)
        stop.set()

    thread = start_gpu_sensor(Events(send), FakeNvml(SMALL), stop)
    thread.join()
    assert sent == [reading_of([SMALL])]

    def refuse(_reading: GpuReading) -> None:
        raise BrokenPipeError

    thread = start_gpu_sensor(Events(refuse), FakeNvml(SMALL), threading.Event())
    thread.join()
