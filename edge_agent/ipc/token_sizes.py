"""The numbers of image tokens that a frame may have. The model process chooses among them, the governor limits them."""

from __future__ import annotations

STEPS = (1.0, 0.75, 0.5, 0.375, 0.25)  # of the configured tokens; every size costs buffers of its own, so not finer
MIN_TOKENS = 64  # fewer show too little: then the answer is late and is refused


def token_sizes(max_tokens: int) -> list[int]:
    """The largest first. max_tokens: as configured."""
    floor = min(MIN_TOKENS, max_tokens)
    return sorted({max(floor, int(max_tokens * step)) for step in STEPS}, reverse=True)
