"""Pictures of every format that is read: whole ones and first frames are decoded, cut and huge ones are refused."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from workloads.data import images

SIDE = 40


def noise(seed):
    """A picture of 16 colours, which a palette holds."""
    colours = np.random.default_rng(99).integers(0, 256, (16, 3), dtype=np.uint8)
    return colours[np.random.default_rng(seed).integers(0, 16, (SIDE, SIDE + 8))]


def encoded(kind, *frames_HWC, **settings):
    """The bytes of a picture; of several frames a moving one."""
    first, *rest = (Image.fromarray(frame_HWC) for frame_HWC in frames_HWC)
    moving = {"save_all": True, "append_images": rest, "duration": 50} if rest else {}
    buffer = io.BytesIO()
    first.save(buffer, kind, **moving, **settings)
    return buffer.getvalue()


def wide(data, place, num_bytes, order, side):
    """The bytes with another width and height at `place`, and a PNG's checksum of them."""
    both = 2 * (side - (num_bytes == 3)).to_bytes(num_bytes, order)
    changed = data[:place] + both + data[place + len(both) :]
    if not data.startswith(b"\x89PNG"):
        return changed
    return changed[:29] + zlib.crc32(changed[12:29]).to_bytes(4, "big") + changed[33:]


# Kind -> settings with which it keeps every pixel.
EXACT = {"PNG": {}, "GIF": {}, "WEBP": {"lossless": True}}


@pytest.mark.parametrize("kind", EXACT)
def test_a_whole_picture_is_decoded_and_its_header_tells_its_size(kind):
    picture_HWC = noise(0)
    data = encoded(kind, picture_HWC, **EXACT[kind])
    assert np.array_equal(images.decode(data), picture_HWC)
    assert images.size(data) == picture_HWC.shape[:2]


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_of_a_moving_picture_the_first_frame_is_seen(kind):
    data = encoded(kind, noise(0), noise(1), noise(2), **EXACT[kind])
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.array_equal(images.decode(data), noise(0))
    assert images.size(data) == noise(0).shape[:2]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP"])
def test_a_picture_cut_anywhere_in_its_content_is_refused(kind):
    data = encoded(kind, noise(0))
    assert images.decode(data).shape == noise(0).shape
    for place in range(0, len(data) * 9 // 10, 7):
        with pytest.raises(ValueError, match="^image: "):
            images.decode(data[:place])


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_a_moving_picture_cut_in_its_first_frame_is_refused(kind):
    still, data = (encoded(kind, *(noise(k) for k in range(num)), **EXACT[kind]) for num in (1, 3))
    for place in range(0, len(still) * 9 // 10, 7):
        with pytest.raises(ValueError, match="^image: "):
            images.decode(data[:place])


GIF, MOVING_WEBP = encoded("GIF", noise(0)), encoded("WEBP", noise(0), noise(1))
# Where a GIF's frame says its place, width and height.
FRAME = GIF.index(b",\0\0\0\0" + SIDE.to_bytes(1, "little").join((b"\x30\0", b"\0")))


@pytest.mark.parametrize("side", [8_100, 60_000])
@pytest.mark.parametrize(
    ("data", "place", "num_bytes", "order"),
    [
        (encoded("PNG", noise(0)), 16, 4, "big"),
        (GIF, 6, 2, "little"),
        (GIF, FRAME + 5, 2, "little"),
        (MOVING_WEBP, MOVING_WEBP.index(b"VP8X") + 12, 3, "little"),
    ],
    ids=["png", "gif", "frame_of_a_gif", "moving_webp"],
)
def test_more_pixels_than_allowed_are_refused_by_the_header_alone(data, place, num_bytes, order, side):
    bomb = wide(data, place, num_bytes, order, side)
    for seen in (images.decode, images.size):
        with pytest.raises(ValueError, match=r"^image: .*pixels"):
            seen(bomb)


def test_what_is_no_picture_is_refused_in_the_same_words_each_time():
    said = set()
    for data in (b"hello", b"", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", encoded("BMP", noise(0)),
                 encoded("TIFF", noise(0)), b"GIF89a\x08\x00\x08\x00\x00\x00\x00;"):  # fmt: skip
        with pytest.raises(ValueError, match="^image: ") as error:
            images.decode(data)
        said.add(str(error.value))
    assert said == {"image: none of PNG, JPEG, GIF, WEBP, or broken in its header"}
