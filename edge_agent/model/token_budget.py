"""How many image tokens a frame may have so that its answer is in time."""

from __future__ import annotations

import msgspec

from edge_agent.ipc.token_sizes import token_sizes

EMA_WEIGHT = 0.3  # weight of the newest frame in the running estimates
MARGIN = 0.9  # share of the time left that may be used
STEP_UP_MARGIN = 0.75  # the same, before a larger size is tried again


class TokenBudget(msgspec.Struct, frozen=True):
    """The largest number of image tokens whose answer is ready in time, from running estimates of earlier frames.

    A value: `record` and `select` return new values and change nothing. The main thread owns the current one and gives
    it to the encoder thread as the argument of a job, so that no number is written by two threads.
    """

    max_tokens: int  # as configured
    tokens: int  # selected for the newest frame
    per_token_ms: float = 0.0  # encode and prefill of one image token; 0: not measured yet
    rest_ms: float = 0.0  # what does not grow with the tokens
    limit: int = 0  # the governor's; 0: none

    @classmethod
    def of(cls, max_tokens: int) -> TokenBudget:
        return cls(max_tokens, max_tokens)

    @property
    def sizes(self) -> list[int]:
        """The sizes to select from, the largest first."""
        sizes = token_sizes(self.max_tokens)
        return [size for size in sizes if size <= self.limit] or sizes[-1:] if self.limit else sizes

    def record(self, n_tokens: int, frame_ms: float, rest_ms: float) -> TokenBudget:
        """n_tokens, frame_ms: a frame's image tokens and the time of encode and prefill, which grows with them;
        rest_ms: the time of its answer, which does not."""
        weight = EMA_WEIGHT if self.per_token_ms else 1.0
        return msgspec.structs.replace(
            self,
            per_token_ms=self.per_token_ms + weight * (frame_ms / n_tokens - self.per_token_ms),
            rest_ms=self.rest_ms + weight * (rest_ms - self.rest_ms),
        )

    def select(self, left_ms: float) -> TokenBudget:
        """left_ms: time until the answer must be ready. `tokens` of the result is the number for this frame: the
        largest size that is in time, or the smallest."""
        for size in self.sizes:
            share = STEP_UP_MARGIN if size > self.tokens else MARGIN
            if size * self.per_token_ms + self.rest_ms <= share * left_ms:
                break
        return msgspec.structs.replace(self, tokens=size)
