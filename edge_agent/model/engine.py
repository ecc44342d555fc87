"""Frame -> rows -> answer and words: encoder, language model, grammar and what the cache holds. No sockets.

What is evaluated, in this order, so that little has to be evaluated again:

    <s>[SYSTEM_PROMPT] role, actions, instruction [/SYSTEM_PROMPT][INST]   pinned: once per instruction
    the frame's rows [IMG_END]                                             once per frame
    state Action?[/INST]{"action":…}                                       ACT: every frame, bound by the grammar; the
                                                                           answer before goes along as a draft
    question[/INST]words words words                                       WORDS: over the same frame, a step at a time

Where bits need not be the same however a prompt is cut (language.reproducible false, or a GPU), the next word rides
in ACT's batches: the weights are read once for both. Otherwise words are decoded between frames.
"""

from __future__ import annotations

import codecs
import itertools
import time
from collections.abc import Callable

import msgspec
import numpy as np

from edge_agent.actions import action_tokens
from edge_agent.actions.grammar import json_schema
from edge_agent.actions.prompt import describe_action_space
from edge_agent.actions.space import ActionSpace
from edge_agent.actions.vehicle_state import max_vehicle_state_tokens
from edge_agent.bundle.manifest import LANGUAGE, Bundle
from edge_agent.config import Config
from edge_agent.errors import ConfigError, UserError
from edge_agent.ipc.events import Heartbeat, StopReason, TextDelta, TraceSpan
from edge_agent.model.constrained import (
    DraftSteps,
    Grammar,
    GrammarError,
    NonFiniteError,
    flatten,
    grammar_from_lark,
    grammar_from_schema,
    greedy,
)
from edge_agent.model.llama import ACTION_SEQ, ROW_ALIGNMENT, TEXT_SEQ, LlamaContext
from edge_agent.model.preprocess import Preprocessor
from edge_agent.model.vision_encoder import open_encoder
from edge_agent.wire.messages import Lane, TextStopReason

SYSTEM_PROMPT = (
    "You are the eyes and judgement of a robot. You see one camera frame.\n"
    'When asked "Action?", answer with one JSON object, an action of this list and its fields:\n{space}\n'
    "When asked anything else, answer in a few plain words.\n"
    "Instruction: {instruction}"
)
SYSTEM_PROMPTS = {
    "json": SYSTEM_PROMPT,
    "action_tokens": SYSTEM_PROMPT.replace("answer with one JSON object, an action", "answer with one action"),
}
ACTION_QUESTION = "Action?"
MAX_ANSWER_TOKENS = 160  # the grammar ends an answer long before; this bounds one that does not
MIN_QUESTION_TOKENS = 64  # at least so many fit; where the context is larger, more do
NS_PER_MS = 1e6

Emit = Callable[[object], None]


class InstructionRefused(UserError):
    """An instruction cannot be taken; the one before stands. One line."""


class TextGeneration(msgspec.Struct):
    """Words in the making on the WORDS sequence."""

    lane: Lane
    request: str
    frame_id: int
    position: int  # of the next token
    token: int  # decided, not yet evaluated
    letters: codecs.IncrementalDecoder
    thinking: bool
    n_tokens: int = 0  # of words
    n_thoughts: int = 0


class Engine:
    """Model, encoder, grammar and the state of the cache. Owns native memory; close() frees it.

    `see` may run in another thread than all the rest: it touches the encoder and one of two buffers, nothing else.
    """

    def __init__(self, config: Config, model_bundle: Bundle, space: ActionSpace, emit: Emit) -> None:
        """Load everything. Emits Progress while it does. Raises LanguageError, VisionError, ConfigError, ValueError."""
        manifest = model_bundle.manifest
        self.special = manifest.model.special
        self.action_space, self.emit, self.config = space, emit, config
        self.trace = False  # whether span() emits
        if config.language.max_reasoning_tokens and "think" not in self.special:
            raise ConfigError("language.max_reasoning_tokens: expected 0 for a model without [THINK]")
        self.language = LlamaContext(
            model_bundle.path(LANGUAGE),
            config.language,
            manifest.model.embedding,
            progress=lambda part: emit(Heartbeat(f"weights {part:.0%}")),
        )
        emit(Heartbeat("grammar"))
        self.grammar = Grammar(self.language.vocab)
        if space.codec == "action_tokens":
            action_tokens.check_vocabulary(self.language.written)
            longest = 1 + space.horizon * max(len(verb.fields) for verb in space.actions.values())
            if longest > MAX_ANSWER_TOKENS:
                raise ConfigError(f"horizon: expected answers of at most {MAX_ANSWER_TOKENS} tokens, found {longest}")
            self.grammar.allow(grammar_from_lark(action_tokens.lark_grammar(space)))
        else:
            self.grammar.allow(grammar_from_schema(json_schema(space)))
        emit(Heartbeat("vision"))
        self.preprocessor = Preprocessor(manifest.vision, config.vision.max_image_tokens)
        self.encoder = open_encoder(
            model_bundle,
            config.vision,
            self.preprocessor,
            self.language.model,
            break_row=self.language.embed([self.special["img_break"]])[0],
            gpu=config.language.gpu_layers != 0,
        )
        self.grammar.start()
        self.opening = self.grammar.forced()  # what every answer begins with travels with the frame
        self.closing_rows = self._closing("")  # (n, hidden) float32
        # A frame's rows, a break after each line but the last, what follows them, a draft, a rider. Two of them: one is
        # answered while the next is encoded.
        most_lines = manifest.vision.image_size // (manifest.vision.patch * manifest.vision.merge)
        most_state = max_vehicle_state_tokens(space, lambda text: len(self.language.tokens(text)))
        self.most_rows = config.vision.max_image_tokens + most_lines + len(self.closing_rows) + most_state
        size = (self.most_rows + MAX_ANSWER_TOKENS + ROW_ALIGNMENT, self.language.n_embd)
        self.buffers = itertools.cycle([np.empty(size, np.float32), np.empty(size, np.float32)])
        self.answer: DraftSteps = []  # to the frame before
        self.answers: dict[int, DraftSteps] = {}  # the last that began with this token, which tells the verb
        self.n_drafted = self.n_taken = 0  # tokens
        self.instruction, self.adapter = "", ""
        self.prefix: list[int] = []
        self.room = 0  # tokens that a question may have
        self.frame_stop = 0  # position after the frame's [IMG_END]; 0: the cache holds no frame
        self.frame_id = 0
        self.sentence: TextGeneration | None = None
        self.cancelled: Callable[[], bool] = lambda: False  # asked before each step of an answer

    def close(self) -> None:
        self.encoder.close()
        self.language.close()

    def instruct(self, instruction: str, adapter: str = "") -> None:
        """Pin a new prefix, under an adapter or none. Raises Refused when it does not leave room for frames."""
        text = SYSTEM_PROMPTS[self.action_space.codec].format(
            space=describe_action_space(self.action_space), instruction=instruction
        )
        s, language = self.special, self.config.language
        prefix = [s["bos"], s["system"], *self.language.tokens(text), s["system_end"], s["inst"]]
        words = language.max_text_tokens + language.max_reasoning_tokens + MIN_QUESTION_TOKENS
        needed = len(prefix) + self.most_rows + max(MAX_ANSWER_TOKENS, words)
        if needed > self.language.n_ctx:
            raise InstructionRefused(
                f"language.context: {len(prefix)} tokens of prompt, a frame and an answer make {needed}, found "
                f"{self.language.n_ctx}; raise it, lower vision.max_image_tokens, or shorten the instruction"
            )
        if self.sentence is not None:
            self.end("new-instruction")
        self.language.forget(TEXT_SEQ, 0)
        self.language.forget(ACTION_SEQ, 0)
        self.language.adapt(adapter)
        self.language.decode_tokens(prefix, 0)
        self.prefix, self.frame_stop = prefix, 0
        self.instruction, self.adapter = instruction, adapter
        self.room = self.language.n_ctx - len(prefix) - self.most_rows - words + MIN_QUESTION_TOKENS

    # -- a frame ------------------------------------------------------------------------------------------------------

    def see(self, image: np.ndarray) -> np.ndarray:
        """image: on the grid, as the preprocessor made it -> its rows (n, hidden) float32, the beginning of a buffer
        that is good until the call after the next. Raises NotFinite: 4-bit kernels take NaN for a number, and the
        logits would look fine."""
        start_ns = time.monotonic_ns()
        rows = self.encoder.encode(image, next(self.buffers))
        if not np.isfinite(rows.sum()):  # as if asked of each: one that is not makes the sum so
            raise NonFiniteError
        self.span("encode", "eyes", start_ns)
        return rows

    def act(
        self, image: np.ndarray, frame_id: int, deadline_ns: int, state: str = ""
    ) -> tuple[str, StopReason, dict[str, float]]:
        """See and answer -> (answer, why it stopped early, stage times in ms)."""
        t0 = time.monotonic_ns()
        try:
            rows = self.see(image)
        except NonFiniteError:
            return "", "not-finite", dict.fromkeys(("encode", "prefill", "decode"), 0.0)
        encode_ms = (time.monotonic_ns() - t0) / NS_PER_MS
        text, stop_reason, stages = self.respond(rows, frame_id, deadline_ns, state)
        return text, stop_reason, {"encode": encode_ms, **stages}

    def respond(
        self, rows: np.ndarray, frame_id: int, deadline_ns: int, state: str = ""
    ) -> tuple[str, StopReason, dict[str, float]]:
        """rows: as `see` gave them; state: of render_vehicle_state -> (answer, why it stopped early, times in ms)."""
        t1 = time.monotonic_ns()
        self.frame_stop = 0
        closing = self._closing(state) if state else self.closing_rows
        self.grammar.start()
        self.grammar.forced()  # self.opening, which is in closing
        draft = self.answer if self.config.language.speculative else []
        logits, rode = self._evaluate(rows, closing, draft[:-1])
        self.frame_stop, self.frame_id = len(self.prefix) + len(rows) + 1, frame_id
        t2 = time.monotonic_ns()
        text, stop_reason = self._answer(logits, rode, draft, len(self.prefix) + len(rows) + len(closing), deadline_ns)
        t3 = time.monotonic_ns()
        self.span("prefill", "language", t1, t2)
        self.span("decode", "language", t2, t3)
        return text, stop_reason, {"prefill": (t2 - t1) / NS_PER_MS, "decode": (t3 - t2) / NS_PER_MS}

    def look(self, rows: np.ndarray, frame_id: int) -> None:
        """Evaluate a frame without asking for an action: for a question while paused."""
        self.frame_stop = 0
        self._evaluate(rows, self.closing_rows[:1], [])
        self.frame_stop, self.frame_id = len(self.prefix) + len(rows) + 1, frame_id

    def _closing(self, state: str) -> np.ndarray:
        """What follows the frame, as rows (n, hidden) float32."""
        text = self.language.tokens(f"{state}{ACTION_QUESTION}")
        return self.language.embed([self.special["img_end"], *text, self.special["inst_end"], *self.opening])

    def _answer(
        self, logits: list[np.ndarray], rode: np.ndarray | None, draft: DraftSteps, position: int, deadline_ns: int
    ) -> tuple[str, StopReason]:
        """The answer to the frame in the cache. logits: before each step of the draft, or one; rode: behind the word
        that came along; position: of the first step's first token."""
        letters = codecs.getincrementaldecoder("utf-8")("replace")
        text, stop_reason, known = self._speak(letters, self.opening), "", draft
        answer: DraftSteps = []
        while not (self.grammar.complete or stop_reason):
            n = len(answer)
            if self.cancelled():
                stop_reason = "cancelled"
                break
            if time.monotonic_ns() > deadline_ns:
                stop_reason = "late"
                break
            if len(self.opening) + len(flatten(answer)) > MAX_ANSWER_TOKENS:
                stop_reason = "length"
                break
            try:
                self.grammar.take(logits, draft, answer)
            except NonFiniteError:
                stop_reason = "not-finite"
            except GrammarError:
                stop_reason = "grammar"
            new = answer[n:]
            self.n_taken += len(flatten(new[:-1]))
            text += self._speak(letters, flatten(new))
            if rode is not None:
                self._go_on(rode)
            if self.grammar.complete or stop_reason:  # a complete answer is never evaluated: nothing will follow it
                break
            position += len(flatten(new[:-1]))  # these were in the draft
            known = known[len(new) - 1 :]
            if len(answer) == 1 and self.config.language.speculative:  # another verb than before: what was said with it
                known = self.answers.get(answer[0][0], known)
            if draft := self.grammar.rest_of(known):
                known = draft
            self.language.forget(ACTION_SEQ, position)
            logits, rode = self._continue(new[-1], draft[:-1], position)
            position += len(new[-1])
        if self.action_space.codec == "action_tokens" and not stop_reason:
            text = self._say(action_tokens.decode(self.action_space, [*self.opening, *flatten(answer)]))
        if self.config.language.stream_action_text:
            self.emit(TextDelta(lane="action", frame_id=self.frame_id, text="", final=True, stop_reason=stop_reason))
        if self.config.language.speculative and answer and not stop_reason:
            self.answer = self.answers[answer[0][0]] = answer
        return text, stop_reason

    def _evaluate(
        self, rows: np.ndarray, closing: np.ndarray, draft: DraftSteps
    ) -> tuple[list[np.ndarray], np.ndarray | None]:
        """rows: the beginning of a buffer -> logits (n_vocab,) behind the closing text and behind each step of the
        draft, and behind the word that rode along."""
        buffer, n, drafted = rows.base, len(rows) + len(closing), flatten(draft)
        tokens, want, rider = self._with_rider(drafted, _output_rows(n, draft), n)
        buffer[len(rows) : n] = closing
        if tokens:
            buffer[n : n + len(tokens)] = self.language.embed(tokens)
        self.n_drafted += len(drafted)
        self.language.forget(ACTION_SEQ, len(self.prefix))
        rows = buffer[: n + len(tokens)]
        logits = self.language.decode_rows(rows, len(self.prefix), want=want, rider=rider, spare=True)
        return (logits, None) if rider is None else (logits[:-1], logits[-1])

    def _continue(self, new: list[int], draft: DraftSteps, position: int) -> tuple[list[np.ndarray], np.ndarray | None]:
        """The same behind new tokens and a draft of what follows them."""
        drafted = flatten(draft)
        self.n_drafted += len(drafted)
        tokens, want, rider = self._with_rider([*new, *drafted], _output_rows(len(new), draft), 0)
        logits = self.language.decode_tokens(tokens, position, want=want, rider=rider)
        return (logits, None) if rider is None else (logits[:-1], logits[-1])

    def _with_rider(self, tokens: list[int], want: list[int], before: int) -> tuple[list[int], list[int], int | None]:
        """With the sentence's next token behind these (and `before` rows), if it may ride; then its position too."""
        if self.sentence is None or not self.language.rides:
            return tokens, want, None
        self.sentence.position += 1
        return [*tokens, self.sentence.token], [*want, before + len(tokens)], self.sentence.position - 1

    def _speak(self, letters: codecs.IncrementalDecoder, tokens: list[int]) -> str:
        return self._say(letters.decode(b"".join(self.language.piece(token) for token in tokens)))

    def _say(self, text: str) -> str:
        if text and self.config.language.stream_action_text:
            self.emit(TextDelta(lane="action", frame_id=self.frame_id, text=text))
        return text

    # -- words --------------------------------------------------------------------------------------------------------

    def begin(self, lane: Lane, request: str, question: str) -> None:
        """Start a sentence about the frame that ACT holds. It may end before it began."""
        thinking = self.config.language.max_reasoning_tokens > 0
        tokens = [*self.language.tokens(question), self.special["inst_end"]]
        letters = codecs.getincrementaldecoder("utf-8")("replace")
        self.sentence = TextGeneration(lane, request, self.frame_id, self.frame_stop, 0, letters, thinking)
        if len(tokens) > self.room:
            self.end("length")
            return
        if thinking:
            tokens.append(self.special["think"])
        self.language.share(self.frame_stop)
        logits = self.language.decode_tokens(tokens, self.frame_stop, TEXT_SEQ)
        self.sentence.position += len(tokens)
        self._go_on(logits)

    def step(self) -> None:
        """One more token of the sentence."""
        start_ns, sentence = time.monotonic_ns(), self.sentence
        logits = self.language.decode_tokens([sentence.token], sentence.position, TEXT_SEQ)
        sentence.position += 1
        self._go_on(logits)
        self.span("text", "language", start_ns)

    def end(self, stop_reason: TextStopReason) -> None:
        """The sentence ends here; stop_reason: why, or empty."""
        if self.sentence.thinking:
            self._stop_thinking()
        self._utter(self.sentence.letters.decode(b"", final=True), final=True, stop_reason=stop_reason)
        self.sentence = None
        self.language.forget(TEXT_SEQ, 0)

    def _go_on(self, logits: np.ndarray) -> None:
        """logits: (n_vocab,), behind the sentence's last token."""
        sentence, limits = self.sentence, self.config.language
        try:
            token = greedy(logits)
        except NonFiniteError:
            self.end("not-finite")
            return
        if sentence.thinking and sentence.n_thoughts >= limits.max_reasoning_tokens:
            token = self.special["think_end"]  # enough; what was thought until here has to do
        if self.language.is_end(token):
            self.end("")
            return
        sentence.token = token
        if token == self.special.get("think"):
            sentence.thinking = True
        elif token == self.special.get("think_end"):
            self._stop_thinking()
        elif text := sentence.letters.decode(self.language.piece(token)):
            self._utter(text)
        if sentence.thinking:
            sentence.n_thoughts += 1
        else:
            sentence.n_tokens += 1
        if sentence.n_tokens >= limits.max_text_tokens or sentence.position >= self.language.n_ctx:
            self.end("length")

    def _stop_thinking(self) -> None:
        self._utter(self.sentence.letters.decode(b"", final=True), final=True)
        self.sentence.letters.reset()
        self.sentence.thinking = False

    def _utter(self, text: str, final: bool = False, stop_reason: TextStopReason = "") -> None:
        sentence = self.sentence
        lane = "reasoning" if sentence.thinking else sentence.lane
        piece = TextDelta(
            lane=lane,
            frame_id=sentence.frame_id,
            text=text,
            request=sentence.request,
            final=final,
            stop_reason=stop_reason,
        )
        self.emit(piece)

    # -- the rest -----------------------------------------------------------------------------------------------------

    def keep_warm(self) -> None:
        """One real decode step behind the frame, thrown away; the frame stays, a question may still come."""
        start = self.frame_stop or len(self.prefix)
        self.language.forget(ACTION_SEQ, start)
        self.language.decode_tokens([self.special["inst_end"]], start)
        self.language.forget(ACTION_SEQ, start)

    def span(self, name: str, thread: str, start_ns: int, stop_ns: int | None = None) -> None:
        """For the timeline, if one is asked for: what was done from when to when, or to now."""
        if self.trace:
            stop_ns = time.monotonic_ns() if stop_ns is None else stop_ns
            self.emit(TraceSpan(name=name, thread=thread, start_ns=start_ns, stop_ns=stop_ns))


def _output_rows(n: int, steps: DraftSteps) -> list[int]:
    """Where logits are wanted: behind the first n rows, and behind each step that follows them."""
    return list(itertools.accumulate([n - 1, *map(len, steps)]))
