"""The model process: newest frame -> vision -> language -> events.

    python -m edge_agent.model --slot FD --wake FD --events FD

It checks nothing and publishes nothing: what it says is a proposal. It may crash, hang or be killed at any moment; the
supervisor starts another one. What is evaluated, in this order, so that little has to be evaluated again:

    <s>[SYSTEM_PROMPT] role, actions, instruction [/SYSTEM_PROMPT][INST]   pinned: once per instruction
    the frame's rows [IMG_END]                                             once per frame
    Action?[/INST]{"action":…}                                             ACT: every frame, bound by the grammar; the
                                                                           answer before goes along as a draft
    question[/INST]words words words                                       WORDS: over the same frame, a step at a time
"""

from __future__ import annotations

import codecs
import contextlib
import itertools
import os
import select
import socket
import sys
import time
from collections import deque
from collections.abc import Callable

import msgspec
import numpy as np

from edge_agent import actions, bundle, health, memory, vision, worker
from edge_agent.config import Config, ConfigError
from edge_agent.decoding import Grammar, NotFinite, Steps, Stuck, flat, greedy
from edge_agent.frames import Frame, Slot
from edge_agent.language import ACT, UNIT, WORDS, Language, LanguageError
from edge_agent.messages import (
    Ask,
    CannotStart,
    Cut,
    Instruct,
    Instructed,
    Lane,
    Note,
    Piece,
    Progress,
    Proposal,
    Ready,
    SetPaused,
    Stages,
    decode_model_command,
    encode,
)

ROLE = (
    "You are the eyes and judgement of a robot. You see one camera frame.\n"
    'When asked "Action?", answer with one JSON object, an action of this list and its fields:\n{space}\n'
    "When asked anything else, answer in a few plain words.\n"
    "Instruction: {instruction}"
)
ACT_CLOSING = "Action?"
MAX_ANSWER_TOKENS = 160  # the grammar ends an answer long before; this bounds one that does not
QUESTION_TOKENS = 64  # at least so many fit; where the context is larger, more do
KEEP_WARM_S = 1.0  # without frames: one decode step so often, which is also how the supervisor knows that we can
WARM_UP_FRAME = (480, 640, 3)
NS_PER_MS = 1e6

Emit = Callable[[object], None]


class Refused(Exception):
    """An instruction cannot be taken; the one before stands. One line."""


class Sentence(msgspec.Struct):
    """Words in the making on the WORDS sequence."""

    lane: Lane
    request: str
    frame_id: int
    position: int  # of the next token
    token: int  # decided, not yet evaluated
    n_tokens: int
    letters: codecs.IncrementalDecoder


class Engine:
    """Model, encoder, grammar and the state of the cache. Owns native memory; close() frees it."""

    def __init__(self, config: Config, model_bundle: bundle.Bundle, space: actions.Space, emit: Emit) -> None:
        """Load everything. Emits Progress while it does. Raises LanguageError, VisionError, ValueError."""
        manifest = model_bundle.manifest
        self.special = manifest.model.special
        self.space, self.emit, self.config = space, emit, config
        self.language = Language(
            model_bundle.path(bundle.LANGUAGE),
            config.language,
            manifest.model.embedding,
            progress=lambda part: emit(Progress(f"weights {part:.0%}")),
        )
        emit(Progress("grammar"))
        self.grammar = Grammar(self.language.vocab)
        self.grammar.allow(actions.schema(space))
        emit(Progress("vision"))
        self.preprocessor = vision.Preprocessor(manifest.vision, config.vision.max_tokens)
        self.encoder = vision.open_encoder(
            model_bundle,
            config.vision,
            self.preprocessor,
            self.language.model,
            break_row=self.language.embed([self.special["img_break"]])[0],
            gpu=config.language.gpu_layers != 0,
        )
        self.grammar.start()
        opening = self.grammar.forced()  # what every answer begins with travels with the frame
        closing = [self.special["img_end"], *self.language.tokens(ACT_CLOSING), self.special["inst_end"], *opening]
        self.opening = opening
        self.closing_rows = self.language.embed(closing)  # (n, hidden) float32
        # One buffer for a frame's rows, a break after each line but the last, what follows them, and a draft.
        most_lines = manifest.vision.image_size // (manifest.vision.patch * manifest.vision.merge)
        self.most_rows = config.vision.max_tokens + most_lines + len(closing)
        self.rows = np.empty((self.most_rows + MAX_ANSWER_TOKENS + UNIT, self.language.n_embd), np.float32)
        self.answer: Steps = []  # to the frame before
        self.n_drafted = self.n_taken = 0  # tokens
        self.task, self.adapter = "", ""
        self.prefix: list[int] = []
        self.room = 0  # tokens that a question may have
        self.frame_stop = 0  # position after the frame's [IMG_END]; 0: the cache holds no frame
        self.frame_id = 0

    def close(self) -> None:
        self.encoder.close()
        self.language.close()

    def instruct(self, instruction: str, adapter: str = "") -> None:
        """Pin a new prefix, under an adapter or none. Raises Refused when it does not leave room for frames."""
        text = ROLE.format(space=actions.describe(self.space), instruction=instruction)
        s = self.special
        prefix = [s["bos"], s["system"], *self.language.tokens(text), s["system_end"], s["inst"]]
        words = self.config.language.max_words_tokens + QUESTION_TOKENS
        needed = len(prefix) + self.most_rows + max(MAX_ANSWER_TOKENS, words)
        if needed > self.language.n_ctx:
            raise Refused(
                f"language.context: {len(prefix)} tokens of prompt, a frame and an answer make {needed}, found "
                f"{self.language.n_ctx}; raise it, lower vision.max_tokens, or shorten the instruction"
            )
        self.language.forget(WORDS, 0)
        self.language.forget(ACT, 0)
        self.language.adapt(adapter)
        self.language.decode_tokens(prefix, 0)
        self.prefix, self.frame_stop = prefix, 0
        self.task, self.adapter = instruction, adapter
        self.room = self.language.n_ctx - len(prefix) - self.most_rows - words + QUESTION_TOKENS

    def act(self, image: np.ndarray, frame_id: int, deadline_ns: int) -> tuple[str, Cut, dict[str, float]]:
        """image: on the grid, as the preprocessor made it -> (answer, why it is cut, stage times in ms)."""
        t0 = time.monotonic_ns()
        try:
            rows = self._see(image)
        except NotFinite:
            return "", "not-finite", dict.fromkeys(("encode", "prefill", "decode"), 0.0)
        t1 = time.monotonic_ns()
        self.grammar.start()
        self.grammar.forced()  # self.opening, which is in closing_rows
        draft = self.answer if self.config.language.draft else []
        self.n_drafted += len(flat(draft[:-1]))
        logits = self._evaluate(rows, self.closing_rows, draft[:-1])
        self.frame_stop, self.frame_id = len(self.prefix) + len(rows) + 1, frame_id
        t2 = time.monotonic_ns()
        text, cut = self._answer(logits, draft, len(self.prefix) + len(rows) + len(self.closing_rows), deadline_ns)
        t3 = time.monotonic_ns()
        stages = {"encode": (t1 - t0) / NS_PER_MS, "prefill": (t2 - t1) / NS_PER_MS, "decode": (t3 - t2) / NS_PER_MS}
        return text, cut, stages

    def _answer(self, logits: np.ndarray, draft: Steps, position: int, deadline_ns: int) -> tuple[str, Cut]:
        """The answer to the frame in the cache. logits: (len(draft) or 1, n_vocab), before each step of the draft;
        position: of the first step's first token."""
        letters = codecs.getincrementaldecoder("utf-8")("replace")
        text, cut, known = self._speak(letters, self.frame_id, self.opening), "", draft
        answer: Steps = []
        while not (self.grammar.complete or cut):
            n = len(answer)
            if time.monotonic_ns() > deadline_ns:
                cut = "late"
                break
            if len(self.opening) + len(flat(answer)) > MAX_ANSWER_TOKENS:
                cut = "length"
                break
            try:
                self.grammar.take(logits, draft, answer)
            except NotFinite:
                cut = "not-finite"
            except Stuck:
                cut = "grammar"
            new = answer[n:]
            self.n_taken += len(flat(new[:-1]))
            text += self._speak(letters, self.frame_id, flat(new))
            if self.grammar.complete or cut:  # a complete answer is never evaluated: nothing will follow it
                break
            position += len(flat(new[:-1]))  # these were in the draft
            known = known[len(new) - 1 :]
            if draft := self.grammar.rest_of(known):
                known = draft
            self.language.forget(ACT, position)
            tokens = [*new[-1], *flat(draft[:-1])]
            self.n_drafted += len(tokens) - len(new[-1])
            logits = self.language.decode_tokens(tokens, position, want=_ends(len(new[-1]), draft[:-1]))
            position += len(new[-1])
        if self.config.language.words:
            self.emit(Piece(lane="action", frame_id=self.frame_id, text="", last=True, cut=cut))
        if self.config.language.draft and not cut:
            self.answer = answer
        return text, cut

    def look(self, image: np.ndarray, frame_id: int) -> None:
        """Evaluate a frame without asking for an action: for a question while paused. Raises NotFinite."""
        rows = self._see(image)
        self._evaluate(rows, self.closing_rows[:1], [])
        self.frame_stop, self.frame_id = len(self.prefix) + len(rows) + 1, frame_id

    def begin(self, lane: Lane, request: str, question: str) -> Sentence | None:
        """Start a sentence about the frame that ACT holds. None: it ended before it began."""
        tokens = [*self.language.tokens(question), self.special["inst_end"]]
        sentence = Sentence(lane, request, self.frame_id, 0, 0, 0, codecs.getincrementaldecoder("utf-8")("replace"))
        if len(tokens) > self.room:
            self.end(sentence, "length")
            return None
        self.language.share(self.frame_stop)
        logits = self.language.decode_tokens(tokens, self.frame_stop, WORDS)
        sentence.position = self.frame_stop + len(tokens)
        return self._go_on(sentence, logits)

    def step(self, sentence: Sentence) -> Sentence | None:
        """One more token. None: the sentence ended."""
        logits = self.language.decode_tokens([sentence.token], sentence.position, WORDS)
        sentence.position += 1
        return self._go_on(sentence, logits)

    def end(self, sentence: Sentence, cut: str) -> None:
        rest = sentence.letters.decode(b"", final=True)
        self.emit(
            Piece(
                lane=sentence.lane, frame_id=sentence.frame_id, text=rest, request=sentence.request, last=True, cut=cut
            )
        )
        self.language.forget(WORDS, 0)

    def keep_warm(self) -> None:
        """One real decode step behind the frame, thrown away; the frame stays, a question may still come."""
        start = self.frame_stop or len(self.prefix)
        self.language.forget(ACT, start)
        self.language.decode_tokens([self.special["inst_end"]], start)
        self.language.forget(ACT, start)

    def _see(self, image: np.ndarray) -> np.ndarray:
        """The frame's rows, in the shared buffer, with room behind them. Raises NotFinite: 4-bit kernels take NaN for
        a number, and the logits would look fine."""
        self.frame_stop = 0
        rows = self.encoder.encode(image)
        if not np.isfinite(rows).all():
            raise NotFinite
        self.rows[: len(rows)] = rows
        return self.rows[: len(rows)]

    def _evaluate(self, rows: np.ndarray, closing: np.ndarray, draft: Steps) -> np.ndarray:
        """-> logits behind the closing text and behind each step of the draft, (1 + len(draft), n_vocab)."""
        n = len(rows) + len(closing)
        self.rows[len(rows) : n] = closing
        drafted = flat(draft)
        if drafted:
            self.rows[n : n + len(drafted)] = self.language.embed(drafted)
        self.language.forget(ACT, len(self.prefix))
        return self.language.decode_rows(self.rows[: n + len(drafted)], len(self.prefix), want=_ends(n, draft))

    def _speak(self, letters: codecs.IncrementalDecoder, frame_id: int, tokens: list[int]) -> str:
        text = letters.decode(b"".join(self.language.piece(token) for token in tokens))
        if text and self.config.language.words:
            self.emit(Piece(lane="action", frame_id=frame_id, text=text))
        return text

    def _go_on(self, sentence: Sentence, logits: np.ndarray) -> Sentence | None:
        try:
            token = greedy(logits)
        except NotFinite:
            self.end(sentence, "not-finite")
            return None
        if self.language.is_end(token):
            self.end(sentence, "")
            return None
        sentence.token, sentence.n_tokens = token, sentence.n_tokens + 1
        if text := sentence.letters.decode(self.language.piece(token)):
            self.emit(Piece(lane=sentence.lane, frame_id=sentence.frame_id, text=text, request=sentence.request))
        if sentence.n_tokens >= self.config.language.max_words_tokens:
            self.end(sentence, "length")
            return None
        return sentence


def _ends(n: int, steps: Steps) -> list[int]:
    """Where logits are wanted: behind the first n rows, and behind each step that follows them."""
    return list(itertools.accumulate([n - 1, *map(len, steps)]))


class Loop:
    """Newest frame in, one proposal out, words in between; commands are taken between two steps."""

    def __init__(self, engine: Engine, slot: Slot, events: socket.socket) -> None:
        self.engine, self.slot, self.events = engine, slot, events
        self.emit = engine.emit
        self.seen_seq = 0
        self.task_id = -1
        self.paused = False
        self.questions: deque[Ask] = deque()
        self.sentence: Sentence | None = None
        self.described_id = 0  # the frame last described: once is enough
        self.budget = vision.Budget(engine.config.vision.max_tokens)
        self.idle_since = time.monotonic()
        self._poll = select.poll()
        self._poll.register(slot, select.POLLIN)
        self._poll.register(events, select.POLLIN)

    def turn(self) -> None:
        self._commands()
        if self.task_id < 0:  # nothing was asked of us yet
            self._wait()
            return
        frame = self.slot.newest(self.seen_seq)
        if frame and (not self.paused or self.questions):
            self._answer(frame)
            self.idle_since = time.monotonic()
        if self.questions and self.sentence is not None and self.sentence.lane == "describe":
            self._cut("asked")  # somebody waits for an answer; nobody waits for a description
        if self.sentence is None:
            self._begin()
        if self.sentence is not None:
            self.sentence = self.engine.step(self.sentence)
            self.idle_since = time.monotonic()
        elif not frame or self.paused:
            self._wait()

    def _commands(self) -> None:
        while select.select([self.events], [], [], 0)[0]:
            payload = self.events.recv(worker.MAX_EVENT_BYTES)
            if not payload:
                raise BrokenPipeError  # the supervisor is gone
            command = decode_model_command(payload)
            if isinstance(command, Ask):
                self.questions.append(command)
            elif isinstance(command, SetPaused):
                self.paused = command.paused
            else:
                self._instruct(command)

    def _instruct(self, command: Instruct) -> None:
        if self.sentence is not None:
            self._cut("instruct")
        engine, error = self.engine, ""
        try:
            engine.instruct(
                engine.task if command.text is None else command.text,
                engine.adapter if command.adapter is None else command.adapter,
            )
            self.task_id = command.task_id
        except Refused as refused:
            error = str(refused)
        self.emit(Instructed(task_id=command.task_id, text=engine.task, adapter=engine.adapter, error=error))

    def _answer(self, frame: Frame) -> None:
        engine, taken_ns = self.engine, time.monotonic_ns()
        deadline_ns = frame.t_capture_ns + round(engine.config.task.deadline_ms * NS_PER_MS)
        engine.preprocessor.max_tokens = self.budget.choose((deadline_ns - taken_ns) / NS_PER_MS)
        image = engine.preprocessor.image(frame.image)
        if not self.slot.still_valid(frame):
            return  # the camera came round while we read: there is a newer one
        self.seen_seq = frame.seq
        if self.paused:
            with contextlib.suppress(NotFinite):  # then the question waits for a better one
                engine.look(image, frame.frame_id)
            return
        text, cut, stages = "", "late", {"encode": 0.0, "prefill": 0.0, "decode": 0.0}
        started_ns = time.monotonic_ns()
        if started_ns < deadline_ns:
            text, cut, stages = engine.act(image, frame.frame_id, deadline_ns)
            if stages["prefill"]:
                n_tokens = image.shape[0] * image.shape[1] // engine.preprocessor.unit**2
                self.budget.note(n_tokens, stages["encode"] + stages["prefill"], stages["decode"])
        stages["encode"] += (started_ns - taken_ns) / NS_PER_MS  # resizing belongs to it
        queue_ms = (taken_ns - frame.t_capture_ns) / NS_PER_MS
        self.emit(
            Proposal(
                frame_id=frame.frame_id,
                t_capture_ns=frame.t_capture_ns,
                capture_clock=frame.capture_clock,
                frame_seq=frame.seq,
                task_id=self.task_id,
                text=text,
                cut=cut,
                stages_ms=Stages(queue=queue_ms, post=0.0, **stages),
            )
        )

    def _cut(self, why: str) -> None:
        self.engine.end(self.sentence, why)
        self.sentence = None

    def _begin(self) -> None:
        if not self.engine.frame_stop:
            return
        if self.questions:
            ask = self.questions.popleft()
            self.sentence = self.engine.begin("answer", ask.request, ask.question)
        elif (describe := self.engine.config.language.describe) and self.described_id != self.engine.frame_id:
            self.described_id = self.engine.frame_id
            self.sentence = self.engine.begin("describe", "", describe)

    def _wait(self) -> None:
        """Until a frame or a command comes; without either, a step now and then keeps caches and clocks warm."""
        if not self._poll.poll(KEEP_WARM_S * 1000) or time.monotonic() - self.idle_since > KEEP_WARM_S:
            self.engine.keep_warm()
            self.emit(Progress("idle"))
            self.idle_since = time.monotonic()


def warm_up(engine: Engine) -> float:
    """A whole frame through everything, milliseconds: the first one allocates, and must not be the vehicle's."""
    start = time.monotonic()
    image = engine.preprocessor.image(np.full(WARM_UP_FRAME, 128, np.uint8))
    quiet, engine.emit = engine.emit, lambda event: None
    try:
        engine.instruct("")
        engine.act(image, 0, time.monotonic_ns() + 10**12)
        sentence = engine.begin("describe", "", ACT_CLOSING)
        if sentence is not None:
            engine.end(sentence, "")
    finally:
        engine.emit = quiet
    return (time.monotonic() - start) * 1000


def main() -> int:
    slot, events, first = worker.attach()
    config = msgspec.msgpack.decode(first, type=Config)

    def emit(event: object) -> None:
        events.send(encode(event))

    start = time.monotonic()
    try:
        model_bundle = bundle.read_manifest(config.bundle)  # the supervisor has verified the files
        planned = memory.plan(config, model_bundle.manifest, health.mem_available_mib(), memory.adapters_mib(config))
        for key, value in planned.given_up.items():
            emit(Note(f"memory is short: {key} is {value} instead of what was configured"))
        config = planned.config
        engine = Engine(config, model_bundle, actions.load(config.task.space), emit)
        emit(Progress("warm-up"))
        warmup_ms = warm_up(engine)
    except (LanguageError, vision.VisionError, bundle.BundleError, memory.TooLittle, ValueError) as error:
        emit(CannotStart(reason=str(error), configured=False))
        return 1
    except (Refused, ConfigError) as error:
        emit(CannotStart(reason=str(error), configured=True))
        return 1
    emit(Ready(vision=engine.encoder.provider, load_s=time.monotonic() - start, warmup_ms=warmup_ms))
    loop = Loop(engine, slot, events)
    while True:
        loop.turn()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)  # the supervisor is gone
