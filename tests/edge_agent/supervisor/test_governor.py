"""The governor on simulated boards: it gives way before the board throttles, and takes back what it can."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from edge_agent.ipc.token_sizes import token_sizes
from edge_agent.supervisor import governor as rules
from edge_agent.supervisor.governor import Governor, Heat, LoadLimit
from tests.harness.thermal import HotBoard

QUARTER_S, CAMERA_PER_S = 900, 60.0


class Run:
    """One board for a quarter of an hour, with the governor or without it."""

    def __init__(
        self,
        board: HotBoard,
        governed: bool = True,
        max_tokens: int | None = 256,
        noise_c: float = 0.0,
        each_second: Callable[[int, HotBoard], None] = lambda second, board: None,
        seed: int = 1,
    ) -> None:
        self.board, self.governor = board, Governor.of(max_tokens)
        self.levels: list[int] = []
        noise = random.Random(seed)
        for second in range(QUARTER_S):
            each_second(second, board)
            limit = self.governor.limit if governed else LoadLimit()
            wanted_per_s = min(CAMERA_PER_S, limit.answers_per_s or CAMERA_PER_S)
            rate = board.run_for(1.0, limit.max_image_tokens or max_tokens or 256, wanted_per_s)
            headroom_c = round(2 * (board.limit_c - board.chip_c + noise.gauss(0, noise_c))) / 2  # sensors have steps
            reasons = ("temperature",) if board.is_throttled else ()
            self.governor = self.governor.update(Heat(headroom_c, None, reasons), rate, float(second))
            self.levels.append(self.governor.level)

    @property
    def n_changes(self) -> int:
        return sum(a != b for a, b in zip(self.levels, self.levels[1:], strict=False))


BOARDS = {
    "Orin-like": {},
    "a small heat sink": {"sink_s": 20.0},
    "a large heat sink": {"sink_s": 300.0},
    "a chip that is far from its sink": {"chip_s": 1.0, "chip_c_w": 1.0},
    "less air": {"sink_c_w": 3.0},
    "started hot": {"sink_c": 85.0, "chip_c": 90.0},
}


@pytest.mark.parametrize("name", BOARDS)
@pytest.mark.parametrize("noise_c", [0.0, 1.0])
def test_a_board_that_would_throttle_does_not_and_keeps_its_actions(name, noise_c):
    without = Run(HotBoard(**BOARDS[name]), governed=False)
    cool = Run(HotBoard(**BOARDS[name], limit_c=1e6), governed=False)
    governed = Run(HotBoard(**BOARDS[name]), noise_c=noise_c)
    assert without.board.throttled_s > 0
    assert governed.board.throttled_s == 0
    assert governed.board.answers >= 0.6 * cool.board.answers
    assert governed.n_changes < 40  # it does not swing


@pytest.mark.parametrize("seed", [2, 3, 4])
def test_a_small_heat_sink_and_a_sensor_with_noise(seed):
    """Such a board goes from the first step to its limit in seconds."""
    assert Run(HotBoard(sink_s=20.0), noise_c=1.0, seed=seed).board.throttled_s == 0


def most_answers(board: HotBoard, margin_c: float = 0.0, image_tokens: int = 64) -> tuple[float, float]:
    """(answers per second for ever; answers in QUARTER_S) that a board can cool at `margin_c` below its limit, with the
    fewest image tokens. The second figure adds the heat that the sink takes until it is hot, and is never reached: a
    sink that is cooler also gives off less."""
    cooled_w = (board.limit_c - margin_c - board.ambient_c) / (board.sink_c_w + board.chip_c_w)
    answer_j = board.answer_j + board.token_j * image_tokens
    sink_j = board.sink_s / board.sink_c_w * (board.ambient_c + board.sink_c_w * cooled_w - board.sink_c)
    per_s = (cooled_w - board.idle_w) / answer_j
    return per_s, per_s * QUARTER_S + sink_j / answer_j


HALF = {
    "a heat sink that is too small": {"sink_c_w": 4.0},
    "joules that fewer image tokens do not save": {"answer_j": 1.5, "token_j": 0.001},
    "50 °C around it": {"ambient_c": 50.0},
}


@pytest.mark.parametrize("noise_c", [0.0, 1.0])
@pytest.mark.parametrize("name", HALF)
def test_a_board_that_can_cool_half_of_the_work_keeps_what_it_can_cool(name, noise_c):
    """Here 60 % of the actions cannot be kept without throttling; the governor keeps what its margin leaves.

    Uncooled, a board answers 1000 / (25 + 0.1 * 256) = 19.8 frames a second. With 64 image tokens, at the limit itself,
    it can cool

        a heat sink that is too small:  (95 - 35) °C / 4.5 °C/W - 5 W = 8.3 W;  / 0.82 J = 10.2 answers/s, 51 %
        joules that tokens do not save: (95 - 35) / 2.9 - 5 = 15.7 W;  / 1.564 J = 10.0 answers/s, 51 %
        50 °C around it:                (95 - 50) / 2.9 - 5 = 10.5 W;  / 0.82 J = 12.8 answers/s, 65 %

    and the heat sink takes 7 % and 5 % more of a quarter of an hour's work until it is hot: 58 % and 56 % at most. The
    third can cool 56 % at 4 °C below its limit, where the governor gives way; for 60 % it would have to stay 2.3 °C
    below the limit.
    """
    board = HALF[name]
    every_per_s = Run(HotBoard(**board, limit_c=1e6), governed=False).board.answers / QUARTER_S
    _, most = most_answers(HotBoard(**board))
    safe_per_s, _ = most_answers(HotBoard(**board), margin_c=rules.LOWER_AT_C)
    assert most < 0.6 * every_per_s * QUARTER_S or safe_per_s < 0.6 * every_per_s
    governed = Run(HotBoard(**board), noise_c=noise_c)
    assert governed.board.throttled_s == 0
    assert governed.board.answers >= 0.95 * safe_per_s * QUARTER_S


def test_a_cool_board_is_left_alone():
    run = Run(HotBoard(sink_c_w=0.5), noise_c=1.0)
    assert set(run.levels) == {0} and run.governor.limit == LoadLimit()


def test_image_tokens_go_first_then_the_rate():
    governor = Governor.of(256).update(Heat(headroom_c=30.0), 20.0, 0.0)
    limits = []
    for second in range(1, 200):
        governor = governor.update(Heat(headroom_c=3.0), 10.0 if governor.level else 20.0, 10.0 * second)
        if governor.level:  # the reading is smoothed
            limits.append(governor.limit)
    seen = list(dict.fromkeys(limits))
    tokens = [limit.max_image_tokens for limit in seen]
    rates = [limit.answers_per_s for limit in seen]
    assert tokens == sorted(tokens, reverse=True) and set(tokens) <= set(token_sizes(256))
    assert rates == sorted(rates, reverse=True) and rates[0] == 20.0
    assert [rate for rate, n in zip(rates, tokens, strict=True) if n > tokens[-1]] == [20.0] * (len(set(tokens)) - 1)
    assert seen[-1] == LoadLimit(64, pytest.approx(20.0 * rules.RATE_STEPS[-1]))  # and it stays there


@pytest.mark.parametrize("max_tokens", [8, 25, 64])
def test_a_model_with_few_image_tokens_has_its_rate_alone(max_tokens):
    governor = Governor.of(max_tokens).update(Heat(headroom_c=1.0), 20.0, 1.0)
    assert governor.limit.max_image_tokens == max_tokens and governor.limit.answers_per_s < 20.0


def test_a_model_without_a_choice_of_image_tokens_keeps_a_board_cool_by_its_rate():
    board = {"answer_j": 1.78, "token_j": 0.0}
    cool = Run(HotBoard(**board, limit_c=1e6), governed=False).board
    governed = Run(HotBoard(**board), max_tokens=None)
    assert governed.board.throttled_s == 0 < governed.board.answers < cool.answers
    assert {governed.governor.steps[level][0] for level in governed.levels} == {None}


def test_when_it_is_cool_again_everything_comes_back_step_by_step():
    def fan(second: int, board: HotBoard) -> None:
        board.sink_c_w = 4.0 if second < 200 else 0.5

    run = Run(HotBoard(), each_second=fan)
    hot, after = max(run.levels), run.levels[-1]
    assert hot > 0 and after == 0
    downward = [b - a for a, b in zip(run.levels[300:], run.levels[301:], strict=False)]
    assert min(downward) == -1  # never two steps back at once
    assert run.governor.limit == LoadLimit() and run.governor.reason == ""


def test_between_the_two_thresholds_nothing_changes():
    governor = Governor.of(256).update(Heat(headroom_c=1.0), 10.0, 1.0)
    level = governor.level
    assert level > 0
    middle = (rules.LOWER_AT_C + rules.RAISE_AT_C) / 2
    for second in range(2, 2000):
        governor = governor.update(Heat(headroom_c=middle), 5.0, float(second))
        assert governor.level == level


def test_a_step_back_that_was_wrong_waits_longer_the_next_time():
    governor, second, waits, since = Governor.of(256), 0, [], 0
    governor = governor.update(Heat(headroom_c=30.0), 10.0, 0.0)
    while len(waits) < 5:
        second += 1
        level = governor.level
        governor = governor.update(Heat(headroom_c=12.0 if level else 1.0), 10.0, float(second))
        if governor.level > level:
            since = second
        elif governor.level < level and governor.level == 0:
            waits.append(second - since)
    assert waits == sorted(waits) and waits[-1] > 4 * waits[0]
    assert governor.raise_every_s <= rules.MAX_RAISE_EVERY_S


@pytest.mark.parametrize(
    ("heat", "word"),
    [
        (Heat(headroom_c=1.0), "1 °C below the limit"),
        (Heat(headroom_c=-3.0), "3 °C above the limit"),
        (Heat(power_share=0.99), "power at 99% of its limit"),
        (Heat(power_share=1.2), "power at 120%"),
        (Heat(throttle_reasons=("under-voltage",)), "the board throttles: under-voltage"),
        (Heat(headroom_c=50.0, throttle_reasons=("temperature",)), "the board throttles: temperature"),
    ],
)
def test_the_reason_is_said(heat, word):
    governor = Governor.of(256).update(heat, 10.0, 0.0)
    assert governor.level > 0 and word in governor.reason


def test_power_alone_is_enough_to_lower_and_to_raise():
    governor = Governor.of(256)
    for second in range(100):
        governor = governor.update(Heat(power_share=0.99), 10.0, float(second))
    assert governor.level > 3
    for second in range(100, 5000):
        governor = governor.update(Heat(power_share=0.5), 10.0, float(second))
    assert governor.level == 0


def test_one_wrong_reading_of_the_power_is_over_within_seconds():
    governor, levels = Governor.of(256), []
    for second in range(100):
        share = 199_999.0 if second == 50 else 0.25
        governor = governor.update(Heat(power_share=share), 10.0, float(second))
        levels.append(governor.level)
    assert max(levels) <= 1 and levels[-1] == 0


def test_a_board_that_tells_nothing_is_never_limited_and_never_released():
    governor = Governor.of(256)
    for second in range(1000):
        governor = governor.update(Heat(), 10.0, float(second))
    assert governor.level == 0
    governor = governor.update(Heat(headroom_c=1.0), 10.0, 1000.0)
    level = governor.level
    for second in range(1001, 3000):
        governor = governor.update(Heat(), 10.0, float(second))
    assert governor.level == level > 0


def test_half_of_the_sensors_now_and_then_do_no_harm():
    """A sensor that comes and goes is not taken for a start."""
    governor = Governor.of(256).update(Heat(headroom_c=20.0), 10.0, 0.0)
    for second in range(1, 500):
        governor = governor.update(Heat(headroom_c=6.0) if second % 2 else Heat(), 10.0, float(second))
    assert governor.level == 0


def test_without_answers_there_is_no_rate_to_keep():
    governor = Governor.of(256).update(Heat(headroom_c=1.0), None, 0.0)
    assert governor.limit == LoadLimit(governor.limit.max_image_tokens, None)
    governor = governor.update(Heat(headroom_c=3.0), 12.0, 1.0)
    assert governor.limit.answers_per_s is not None and governor.limit.answers_per_s <= 12.0


def test_a_pause_of_the_camera_is_not_taken_for_a_low_rate():
    governor = Governor.of(256).update(Heat(headroom_c=30.0), 20.0, 0.0)
    for second in range(1, 6):
        governor = governor.update(Heat(headroom_c=30.0), 2.0, float(second))
    governor = governor.update(Heat(headroom_c=1.0), 0.0, 6.0)
    assert governor.base_rate > 15.0
