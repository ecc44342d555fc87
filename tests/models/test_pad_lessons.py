"""Pictures and what is right under them: from the seed alone, judged by the rule, with enough of everything."""

from __future__ import annotations

import hashlib
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.pad_pilot import lessons, task
from models.pad_pilot.lessons import Grounds, Lesson, arrangement, blank, lesson
from models.pad_pilot.scene import COLOURS, SHAPES, Pad, Pose, homography, sights

pytestmark = pytest.mark.filterwarnings("error")

SIZES = [(140, 140), (126, 168), (168, 126)]
# What other parts write and read: five languages' words for none, and for a pad that is not there.
NONE_SEEN = {"No pads.", "Aucune.", "Keine.", "Ninguna.", "없어요.", "None."}
NO_OR_GONE = {
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
    """Also from another stock of the same seed, in whatever order its grounds were made."""
    other = Grounds([], 7, 10)
    first, same, different = (
        lesson(np.random.default_rng([1, i]), g) for i, g in ((5, other), (5, grounds), (6, grounds))
    )
    assert (first.picture == same.picture).all() and first[1:] == same[1:]
    assert first.said != different.said and not np.array_equal(first.picture, different.picture)


def test_every_order_has_the_action_of_the_rule(many):
    for one in many:
        assert len(one.said) == 3
        for said in one.said:
            assert said.action == task.action(said.order, one.sights) and said.action is not None
            assert said.instruction.strip() and len(said.questions) <= 4
            assert all(asked.question.strip() and asked.answer.strip() for asked in said.questions)


def test_every_pad_in_the_picture_is_among_the_sights_and_no_other(many):
    assert all(task.seen(s) is not False for one in many for s in one.sights)
    assert {len(one.sights) for one in many} == {0, 1, 2, 3}


def test_a_question_about_a_pad_is_answered_by_whether_it_is_there(many):
    """A pad of this colour and shape is among the sights, or the answer is no. Both are asked often."""
    n = Counter()
    for one in many:
        there = {(s.pad.colour, s.pad.shape) for s in one.sights}
        for asked in (asked for said in one.said for asked in said.questions):
            if asked.about is None:
                n["about none"] += 1
            else:
                assert (asked.about in there) == (asked.answer not in NO_OR_GONE), asked
                n["there" if asked.about in there else "not there"] += 1
    assert n["about none"] > 1000 and min(n["there"], n["not there"]) > 300, n


def strange(order: task.Order) -> bool:
    """For a pad that no world has."""
    return order.colour not in COLOURS or order.shape not in SHAPES


def test_there_is_enough_of_everything(many):
    """A model that never saw a landing would never land. Shares of all orders."""
    n = Counter(said.action["action"] for one in many for said in one.said)
    assert n["move"] > 400 and n["search"] > 100 and n["hold"] > 80 and n["land"] > 30, n
    orders = Counter(said.order.kind for one in many for said in one.said)
    assert min(orders[kind] for kind in ("goto", "land", "hold", "nothing")) > 30, orders
    pads = Counter((s.pad.colour, s.pad.shape) for one in many for s in one.sights)
    assert len(pads) == len(COLOURS) * len(SHAPES) and min(pads.values()) > 5
    assert sum(len(said.questions) == 4 for one in many for said in one.said) > 700
    absent = [said for one in many for said in one.said if said.order.kind in ("goto", "land") and strange(said.order)]
    assert len(absent) > 9 and {said.action["action"] for said in absent} == {"search"}
    assert {said.order.kind for said in absent} == {"goto", "land"}


def test_colours_in_the_picture_are_those_of_the_sights(many):
    """Whatever the light: a red pad's red stays the largest channel, a yellow one's blue the smallest."""
    n_right = n_seen = 0
    for one in many:
        for s in one.sights:
            if s.pad.shape == "ring" or not task.seen(s):
                continue  # a ring is white in the middle
            x, y = round(69.5 + 70 * s.right), round(69.5 + 70 * s.down)
            red, green, blue = one.picture[y - 1 : y + 2, x - 1 : x + 2].mean((0, 1))
            n_seen += 1
            n_right += {
                "red": red > max(green, blue),
                "green": green > max(red, blue),
                "blue": blue > max(red, green),
                "yellow": blue < min(red, green),
                "purple": green < min(red, blue),
            }[s.pad.colour]
    assert n_seen > 150 and n_right / n_seen > 0.98, (n_right, n_seen)


def test_nothing_is_seen_in_a_blank_picture(grounds, monkeypatch):
    monkeypatch.setattr(lessons, "BLANK_SHARE", 1.0)
    for i in range(60):
        one = lesson(np.random.default_rng([8, i]), grounds, size_px=SIZES[i % 3])
        assert one.sights == [] and one.picture.shape == (*SIZES[i % 3], 3) and one.picture.dtype == np.uint8
        for said in one.said:
            assert said.action["action"] == ("search" if said.order.kind in ("goto", "land") else "hold")
            assert len(said.questions) == 4  # nothing is in doubt
            assert {asked.answer for asked in said.questions} <= NONE_SEEN | NO_OR_GONE
            assert all((asked.about is not None) == (asked.answer in NO_OR_GONE) for asked in said.questions)


def test_blank_pictures_are_black_white_plain_or_noise():
    rng = np.random.default_rng(9)
    pictures = [blank(rng, (56, 84)) for _ in range(80)]
    kinds = Counter(
        "black" if p.max() < 12 else "white" if p.min() > 242 else "plain" if p.std((0, 1)).max() == 0 else "noise"
        for p in pictures
    )
    assert set(kinds) == {"black", "white", "plain", "noise"} and min(kinds.values()) > 5
    assert all(p.shape == (56, 84, 3) and p.dtype == np.uint8 and p.flags.writeable for p in pictures)


@pytest.mark.parametrize("size_px", SIZES[1:])
def test_other_sizes_are_lessons_too(grounds, size_px):
    for i in range(30):
        one = lesson(np.random.default_rng([10, i]), grounds, 2, 1, size_px)
        assert one.picture.shape == (*size_px, 3) and one.picture.dtype == np.uint8 and len(one.said) == 2
        assert all(len(said.questions) <= 1 for said in one.said)


@pytest.mark.parametrize("size_px", SIZES[1:])
def test_a_pad_that_is_seen_has_its_centre_in_the_picture(grounds, size_px):
    edge = np.array(size_px) / max(size_px)  # down, right
    for i in range(300):
        for s in lesson(np.random.default_rng([11, i]), grounds, 0, 0, size_px).sights:
            if task.seen(s):
                assert abs(s.down) <= edge[0] and abs(s.right) <= edge[1], (i, s)
            assert s.edge == tuple(edge[::-1])


@pytest.mark.parametrize("size_px", SIZES[1:])
def test_the_first_pad_is_placed_within_its_own_picture(size_px):
    """Not within the square around it: from the same seed, at the same share of the way to the edge."""
    for seed in range(100):
        (in_square, pose), (in_other, same) = (
            arrangement(np.random.default_rng(seed), size) for size in (SIZES[0], size_px)
        )
        if in_square:
            (a,), (b,) = sights(in_square[:1], pose), sights(in_other[:1], same, size_px)
            assert pose == same and (b.right / b.edge[0], b.down / b.edge[1]) == pytest.approx(
                (a.right, a.down), abs=1e-6
            )


def test_a_crowd_has_up_to_nine_pads(grounds):
    """For who only learns to tell them apart; should it be asked all the same, it can be answered."""
    crowds = [lesson(np.random.default_rng([14, i]), grounds, 2, 4, SIZES[i % 3], crowded=True) for i in range(60)]
    sizes = [len(one.sights) for one in crowds]
    assert max(sizes) in range(6, 10) and np.mean(sizes) > 3
    for one in crowds:
        assert len({(s.pad.colour, s.pad.shape) for s in one.sights}) == len(one.sights)
        assert all(said.action == task.action(said.order, one.sights) is not None for said in one.said)


def test_a_lesson_without_orders_is_a_picture(grounds):
    """The vision tower alone is trained on those."""
    one = lesson(np.random.default_rng(3), grounds, n_orders=0)
    assert one.said == [] and one.picture.shape == (140, 140, 3)


# -- where pads lie ---------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(SIZES), st.booleans())
def test_pads_lie_apart_and_are_of_different_kinds(seed, size_px, crowded):
    pads, pose = arrangement(np.random.default_rng(seed), size_px, crowded)
    assert len(pads) <= (9 if crowded else 3) and len({(p.colour, p.shape) for p in pads}) == len(pads)
    for i, a in enumerate(pads):
        assert a.colour in COLOURS and a.shape in SHAPES
        assert lessons.PAD_RADIUS_M[0] <= a.radius_m <= lessons.PAD_RADIUS_M[1]
        for b in pads[:i]:
            assert math.hypot(a.north_m - b.north_m, a.east_m - b.east_m) > a.radius_m + b.radius_m
    assert pose.height_m > 0.5 and max(abs(pose.roll_rad), abs(pose.pitch_rad)) <= 0.2
    assert len(sights(pads, pose, size_px)) == len(pads)  # none behind the horizon


def test_the_first_pad_has_the_size_it_was_drawn_with():
    """It is what the lesson is about: its apparent radius is spread over the whole range that flights show."""
    sizes = []
    for seed in range(400):
        pads, pose = arrangement(np.random.default_rng(seed), (140, 140))
        if pads:  # level, straight above it
            (sight,) = sights(pads[:1], Pose(pads[0].north_m, pads[0].east_m, pose.height_m))
            sizes.append(sight.radius)
    low, high = lessons.APPARENT_RADIUS
    assert low - 1e-9 <= min(sizes) < 1.2 * low and 0.9 * high < max(sizes) <= high + 1e-9
    near = np.mean(np.array(sizes) > task.LOW[0])
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
def test_what_is_placed_in_the_picture_is_sighted_there(pose, right, down):
    """Against sights and, for a picture's pixels, against homography: both go the other way."""
    north, east = lessons._on_the_ground(pose, right, down)
    (sight,) = sights([Pad("red", "disc", north, east, 0.5, 0.0)], pose)
    assert (sight.right, sight.down) == pytest.approx((right, down), abs=1e-6)
    x, y, w = homography(pose, 140, 140) @ (north, east, 1)
    assert (x / w, y / w) == pytest.approx((69.5 + 70 * right, 69.5 + 70 * down), abs=1e-3)


def test_nothing_lies_under_a_plates_rim(grounds, monkeypatch):
    """A red spot that shows beside a plate could be taken for part of the pad."""
    drawn = []
    monkeypatch.setattr(lessons, "render", lambda pads, *args: drawn.append((pads, args[5])) or np.zeros((140, 140, 3)))
    for i in range(200):
        lesson(np.random.default_rng([12, i]), grounds, 0)
    pairs = [(thing[0], pad) for pads, things in drawn for thing in things for pad in pads]
    assert len(pairs) > 200
    for outline, pad in pairs:
        corners = np.vstack([outline, (outline + np.roll(outline, 1, 0)) / 2])  # and half way between them
        assert np.hypot(*(corners - (pad.north_m, pad.east_m)).T).min() > pad.radius_m


# -- grounds ----------------------------------------------------------------------------------------------------------


def test_a_stock_of_grounds_follows_from_its_seed_and_each_is_made_once():
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
    assert len({ground.metres_per_px for ground in picked}) == 20  # seen from nearer or farther each time


def test_half_the_grounds_are_photographs_or_all_of_them_or_none():
    """A photograph of one colour stays of one colour; a painted ground never is."""
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


def test_photographs_held_back_are_not_among_the_training_ones():
    pytest.importorskip("skimage")
    training, held_back = lessons.training_photographs(), lessons.held_back_photographs()
    assert len(training) == 13 and len(held_back) == len(lessons.HELD_BACK) == 2
    for image in (*training, *held_back):
        assert image.ndim == 3 and image.shape[2] == 3 and min(image.shape[:2]) >= 300
        assert image.dtype == np.uint8 and image.flags.c_contiguous
    known = {hashlib.sha256(image.tobytes()).digest() for image in training}
    assert len(known) == 13 and not known & {hashlib.sha256(image.tobytes()).digest() for image in held_back}
