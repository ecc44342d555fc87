"""Steps of number fields as decimal fractions. Decided on the decimal text: in binary, 0.07 times 100 is not 7.

>>> is_decimal_fraction(0.07), is_decimal_fraction(1 / 3)
(True, False)
>>> multiples(-0.1, 0.1, 0.07)
[-0.07, 0.0, 0.07]
"""

from __future__ import annotations

import math
from decimal import Decimal

MAX_DECIMALS = 6
MAX_INTEGER = 2**32 - 1  # of a step without its point, in llguidance


def decimal(number: float) -> Decimal:
    """The number as it was written: the shortest decimal text that reads as this float. number: finite."""
    return Decimal(repr(number))


def is_decimal_fraction(step: float) -> bool:
    """Whether a step has at most MAX_DECIMALS digits behind the point, and not too many in all. step: above 0."""
    scaled = decimal(step).scaleb(MAX_DECIMALS)
    if scaled != scaled.to_integral_value():
        return False
    return int(decimal(step).normalize().scaleb(n_decimals(step))) <= MAX_INTEGER


def n_decimals(step: float) -> int:
    """Digits behind the point."""
    exponent = decimal(step).normalize().as_tuple().exponent
    return max(0, -int(exponent))


def has_exact_grammar(low: float, high: float, step: float) -> bool:
    """Whether llguidance, from minimum, maximum and multipleOf, allows every multiple of the step and no other number.

    It does for whole numbers, and for steps of 0.1, 0.01, … with limits that are multiples of the step. Other steps it
    reads in binary and refuses (0.07), or it leaves out values that have fewer digits (-0.5 with a step of 0.25).
    """
    numbers = [decimal(number) for number in (low, high, step)]
    if all(number == number.to_integral_value() for number in numbers):
        return True
    digits = decimal(step).normalize().as_tuple().digits
    return digits == (1,) and all(number % decimal(step) == 0 for number in numbers)


def n_multiples(low: float, high: float, step: float) -> int:
    """How many multiples of the step lie from low to high."""
    first, last = _range(low, high, step)
    return max(0, last - first + 1)


def multiples(low: float, high: float, step: float) -> list[float]:
    """The multiples of the step from low to high."""
    first, last = _range(low, high, step)
    return [float(n * decimal(step)) for n in range(first, last + 1)]


def _range(low: float, high: float, step: float) -> tuple[int, int]:
    return math.ceil(decimal(low) / decimal(step)), math.floor(decimal(high) / decimal(step))
