"""The board in the status, the energy of an action, and the governor in the supervisor's own loop."""

from __future__ import annotations

import re
import time

import msgspec
import pytest

from edge_agent.board.sensors import Board, Zone
from edge_agent.bundle.manifest import Bundle, VisionInfo
from edge_agent.config import GovernorConfig, VisionConfig
from edge_agent.ipc.events import GpuReading, LimitLoad
from edge_agent.supervisor.board_monitor import NO_LIMIT, BoardReader, load_command
from edge_agent.supervisor.governor import LoadLimit
from tests.harness.in_process import FAKE_BUNDLE, FakeVerification, InProcess, commands, fake_config
from tests.harness.thermal import HotBoard

ORIN = Board(
    zones=(Zone("cpu-thermal", 50.0, 99.0), Zone("cv0-thermal", None, 99.0)),
    power_w=8.0,
    power_limit_w=25.0,
    throttle_reasons=(),
    cpu_mhz=1510.0,
    gpu_mhz=611.0,
)
CARD = GpuReading(
    power_w=60.0, temperature_c=70.0, throttle_at_c=87.0, throttle_reasons=("power limit",), clock_mhz=1500.0
)


class FakeReader:
    """In place of the thread that reads the sensors."""

    def __init__(self, board: Board | None) -> None:
        self.board = board

    def start(self) -> None:
        pass

    def newest(self, now_ns: int) -> Board | None:
        return self.board


def daemon(board: Board | None = ORIN, verification: FakeVerification | None = None, **config) -> InProcess:
    running = InProcess(fake_config(**config), verification=verification)
    running.supervisor.board.reader = FakeReader(board)
    running.make_ready()
    return running


@pytest.fixture
def running():
    with daemon() as supervised:
        yield supervised


def status(running: InProcess):
    return running.publisher.stream("status")[-1]


def test_the_status_has_what_the_sensors_say(running):
    running.turn(1.1)
    board = status(running).board
    assert (status(running).temperature_c, board.power_w, board.cpu_mhz, board.gpu_mhz) == (50.0, 8.0, 1510.0, 611.0)
    assert (board.throttle_reasons, board.gpu_temperature_c) == ([], None)
    assert status(running).governor.level == 0 and status(running).governor.reason == ""


def test_without_sensors_everything_is_unknown_and_nothing_is_limited():
    with daemon(None) as running:
        for _ in range(5):
            running.turn(1.1)
        board = msgspec.to_builtins(status(running).board)
        assert set(board.values()) == {None} and status(running).temperature_c is None
        assert commands(running, LimitLoad) == []


def test_a_card_has_the_power_where_the_board_does_not_tell_it():
    with daemon(ORIN._replace(power_w=None)) as running:
        running.model.emit(CARD)
        running.turn(1.1)
        board = status(running).board
        assert (board.power_w, board.gpu_mhz, board.gpu_temperature_c) == (60.0, 1500.0, 70.0)
        assert status(running).temperature_c == 70.0 and board.throttle_reasons == ["power limit"]
        assert running.supervisor.board.heat().throttle_reasons == ()  # a card at its own limit is no hot board
        assert running.supervisor.board.heat().headroom_c == 17.0
        running.turn(6.0)
        running.turn(1.1)  # the card has said nothing for too long
        assert (status(running).board.power_w, status(running).temperature_c) == (None, 50.0)


def test_a_reading_of_the_gpu_is_no_sign_of_progress(running):
    n_events, progress_ns = running.counters.model_events, running.supervisor.model.last_progress_ns
    running.clock.advance(1.0)
    running.model.emit(CARD, GpuReading())
    running.turn()
    assert (running.counters.model_events, running.supervisor.model.last_progress_ns) == (n_events, progress_ns)


@pytest.mark.parametrize(
    "reading",
    [
        GpuReading(power_w=float("nan")),
        GpuReading(temperature_c=float("inf")),
        GpuReading(throttle_at_c=float("-inf")),
        GpuReading(clock_mhz=float("nan")),
        GpuReading(throttle_reasons=("x" * 201,)),
        GpuReading(throttle_reasons=("x",) * 65),
    ],
)
def test_a_reading_that_cannot_be_right_is_a_fault_of_the_model_process(running, reading):
    running.model.emit(reading)
    running.turn()
    assert running.state[0] == "fault" and "a reading of the GPU out of bounds" in running.state[1]


# -- energy -----------------------------------------------------------------------------------------------------------


def test_the_energy_of_an_action_is_that_of_the_last_seconds(running):
    assert status(running).board.energy_j_per_action is None
    for _ in range(40):
        running.answer()
        running.answer()
        running.turn(1.0)
    assert status(running).board.energy_j_per_action == pytest.approx(4.0)  # 8 W, two actions a second
    for _ in range(60):
        running.answer()
        running.turn(1.0)
    assert status(running).board.energy_j_per_action == pytest.approx(8.0)
    for _ in range(32):
        running.turn(1.0)
    assert status(running).board.energy_j_per_action is None  # no action


def test_while_the_power_was_unknown_the_energy_is_unknown(running):
    for second in range(8):
        running.supervisor.board.reader.board = None if second == 2 else ORIN
        running.answer()
        running.turn(1.0)
        known = status(running).board.energy_j_per_action is not None
        assert known == (second not in (0, 2, 3)), second  # of two seconds at least


# -- the governor -----------------------------------------------------------------------------------------------------


def hot(headroom_c: float) -> Board:
    return ORIN._replace(zones=(Zone("gpu-thermal", 99.0 - headroom_c, 99.0),))


def heat_up(running: InProcess) -> None:
    """To 1 °C below the limit, while frames are answered."""
    for headroom_c in (30.0, 20.0, 1.0):
        running.supervisor.board.reader.board = hot(headroom_c)
        running.answer()
        running.turn(1.0)
    running.turn()


def test_a_hot_board_limits_the_model_and_the_status_says_why(running, capfd):
    heat_up(running)
    (limit,) = commands(running, LimitLoad)
    assert limit.max_image_tokens == 128 and limit.min_interval_ms > 0 and not limit.describe
    said = status(running).governor
    assert (said.level, said.max_image_tokens) == (2, 128) and said.max_rate_hz == pytest.approx(
        1000 / limit.min_interval_ms
    )
    assert "at most 128 image tokens" in said.reason and "1 °C below the limit" in said.reason
    assert "governor: at most 128 image tokens" in capfd.readouterr().err
    assert running.state == ("running", "")


FIXED = VisionInfo(patch=14, merge=4, image_size=896, mean=(0.5,) * 3, std=(0.5,) * 3, fixed=(896, 896))


def bundle_of(vision: VisionInfo | None) -> Bundle:
    manifest = msgspec.structs.replace(FAKE_BUNDLE.manifest, vision=vision)
    return msgspec.structs.replace(FAKE_BUNDLE, manifest=manifest)


@pytest.mark.parametrize("vision", [None, FIXED])
def test_a_model_without_a_choice_of_image_tokens_has_its_rate_lowered_at_once(vision, capfd):
    """A text-only model, and an encoder that takes images of one size: fewer tokens would save nothing."""
    with daemon(verification=FakeVerification(bundle_of(vision))) as running:
        heat_up(running)
        (limit,) = commands(running, LimitLoad)
        assert (limit.max_image_tokens, limit.describe) == (0, False) and limit.min_interval_ms > 0
        assert status(running).governor.max_image_tokens is None
        assert status(running).governor.max_rate_hz == pytest.approx(1000 / limit.min_interval_ms)
    assert re.search(r"governor: at most \S+ answers/s: temperature 1 °C below", capfd.readouterr().err)


def test_a_limit_before_the_rate_is_known_says_so():
    with daemon(hot(1.0), verification=FakeVerification(bundle_of(None))) as running:
        running.turn(1.1)
        assert "no rate is known yet: temperature" in status(running).governor.reason


def test_the_rate_counts_from_the_first_answer(running):
    """Half a minute without an answer, as while a model loads, then five a second."""
    board = running.supervisor.board
    for _ in range(32):
        running.turn(1.0)
    assert board.answers_per_s is None
    for _ in range(3):
        for _ in range(5):
            running.answer()
        running.turn(1.0)
    assert board.answers_per_s == pytest.approx(5.0)
    for _ in range(32):
        running.answer()
        running.turn(1.0)
    assert board.answers_per_s == pytest.approx(1.0, abs=0.1)


def test_a_new_model_process_gets_the_limit_in_force(running):
    running.supervisor.board.reader.board = hot(1.0)
    running.turn(1.0)
    running.turn()
    first = commands(running, LimitLoad)
    running.restart_model()
    running.load_model()
    running.turn()
    assert len(first) == 1 and commands(running, LimitLoad)[0].max_image_tokens <= first[0].max_image_tokens


def test_a_limit_that_the_process_did_not_take_is_sent_again(running):
    running.model.takes_messages = False
    running.supervisor.board.reader.board = hot(1.0)
    running.turn(1.0)
    assert commands(running, LimitLoad) == []
    running.model.takes_messages = True
    running.turn()
    assert len(commands(running, LimitLoad)) == 1


def test_the_governor_can_be_switched_off():
    with daemon(hot(-5.0), governor=GovernorConfig(enabled=False)) as running:
        for _ in range(5):
            running.turn(1.1)
        assert commands(running, LimitLoad) == [] and status(running).governor.level == 0


@pytest.mark.parametrize("limit", [{"max_temperature_c": 45.0}, {"max_power_w": 7.0}])
def test_a_configured_limit_counts_before_the_boards_own(limit):
    with daemon(governor=GovernorConfig(**limit)) as running:
        for _ in range(3):
            running.turn(1.1)
        assert status(running).governor.level > 0


def test_no_deadline_and_no_validity_changes(running):
    running.answer()
    before = running.publisher.stream("actions")[-1]
    running.supervisor.board.reader.board = hot(-5.0)
    for _ in range(30):
        running.answer()
        running.turn(1.0)
    after = running.publisher.stream("actions")[-1]
    assert status(running).governor.level > 5
    assert after.valid_for_ms == before.valid_for_ms and running.supervisor.gate.deadline_ms == 2000


def test_the_commands_of_a_limit():
    assert load_command(LoadLimit()) == NO_LIMIT
    assert load_command(LoadLimit(64, 8.0)) == LimitLoad(max_image_tokens=64, min_interval_ms=125.0, describe=False)
    assert load_command(LoadLimit(64, None)) == LimitLoad(max_image_tokens=64, describe=False)


@pytest.mark.parametrize("governed", [True, False])
def test_the_whole_loop_keeps_a_simulated_board_from_throttling(governed):
    """The supervisor's loop, its commands to a model process that obeys them, and a board that gets hot by its work."""
    board, config = HotBoard(sink_s=30.0), {"governor": GovernorConfig(enabled=governed)}
    with daemon(**config, vision=VisionConfig(max_image_tokens=256)) as running:
        for _second in range(300):
            limits = commands(running, LimitLoad)
            limit = limits[-1] if limits else NO_LIMIT
            rate = 1000 / limit.min_interval_ms if limit.min_interval_ms else 60.0
            rate = board.run_for(1.0, limit.max_image_tokens or 256, rate)
            running.supervisor.board.reader.board = ORIN._replace(
                zones=(Zone("gpu-thermal", board.chip_c, board.limit_c),),
                power_w=board.power_w,
                throttle_reasons=("temperature: gpu at step 1",) if board.is_throttled else (),
            )
            running.counters.actions += round(rate)  # what the gate would have counted
            running.supervisor.model.note_progress()
            running.push_frame()
            running.turn(1.0)
        assert (board.throttled_s == 0) == governed
        assert (status(running).governor.level > 0) == governed
        assert status(running).board.energy_j_per_action == pytest.approx(board.power_w / rate, rel=0.3)


# -- the thread -------------------------------------------------------------------------------------------------------


def test_a_reading_that_is_too_old_is_unknown():
    now_ns = [10**12]
    reader = BoardReader(lambda: now_ns[0], lambda: ORIN)
    assert reader.newest(now_ns[0]) is None
    reader.read_once()
    assert reader.newest(now_ns[0] + 4 * 10**9) is ORIN
    assert reader.newest(now_ns[0] + 6 * 10**9) is None


def test_the_sensors_are_read_in_a_thread():
    reader = BoardReader(time.monotonic_ns, lambda: ORIN)
    reader.start()
    while reader.newest(time.monotonic_ns()) is None:
        time.sleep(0.01)
    assert reader.newest(time.monotonic_ns()) is ORIN


def test_a_sensor_that_raises_does_not_end_the_thread(capfd):
    readings = iter([TypeError("can't concat NoneType to bytes"), TypeError("again"), ORIN])

    def read():
        found = next(readings, ORIN)
        if isinstance(found, Exception):
            raise found
        return found

    reader = BoardReader(time.monotonic_ns, read)
    for _ in range(3):
        reader.read_once()
    assert reader.newest(time.monotonic_ns()) is ORIN
    assert capfd.readouterr().err.count("board: the sensors cannot be read: TypeError: can't concat") == 1


def test_a_machine_without_processes_left_reads_no_sensor(monkeypatch, capfd):
    def refuse(*_arguments, **_options):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", refuse)
    BoardReader().start()
    assert "board: no sensor is read: can't start new thread" in capfd.readouterr().err
