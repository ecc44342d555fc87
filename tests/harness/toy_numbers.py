"""bfloat16 and float8_e4m3fn as the checkpoints store them: bits to numbers, and back."""

import numpy as np

from tests.harness.toy_layout import F8_MAX


def bf16_bits(x):
    """float32 → the uint16 bits of bfloat16, round to nearest even. Finite values only."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)


def from_bf16_bits(bits):
    """The uint16 bits of bfloat16 → float32, exactly."""
    return (np.asarray(bits, dtype=np.uint16).astype(np.uint32) << 16).view(np.float32)


def e4m3_value(code):
    """float8_e4m3fn code (uint8) → float32. 0x7F and 0xFF are NaN; there is no infinity."""
    code = np.asarray(code, dtype=np.uint8).astype(np.int32)
    exponent, mantissa = (code >> 3) & 15, code & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * np.exp2(exponent - 10.0))
    magnitude = np.where(code & 0x7F == 0x7F, np.nan, magnitude)
    return np.where(code & 0x80, -magnitude, magnitude).astype(np.float32)


def e4m3_code(x):
    """float32 → float8_e4m3fn codes (uint8), round to nearest even, saturating at ±448. Finite values only."""
    magnitude = np.abs(np.asarray(x, dtype=np.float32))
    exponent = np.maximum(np.frexp(magnitude)[1] - 1, -6)  # below 2**-6 the steps stay as wide
    exponent = np.where(magnitude == 0, -6, exponent)
    eighths = np.rint(np.ldexp(magnitude, 3 - exponent)).astype(np.int32)  # of the power of two; ties to even
    code = np.minimum((exponent + 6) * 8 + eighths, 126)
    return code.astype(np.uint8) | np.where(np.signbit(x), 0x80, 0).astype(np.uint8)


def quantise_e4m3(weight):
    """(codes uint8, scale float32) with weight ≈ value(codes) · scale; one scale per tensor, itself exact in bf16."""
    scale = from_bf16_bits(bf16_bits(np.abs(weight).max() / F8_MAX))
    return e4m3_code(weight / scale), scale
