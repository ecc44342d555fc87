"""How many image tokens a frame may have so that its answer is in time."""

from __future__ import annotations


class TokenBudget:
    """How many image tokens a frame may have so that its answer comes in time: as many as configured, or the next
    lower step if the frames before say that it would be late. Pure."""

    STEPS = (1.0, 0.75, 0.5, 0.375, 0.25)  # of the tokens configured; a size of its own for each, so not finer
    LEAST = 64  # below that little is seen: then an answer is late, and refused
    NEWEST = 0.3  # weight of the newest frame in the running estimates
    MARGIN = 0.9  # of the time that is left, to be used
    AGAIN = 0.75  # of it, when a larger step is tried again

    def __init__(self, max_tokens: int) -> None:
        floor = min(self.LEAST, max_tokens)
        self.sizes = sorted({max(floor, int(max_tokens * step)) for step in self.STEPS}, reverse=True)
        self.tokens = max_tokens
        self._per_token_ms = self._rest_ms = 0.0

    def note(self, n_tokens: int, frame_ms: float, rest_ms: float) -> None:
        """What a frame took: encode and prefill, which grow with its tokens, and the rest, which does not."""
        newest = self.NEWEST if self._per_token_ms else 1.0  # nothing was known before the first
        self._per_token_ms += newest * (frame_ms / n_tokens - self._per_token_ms)
        self._rest_ms += newest * (rest_ms - self._rest_ms)

    def choose(self, left_ms: float) -> int:
        """For a frame whose answer has to be there in left_ms."""
        for size in self.sizes:
            share = self.AGAIN if size > self.tokens else self.MARGIN
            if size * self._per_token_ms + self._rest_ms <= share * left_ms:
                self.tokens = size
                return size
        self.tokens = self.sizes[-1]
        return self.tokens
