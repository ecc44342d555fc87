"""The rows of one frame's batch, in one allocation."""

from __future__ import annotations

import numpy as np


class FrameBuffer:
    """Image embeddings written in place by the encoder, and rows of text appended behind them.

    The language model evaluates all of it as one batch without a copy: llama.cpp reads the rows where they are.
    """

    def __init__(self, capacity: int, n_embd: int) -> None:
        """capacity: rows, with those of the longest text and of the padding."""
        self._rows = np.empty((capacity, n_embd), np.float32)
        self._n = self.n_image_rows = 0

    def __len__(self) -> int:
        """Rows in use."""
        return self._n

    @property
    def n_embd(self) -> int:
        return self._rows.shape[1]

    def embeddings(self, n: int) -> np.ndarray:
        """Begin a frame: its n image rows, to be written by the encoder. (n, n_embd) float32, a view."""
        self._n = self.n_image_rows = n
        return self._rows[:n]

    @property
    def image_rows(self) -> np.ndarray:
        """The embeddings of the image: (n_image_rows, n_embd) float32, a view."""
        return self._rows[: self.n_image_rows]

    def append(self, rows: np.ndarray) -> None:
        """Copy rows (m, n_embd) float32 behind those in use."""
        stop = self._n + len(rows)
        self._rows[self._n : stop] = rows
        self._n = stop

    def shorten(self, n: int) -> None:
        """Keep the first n rows, n <= len(self)."""
        self._n = n

    def drop_text(self) -> None:
        """Keep the image rows and drop what was appended."""
        self._n = self.n_image_rows

    def padded(self, n: int) -> np.ndarray:
        """The first n rows, n >= len(self); those that are not in use repeat the last. (n, n_embd) float32, a view."""
        self._rows[self._n : n] = self._rows[self._n - 1]
        return self._rows[:n]
