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


def llguidance_reads_exactly(step: float) -> bool:
    """Whether llguidance reads a JSON schema's multipleOf as this decimal fraction: it multiplies the float by 10 until
    the result is a whole number."""
    value, n_times = step, 0
    while not value.is_integer() and n_times <= MAX_DECIMALS:
        value, n_times = value * 10, n_times + 1
    return decimal(step) == Decimal(value).scaleb(-n_times)


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
