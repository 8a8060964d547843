from __future__ import annotations

import io
import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pnp_batch.errors import ItemError
from pnp_batch.media.images import (
    MAX_PIXELS,
    encode_png,
    fitted_size,
    load_rgb,
    opened,
    picture_size,
    rgb_pixels,
)

ORIENTATION = 0x0112
LOSSLESS = ("png", "tif", "webp")


def quadrants() -> Image.Image:
    """40 x 20: red, green over blue, white."""
    image = Image.new("RGB", (40, 20))
    for place, colour in {(0, 0): "red", (20, 0): "lime", (0, 10): "blue", (20, 10): "white"}.items():
        image.paste(colour, (*place, place[0] + 20, place[1] + 10))
    return image


def png(width: int, height: int, bits: int, kind: int, rows: bytes, **chunks: bytes) -> bytes:
    """A PNG made by hand, for what Pillow does not write."""

    def chunk(name: str, data: bytes) -> bytes:
        body = name.encode() + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = chunk("IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    extra = b"".join(chunk(name, data) for name, data in chunks.items())
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk("IDAT", zlib.compress(rows)) + chunk("IEND", b"")


@pytest.mark.parametrize("suffix", ["jpg", "avif", *LOSSLESS])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_stands_upright_whatever_its_exif_says(tmp_path, suffix, orientation):
    """The file holds the pixels turned the other way and says so; what comes out is always the same."""
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    upright = quadrants()
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / f"picture.{suffix}"
    if suffix in LOSSLESS:
        stored.save(path, exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    else:
        stored.save(path, exif=exif, quality=100, subsampling="4:4:4")
    assert picture_size(path) == (40, 20)
    difference = np.abs(load_rgb(path, (40, 20)).astype(int) - np.asarray(upright).astype(int))
    assert difference.max() <= (0 if suffix in LOSSLESS else 40)


def test_exif_after_the_pixels_of_a_png_counts_too(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    quadrants().save(tmp_path / "early.png", exif=exif)
    data = (tmp_path / "early.png").read_bytes()
    begin = data.index(b"eXIf") - 4
    end = begin + 12 + struct.unpack(">I", data[begin : begin + 4])[0]
    rest, chunk = data[:begin] + data[end:], data[begin:end]
    iend = rest.index(b"IEND") - 4
    (tmp_path / "late.png").write_bytes(rest[:iend] + chunk + rest[iend:])
    assert picture_size(tmp_path / "late.png") == (20, 40)
    assert np.array_equal(load_rgb(tmp_path / "late.png", (20, 40)), load_rgb(tmp_path / "early.png", (20, 40)))


@pytest.mark.parametrize(
    "mode", ["RGB", "RGBA", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr", "I", "I;16", "F", "HSV", "LAB", "RGBa", "La"]
)
def test_every_mode_becomes_rgb(mode):
    pixels = rgb_pixels(Image.new(mode, (8, 8)), (8, 8))
    assert (pixels.shape, pixels.dtype) == ((8, 8, 3), np.uint8)


def test_transparency_is_shown_over_white(tmp_path):
    half = Image.new("RGBA", (2, 1), (0, 0, 0, 128))
    half.putpixel((1, 0), (10, 20, 30, 0))
    expected = [[[127, 127, 127], [255, 255, 255]]]
    for name, image in {"rgba.png": half, "la.png": half.convert("LA"), "rgba.webp": half, "rgba.tif": half}.items():
        image.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
        assert np.abs(load_rgb(tmp_path / name, (2, 1)).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("alpha", [b"\x00\xff\xff", b"\x00\x80\xff"])
def test_a_transparent_palette_entry_is_white(tmp_path, alpha):
    """One wholly transparent entry and a table of alphas are read by Pillow in two different ways."""
    palette = b"\x00\x00\xff\xff\x00\x00\x00\xff\x00"
    (tmp_path / "p.png").write_bytes(png(3, 1, 8, 3, b"\0\0\1\2", PLTE=palette, tRNS=alpha))
    red = [255, 0, 0] if alpha[1] == 0xFF else [255, 127, 127]
    assert load_rgb(tmp_path / "p.png", (3, 1)).tolist() == [[[255, 255, 255], red, [0, 255, 0]]]


@pytest.mark.parametrize(("bits", "rows", "key"), [(8, b"\0\x10\x80", 0x10), (16, b"\0\x10\x00\x80\x80", 0x1000)])
def test_a_transparent_grey_is_white(tmp_path, bits, rows, key):
    (tmp_path / "g.png").write_bytes(png(2, 1, bits, 0, rows, tRNS=struct.pack(">H", key)))
    assert load_rgb(tmp_path / "g.png", (2, 1)).tolist() == [[[255] * 3, [128] * 3]]


@pytest.mark.parametrize("suffix", ["png", "tif", "ppm"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(tmp_path, suffix):
    values = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"g.{suffix}")
    assert load_rgb(tmp_path / f"g.{suffix}", (4, 1))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_sixteen_bit_colour_is_read(tmp_path):
    values = np.array([[[0x8080, 0x1212, 0xFFFF], [0, 0x0101, 0]]], dtype=">u2")
    (tmp_path / "c.png").write_bytes(png(2, 1, 16, 2, b"\0" + values.tobytes()))
    assert load_rgb(tmp_path / "c.png", (2, 1)).tolist() == [[[128, 18, 255], [0, 1, 0]]]
    grey_alpha = np.array([0x8080, 0xFFFF, 0, 0], dtype=">u2")
    (tmp_path / "la.png").write_bytes(png(2, 1, 16, 4, b"\0" + grey_alpha.tobytes()))
    assert load_rgb(tmp_path / "la.png", (2, 1)).tolist() == [[[128] * 3, [255] * 3]]


def test_floats_are_zero_to_one_and_what_is_no_number_is_black():
    values = np.array([[0.0, 0.5, 1.0, 7.0, -1.0, np.nan]], dtype=np.float32)
    assert rgb_pixels(Image.fromarray(values), (6, 1))[0, :, 0].tolist() == [0, 128, 255, 255, 0, 0]


def test_one_bit_and_grey_and_cmyk_files(tmp_path):
    Image.new("1", (2, 2), 1).save(tmp_path / "b.png")
    Image.new("L", (2, 2), 77).save(tmp_path / "g.jpg")
    Image.new("CMYK", (2, 2), (255, 0, 0, 0)).save(tmp_path / "c.jpg", quality=100)
    Image.new("CMYK", (2, 2), (255, 0, 0, 0)).save(tmp_path / "c.tif")
    assert load_rgb(tmp_path / "b.png", (2, 2))[0, 0].tolist() == [255, 255, 255]
    assert load_rgb(tmp_path / "g.jpg", (2, 2))[0, 0].tolist() == [77, 77, 77]
    for name in ("c.jpg", "c.tif"):
        assert np.abs(load_rgb(tmp_path / name, (2, 2))[0, 0].astype(int) - [0, 255, 255]).max() <= 2


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_of_many_frames_the_first_is_taken(tmp_path, suffix):
    path = tmp_path / f"many.{suffix}"
    first, *rest = (Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue"))
    first.save(path, save_all=True, append_images=rest, **({"lossless": True} if suffix == "webp" else {}))
    assert load_rgb(path, (8, 8))[4, 4].tolist() == [255, 0, 0]


def test_a_transparent_gif_is_white_where_it_is_transparent(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "t.gif", transparency=0)
    assert load_rgb(tmp_path / "t.gif", (2, 1)).tolist() == [[[255, 255, 255], [200, 100, 50]]]


def test_what_counts_is_the_content_and_not_the_suffix(tmp_path):
    quadrants().save(tmp_path / "x.png", "JPEG")
    assert picture_size(tmp_path / "x.png") == (40, 20)


def test_the_size_is_asked_for_and_pixels_of_that_size_are_left_alone(tmp_path):
    quadrants().save(tmp_path / "x.png")
    assert np.array_equal(load_rgb(tmp_path / "x.png", (40, 20)), np.asarray(quadrants()))
    assert load_rgb(tmp_path / "x.png", (64, 32)).shape == (32, 64, 3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"hello", "not a readable picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not a readable picture"),
        (png(60_000, 60_000, 8, 2, b""), "the limit is 134,217,728 pixels"),
        (png(12_000, 12_000, 8, 2, b""), "12000x12000 pixels; the limit is 134,217,728 pixels"),
        (png(0, 1, 8, 2, b"\0"), "not a readable picture"),
        (png(200, 200, 8, 2, bytes(100)), "not a readable picture"),
        (b"GIF89a" + bytes(7) + b";", ": "),
    ],
)
def test_what_is_no_picture_is_an_item_error_with_its_name(tmp_path, data, message):
    path = tmp_path / "bad.png"
    path.write_bytes(data)
    with pytest.raises(ItemError, match=f"bad.png.*{message}"):
        load_rgb(path, picture_size(path))


def test_what_is_no_file_is_an_item_error_and_nothing_waits(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("pipe.png", "gone.png", ".", "x" * 300, "pipe.png/x"):
        with pytest.raises(ItemError):
            picture_size(tmp_path / name)
    with pytest.raises(ItemError, match="no such file"):
        load_rgb(tmp_path / "gone.png", (8, 8))


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", "avif", "gif", "bmp", "ppm"])
def test_damaged_bytes_never_raise_anything_but_an_item_error(tmp_path, suffix):
    buffer = io.BytesIO()
    quadrants().save(buffer, {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix))
    good, path, chance = buffer.getvalue(), tmp_path / f"x.{suffix}", random.Random(suffix)
    failed = 0
    for _ in range(60):
        bad = bytearray(good)
        for _ in range(chance.randint(1, 8)):
            bad[chance.randrange(len(bad))] = chance.randrange(256)
        path.write_bytes(bad[: chance.randint(1, len(bad))] if chance.random() < 0.3 else bad)
        try:
            picture_size(path)
            load_rgb(path, (8, 8))
        except ItemError as error:
            assert str(path) in str(error)
            failed += 1
    assert failed


def test_an_error_of_ours_inside_passes_through(tmp_path):
    quadrants().save(tmp_path / "x.png")
    with pytest.raises(ItemError, match=r"^mine$"), opened(tmp_path / "x.png"):
        raise ItemError("mine")


@pytest.mark.parametrize(
    ("picture", "height", "width", "expected"),
    [
        ((1000, 1000), None, None, (512, 512)),
        ((4000, 3000), None, None, (592, 440)),
        ((300, 400), 512, None, (384, 512)),
        ((300, 400), None, 512, (512, 680)),
        ((300, 400), 512, 512, (512, 512)),
        ((300, 400), 499, 301, (304, 496)),
        ((1, 400), 64, 64, (64, 64)),
        ((1000, 1000), 8, None, (8, 8)),
        ((3200, 100), 8, None, (256, 8)),
    ],
)
def test_sizes_follow_the_aspect_ratio_in_whole_cells(picture, height, width, expected):
    assert fitted_size(picture, height, width, 512, 8) == expected


def test_strips_and_giants_are_refused():
    with pytest.raises(ItemError, match="narrower than 1:32"):
        fitted_size((33, 1), None, None, 512, 8)
    with pytest.raises(ItemError, match="the limit is"):
        fitted_size((1, 32), None, 16384, 512, 8)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    picture=st.tuples(st.integers(1, 20_000), st.integers(1, 20_000)),
    height=st.none() | st.integers(8, 16_384),
    width=st.none() | st.integers(8, 16_384),
    cell=st.sampled_from([4, 8, 16]),
)
def test_any_size_is_made_of_cells_and_bounded_or_refused(picture, height, width, cell):
    try:
        wide, high = fitted_size(picture, height, width, 512, cell)
    except ItemError:
        return
    assert wide % cell == high % cell == 0 < min(wide, high)
    assert wide * high <= 2 * MAX_PIXELS + 64 * 16_384
    for given_side, side in ((width, wide), (height, high)):
        assert given_side is None or abs(side - given_side) <= max(cell / 2, cell - given_side)


def test_a_png_carries_its_text_and_is_the_same_every_time(tmp_path):
    pixels = np.asarray(quadrants())
    text = {"prompt": "ein Pferd - 馬", "settings": '{"seed": 1}'}
    data = encode_png(pixels, text)
    assert data == encode_png(pixels.copy(), dict(text))
    with Image.open(io.BytesIO(data)) as image:
        assert image.text == text
        assert np.array_equal(np.asarray(image), pixels)


def test_planning_does_not_decode_pixels(tmp_path):
    """A PNG whose pixels are missing has a size all the same, so a folder of large ones is planned quickly."""
    path: Path = tmp_path / "x.png"
    path.write_bytes(png(3000, 2000, 8, 2, bytes(100)))
    assert picture_size(path) == (3000, 2000)
