"""Coverage is measured in the tests of the covered rooms alone: under it Python needs twice the time."""

from __future__ import annotations

import coverage


def test_this_test_is_not_measured():
    assert coverage.Coverage.current() is None
