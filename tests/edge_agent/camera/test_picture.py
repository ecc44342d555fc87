"""One reader of pictures: what is whole and of 8 bits is taken, and everything else is refused by name."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.camera.picture import decode_jpeg, decode_picture, picture_paths, read_picture
from edge_agent.camera.source import SourceError
from tests.harness.pictures import encoded, exif, png, png_chunk, scene, with_segment

PROGRESSIVE, RESTARTS = (cv2.IMWRITE_JPEG_PROGRESSIVE, 1), (cv2.IMWRITE_JPEG_RST_INTERVAL, 2)
KINDS = {
    "jpeg": encoded(".jpg"),
    "progressive jpeg": encoded(".jpg", None, *PROGRESSIVE),
    "jpeg with restart markers": encoded(".jpg", None, *RESTARTS),
    "grey jpeg": encoded(".jpg", scene()[:, :, 0]),
    "png": encoded(".png"),
    "webp": encoded(".webp", None, cv2.IMWRITE_WEBP_QUALITY, 80),
    "lossless webp": encoded(".webp", None, cv2.IMWRITE_WEBP_QUALITY, 101),
    "bmp": encoded(".bmp"),
}
JPEGS = {name: data for name, data in KINDS.items() if "jpeg" in name}
JPEG = KINDS["jpeg"]


def refusal(data: bytes, max_pixels: int = 10**6) -> SourceError:
    with pytest.raises(SourceError) as caught:
        decode_picture(data, max_pixels)
    return caught.value


# -- whole, or cut and damaged ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", KINDS.values(), ids=KINDS)
def test_a_whole_picture_is_taken(data):
    image = decode_picture(data)
    assert image.shape == (96, 128, 3) and image.dtype == np.uint8
    assert np.array_equal(image, cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR))


@pytest.mark.parametrize("data", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("share", [0.001, 0.33, 0.5, 0.9, 0.99, 1.0])
def test_a_picture_that_is_cut_is_refused(data, share, capfd):
    """Also if only the last byte is missing. The decoders print nothing."""
    assert refusal(data[: min(int(share * len(data)), len(data) - 1)]).reason == "unreadable"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("data", JPEGS.values(), ids=JPEGS)
@pytest.mark.parametrize("kept", [0.4, 0.7])
def test_a_cut_jpeg_with_an_end_marker_is_refused(data, kept):
    assert "not one whole JPEG" in refusal(data[: int(kept * len(data))] + b"\xff\xd9").detail


@pytest.mark.parametrize("data", JPEGS.values(), ids=JPEGS)
def test_a_jpeg_with_a_hole_is_refused(data):
    """Lost packets of a transfer, at several places of the last scan."""
    scan = data.rindex(b"\xff\xda") + 14
    hole = (len(data) - scan) // 4
    for at in range(scan + 40, len(data) - hole - 40, hole // 2):
        assert "not one whole JPEG" in refusal(data[:at] + data[at + hole :]).detail


def test_each_damaged_byte_of_a_png_is_found():
    data = png(8, 2, bytes(range(12)))
    for i in range(8, len(data)):
        damaged = bytearray(data)
        damaged[i] ^= 1
        assert refusal(bytes(damaged)).reason in ("unreadable", "too-large")


@pytest.mark.parametrize("tail", [b"\0", b"\0\0\0", b"\xff", bytes(600), b"\xff\xd9", b"\xff\xd9\xff\xd9", b"junk" * 9])
@pytest.mark.parametrize("data", JPEGS.values(), ids=JPEGS)
def test_a_jpeg_is_whole_up_to_its_end_marker(data, tail):
    assert np.array_equal(decode_picture(data + tail), decode_picture(data))


@pytest.mark.parametrize("stray", [b"\0", b"\0\0\0\0", b"\xff\xff", b"\x01" * 12])
def test_a_few_bytes_before_the_end_marker_are_padding(stray):
    assert np.array_equal(decode_picture(JPEG[:-2] + stray + JPEG[-2:]), decode_picture(JPEG))


def test_many_bytes_before_the_end_marker_are_damage():
    assert "extraneous" in refusal(JPEG[:-2] + b"\x01" * 200 + JPEG[-2:]).detail


def test_the_end_marker_of_a_thumbnail_is_not_the_end_of_the_picture():
    nested = with_segment(JPEG, b"Thumb\0" + encoded(".jpg", scene(8, 8)) + b"\xff\xd9\xff\xd9")
    assert np.array_equal(decode_picture(nested), decode_picture(JPEG))
    assert "not one whole JPEG" in refusal(nested[: nested.rindex(b"\xff\xda") + 100]).detail


def test_a_camera_may_leave_the_standard_tables_out():
    """Frames of Motion JPEG have no Huffman tables."""
    data = JPEG
    while (at := data.find(b"\xff\xc4")) > 0:
        data = data[:at] + data[at + 2 + struct.unpack_from(">H", data, at + 2)[0] :]
    assert len(data) < len(JPEG) - 400 and np.array_equal(decode_jpeg(data), decode_jpeg(JPEG))


# -- depth and colour -------------------------------------------------------------------------------------------------

PALETTE = png_chunk(b"PLTE", bytes((10, 20, 30, 40, 50, 60)))


@pytest.mark.parametrize(
    ("data", "first_pixel"),
    [
        (png(8, 0, b"\x07" * 4), (7, 7, 7)),
        (png(1, 0, b"\x80"), (255, 255, 255)),
        (png(8, 2, bytes((1, 2, 3)) * 4), (3, 2, 1)),
        (png(8, 3, b"\1" * 4, PALETTE), (60, 50, 40)),
        (png(8, 6, bytes((1, 2, 3, 255)) * 4), (3, 2, 1)),
        (png(8, 4, bytes((9, 255)) * 4), (9, 9, 9)),
        (encoded(".bmp", scene()[:, :, 0]), None),
    ],
    ids=["grey", "black and white", "colour", "palette", "opaque alpha", "grey with opaque alpha", "grey bmp"],
)
def test_grey_and_colour_of_8_bits_are_taken(data, first_pixel):
    image = decode_picture(data)
    assert image.shape[2] == 3 and (first_pixel is None or tuple(image[0, 0]) == first_pixel)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (encoded(".png", np.full((8, 8), 7800, np.uint16)), "16 bits per channel; expected 8"),
        (encoded(".png", np.full((8, 8, 3), 7800, np.uint16)), "16 bits per channel; expected 8"),
        (encoded(".png", np.full((8, 8, 4), 60000, np.uint16)), "16 bits per channel; expected 8"),
        (png(8, 6, bytes((1, 2, 3, 254)) * 4), "transparent"),
        (png(8, 4, bytes((9, 0)) * 4), "transparent"),
        (png(8, 3, b"\1" * 4, PALETTE, png_chunk(b"tRNS", b"\xff\x80")), "transparent"),
        (encoded(".webp", np.full((8, 8, 4), 90, np.uint8), cv2.IMWRITE_WEBP_QUALITY, 101), "transparent"),
        (encoded(".tiff"), "not a JPEG, PNG, WebP or BMP"),
        (encoded(".ppm"), "not a JPEG, PNG, WebP or BMP"),
        (b"GIF89a" + bytes(40), "not a JPEG, PNG, WebP or BMP"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not a JPEG, PNG, WebP or BMP"),
        (b"", "not a JPEG, PNG, WebP or BMP"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_other_pixels_are_refused_by_name(data, words):
    assert words in refusal(data).detail


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_a_file_is_turned_as_its_exif_says_and_a_frame_is_not(orientation):
    data = with_segment(JPEG, exif(orientation))
    stored, turns = decode_jpeg(data), {1: 0, 3: 2, 6: 3, 8: 1}[orientation]
    assert np.array_equal(stored, decode_jpeg(JPEG))
    assert np.array_equal(decode_picture(data), np.rot90(stored, turns))


# -- size -------------------------------------------------------------------------------------------------------------


def claimed(name: str, width: int, height: int) -> bytes:
    """The picture with another size in its header."""
    data = bytearray(KINDS[name])
    if name == "jpeg":
        struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, height, width)
    elif name == "png":
        data[8:33] = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    elif name == "bmp":
        struct.pack_into("<ii", data, 18, width, height)
        data += bytes(1)
    elif name == "webp":
        struct.pack_into("<HH", data, 26, width, height)
    else:
        struct.pack_into("<I", data, 21, width - 1 | height - 1 << 14)
    return bytes(data)


@pytest.mark.parametrize("name", ["jpeg", "png", "webp", "lossless webp"])
def test_a_picture_that_is_too_large_is_refused_before_it_is_decoded(name, monkeypatch):
    monkeypatch.setattr("cv2.imdecode", lambda *arguments: pytest.fail("decoded"))
    monkeypatch.setattr("simplejpeg.decode_jpeg", lambda *arguments: pytest.fail("decoded"))
    error = refusal(claimed(name, 16000, 15000))
    assert error.reason == "too-large" and "16000x15000" in error.detail and "camera.max_megapixels" in error.detail


def test_the_limit_counts_pixels():
    assert decode_picture(JPEG, 96 * 128).shape == (96, 128, 3)
    assert refusal(JPEG, 96 * 128 - 1).reason == refusal(KINDS["bmp"], 96 * 128 - 1).reason == "too-large"


@pytest.mark.parametrize("name", ["jpeg", "png", "webp", "bmp"])
def test_a_picture_without_pixels_is_refused(name):
    assert refusal(claimed(name, 0, 100)).reason == "unreadable"


# -- anything else ----------------------------------------------------------------------------------------------------


@given(st.sampled_from(sorted(KINDS)), st.integers(0, 10**6), st.binary(max_size=40), st.booleans())
@settings(derandomize=True, max_examples=150)
def test_any_bytes_are_a_picture_or_a_refusal(name, at, change, is_cut):
    data = KINDS[name]
    at %= len(data)
    damaged = data[:at] + change + (b"" if is_cut else data[at + len(change) :])
    try:
        image = decode_picture(damaged, 10**6)
    except SourceError as error:
        assert error.reason in ("unreadable", "too-large")
    else:
        assert image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8


def test_an_error_of_opencv_is_a_refusal(monkeypatch):
    def raise_error(*arguments: object) -> None:
        raise cv2.error("out of memory")

    monkeypatch.setattr("cv2.imdecode", raise_error)
    assert refusal(KINDS["png"]).reason == "unreadable"


# -- names of files ---------------------------------------------------------------------------------------------------

NAMES = [
    b"Fl\xfcgel.jpg",
    b"\xff\xfe.jpeg",
    "Flügel.png".encode(),
    b"a\nb.bmp",
    b"%03d.jpg",
    b"a:b.JPG",
    b"[bold].webp",
]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_a_name_in_any_encoding_is_read(tmp_path, name):
    path = Path(os.fsdecode(bytes(tmp_path) + b"/" + name))
    path.write_bytes(encoded(path.suffix.lower()))
    assert picture_paths(tmp_path) == [path] and read_picture(path).shape == (96, 128, 3)
    path.write_bytes(b"nothing")
    with pytest.raises(SourceError) as caught:
        read_picture(path)
    assert str(tmp_path) in caught.value.detail and caught.value.detail.encode()  # it can be sent and printed


@pytest.mark.parametrize("name", ["._a.jpg", ".hidden.png", "Thumbs.db", ".DS_Store", "desktop.ini", "a.jpg.part"])
def test_what_other_systems_leave_is_not_a_picture(tmp_path, name):
    (tmp_path / name).write_bytes(JPEG)
    with pytest.raises(SourceError, match="no image in this folder"):
        picture_paths(tmp_path)
    (tmp_path / "a.jpg").write_bytes(JPEG)
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "broken.jpg").symlink_to(tmp_path / "nowhere")
    assert picture_paths(tmp_path) == [tmp_path / "a.jpg"]


def test_a_picture_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(SourceError, match=r"gone\.jpg: No such file or directory") as caught:
        read_picture(tmp_path / "gone.jpg")
    assert caught.value.reason == "unreadable"


def test_a_file_larger_than_any_picture_is_not_read_to_its_end(tmp_path):
    with (tmp_path / "a.bmp").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(SourceError, match="expected at most") as caught:
        read_picture(tmp_path / "a.bmp")
    assert caught.value.reason == "too-large"
