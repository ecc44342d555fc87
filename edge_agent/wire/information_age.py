"""How old the newest action is on average: the figure by which two configurations are compared.

>>> mean_information_age_ms([PublishedAction(0, 40_000_000), PublishedAction(60_000_000, 140_000_000)])
90.0
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

from edge_agent.time_units import NS_PER_MS


class PublishedAction(NamedTuple):
    """A valid action. CLOCK_MONOTONIC in nanoseconds."""

    t_capture_ns: int
    t_pub_ns: int


def mean_information_age_ms(actions: Iterable[PublishedAction]) -> float | None:
    """Mean age of information: how old the picture behind the newest action is, on average over time.

    An action has an age when it is published, and grows older until the next one: on average by half the time between
    the two. Each counts for that time. A refusal is no action, so it makes that time longer. Source: Kaul, Yates,
    Gruteser, "Real-time status: How often should one update?", INFOCOM 2012. None: fewer than two actions.
    """
    area_ns2 = span_ns = 0
    for this, following in itertools.pairwise(actions):
        interval_ns = following.t_pub_ns - this.t_pub_ns
        area_ns2 += interval_ns * (this.t_pub_ns - this.t_capture_ns) + interval_ns * interval_ns // 2
        span_ns += interval_ns
    return area_ns2 / span_ns / NS_PER_MS if span_ns else None
