"""Nanoseconds per unit: all stamps and intervals of the code are integers in nanoseconds."""

NS_PER_S = 1_000_000_000
NS_PER_MS = 1_000_000
