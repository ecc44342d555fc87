"""The action lane: one frame in, one answer out, bound by the grammar.

The frame, the closing text and the previous answer as a draft are evaluated in one batch behind the pinned prefix, or
in two where the model needs an image in a batch of its own. Then the draft is verified step by step; where the model
selects another token, the rest is decoded with what remains of a draft. If bit-exact reproducibility is off, or on a
GPU, the text lane's next token is added to each batch: the weights are read once for both lanes.

There a batch with a draft or with text gives slightly other logits than plain decoding, one step after the other. A
token whose lead is below `draft_margin` is therefore decided by plain decoding: its position is evaluated again alone,
or for the nearest ties the whole answer so far. On a CPU the batch of a frame is padded, so that the frame and the
first step are those of plain decoding.
"""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Callable
from typing import NamedTuple

import msgspec
import numpy as np

from edge_agent.actions import action_tokens
from edge_agent.ipc.events import AnswerStopReason, StopReason, TextDelta
from edge_agent.model.batch_shape import margin_of, shift_of_leads
from edge_agent.model.constrained import (
    NO_ANSWER,
    DraftSteps,
    Grammar,
    GrammarError,
    NonFiniteError,
    PastAnswer,
    flatten,
)
from edge_agent.model.events import NULL_EVENTS, Events
from edge_agent.model.frame_buffer import FrameBuffer
from edge_agent.model.llama import ACTION_SEQ, LlamaContext
from edge_agent.model.text_lane import LaneContext, TextLane
from edge_agent.time_units import NS_PER_MS

# How much of a draft is evaluated again after one of its steps was wrong: GROWTH times what was right until then, but
# FEW_TOKENS at least. A CPU computes so few rows in little more time than one, and 16 of them in four times as much.
FEW_TOKENS, GROWTH = 3, 4
# A step alone stands behind cells that a draft may have left. Below this part of the margin, its lead could be due to
# their rounding.
NEAR_TIE = 1 / 8


class Decision(NamedTuple):
    """The answer to one frame."""

    text: str
    stop_reason: StopReason  # empty: the answer is complete
    prefill_ms: float
    decode_ms: float


class Batch(msgspec.Struct):
    """One batch that was evaluated. Logits are (n_vocab,) float32 each: views that are valid until the next batch."""

    steps: list[np.ndarray]  # logits before each step of the draft, and after the last
    text: np.ndarray | None  # logits after the text lane's token, if it was in the batch
    draft: DraftSteps
    position: int  # of the draft's first token
    before: list[int]  # tokens in front of the draft; none where they are rows of the frame
    frame: FrameBuffer | None = None  # its rows are in front of the draft, in the same batch
    n_frame_rows: int = 0
    is_first_exact: bool = False  # the logits before the first step are those of plain decoding, bit for bit

    @property
    def is_plain(self) -> bool:
        """Whether plain decoding evaluates the same rows."""
        return not self.draft and self.text is None


class _Stopped(Exception):
    """The answer ends before its next step, for this reason."""


def never() -> bool:
    return False


class ActionLane:
    """The answers to frames, the last of which are the drafts of the next."""

    def __init__(
        self, shared: LaneContext, grammar: Grammar, text_lane: TextLane, *, speculative: bool, stream_text: bool
    ) -> None:
        """speculative: the previous answer is the draft of the next. stream_text: send the answer's text."""
        self._llama, self._prompt, self._cache, self._clock = shared
        self._grammar, self._text_lane = grammar, text_lane
        self._speculative, self._stream_text = speculative, stream_text
        self.last_answer = NO_ANSWER
        self.last_answer_by_type: dict[int, PastAnswer] = {}  # keyed by the first token, which tells the action type
        self.n_draft_tokens = self.n_accepted_tokens = self.n_steps_alone = 0
        # Logits; 0: any batch gives the same bits; None: not measured yet, so that there are no drafts.
        self.draft_margin: float | None = 0.0 if self._llama.reproducible else None
        self.frame_alignment = 0  # rows: padded to it, the batch of a frame is exact whatever stands behind; 0: never
        self._answer_start = 0  # position of the answer, or of the closing tokens in front of it
        self._before_answer: list[int] = []  # those tokens; none where they are rows of the frame
        self._is_rounded = False  # cells of this answer may differ from those of plain decoding in their last bits

    def decide(
        self,
        frame: FrameBuffer,
        frame_id: int,
        deadline_ns: int,
        vehicle_state: str = "",
        should_cancel: Callable[[], bool] = never,
        events: Events = NULL_EVENTS,
    ) -> Decision:
        """Answer a frame.

        frame: its image embeddings; text is appended to it. deadline_ns: on the lane's clock. vehicle_state: of
        render_vehicle_state. should_cancel: asked before each step; true abandons the answer. The text of the answer
        goes to `events` as it is decoded.
        """
        start_ns = self._clock()
        self._cache.frame_end_position = 0
        self._grammar.start()
        self._grammar.forced_tokens()  # the forced prefix, which is in the closing text
        draft = self.last_answer if self._speculative and self.draft_margin is not None else NO_ANSWER
        closing = self._close(frame, vehicle_state)
        offered = draft.clear_steps(self.draft_margin or 0.0, n_exact=int(self.frame_alignment > 0))
        batch = self._prefill(frame, closing, offered, may_share=not self._begins_with_tie(draft))
        self._remember_frame(frame, frame_id)
        prefilled_ns = self._clock()
        stream = _ActionText(self._llama, frame_id, events if self._stream_text else NULL_EVENTS)
        stop_reason, answer = self._decode(batch, draft, stream, self._stop_check(deadline_ns, should_cancel))
        self._finish(stream, answer, stop_reason)
        decoded_ns = self._clock()
        events.span("prefill", "language", start_ns, prefilled_ns)
        events.span("decode", "language", prefilled_ns, decoded_ns)
        return Decision(
            stream.text, stop_reason, (prefilled_ns - start_ns) / NS_PER_MS, (decoded_ns - prefilled_ns) / NS_PER_MS
        )

    def prefill_only(self, frame: FrameBuffer, frame_id: int) -> bool:
        """Evaluate a frame without an answer, for a question. Returns whether there was anything to evaluate: a
        text-only model has no rows of a frame."""
        self._cache.frame_end_position = 0
        frame.drop_text()
        end = self._prompt.image_end_tokens
        if self._prompt.text_as_rows:
            frame.append(self._llama.embed(end))
            end = []
        has_rows = len(frame) > 0 or len(end) > 0
        if has_rows:
            self._accept_text(self._prefill(frame, end, []))
        self._remember_frame(frame, frame_id)
        return has_rows

    def _close(self, frame: FrameBuffer, vehicle_state: str) -> list[int]:
        """Append the closing text to the rows of a frame -> the tokens that have to follow them; none: they are
        rows."""
        frame.drop_text()
        if not self._prompt.text_as_rows:
            return self._prompt.closing_tokens(vehicle_state)
        frame.append(self._prompt.closing_embeddings(vehicle_state))
        return []

    def _remember_frame(self, frame: FrameBuffer, frame_id: int) -> None:
        self._cache.frame_id = frame_id
        n_rows = frame.n_image_rows + len(self._prompt.image_end_tokens)
        self._cache.frame_end_position = len(self._cache.prefix_tokens) + n_rows

    def _stop_check(
        self, deadline_ns: int, should_cancel: Callable[[], bool]
    ) -> Callable[[DraftSteps], AnswerStopReason]:
        """A function of the answer so far: why to stop before its next step, or empty."""
        n_forced = len(self._prompt.forced_prefix)

        def stop_reason(answer: DraftSteps) -> AnswerStopReason:
            if should_cancel():
                return "cancelled"
            if self._clock() > deadline_ns:
                return "late"
            return "length" if n_forced + len(flatten(answer)) > self._prompt.max_answer_tokens else ""

        return stop_reason

    def _decode(
        self,
        batch: Batch,
        draft: PastAnswer,
        stream: _ActionText,
        stop_check: Callable[[DraftSteps], AnswerStopReason],
    ) -> tuple[AnswerStopReason, PastAnswer]:
        """Verify the draft and decode until the answer is complete -> (why it stopped early, the answer)."""
        grammar, known, answer = self._grammar, draft, PastAnswer([], [])
        stop_reason: AnswerStopReason = ""
        stream.add(self._prompt.forced_prefix)
        most = self._prompt.max_answer_tokens  # of a draft
        self._answer_start, self._before_answer = batch.position - len(batch.before), batch.before
        self._is_rounded = False
        while not grammar.complete:
            if stop_reason := stop_check(answer.steps):
                break
            n = len(answer.steps)
            stop_reason = self._verify(batch, draft.steps, answer, stop_check)
            new = answer.steps[n:]
            n_accepted = len(flatten(new[:-1]))
            self.n_accepted_tokens += n_accepted
            stream.add(flatten(new))
            if batch.is_first_exact and not n_accepted:
                self._is_rounded = False
            self._accept_text(batch)
            if grammar.complete or stop_reason:  # a complete answer is not evaluated: nothing follows it
                break
            known = known.after(len(new) - 1)
            is_right = new[-1:] == draft.steps[len(new) - 1 : len(new)]  # all that was evaluated of the draft
            n_right = n_accepted + is_right * len(new[-1])
            most = max(most if is_right else FEW_TOKENS, GROWTH * n_right)
            if len(answer.steps) == 1 and self._speculative and new[0][0] in self.last_answer_by_type:
                # The model chose a different action type: the last answer of that type is the draft.
                known, most = self.last_answer_by_type[new[0][0]], self._prompt.max_answer_tokens
            draft = grammar.usable_draft(known) if self.draft_margin is not None else NO_ANSWER
            known = draft if draft.steps else known
            position = batch.position + n_accepted  # these tokens were evaluated as the draft
            self._llama.truncate(ACTION_SEQ, position)
            batch = self._continue(new[-1], _beginning(draft.clear_steps(self.draft_margin or 0.0), most), position)
        self._accept_text(batch)
        return stop_reason, answer

    def _verify(
        self, batch: Batch, draft: DraftSteps, answer: PastAnswer, stop_check: Callable[[DraftSteps], AnswerStopReason]
    ) -> AnswerStopReason:
        n = len(answer.steps)

        def evaluate_alone(i: int) -> tuple[np.ndarray, bool]:
            if i and (reason := stop_check(answer.steps)):
                raise _Stopped(reason)
            if batch.is_plain:
                return self._evaluate_plainly(answer.steps, stop_check), False
            alone, is_draft_kept = self._evaluate_alone(batch, answer.steps[n:], i)
            # Both are known here, so the margin learns from real frames what warm-up did not meet.
            self.draft_margin = max(self.draft_margin or 0.0, margin_of(shift_of_leads(alone, batch.steps[i])))
            if answer.steps and not self._grammar.lead(alone) >= NEAR_TIE * self.draft_margin:
                return self._evaluate_plainly(answer.steps, stop_check), False
            return alone, is_draft_kept

        margin = self.draft_margin or 0.0
        if batch.is_plain:
            margin *= NEAR_TIE * self._is_rounded
        else:
            self._is_rounded = True
        try:
            self._grammar.verify_draft(batch.steps, draft, answer, margin, evaluate_alone, int(batch.is_first_exact))
        except NonFiniteError:
            return "not-finite"
        except GrammarError:
            return "grammar"
        except _Stopped as stopped:
            return stopped.args[0]
        return ""

    def _evaluate_plainly(self, steps: DraftSteps, stop_check: Callable[[DraftSteps], AnswerStopReason]) -> np.ndarray:
        """Evaluate all steps of an answer again, one after the other -> logits after the last. What a draft leaves in
        the cells is rounded only a little differently, but that can turn round the nearest ties."""
        position, logits = self._answer_start, np.empty(0, np.float32)
        self._llama.truncate(ACTION_SEQ, position)
        for tokens in filter(None, [self._before_answer, *steps]):
            if reason := stop_check(steps):
                raise _Stopped(reason)
            logits = self._llama.logits_after_last(tokens, position)
            position += len(tokens)
        self._is_rounded = False
        return logits

    def _evaluate_alone(self, batch: Batch, accepted: DraftSteps, i: int) -> tuple[np.ndarray, bool]:
        """(logits before step i of a batch's draft as plain decoding evaluates them, whether the draft is still in the
        cache). accepted: the i steps before it."""
        self._accept_text(batch)  # its logits would be overwritten
        self.n_steps_alone += 1
        if i == 0 and batch.frame is not None:  # plain decoding evaluates the frame in one batch, without a draft
            batch.frame.shorten(batch.n_frame_rows)
            start = len(self._cache.prefix_tokens)
            self._llama.truncate(ACTION_SEQ, start)
            return self._llama.logits_after_last(batch.frame, start), False
        tokens = accepted[-1] if i else batch.before
        start = batch.position + len(flatten(accepted)) - len(tokens)
        return self._llama.logits_alone(tokens, start), True

    def _finish(self, stream: _ActionText, answer: PastAnswer, stop_reason: AnswerStopReason) -> None:
        """End the stream and remember a complete answer as a draft."""
        space = self._prompt.action_space
        if space.codec == "action_tokens" and not stop_reason:
            stream.emit(action_tokens.decode(space, [*self._prompt.forced_prefix, *flatten(answer.steps)]))
        stream.finish(stop_reason)
        if self._speculative and answer.steps and not stop_reason:
            self.last_answer = self.last_answer_by_type[answer.steps[0][0]] = answer

    def _begins_with_tie(self, draft: PastAnswer) -> bool:
        """Then the frame would be evaluated again if its batch had one row more. An answer of a single step has no
        other batch for the text lane."""
        return len(draft.steps) > 1 and draft.is_tie(0, self.draft_margin or 0.0)

    def _prefill(self, frame: FrameBuffer, closing: list[int], draft: DraftSteps, *, may_share: bool = True) -> Batch:
        """Evaluate the frame with its rows of text, tokens that follow them, and a draft. may_share: whether the text
        lane's next token may be in the batch of the frame."""
        start, n_rows = len(self._cache.prefix_tokens), len(frame)
        self._llama.truncate(ACTION_SEQ, start)
        if closing and n_rows:
            self._llama.evaluate_image(frame.image_rows, start)
            start += n_rows
        if closing:
            return self._continue(closing, draft, start)
        tokens, output_rows, text_position = flatten(draft), _output_rows(n_rows, draft), None
        if may_share:
            tokens, output_rows, text_position = self._append_text_token(tokens, output_rows, n_rows)
        if tokens:
            frame.append(self._llama.embed(tokens))
        alignment = self._alignment_of(start + len(frame)) if text_position is None else 0
        logits = self._llama.logits_at(frame, start, output_rows, text_position=text_position, alignment=alignment)
        batch = Batch([], None, draft, start + n_rows, [], frame, n_rows, is_first_exact=alignment > 0)
        return self._with_logits(batch, logits, text_position)

    def _alignment_of(self, stop: int) -> int:
        """Of the batch of a frame with a draft that ends at this position."""
        return self.frame_alignment if stop + self.frame_alignment <= self._llama.n_ctx else 0

    def _continue(self, new: list[int], draft: DraftSteps, position: int) -> Batch:
        """Evaluate new tokens and a draft of what follows them."""
        tokens, output_rows, text_position = self._append_text_token(
            [*new, *flatten(draft)], _output_rows(len(new), draft), 0
        )
        logits = self._llama.logits_at(tokens, position, output_rows, text_position=text_position)
        return self._with_logits(Batch([], None, draft, position + len(new), new), logits, text_position)

    def _with_logits(self, batch: Batch, logits: list[np.ndarray], text_position: int | None) -> Batch:
        self.n_draft_tokens += len(flatten(batch.draft))
        batch.text = None if text_position is None else logits.pop()
        batch.steps = logits
        return batch

    def _append_text_token(
        self, tokens: list[int], output_rows: list[int], n_before: int
    ) -> tuple[list[int], list[int], int | None]:
        """The same with the text lane's next token behind n_before rows and these tokens, and its position; unchanged
        and None when there is no text, or when it may not share a batch."""
        if self._text_lane.idle or not self._llama.can_batch_text:
            return tokens, output_rows, None
        token, position = self._text_lane.take_next_row()
        return [*tokens, token], [*output_rows, n_before + len(tokens)], position

    def _accept_text(self, batch: Batch) -> None:
        """Give the text lane its logits, once."""
        if batch.text is not None:
            logits, batch.text = batch.text, None
            self._text_lane.accept(logits)


def _beginning(draft: DraftSteps, n_tokens: int) -> DraftSteps:
    """The first steps of a draft, at most n_tokens."""
    ends = itertools.accumulate(len(step) for step in draft)
    return draft[: sum(end <= n_tokens for end in ends)]


class _ActionText:
    """The text of an answer, streamed as it is decoded."""

    def __init__(self, llama: LlamaContext, frame_id: int, events: Events) -> None:
        self._llama, self._frame_id, self._events = llama, frame_id, events
        self._utf8_decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.text = ""

    def add(self, tokens: list[int]) -> None:
        self.emit(self._utf8_decoder.decode(b"".join(self._llama.token_bytes(token) for token in tokens)))

    def emit(self, text: str) -> None:
        self.text += text
        if text:
            self._events.text(TextDelta(lane="action", frame_id=self._frame_id, text=text))

    def finish(self, stop_reason: AnswerStopReason) -> None:
        self._events.text(
            TextDelta(lane="action", frame_id=self._frame_id, text="", final=True, stop_reason=stop_reason)
        )


def _output_rows(n: int, steps: DraftSteps) -> list[int]:
    """The rows whose logits are needed: the last of the first n, and the last of each step that follows them."""
    return list(itertools.accumulate([n - 1, *map(len, steps)]))
