"""Decimal fractions, decided on the decimal text. Compared with integers, which have no rounding."""

from __future__ import annotations

from decimal import Decimal

import pytest

from edge_agent.actions.decimals import has_exact_grammar, is_decimal_fraction, multiples, n_multiples


def test_every_fraction_of_up_to_six_digits_is_one():
    for n_digits in range(7):
        for n in (*range(1, 1200), 4321, 99_999, 123_457, 999_999):
            assert is_decimal_fraction(float(Decimal(n).scaleb(-n_digits))), (n, n_digits)


@pytest.mark.parametrize("step", [1 / 3, 0.1 + 0.2, 2 / 7, 1e-7, 0.0000015, 5e-324, 1e300, 4294967.296, 2**32])
def test_what_is_not_one(step):
    """The last ones have too many digits in all: llguidance computes with 32 bits."""
    assert not is_decimal_fraction(step)


@pytest.mark.parametrize("scale", [0, 1, 2, 3, 4])
def test_multiples_are_those_of_whole_numbers(scale):
    for low, high, step in ((-210, 210, 7), (-35, 36, 5), (3, 20, 53), (0, 0, 7), (-1, 1000, 999)):
        low_f, high_f, step_f = (float(Decimal(n).scaleb(-scale)) for n in (low, high, step))
        expected = [float(Decimal(n).scaleb(-scale)) for n in range(low, high + 1) if n % step == 0]
        assert multiples(low_f, high_f, step_f) == expected
        assert n_multiples(low_f, high_f, step_f) == len(expected)


@pytest.mark.parametrize(
    ("low", "high", "step", "exact"),
    [
        (-2, 2, 0.01, True),
        (-20, 20, 1, True),
        (0, 100, 7, True),
        (-0.8, 0.8, 0.1, True),
        (-2.1, 2.1, 0.07, False),
        (-2, 2, 0.25, False),
        (-2, 2, 0.5, False),
        (-1.25, 1.25, 0.1, False),
        (0.5, 9.5, 1, False),
    ],
)
def test_which_ranges_the_grammar_has_to_list(low, high, step, exact):
    assert has_exact_grammar(low, high, step) == exact
