"""The arrays behind llama.cpp's llama_batch, rewritten in place for each call. One token needs no numpy operation."""

from __future__ import annotations

import ctypes

import llama_cpp.llama_cpp as ll
import numpy as np

ACTION_SEQ, TEXT_SEQ, CHECK_SEQ = 0, 1, 2  # sequences of the cache
N_SEQUENCES = 3


class BatchArrays:
    """Positions, sequences and output marks of up to n rows. `native` is the batch that was filled last."""

    def __init__(self, n: int) -> None:
        self._token = np.zeros(n, np.int32)
        self._pos = np.zeros(n, np.int32)
        self._n_seq = np.ones(n, np.int32)
        self._output = np.zeros(n, np.int8)
        self._sequence = np.arange(N_SEQUENCES, dtype=np.int32)
        first = self._sequence.ctypes.data
        self._pointers = [np.full(n, first + 4 * sequence, np.uintp) for sequence in range(N_SEQUENCES)]
        self._mixed = self._pointers[ACTION_SEQ].copy()  # the last row of a batch is of TEXT_SEQ
        self._token_pointer = self._token.ctypes.data_as(ctypes.POINTER(ll.llama_token))
        pointer_type = ctypes.POINTER(ctypes.POINTER(ll.llama_seq_id))
        self._sequence_pointers = [pointers.ctypes.data_as(pointer_type) for pointers in self._pointers]
        self._mixed_pointer = self._mixed.ctypes.data_as(pointer_type)
        self.native = ll.llama_batch(
            pos=self._pos.ctypes.data_as(ctypes.POINTER(ll.llama_pos)),
            n_seq_id=self._n_seq.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            logits=self._output.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def set_tokens(self, tokens: list[int], n_padded: int) -> None:
        """The rows are tokens; the last one is repeated up to n_padded."""
        n = len(tokens)
        if n_padded == 1:
            self._token[0] = tokens[0]
        else:
            self._token[:n] = tokens
            self._token[n:n_padded] = tokens[-1]
        self.native.token, self.native.embd = self._token_pointer, None

    def set_rows(self, rows: np.ndarray) -> None:
        """The rows are embeddings: (n_padded, n_embd) float32, contiguous."""
        self.native.token, self.native.embd = None, rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))

    def place(self, n_padded: int, start: int, sequence: int) -> None:
        """Positions start… of one sequence."""
        if n_padded == 1:
            self._pos[0] = start
        else:
            self._pos[:n_padded] = np.arange(start, start + n_padded)
        self.native.n_tokens, self.native.seq_id = n_padded, self._sequence_pointers[sequence]

    def place_last_in_text(self, n: int, position: int) -> None:
        """The last of n rows of ACTION_SEQ is of TEXT_SEQ instead, at this position."""
        self._pos[n - 1] = position
        self._mixed[: n - 1], self._mixed[n - 1] = self._pointers[ACTION_SEQ][0], self._pointers[TEXT_SEQ][0]
        self.native.seq_id = self._mixed_pointer

    def mark_outputs(self, n_padded: int, output_rows: list[int], alignment: int) -> tuple[list[int], int]:
        """Ask for logits after these rows, and after as many others as make a multiple of `alignment` -> (the place of
        each row's logits among all, how many there are)."""
        if n_padded == 1:
            self._output[0] = 1
            return [0], 1
        output = self._output[:n_padded]
        output[:] = 0
        output[output_rows] = 1
        if n_more := -len(output_rows) % alignment:
            output[np.flatnonzero(output == 0)[-n_more:]] = 1
        places = np.cumsum(output) - 1
        return places[output_rows].tolist(), int(places[-1]) + 1


def padded_copy(rows: np.ndarray, n_padded: int) -> np.ndarray:
    """The last row is repeated. The same array where nothing is added."""
    if n_padded == len(rows):
        return rows
    return np.concatenate([rows, np.repeat(rows[-1:], n_padded - len(rows), 0)])
