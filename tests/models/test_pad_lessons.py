"""Lessons: the seed decides them, the rule gives their actions, and every case is frequent enough."""

from __future__ import annotations

import hashlib
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.pad_pilot import lessons, task
from models.pad_pilot.lessons import Grounds, Lesson, arrangement, blank_picture, lesson
from models.pad_pilot.scene import COLOURS, SHAPES, Pad, Pose, homography, sights

pytestmark = pytest.mark.filterwarnings("error")

SIZES = [(140, 140), (126, 168), (168, 126)]
# The answers in five languages when there is no pad, and about a pad that is not in the picture.
NO_PADS = {"No pads.", "Aucune.", "Keine.", "Ninguna.", "없어요.", "None."}
NO_OR_NOT_IN_VIEW = {
    "No.",
    "Non.",
    "Nein.",
    "아니요.",
    "Not in view.",
    "Pas en vue.",
    "Nicht im Bild.",
    "No se ve.",
    "안 보여요.",
}


@pytest.fixture(scope="module")
def grounds() -> Grounds:
    return Grounds([], 7, 10)


@pytest.fixture(scope="module")
def many(grounds) -> list[Lesson]:
    return [lesson(np.random.default_rng([7, i]), grounds) for i in range(300)]


# -- lessons ----------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_lesson(grounds):
    """Also with another stock of grounds of the same seed, in which the grounds are made in another order."""
    other = Grounds([], 7, 10)
    first, same, different = (
        lesson(np.random.default_rng([1, i]), g) for i, g in ((5, other), (5, grounds), (6, grounds))
    )
    assert (first.picture == same.picture).all() and first[1:] == same[1:]
    assert first.exercises != different.exercises and not np.array_equal(first.picture, different.picture)


def test_every_order_has_the_action_of_the_rule(many):
    for example in many:
        assert len(example.exercises) == 3
        for exercise in example.exercises:
            assert exercise.action == task.action(exercise.order, example.sights) and exercise.action is not None
            assert exercise.instruction.strip() and len(exercise.exchanges) <= 4
            assert all(exchange.question.strip() and exchange.answer.strip() for exchange in exercise.exchanges)


def test_the_sights_are_the_pads_in_the_picture(many):
    assert all(task.is_in_picture(s) is not False for example in many for s in example.sights)
    assert {len(example.sights) for example in many} == {0, 1, 2, 3}


def test_the_answer_about_a_pad_says_whether_the_pad_is_in_the_picture(many):
    """If no pad among the sights has this colour and shape, the answer is "no" or "not in view"."""
    n = Counter()
    for example in many:
        pads = {(s.pad.colour, s.pad.shape) for s in example.sights}
        for exchange in (exchange for exercise in example.exercises for exchange in exercise.exchanges):
            if exchange.about is None:
                n["about no pad"] += 1
            else:
                assert (exchange.about in pads) == (exchange.answer not in NO_OR_NOT_IN_VIEW), exchange
                n["in the picture" if exchange.about in pads else "not in the picture"] += 1
    assert n["about no pad"] > 1000 and min(n["in the picture"], n["not in the picture"]) > 300, n


def is_absent(order: task.Order) -> bool:
    """Whether no world contains a pad of this kind."""
    return order.colour not in COLOURS or order.shape not in SHAPES


def test_every_action_order_and_pad_is_frequent_enough(many):
    """A model does not learn a case that is not in the training data."""
    n = Counter(exercise.action["action"] for example in many for exercise in example.exercises)
    assert n["move"] > 400 and n["search"] > 100 and n["hold"] > 80 and n["land"] > 30, n
    orders = Counter(exercise.order.kind for example in many for exercise in example.exercises)
    assert min(orders[kind] for kind in ("goto", "land", "hold", "nothing")) > 30, orders
    pads = Counter((s.pad.colour, s.pad.shape) for example in many for s in example.sights)
    assert len(pads) == len(COLOURS) * len(SHAPES) and min(pads.values()) > 5
    assert sum(len(exercise.exchanges) == 4 for example in many for exercise in example.exercises) > 700
    exercises = [exercise for example in many for exercise in example.exercises]
    absent = [one for one in exercises if one.order.kind in ("goto", "land") and is_absent(one.order)]
    assert len(absent) > 9 and {exercise.action["action"] for exercise in absent} == {"search"}
    assert {exercise.order.kind for exercise in absent} == {"goto", "land"}


def test_colours_in_the_picture_are_those_of_the_sights(many):
    """In any light, red is the largest channel of a red pad, blue the smallest channel of a yellow pad, and so on."""
    n_right = n_pads = 0
    for example in many:
        for s in example.sights:
            if s.pad.shape == "ring" or not task.is_in_picture(s):
                continue  # a ring is white in the middle
            x, y = round(69.5 + 70 * s.right), round(69.5 + 70 * s.down)
            red, green, blue = example.picture[y - 1 : y + 2, x - 1 : x + 2].mean((0, 1))
            n_pads += 1
            n_right += {
                "red": red > max(green, blue),
                "green": green > max(red, blue),
                "blue": blue > max(red, green),
                "yellow": blue < min(red, green),
                "purple": green < min(red, blue),
            }[s.pad.colour]
    assert n_pads > 150 and n_right / n_pads > 0.98, (n_right, n_pads)


def test_a_blank_picture_has_no_pads(grounds, monkeypatch):
    monkeypatch.setattr(lessons, "BLANK_SHARE", 1.0)
    for i in range(60):
        example = lesson(np.random.default_rng([8, i]), grounds, size_px=SIZES[i % 3])
        assert example.sights == []
        assert example.picture.shape == (*SIZES[i % 3], 3) and example.picture.dtype == np.uint8
        for exercise in example.exercises:
            assert exercise.action["action"] == ("search" if exercise.order.kind in ("goto", "land") else "hold")
            assert len(exercise.exchanges) == 4  # every question has an answer
            for exchange in exercise.exchanges:
                assert exchange.answer in (NO_PADS if exchange.about is None else NO_OR_NOT_IN_VIEW)


def test_blank_pictures_are_black_white_plain_or_noise():
    rng = np.random.default_rng(9)
    pictures = [blank_picture(rng, (56, 84)) for _ in range(80)]
    kinds = Counter(
        "black" if p.max() < 12 else "white" if p.min() > 242 else "plain" if p.std((0, 1)).max() == 0 else "noise"
        for p in pictures
    )
    assert set(kinds) == {"black", "white", "plain", "noise"} and min(kinds.values()) > 5
    assert all(p.shape == (56, 84, 3) and p.dtype == np.uint8 and p.flags.writeable for p in pictures)


@pytest.mark.parametrize("size_px", SIZES[1:])
def test_lessons_with_other_sizes_of_the_picture(grounds, size_px):
    for i in range(30):
        example = lesson(np.random.default_rng([10, i]), grounds, 2, 1, size_px)
        assert example.picture.shape == (*size_px, 3) and example.picture.dtype == np.uint8
        assert len(example.exercises) == 2
        assert all(len(exercise.exchanges) <= 1 for exercise in example.exercises)


@pytest.mark.parametrize("size_px", SIZES[1:])
def test_a_pad_that_counts_as_in_the_picture_has_its_centre_in_it(grounds, monkeypatch, size_px):
    monkeypatch.setattr(lessons, "render", lambda *_: np.zeros((*size_px, 3), np.uint8))  # only the sights matter here
    edge = np.array(size_px) / max(size_px)  # down, right
    for i in range(300):
        for s in lesson(np.random.default_rng([11, i]), grounds, 0, 0, size_px).sights:
            if task.is_in_picture(s):
                assert abs(s.down) <= edge[0] and abs(s.right) <= edge[1], (i, s)
            assert s.edge == tuple(edge[::-1])


@pytest.mark.parametrize("size_px", SIZES[1:])
def test_the_position_of_the_first_pad_scales_with_the_edge_of_the_picture(size_px):
    """With the same seed, it is at the same share of the way to the edge as in a square picture."""
    for seed in range(100):
        (in_square, pose), (in_other, same) = (
            arrangement(np.random.default_rng(seed), size) for size in (SIZES[0], size_px)
        )
        if in_square:
            (a,), (b,) = sights(in_square[:1], pose), sights(in_other[:1], same, size_px)
            assert pose == same and (b.right / b.edge[0], b.down / b.edge[1]) == pytest.approx(
                (a.right, a.down), abs=1e-6
            )


def test_a_crowded_picture_has_up_to_nine_pads(grounds):
    """Training uses crowded pictures without orders. Orders about them have the action of the rule, too."""
    crowds = [lesson(np.random.default_rng([14, i]), grounds, 2, 4, SIZES[i % 3], crowded=True) for i in range(60)]
    sizes = [len(example.sights) for example in crowds]
    assert max(sizes) in range(6, 10) and np.mean(sizes) > 3
    for example in crowds:
        assert len({(s.pad.colour, s.pad.shape) for s in example.sights}) == len(example.sights)
        for exercise in example.exercises:
            assert exercise.action == task.action(exercise.order, example.sights) is not None


def test_a_lesson_without_orders_has_no_exercises(grounds):
    """The training stage of the vision tower uses such lessons."""
    example = lesson(np.random.default_rng(3), grounds, n_orders=0)
    assert example.exercises == [] and example.picture.shape == (140, 140, 3)


# -- positions of pads ------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(SIZES), st.booleans())
def test_pads_do_not_touch_and_are_of_different_kinds(seed, size_px, crowded):
    pads, pose = arrangement(np.random.default_rng(seed), size_px, crowded)
    assert len(pads) <= (9 if crowded else 3) and len({(p.colour, p.shape) for p in pads}) == len(pads)
    for i, a in enumerate(pads):
        assert a.colour in COLOURS and a.shape in SHAPES
        assert lessons.PAD_RADIUS_M[0] <= a.radius_m <= lessons.PAD_RADIUS_M[1]
        for b in pads[:i]:
            assert math.hypot(a.north_m - b.north_m, a.east_m - b.east_m) > a.radius_m + b.radius_m
    assert pose.height_m > 0.5 and max(abs(pose.roll_rad), abs(pose.pitch_rad)) <= 0.2
    assert len(sights(pads, pose, size_px)) == len(pads)  # no pad is behind the horizon


def test_the_apparent_radius_of_the_first_pad_covers_the_whole_range():
    """The first pad is the pad of most orders. The range is that of the pictures in flights."""
    sizes = []
    for seed in range(400):
        pads, pose = arrangement(np.random.default_rng(seed), (140, 140))
        if pads:  # level, straight above it
            (sight,) = sights(pads[:1], Pose(pads[0].north_m, pads[0].east_m, pose.height_m))
            sizes.append(sight.radius)
    low, high = lessons.APPARENT_RADIUS
    assert low - 1e-9 <= min(sizes) < 1.2 * low and 0.9 * high < max(sizes) <= high + 1e-9
    near = np.mean(np.array(sizes) > task.LANDING_RADIUS[0])
    assert 0.1 < near < 0.4  # low enough to land


@given(
    st.builds(
        Pose,
        *(st.floats(-5, 5) for _ in range(2)),
        st.floats(0.5, 10),
        st.floats(0, 6.3),
        st.floats(-0.2, 0.2),
        st.floats(-0.2, 0.2),
    ),
    st.floats(-1.6, 1.6),
    st.floats(-1.6, 1.6),
)
def test_a_ground_point_appears_at_its_position_in_the_picture(pose, right, down):
    """Against the inverse functions: sights(), and homography() for pixels."""
    north, east = lessons.ground_point(pose, right, down)
    (sight,) = sights([Pad("red", "disc", north, east, 0.5, 0.0)], pose)
    assert (sight.right, sight.down) == pytest.approx((right, down), abs=1e-6)
    x, y, w = homography(pose, 140, 140) @ (north, east, 1)
    assert (x / w, y / w) == pytest.approx((69.5 + 70 * right, 69.5 + 70 * down), abs=1e-3)


def test_no_object_reaches_under_the_rim_of_a_plate(grounds, monkeypatch):
    """A red object beside a plate could look like a part of the pad."""
    drawn = []
    monkeypatch.setattr(lessons, "render", lambda pads, *args: drawn.append((pads, args[5])) or np.zeros((140, 140, 3)))
    for i in range(200):
        lesson(np.random.default_rng([12, i]), grounds, 0)
    pairs = [(item[0], pad) for pads, objects in drawn for item in objects for pad in pads]
    assert len(pairs) > 200
    for outline, pad in pairs:
        corners = np.vstack([outline, (outline + np.roll(outline, 1, 0)) / 2])  # and half way between them
        assert np.hypot(*(corners - (pad.north_m, pad.east_m)).T).min() > pad.radius_m


# -- grounds ----------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_grounds_and_each_ground_is_made_once():
    photographs = [np.full((20, 30, 3), value, np.uint8) for value in (10, 200)]
    a, b, other = Grounds(photographs, 3, 4), Grounds(photographs, 3, 4), Grounds(photographs, 4, 4)
    rngs = [np.random.default_rng(1) for _ in range(3)]
    picked = []
    for _ in range(20):
        x, y, z = (g.pick(rng) for g, rng in zip((a, b, other), rngs, strict=True))
        assert (x.image == y.image).all() and x.metres_per_px == y.metres_per_px
        assert not np.array_equal(x.image, z.image) or x.metres_per_px != z.metres_per_px
        picked.append(x)
    assert len({id(ground.image) for ground in picked}) == 4
    assert len({ground.metres_per_px for ground in picked}) == 20  # another scale each time


def test_half_the_grounds_are_photographs_or_all_of_them_or_none():
    """The photograph of this test has one colour. A synthetic ground has several colours."""
    photographs = [np.full((20, 30, 3), 90, np.uint8)]
    for grounds, low, high in (
        (Grounds(photographs, 3, 16), 0.3, 0.7),
        (Grounds(photographs, 3, 16, only_photographs=True), 1.0, 1.0),
        (Grounds([], 3, 8, only_photographs=True), 0.0, 0.0),
        (Grounds([], 3, 8), 0.0, 0.0),
    ):
        rng = np.random.default_rng(2)
        share = np.mean([grounds.pick(rng).image[::8, ::8].std((0, 1)).max() == 0 for _ in range(60)])
        assert low <= share <= high


def test_the_held_out_photographs_are_not_in_the_training_data():
    pytest.importorskip("skimage")
    training, held_out = lessons.training_photographs(), lessons.held_out_photographs()
    assert len(training) == 13 and len(held_out) == len(lessons.HELD_OUT) == 2
    for image in (*training, *held_out):
        assert image.ndim == 3 and image.shape[2] == 3 and min(image.shape[:2]) >= 300
        assert image.dtype == np.uint8 and image.flags.c_contiguous
    known = {hashlib.sha256(image.tobytes()).digest() for image in training}
    assert len(known) == 13 and not known & {hashlib.sha256(image.tobytes()).digest() for image in held_out}
