"""Once a second: what the cards say goes to the supervisor. In a thread, because NVML calls can take milliseconds.

A Jetson's GPU has no NVML of this kind: the supervisor reads its sensors from sysfs.
"""

from __future__ import annotations

import threading

from edge_agent.board.nvml import Card, Nvml
from edge_agent.ipc.events import GpuReading
from edge_agent.model.events import Events

INTERVAL_S = 1.0


def start_gpu_sensor(events: Events, nvml: Nvml, pause: threading.Event) -> threading.Thread | None:
    """A thread that ends with the process, or when `pause` is set. None: there is no card, and NVML is closed."""
    if not nvml.cards():
        nvml.close()
        return None
    thread = threading.Thread(target=_send_readings, args=(events, nvml, pause), name="gpu-sensor", daemon=True)
    thread.start()
    return thread


def _send_readings(events: Events, nvml: Nvml, pause: threading.Event) -> None:
    try:
        while True:
            events.send(reading_of(nvml.cards()))
            if pause.wait(INTERVAL_S):
                return
    except OSError:  # the supervisor is gone: this process ends
        return


def reading_of(cards: list[Card]) -> GpuReading:
    """Of several cards: power is added up, of the others the worst value counts."""
    powers = [card.power_w for card in cards if card.power_w is not None]
    clocks = [card.clock_mhz for card in cards if card.clock_mhz is not None]
    reasons = [card.throttle_reasons for card in cards if card.throttle_reasons is not None]
    hottest = min(cards, key=_headroom_c, default=None)
    return GpuReading(
        power_w=sum(powers) if powers else None,
        temperature_c=hottest.temperature_c if hottest is not None else None,
        throttle_at_c=hottest.throttle_at_c if hottest is not None else None,
        throttle_reasons=tuple(dict.fromkeys(reason for found in reasons for reason in found)) if reasons else None,
        clock_mhz=min(clocks, default=None),
    )


def _headroom_c(card: Card) -> tuple[bool, float]:
    """For an order: the card that is nearest to its limit first; without a limit, the hottest."""
    if card.temperature_c is None:
        return True, 0.0
    return card.throttle_at_c is None, (card.throttle_at_c or 0.0) - card.temperature_c
