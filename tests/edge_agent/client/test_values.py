"""Values and texts as flight programs hold them: what cannot be sent is named, at once, and the others are sent."""

from __future__ import annotations

import decimal
import enum
import fractions
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_agent.client import Client, RequestRefused
from edge_agent.client.values import plain_value
from tests.harness.fake_daemon import FakeDaemon, make_reply


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path) as opened:
        yield opened


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with Client(str(tmp_path)) as connected:
        yield connected


class Mode(enum.Enum):
    GUIDED = "GUIDED"


class Number(enum.IntEnum):
    THREE = 3


@pytest.mark.parametrize(
    ("value", "sent"),
    [
        (None, None),
        (True, True),
        ("x", "x"),
        (3, 3),
        (2**70, float(2**70)),
        (np.float32(0.5), 0.5),
        (np.int16(-3), -3),
        (np.bool_(True), True),
        (np.array([[2.0]]), 2.0),
        (decimal.Decimal("1.25"), 1.25),
        (fractions.Fraction(1, 4), 0.25),
        (Mode.GUIDED, "GUIDED"),
        (Number.THREE, 3),
        (type("Metres", (int,), {})(3), 3),
        (type("ModeName", (str,), {})("GUIDED"), "GUIDED"),
        (type("Metres", (float,), {})(0.5), 0.5),
        (np.ma.masked, None),
    ],
)
def test_a_value_of_any_numeric_type_is_sent(value, sent):
    plain = plain_value(value)
    assert plain == sent and type(plain) is type(sent)


class OddItem:
    item = 3


class Tensor:
    def item(self) -> float:
        raise RuntimeError("a Tensor with 2 elements cannot be converted to Scalar")


@pytest.mark.parametrize(
    "value",
    [[1], {"a": 1}, object(), b"x", 10**400, np.zeros(2), np.array([]), 1j, OddItem(), Tensor(), "\ud800", "a\udcff"],
)
def test_what_is_no_value_is_named_and_the_others_are_sent(daemon, client, value):
    with daemon.answering(lambda request: [make_reply(request, refused={"mode": "why"})]) as requests:
        refused = client.vehicle_state(altitude_m=3.5, heading=value, mode="?")
    assert set(refused) == {"heading", "mode"} and refused["mode"] == "why"
    assert requests[0].values == {"altitude_m": 3.5, "mode": "?"}


def test_a_call_of_which_nothing_can_be_sent_names_each_value(client):
    """No daemon is asked."""
    assert list(client.vehicle_state(heading=[1], mode="\ud800")) == ["heading", "mode"]


@pytest.mark.parametrize("call", [Client.instruct, Client.ask, Client.adapter])
def test_a_text_that_is_no_unicode_is_refused_by_name(client, call):
    """As a command line in another encoding gives it."""
    with pytest.raises(RequestRefused, match="text: surrogates not allowed"):
        call(client, "Land \udcff")


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.ask("x" * 70_000),
        lambda client: client.instruct("\U0001f681" * 16_400),
        lambda client: client.vehicle_state(**{f"key_{n}": n for n in range(10_000)}),
    ],
)
def test_a_request_longer_than_a_message_is_refused_at_once(client, call):
    """The daemon would end the connection without a reply."""
    with pytest.raises(RequestRefused, match="expected a request of at most 65536 bytes; found"):
        call(client)


def test_not_a_number_is_sent_as_it_is_and_the_daemon_takes_it_for_unknown(daemon, client):
    with daemon.answering(lambda request: [make_reply(request)]) as requests:
        assert client.vehicle_state(battery_percent=float("nan"), altitude_m=np.float64("inf")) == {}
    assert math.isnan(requests[0].values["battery_percent"]) and math.isinf(requests[0].values["altitude_m"])
