"""The size of the images that the encoder takes, and the resize to it, which camera and model process share."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import cv2
import numpy as np
import pytest

from edge_agent.ipc.image_grid import MIN_TOKENS, ImageRequest, image_grid, image_size, jpeg_reduction, resize
from tests.harness.pictures import scene

UNIT = 28  # pixels a side of one token
LONGEST = 1540 // UNIT
N = 400  # random sizes for each rule


def some_side(rng: random.Random) -> int:
    """1 to 8000 pixels: any, few, and about a whole number of tokens."""
    tokens = UNIT * rng.randint(1, 285) + rng.randint(-1, 1)
    return rng.choice((rng.randint(1, 8000), rng.randint(1, 60), min(tokens, 8000)))


def some_frames(least_tokens: int = 8) -> Iterator[tuple[int, int, int]]:
    """Height, width and token budget."""
    rng = random.Random(least_tokens)
    for _ in range(N):
        budget = rng.choice((rng.randint(least_tokens, 1024), rng.randint(least_tokens, least_tokens + 8)))
        yield some_side(rng), some_side(rng), budget


def wanted(max_tokens: int, **changes: object) -> ImageRequest:
    return ImageRequest(**({"unit": UNIT, "longest_side": 1540, "max_tokens": max_tokens} | changes))


def test_a_request_without_a_grid_is_no_request_and_every_other_has_one():
    rng, n_refused = random.Random(0), 0
    rows = [(28, 1540, 7, 480, 640), (28, 28, 1024, 480, 640), (28, 84, 8, 480, 640), (128, 127, 1024, 480, 640)]
    for _ in range(N):
        unit, longest_side = rng.randint(1, 128), rng.choice((rng.randint(1, 8192), rng.randint(1, 400)))
        max_tokens = rng.choice((rng.randint(1, 1024), rng.randint(1, 12)))
        rows.append((unit, longest_side, max_tokens, some_side(rng), some_side(rng)))
    for unit, longest_side, max_tokens, height, width in rows:
        try:
            request = ImageRequest(unit=unit, longest_side=longest_side, max_tokens=max_tokens)
        except ValueError:
            n_refused += 1
            longest = longest_side // unit
            for n in range(1, min(longest, max_tokens) + 1):  # the most columns for this many lines are still too few
                assert n * min(longest, max_tokens // n) < MIN_TOKENS
        else:
            lines, columns = image_grid(height, width, request)
            assert MIN_TOKENS <= lines * columns <= max_tokens and max(lines, columns) * unit <= longest_side
    assert N / 10 < n_refused < N * 0.9


def test_a_fixed_image_has_room_for_a_token():
    with pytest.raises(ValueError, match="smaller than an image token"):
        ImageRequest(unit=28, longest_side=1540, max_tokens=256, fixed=(896, 27))


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_a_grid_is_within_the_budget_the_model_and_what_mtmd_leaves_alone():
    rows = [(1, 1, 8), (8000, 10, 1024), (10, 8000, 8), (4320, 7680, 1024), (448, 448, 8), (480, 640, 9)]
    for height, width, max_tokens in (*rows, *some_frames()):
        lines, columns = image_grid(height, width, wanted(max_tokens))
        assert type(lines) is int and type(columns) is int
        assert 1 <= lines <= LONGEST and 1 <= columns <= LONGEST
        assert MIN_TOKENS <= lines * columns <= max_tokens, (height, width, max_tokens)


def test_a_frame_that_fits_gets_what_the_reference_processor_gives_it():
    """transformers' Pixtral processor: (side - 1) // unit + 1, nothing shrunk below the longest edge."""
    rng, n_fit = random.Random(1), 0
    for _ in range(N):
        height, width = rng.randint(1, 1540), rng.choice((rng.randint(1, 1540), UNIT * rng.randint(1, 55)))
        reference = (height - 1) // UNIT + 1, (width - 1) // UNIT + 1
        if MIN_TOKENS <= math.prod(reference) <= 1024:
            n_fit += 1
            assert image_grid(height, width, wanted(1024)) == reference, (height, width)
    assert n_fit > N / 4


def test_a_frame_keeps_its_aspect_ratio_to_a_line_and_a_column():
    """Against the exact size in real numbers: the largest of the same shape within budget, edge and frame."""
    n_exact = 0
    for height, width, max_tokens in some_frames(16):
        scale = min(1, 1540 / max(height, width), UNIT * math.sqrt(max_tokens / (height * width)))
        exact = height * scale / UNIT, width * scale / UNIT
        if math.prod(exact) >= MIN_TOKENS and min(exact) >= 1:
            n_exact += 1
            for n, x in zip(image_grid(height, width, wanted(max_tokens)), exact, strict=True):
                assert x - 1 - 1e-9 < n < x + 1 + 1e-9, (height, width, max_tokens)
    assert n_exact > N / 4


def test_turning_the_frame_turns_the_grid():
    for height, width, max_tokens in some_frames(16):
        lines, columns = image_grid(height, width, wanted(max_tokens))
        turned = image_grid(width, height, wanted(max_tokens))
        assert abs(turned[0] - columns) <= 1 and abs(turned[1] - lines) <= 1, (height, width, max_tokens)


def test_an_image_that_is_on_a_grid_keeps_its_size():
    """So the model process leaves an image as the camera process made it."""
    for height, width, max_tokens in some_frames():
        request = wanted(max_tokens)
        size = image_size(height, width, request)
        assert image_size(*size, request) == size, (height, width, max_tokens)


@pytest.mark.parametrize("size", [(1, 1), (480, 640), (8000, 10), (224, 448)])
def test_an_encoder_with_one_size_gets_that_size(size):
    assert image_size(*size, wanted(256, fixed=(224, 448))) == (224, 448)


# -- the resize -------------------------------------------------------------------------------------------------------


def resized(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    image = np.empty((*size, *frame.shape[2:]), np.uint8)
    resize(frame, image)
    return image


def area_weights(n_source: int, n_target: int) -> np.ndarray:
    """(n_target, n_source): the part of each source pixel in the mean of each target pixel."""
    edges = np.arange(n_target + 1) * n_source / n_target
    pixels = np.arange(n_source)
    covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.maximum(covered, 0) * n_target / n_source


@pytest.mark.parametrize(
    ("frame_size", "size"),
    [
        ((480, 640), (112, 168)),
        ((480, 640), (392, 504)),
        ((1080, 640), (112, 168)),
        ((337, 589), (112, 168)),  # no two means have the same shares
        ((337, 589), (336, 588)),
        ((560, 336), (112, 168)),  # whole pixels
        ((252, 900), (252, 336)),  # on one side only
        ((900, 336), (252, 336)),
    ],
)
def test_a_frame_that_shrinks_is_averaged_over_exact_areas(frame_size, size):
    """Every value is the mean over its area, rounded once."""
    frame = scene(*frame_size)
    rows = area_weights(frame_size[0], size[0]) @ frame.reshape(frame_size[0], -1)
    columns = area_weights(frame_size[1], size[1]) @ rows.reshape(size[0], -1, 3).swapaxes(0, 1).reshape(
        -1, 3 * size[0]
    )
    exact = columns.reshape(size[1], size[0], 3).swapaxes(0, 1)
    assert np.abs(resized(frame, size) - exact).max() <= 0.501


def test_an_average_is_the_one_of_opencv():
    """The model was trained on OpenCV's. They differ where the mean is half a number, which floats round either way."""
    frame = scene(1080, 1920)
    difference = np.abs(
        resized(frame, (112, 168)).astype(int) - cv2.resize(frame, (168, 112), interpolation=cv2.INTER_AREA)
    )
    assert difference.max() <= 1 and np.count_nonzero(difference) <= 10


def test_a_frame_that_shrinks_on_one_side_and_grows_on_the_other():
    frame = scene(100, 900)
    assert np.array_equal(resized(frame, (112, 168)), cv2.resize(frame, (168, 112), interpolation=cv2.INTER_AREA))


@pytest.mark.parametrize("frame_size", [(20, 30), (84, 112), (100, 200)])
def test_a_small_frame_grows(frame_size):
    frame = scene(*frame_size)
    size = image_size(*frame_size, wanted(256))
    assert np.array_equal(resized(frame, size), cv2.resize(frame, size[::-1], interpolation=cv2.INTER_CUBIC))


def test_grey_frames_are_resized_like_each_channel_of_a_colour_frame():
    frame = scene(480, 640)
    assert np.array_equal(resized(frame[..., 1].copy(), (252, 336)), resized(frame, (252, 336))[..., 1])


def test_an_image_on_the_grid_is_copied():
    frame = scene(252, 336)
    assert np.array_equal(resized(frame, (252, 336)), frame)


@pytest.mark.parametrize(
    ("frame_size", "image", "n"),
    [
        ((1080, 1920), (336, 588), 1),  # 3.2 pixels for each side of a pixel
        ((1080, 1920), (112, 168), 1),  # 9.6: too few at a half
        ((2160, 3840), (224, 420), 1),
        ((2160, 3840), (112, 168), 2),
        ((4320, 7680), (112, 168), 4),
        ((4320, 7680), (56, 84), 8),
        ((480, 640), (480, 640), 1),
        ((2160, 3840), (112, 588), 1),  # the nearer side decides
        ((2161, 3841), (112, 168), 1),  # no whole number of pixels
        ((2162, 3842), (112, 168), 2),
    ],
)
def test_a_jpeg_is_decoded_smaller_only_where_enough_pixels_remain(frame_size, image, n):
    assert jpeg_reduction(*frame_size, image) == n
