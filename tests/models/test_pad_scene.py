"""Pads in perspective: their positions, against positions worked out by hand and OpenCV's camera; grounds and light."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.pad_pilot.scene import (
    COLOURS,
    HALF_VIEW,
    SHAPES,
    Ground,
    Light,
    Pad,
    Pose,
    clutter,
    homography,
    outlines,
    photograph_ground,
    render,
    rotation,
    sights,
    synthetic_ground,
)

pytestmark = pytest.mark.filterwarnings("error")

GREY = Ground(np.full((64, 64, 3), 96, np.uint8), 0.1)
SIZES = [(140, 140), (126, 168), (168, 126), (28, 140)]

poses = st.builds(
    Pose,
    north_m=st.floats(-5, 5),
    east_m=st.floats(-5, 5),
    height_m=st.floats(1.5, 12),
    yaw_rad=st.floats(-7, 7),
    roll_rad=st.floats(-0.3, 0.3),
    pitch_rad=st.floats(-0.3, 0.3),
)


def pad(north_m: float, east_m: float, radius_m: float = 0.5, colour: str = "red", shape: str = "disc") -> Pad:
    return Pad(colour, shape, north_m, east_m, radius_m, 0.0)


def plain(pads: list[Pad], pose: Pose, *args, **options) -> np.ndarray:
    return render(pads, GREY, pose, np.random.default_rng(0), *args, **options)


def reds(picture: np.ndarray) -> np.ndarray:
    """(n, 2): x, y of the pixels with red paint, in a picture with plain light."""
    y, x = np.nonzero((picture[..., 0] > 150) & (picture[..., 1] < 100))
    return np.column_stack([x, y])


# -- where pads appear ------------------------------------------------------------------------------------------------

# The view is 70 degrees: 5 m up, the picture's edge is 5 * tan 35 = 3.501 m away, and 1 m is 0.2856 of that.


@pytest.mark.parametrize(
    ("at", "pose", "right", "down", "radius"),
    [
        ((0, 0), Pose(height_m=5), 0, 0, 0.14281),
        ((1, 0), Pose(height_m=5), 0, -0.28563, 0.14281),  # ahead is up in the picture
        ((0, 1), Pose(height_m=5), 0.28563, 0, 0.14281),
        ((1, 0), Pose(height_m=10), 0, -0.14281, 0.07141),
        ((3.50104, 0), Pose(height_m=5), 0, -1, 0.14281),
        ((7, -3), Pose(6, -3, 5), 0, -0.28563, 0.14281),
        ((1, 0), Pose(height_m=5, yaw_rad=math.pi / 2), -0.28563, 0, 0.14281),  # facing east, north is on the left
        ((0, 1), Pose(height_m=5, yaw_rad=math.pi / 2), 0, -0.28563, 0.14281),
        ((1, 0), Pose(height_m=5, yaw_rad=math.pi), 0, 0.28563, 0.14281),
        # At a tilt of 0.1, the point straight below is tan 0.1 / tan 35 = 0.14329 from the middle, and its distance
        # along the axis of the camera is smaller by the factor cos 0.1.
        ((0, 0), Pose(height_m=5, roll_rad=0.1), 0.14329, 0, 0.14353),  # right side down: the camera points left
        ((0, 0), Pose(height_m=5, pitch_rad=0.1), 0, 0.14329, 0.14353),  # nose up: the camera points ahead
        ((0.50167, 0), Pose(height_m=5, pitch_rad=0.1), 0, 0, 0.14210),  # 5 tan 0.1 ahead: now in the middle
        ((0, 0.50167), Pose(height_m=5, roll_rad=-0.1), 0, 0, 0.14210),
    ],
)
def test_sights_against_positions_worked_out_by_hand(at, pose, right, down, radius):
    (sight,) = sights([pad(*at)], pose)
    assert (sight.right, sight.down, sight.radius) == pytest.approx((right, down, radius), abs=2e-5)


@pytest.mark.parametrize(
    ("size_px", "edge"),
    [((140, 140), (1, 1)), ((126, 168), (1, 0.75)), ((168, 126), (0.75, 1)), ((28, 140), (1, 0.2))],
)
def test_a_sight_has_the_edge_of_its_picture(size_px, edge):
    """The edge is (right, down); a size is (height, width). The positions do not change with the shorter side."""
    pads, pose = [pad(1, 0.5), pad(-0.5, 2)], Pose(height_m=5, yaw_rad=0.3)
    found = sights(pads, pose, size_px)
    assert [s.edge for s in found] == [edge, edge]
    assert [s[:4] for s in found] == [s[:4] for s in sights(pads, pose)]


@pytest.mark.parametrize("size_px", SIZES)
def test_the_edge_of_a_sight_is_the_edge_of_the_picture(size_px):
    """Against homography(): a pad at `edge` is on the outer border of the last pixel."""
    pose = Pose(1, -2, 4, 0.7, 0.05, -0.1)
    for x, y in ((size_px[1] - 0.5, 3.0), (2.0, size_px[0] - 0.5)):
        place = np.linalg.inv(homography(pose, *size_px)) @ (x, y, 1)
        (sight,) = sights([pad(*place[:2] / place[2])], pose, size_px)
        beyond = abs(sight.right) - sight.edge[0], abs(sight.down) - sight.edge[1]
        assert max(beyond) == pytest.approx(0, abs=1e-9)


@given(poses)
def test_body_axes_are_rotated_by_yaw_pitch_and_roll(pose):
    """cv2.Rodrigues rotates about one axis: yaw about down, then pitch about right, then roll about forward."""
    turns = [(0, 0, pose.yaw_rad), (0, pose.pitch_rad, 0), (pose.roll_rad, 0, 0)]
    yaw, pitch, roll = (cv2.Rodrigues(np.array(turn, float))[0] for turn in turns)
    assert rotation(pose) == pytest.approx(yaw @ pitch @ roll, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(poses, st.sampled_from(SIZES))
def test_sights_and_homography_agree_with_a_pinhole_camera(pose, size_px):
    """The camera is OpenCV's projectPoints. Its axes are right, backward, down."""
    pads = [pad(pose.north_m + n, pose.east_m + e) for n, e in ((0, 0), (1, 0.5), (-0.7, 1.2), (0.2, -2))]
    height, width = size_px
    half = max(size_px) / 2
    middle = np.array([(width - 1) / 2, (height - 1) / 2])  # between the two middle pixels of an even side
    camera = np.array([[half / HALF_VIEW, 0, middle[0]], [0, half / HALF_VIEW, middle[1]], [0, 0, 1]])
    to_camera = np.array([[0, 1, 0], [-1, 0, 0], [0, 0, 1.0]]) @ rotation(pose).T
    points = np.array([[p.north_m - pose.north_m, p.east_m - pose.east_m, pose.height_m] for p in pads])
    expected = cv2.projectPoints(points, cv2.Rodrigues(to_camera)[0], np.zeros(3), camera, None)[0][:, 0]
    on_ground = np.array([[p.north_m, p.east_m, 1] for p in pads]) @ homography(pose, height, width).T
    for sight, pixel, projected in zip(sights(pads, pose, size_px), on_ground, expected, strict=True):
        assert pixel[:2] / pixel[2] == pytest.approx(projected, abs=1e-4)
        assert middle + half * np.array([sight.right, sight.down]) == pytest.approx(projected, abs=1e-4)


def test_pads_behind_the_horizon_are_left_out():
    """With the nose straight up, the camera points north along the ground: a pad to the south is behind it."""
    pose = Pose(height_m=5, pitch_rad=math.pi / 2)
    north, south = pad(30, 0), pad(-30, 0, colour="red")
    assert [s.pad for s in sights([south, north], pose)] == [north]
    assert not len(reds(plain([south], pose)))


def test_a_pad_far_outside_the_picture_has_a_sight():
    """The caller decides which pads count as in the picture."""
    (sight,) = sights([pad(0, 20)], Pose(height_m=5))
    assert sight.right == pytest.approx(5.7126, abs=1e-3)
    assert not len(reds(plain([pad(0, 20)], Pose(height_m=5))))


# -- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("oversampling", [1, 2, 3])
@pytest.mark.parametrize("size_px", SIZES[:3])
def test_the_paint_is_at_the_position_of_the_sight(size_px, oversampling):
    """Small discs, so that perspective does not move the middle of the paint away from the pad's centre."""
    rng = np.random.default_rng([*size_px, oversampling])
    for _ in range(10):
        pose = Pose(*rng.uniform(-3, 3, 2), rng.uniform(2, 6), rng.uniform(0, 7), *rng.uniform(-0.2, 0.2, 2))
        x, y = rng.uniform(0.25, 0.75, 2) * (size_px[1], size_px[0])
        place = np.linalg.inv(homography(pose, *size_px)) @ (x, y, 1)
        target = pad(*place[:2] / place[2], 0.3)
        (sight,) = sights([target], pose)
        half = max(size_px) / 2
        expected = (sight.right * half + (size_px[1] - 1) / 2, sight.down * half + (size_px[0] - 1) / 2)
        assert expected == pytest.approx((x, y), abs=1e-6)
        found = reds(plain([target], pose, size_px, oversampling))
        assert found.mean(0) == pytest.approx(expected, abs=0.6)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_the_paint_covers_the_area_of_its_outline(shape):
    """From 5 m straight above, a metre is 280 / 2 / (5 tan 35) = 39.99 pixels. OpenCV paints the edge's pixels too."""
    target = pad(0, 0, 1.0, shape=shape)
    (_, (outline, _)) = outlines(target, np.zeros(3), np.zeros(3))
    n_px = cv2.contourArea(outline.astype(np.float32)) * 39.99**2
    assert len(reds(plain([target], Pose(height_m=5), (280, 280), oversampling=3))) == pytest.approx(n_px, rel=0.05)


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("shape", SHAPES)
def test_each_kind_of_pad_has_its_paint_on_a_white_plate(colour, shape):
    """A radius of 2 m is 80 pixels here. The pixels: the middle, 43.5 north and south, 45.5 north and east."""
    picture = plain([pad(0, 0, 2.0, colour, shape)], Pose(height_m=5), (280, 280)).astype(int)
    pixels = [(139, 139), (96, 139), (183, 139), (94, 185)]
    is_painted = {
        "disc": (True, True, True, False),
        "square": (True, True, True, True),
        "triangle": (True, True, False, False),  # the tip is to the north, the base is less than half way out
        "ring": (False, True, True, True),
    }[shape]
    white, paint = (236, 236, 232), COLOURS[colour]
    for (y, x), is_paint in zip(pixels, is_painted, strict=True):
        assert np.abs(picture[y, x] - (paint if is_paint else white)).max() <= 1, (y, x)
    assert np.abs(picture[139, 215] - white).max() <= 1  # 0.94 of the radius
    assert np.abs(picture[139, 224] - 96).max() <= 1  # 1.06 of it


def test_a_pad_turns_clockwise():
    """The triangle's tip: north, then east, then south."""
    for turn_rad, north, east in ((0, 1, 0), (math.pi / 2, 0, 1), (math.pi, -1, 0)):
        target = Pad("red", "triangle", 3.0, -2.0, 1.0, turn_rad)
        (_, (tip, *_)) = (outline for outline, _ in outlines(target, np.zeros(3), np.zeros(3)))
        out = tip - (3, -2)
        assert 0.8 < np.hypot(*out) < 1  # on the plate
        assert out / np.hypot(*out) == pytest.approx((north, east), abs=1e-9)


def test_a_triangle_is_rotated_by_the_yaw_of_the_vehicle():
    """In the picture of a vehicle that faces east, a triangle that points north points to the left."""
    target = Pad("red", "triangle", 0.0, 0.0, 2.0, 0.0)
    x, y = reds(plain([target], Pose(height_m=5, yaw_rad=math.pi / 2))).T
    widest = [np.ptp(y[x == column]) for column in (x.min() + 4, x.max() - 4)]
    assert widest[0] < widest[1] / 3 and 69.5 - x.min() > x.max() - 69.5


def test_the_ground_and_the_pads_move_together_in_the_picture():
    """The texture's centre is the world's origin and its top points north."""
    texture = np.zeros((800, 800, 3), np.uint8)
    texture[160:240, 520:600] = 255  # rows 160 to 240 are 4 to 6 m north, columns 520 to 600 are 3 to 5 m east
    ground = Ground(texture, 0.025)
    for pose in (Pose(5, 4, 3), Pose(4, 3, 4, 2.0, 0.1, -0.1)):
        picture = render([], ground, pose, np.random.default_rng(0))
        y, x = np.nonzero(picture[..., 0] > 200)
        (sight,) = sights([pad(5, 4)], pose)
        assert (x.mean(), y.mean()) == pytest.approx((69.5 + 70 * sight.right, 69.5 + 70 * sight.down), abs=1.5)


@pytest.mark.parametrize("size_px", SIZES)
def test_pictures_have_the_requested_size_at_any_oversampling(size_px):
    for oversampling in (1, 2, 3):
        picture = plain([pad(0, 0)], Pose(height_m=4), size_px, oversampling)
        assert picture.shape == (*size_px, 3) and picture.dtype == np.uint8 and picture.flags.c_contiguous


def test_oversampling_changes_only_edges():
    rng = np.random.default_rng(5)
    ground, pads = synthetic_ground(rng), [pad(0.5, 0.3), pad(-1, -0.8, shape="ring"), pad(1, -1, shape="triangle")]
    once, twice = (
        render(pads, ground, Pose(height_m=4), rng, oversampling=oversampling).astype(int) for oversampling in (1, 2)
    )
    off = np.abs(once - twice).max(-1)
    assert off.max() > 20  # edges change
    assert off.mean() < 6 and (off > 40).mean() < 0.04


def test_the_same_arguments_and_the_same_seed_give_the_same_picture():
    light = Light.random(np.random.default_rng(2))._replace(noise=8.0, motion_blur_px=3, jpeg_quality=60)
    ground, pads, pose = synthetic_ground(np.random.default_rng(1)), [pad(0.5, 0.3)], Pose(height_m=4, yaw_rad=1)
    before = ground.image.copy()
    first, same, other = (
        render(pads, ground, pose, np.random.default_rng(seed), light=light).tobytes() for seed in (3, 3, 4)
    )
    assert first == same != other
    assert (ground.image == before).all()  # many pictures use the same ground


def test_objects_are_drawn_below_the_pads():
    """A blue carpet covers the ground and no pad."""
    carpet = np.array([(-5, -5), (-5, 5), (5, 5), (5, -5)], float)
    picture = plain([pad(0, 0, 2.0)], Pose(height_m=5), objects=[(carpet, (10, 20, 200))])
    assert tuple(picture[2, 2]) == (10, 20, 200) and tuple(picture[69, 69]) == COLOURS["red"]


def test_objects_behind_the_horizon_are_not_drawn():
    """Objects that reach behind it are not drawn either: they would appear upside down on the other side."""
    pose = Pose(height_m=5, pitch_rad=math.pi / 2)  # looking north along the ground
    square = np.array([(-5, -5), (-5, 5), (5, 5), (5, -5)], float)
    without = plain([], pose)
    for north_m, drawn in ((-30, False), (3, False), (30, True)):
        item = (square + np.array([north_m, 0]), (10, 20, 200))
        assert (plain([], pose, objects=[item]) != without).any() == drawn


@pytest.mark.parametrize("seed", range(20))
def test_random_objects_can_be_rendered(seed):
    rng = np.random.default_rng(seed)
    pose = Pose(2, -1, 5)
    objects = clutter(rng, 3.0, pose)
    assert len(objects) <= 5
    for outline, colour in objects:
        assert outline.ndim == 2 and outline.shape[1] == 2 and len(outline) >= 3
        assert (np.abs(outline - (2, -1)) < 3 + 0.9).all()
        assert len(colour) == 3 and all(type(c) is int and 0 <= c <= 255 for c in colour)
    assert plain([], pose, objects=objects).shape == (140, 140, 3)


# -- grounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_synthetic_grounds(seed):
    ground = synthetic_ground(np.random.default_rng(seed))
    assert ground.image.shape == (512, 512, 3) and ground.image.dtype == np.uint8
    assert 6 <= ground.metres_per_px * 512 <= 40
    assert ground.image.std() > 1  # more than one colour
    again = synthetic_ground(np.random.default_rng(seed))
    assert (again.image == ground.image).all() and again.metres_per_px == ground.metres_per_px


@pytest.mark.parametrize("shape", [(300, 451, 3), (1000, 40, 3), (5, 5, 3)])
def test_photograph_grounds(shape):
    photograph = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    before = photograph.copy()
    for seed in range(12):
        ground = photograph_ground(np.random.default_rng(seed), photograph)
        assert (
            ground.image.shape == (512, 512, 3) and ground.image.dtype == np.uint8 and ground.image.flags.c_contiguous
        )
        assert 3 <= ground.metres_per_px * 512 <= 40
        again = photograph_ground(np.random.default_rng(seed), photograph)
        assert (again.image == ground.image).all() and again.metres_per_px == ground.metres_per_px
    assert (photograph == before).all()


# -- light ------------------------------------------------------------------------------------------------------------

NOISE = np.random.default_rng(0).integers(0, 256, (56, 84, 3)).astype(np.uint8)
FLAT = np.full((56, 84, 3), 100, np.uint8)


def lit(image: np.ndarray, **changed) -> np.ndarray:
    return Light(**changed).apply(image, np.random.default_rng(1))


def test_plain_light_changes_nothing_and_draws_no_random_number():
    rng, untouched = np.random.default_rng(1), np.random.default_rng(1)
    assert (Light().apply(NOISE, rng) == NOISE).all()
    assert rng.bit_generator.state == untouched.bit_generator.state
    picture, without = (plain([pad(0, 0)], Pose(height_m=4), light=light) for light in (Light(), None))
    assert (picture == without).all()


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"gain": (0.5, 1.0, 2.0)}, (50, 100, 200)),
        ({"gain": (3.0, 3.0, 3.0)}, (255, 255, 255)),
        ({"gamma": 2.0}, (39, 39, 39)),  # 255 (100 / 255)^2
        ({"blur_px": 1.0}, (100, 100, 100)),
        ({"motion_blur_px": 2}, (100, 100, 100)),
        ({"motion_blur_px": 5}, (100, 100, 100)),
        ({"jpeg_quality": 90}, (100, 100, 100)),
    ],
)
def test_light_on_a_flat_grey(changed, expected):
    out = lit(FLAT, **changed)
    assert out.shape == FLAT.shape and out.dtype == np.uint8
    assert np.abs(out.astype(int) - expected).max() <= 1


def test_jpeg_compression_keeps_the_colour():
    image = np.full((56, 84, 3), COLOURS["red"], np.uint8)
    assert np.abs(lit(image, jpeg_quality=90).astype(int) - COLOURS["red"]).max() <= 4


def test_a_shadow_is_dark_on_one_side():
    """Angle 0: the edge runs up and down, half way to the right, and the right side is darker."""
    out = lit(FLAT, shadow=(0.0, 0.5, 0.6)).astype(int)
    assert (out[:, :55] == 100).all() and (np.abs(out[:, 70:] - 60) <= 1).all()


def test_noise_has_the_given_deviation_and_blur_reduces_it():
    noisy = lit(FLAT, noise=8.0).astype(float)
    assert noisy.std() == pytest.approx(8, rel=0.05) and noisy.mean() == pytest.approx(99.5, abs=0.4)
    assert lit(NOISE, blur_px=1.0).std() < NOISE.std() / 2 and lit(NOISE, motion_blur_px=4).std() < NOISE.std() / 1.6


def test_white_and_fading_change_only_the_pads():
    light = Light(white=(200.0, 210.0, 220.0), fading=0.5)
    picture = plain([pad(0, 0, 2.0)], Pose(height_m=5), light=light)
    assert tuple(picture[69, 69]) == (168, 80, 83)  # half way from (208, 32, 38) to grey 128
    assert tuple(picture[69, 69 + 36]) == (200, 210, 220) and tuple(picture[2, 2]) == (96, 96, 96)


def test_random_light_is_neither_black_nor_white():
    for seed in range(60):
        rng = np.random.default_rng(seed)
        out = Light.random(rng).apply(NOISE, rng)
        assert out.shape == NOISE.shape and out.dtype == np.uint8 and out.flags.c_contiguous
        assert 5 < out.mean() < 250
