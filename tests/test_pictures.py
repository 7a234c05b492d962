"""Still pictures: what is one, what comes out, and what is refused."""

import contextlib
import dataclasses
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from models import tiny_config
from numpy.typing import NDArray
from PIL import Image
from videofiles import moving_frames, write_video

from jvjepa import ModelConfig, video
from jvjepa.errors import InputError, VideoError
from jvjepa.pictures import is_picture, picture_clip, read_clip, read_picture

V2 = ModelConfig(encoder=dataclasses.replace(tiny_config(), frames_per_clip=4))
V2_1 = ModelConfig(encoder=dataclasses.replace(tiny_config(), image_tokenizer=True))
Pixels = NDArray[np.uint8]
NO_PICTURE = "is no picture; right is JPEG, PNG, WebP, BMP or TIFF"


def smooth(height: int = 67, width: int = 91, seed: int = 0) -> Pixels:
    """uint8 [H, W, 3]: clouds of colour with sharp edges where they saturate."""
    steps = np.random.default_rng(seed).normal(size=(height, width, 3))
    return np.clip(128 + 2 * steps.cumsum(0).cumsum(1), 0, 255).astype(np.uint8)


def encode(pixels: Pixels | Image.Image, kind: str, **options: object) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def several(kind: str) -> bytes:
    first, *others = (Image.fromarray(frame) for frame in moving_frames(3))
    return encode(first, kind, save_all=True, append_images=others)


def write(folder: Path, data: bytes) -> Path:
    path = folder / "picture"
    path.write_bytes(data)
    return path


def read(folder: Path, data: bytes) -> Pixels:
    """uint8 [H, W, 3]."""
    path = write(folder, data)
    assert is_picture(path)
    pixels = read_picture(path)
    assert (pixels.dtype, pixels.ndim, len(pixels)) == (np.uint8, 4, 1)
    assert pixels.flags.carray
    return pixels[0]


def refusal(folder: Path, data: bytes) -> str:
    path = write(folder, data)
    with pytest.raises(VideoError) as caught:
        read_picture(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def png(values: NDArray[np.integer], kind: int, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG of 16 bits; `values` [H, W, channels]."""
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        checksum = zlib.crc32(name + body)
        data += struct.pack(">I4s", len(body), name) + body + checksum.to_bytes(4, "big")
    return data


def tiff(
    values: NDArray[np.generic], *, bits: int = 16, photometric: int = 1, kind: int = 1
) -> bytes:
    """A grey TIFF of `values` [H, W]; `kind` 1 is unsigned, 2 signed, 3 float."""
    height, width = values.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1}
    tags |= {278: height, 279: values.nbytes, 339: kind}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + values.nbytes) + values.tobytes() + directory


PICTURES = {
    "jpeg": encode(smooth(), "JPEG"),
    "progressive": encode(smooth(), "JPEG", progressive=True),
    "png": encode(smooth(), "PNG"),
    "webp": encode(smooth(), "WEBP"),
    "lossless": encode(smooth(), "WEBP", lossless=True),
    "bmp": encode(smooth(), "BMP"),
    "tiff": encode(smooth(), "TIFF"),
    "lzw": encode(smooth(), "TIFF", compression="tiff_lzw"),
    "deflate": encode(smooth(), "TIFF", compression="tiff_deflate"),
}


# Colours


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_lossy_kinds_are_close(tmp_path: Path, kind: str) -> None:
    for height, width in ((1, 1), (2, 17), (67, 91), (64, 96)):
        pixels = np.empty((height, width, 3), np.uint8)
        pixels[..., 0] = 40 + 2 * np.arange(height)[:, None]
        pixels[..., 1] = 220 - 2 * np.arange(width)
        pixels[..., 2] = 90
        error = read(tmp_path, encode(pixels, kind, quality=95)).astype(int) - pixels
        assert np.abs(error).max() <= 8
        assert np.abs(error).mean() <= 2


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGBA", "L", "LA", "P", "1"])
def test_modes_become_rgb(tmp_path: Path, kind: str, mode: str) -> None:
    if (kind, mode) == ("BMP", "LA"):
        mode = "L"  # there is no such BMP
    image = Image.fromarray(smooth()).convert(mode)
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(read(tmp_path, encode(image, kind)), expected)


def test_cmyk_and_jpeg_in_tiff(tmp_path: Path) -> None:
    red = np.full((16, 16, 3), (200, 60, 30), np.uint8)
    cmyk = Image.fromarray(red).convert("CMYK")
    jpeg_in_tiff = encode(red, "TIFF", compression="jpeg", quality=95)
    for data in (encode(cmyk, "JPEG", quality=95), encode(cmyk, "TIFF"), jpeg_in_tiff):
        assert np.abs(read(tmp_path, data).astype(int) - red).max() <= 3


@pytest.mark.parametrize(("channels", "kind"), [(1, 0), (3, 2), (2, 4), (4, 6)])
def test_of_16_bits_the_upper_8_are_kept(tmp_path: Path, channels: int, kind: int) -> None:
    values = np.random.default_rng(0).integers(0, 1 << 16, (20, 30, channels))
    values[0, 0], values[0, 1] = 0, 0xFFFF
    if channels in (2, 4):
        values[..., -1] = 0xFFFF  # opaque
    colours = values[..., : channels - (channels in (2, 4))]
    upper = np.broadcast_to((colours >> 8).astype(np.uint8), (20, 30, 3))
    np.testing.assert_array_equal(read(tmp_path, png(values, kind)), upper)


def test_what_pillow_would_show_wrongly_is_refused(tmp_path: Path) -> None:
    raw = encode(smooth(), "TIFF", tiffinfo={330: 8})  # a camera's: a thumbnail stands first
    assert refusal(tmp_path, raw).startswith("holds several pictures")
    grey = np.arange(600).reshape(20, 30)
    assert is_picture(write(tmp_path, tiff(grey.astype("<u2"))))
    for data in (
        tiff(grey.astype("<i2"), kind=2),
        tiff(grey.astype("<i1"), bits=8, kind=2),
        tiff(grey.astype("<f4"), bits=32, kind=3),
        tiff(grey.astype("<u4"), bits=32),
        tiff(grey.astype("<u2"), photometric=0),  # white is 0
        tiff(grey.astype("<u2")[:, :23], bits=12),
    ):
        assert refusal(tmp_path, data).startswith("has samples that are not read; right are")
    for key, kind in ((grey[0, :1], 0), (grey[0, :3], 2)):
        shown = (b"tRNS", key.astype(">u2").tobytes())
        data = png(np.broadcast_to(grey[..., None], (20, 30, len(key))), kind, shown)
        assert refusal(tmp_path, data).startswith("has a transparent colour of 16 bits")


def test_transparent_pixels_are_refused(tmp_path: Path) -> None:
    image = Image.fromarray(smooth(10, 20)).convert("RGBA")
    image.putpixel((3, 4), (1, 2, 3, 254))
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("WEBP", {}), ("TIFF", {})):
        message = refusal(tmp_path, encode(image, kind, **options))
        assert message == "is transparent in 1 of its pixels; put it on a background first"
    for mode in ("P", "L", "RGB"):
        image = Image.fromarray(smooth(10, 20)).convert(mode)
        key = image.getpixel((0, 0))
        assert "is transparent in " in refusal(tmp_path, encode(image, "PNG", transparency=key))
    half = encode(Image.fromarray(smooth()).convert("P"), "PNG", transparency=bytes([128] * 256))
    assert refusal(tmp_path, half).startswith(f"is transparent in {67 * 91} of its pixels")


# Orientation

UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda image: image,
    2: np.fliplr,
    3: lambda image: np.rot90(image, 2),
    4: np.flipud,
    5: lambda image: np.rot90(np.fliplr(image)),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: np.rot90(np.fliplr(image), -1),
    8: np.rot90,
}


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[274] = orientation
    return tags


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_pictures_are_upright(tmp_path: Path, orientation: int) -> None:
    colours, turned = smooth(19, 34), UPRIGHT[orientation]
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {})):
        stored = read(tmp_path, encode(colours, kind, **options))
        data = encode(colours, kind, exif=exif(orientation), **options)
        np.testing.assert_array_equal(read(tmp_path, data), turned(stored))
    # Pillow maps some of these into memory, and would then spoil them.
    lzw, grey = {"compression": "tiff_lzw"}, colours[..., 0]
    for pixels, options in ((colours, {}), (colours, lzw), (grey, {}), (grey, lzw)):
        data = encode(pixels, "TIFF", tiffinfo={274: orientation}, **options)
        np.testing.assert_array_equal(read(tmp_path, data)[..., 0], turned(grey))
    data = encode(grey * np.uint16(256), "TIFF", tiffinfo={274: orientation})
    np.testing.assert_array_equal(read(tmp_path, data)[..., 0], turned(grey))


def test_metadata_cannot_do_harm(tmp_path: Path) -> None:
    junk = np.random.default_rng(0).integers(0, 256, 300).astype(np.uint8).tobytes()
    tags = {305: "a program", 700: junk, 34675: junk, 65000: 7}
    for data in (
        *(encode(smooth(), "PNG", exif=exif(undefined)) for undefined in (0, 9, 77)),
        encode(smooth(), "WEBP", lossless=True, xmp=junk, icc_profile=junk),
        encode(smooth(), "TIFF", tiffinfo=tags, compression="tiff_lzw"),
    ):
        np.testing.assert_array_equal(read(tmp_path, data), smooth())
    # A tag that Pillow can read but not write again, and one that lies behind the end.
    entries = struct.pack("<HHIHH", 274, 3, 1, 6, 0) + struct.pack("<HHII", 258, 2, 1, 65)
    entries += struct.pack("<HHII", 271, 2, 99, 9999) + bytes(4)
    broken = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 3) + entries
    upright = read(tmp_path, encode(smooth(), "PNG", exif=broken))
    np.testing.assert_array_equal(upright, UPRIGHT[6](smooth()))
    assert "cannot be read" in refusal(tmp_path, encode(smooth(), "PNG", exif=b"Exif\0\0" + junk))


# What is a picture


@pytest.mark.parametrize("name", PICTURES)
def test_content_decides(tmp_path: Path, name: str) -> None:
    for file in ("a", "a.mp4", "%03d.png"):
        path = tmp_path / file
        path.write_bytes(PICTURES[name])
        assert is_picture(path)
        pixels = read_picture(str(path))[0]
        assert pixels.shape == (67, 91, 3)
        if name not in ("jpeg", "progressive", "webp"):
            np.testing.assert_array_equal(pixels, smooth())


def test_what_moves_is_no_picture(tmp_path: Path, clips: dict[str, Path]) -> None:
    for kind in ("PNG", "WEBP", "TIFF"):
        assert not is_picture(write(tmp_path, several(kind)))
        assert refusal(tmp_path, several(kind)).startswith("is no still picture, but several")
    for data in (several("GIF"), *(clip.read_bytes() for clip in clips.values())):
        assert not is_picture(write(tmp_path, data))
        assert refusal(tmp_path, data) == NO_PICTURE


def test_of_several_jpegs_the_first_is_the_picture(tmp_path: Path) -> None:
    """A phone's preview, or the film of a moment."""
    first = read(tmp_path, encode(moving_frames(3)[0], "JPEG"))
    motion = b"".join(encode(frame, "JPEG") for frame in moving_frames(3))
    appended = encode(moving_frames(3)[0], "JPEG") + b"ftyp" + bytes(500)
    for data in (several("MPO"), several("MPO")[:-100], motion, appended):
        np.testing.assert_array_equal(read(tmp_path, data), first)


def test_what_is_no_picture(tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "a.png", "http://127.0.0.1/a.png", "camera:0"):
        assert not is_picture(source)
    with pytest.raises(VideoError, match=r"gone\.png: is not there"):
        read_picture(tmp_path / "gone.png")
    with pytest.raises(VideoError, match=r": is no file"):
        read_picture(tmp_path)
    for data in (b"", b"BM", b"II*", b"hello", b"RIFF1234WAVEfmt ", PICTURES["png"][:12]):
        assert not is_picture(write(tmp_path, data))
        assert refusal(tmp_path, data) == NO_PICTURE


def test_heif_is_no_picture_and_no_video(tmp_path: Path) -> None:
    for data in (encode(smooth(), "AVIF"), struct.pack(">I", 24) + b"ftypheic" + bytes(100)):
        assert refusal(tmp_path, data) == NO_PICTURE
        assert not is_picture(tmp_path / "picture")
        with pytest.raises(VideoError, match=r": (num_frames = 4, but it has 1 |cannot be opened)"):
            read_clip(V2, str(tmp_path / "picture"))


# Damage


@pytest.mark.parametrize("name", PICTURES)
def test_a_cut_off_picture_is_an_error(tmp_path: Path, name: str) -> None:
    data = PICTURES[name]
    # The last 4 bytes of a PNG are a checksum of nothing; in a BMP rows end with padding.
    whole = len(data) - 4 if name in ("png", "bmp") else len(data)
    for length in (*range(0, whole, max(1, whole // 40)), whole - 2, whole - 1):
        refusal(tmp_path, data[:length])
    if name not in ("lzw", "deflate"):  # their headers come last
        assert is_picture(write(tmp_path, data[: len(data) // 2]))


def test_a_changed_bit_in_a_png_is_an_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(PICTURES["png"])
        data[rng.integers(12, len(data) - 4)] ^= 1 << rng.integers(8)
        refusal(tmp_path, bytes(data))
    # Pillow itself shows this one: the last bytes checksum the pixels.
    data = PICTURES["png"][:-13] + bytes([PICTURES["png"][-13] ^ 1]) + PICTURES["png"][-12:]
    assert "checksum" in refusal(tmp_path, data)
    short = PICTURES["png"][:11] + b"\5" + PICTURES["png"][12:]
    assert "Truncated IHDR" in refusal(tmp_path, short)


def test_damage_raises_nothing_else(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "picture"
    for data in (*PICTURES.values(), encode(smooth(), "JPEG", exif=exif(6)), several("MPO")):
        for end in (60, 400, len(data)) * 12:
            damaged = bytearray(data)
            for at in rng.integers(4, end, size=4):
                damaged[at] = rng.integers(256)
            path.write_bytes(damaged)
            is_picture(path)
            with contextlib.suppress(VideoError):
                assert len(read_picture(path)) == 1


@pytest.mark.parametrize("times", [1.5, 3])
def test_too_many_pixels(tmp_path: Path, times: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(67 * 91 / times))
    for data in PICTURES.values():
        message = refusal(tmp_path, data)
        assert message.startswith("has more pixels than PIL.Image.MAX_IMAGE_PIXELS, which is ")
        assert is_picture(tmp_path / "picture")


# Clips


def test_a_picture_for_a_model_that_knows_pictures(tmp_path: Path) -> None:
    path = write(tmp_path, PICTURES["png"])
    expected = video.preprocess(smooth()[None], V2_1)

    clip = read_clip(V2_1, str(path))

    assert clip.is_picture
    assert clip.pixels.shape == (1, 64, 64, 3)
    assert clip.pixels.dtype == np.float32
    assert clip.times.tolist() == [0.0]
    np.testing.assert_array_equal(clip.pixels, expected)
    np.testing.assert_array_equal(picture_clip(V2_1, path), expected)


def test_a_model_of_videos_takes_pictures_only_if_asked(tmp_path: Path) -> None:
    path = str(write(tmp_path, PICTURES["png"]))
    refused = r"picture: is a picture, and this model \(V-JEPA 2\) .*; --repeat-frame encodes it as"
    with pytest.raises(InputError, match=refused):
        picture_clip(V2, path)
    with pytest.raises(InputError, match=refused):
        read_clip(V2, path)

    clip = read_clip(V2, path, repeat_frame=True)

    assert clip.is_picture
    np.testing.assert_array_equal(clip.pixels, video.preprocess(smooth()[None], V2))
    with pytest.raises(InputError, match=r"this model \(V-JEPA 2\.1\) takes as it is; leave out"):
        read_clip(V2_1, path, repeat_frame=True)


@pytest.mark.parametrize(
    "options", [{"num_frames": 1}, {"fps": 2.0}, {"start": 0.5}, {"end": 1.0}, {"end": 0.0}]
)
def test_a_picture_has_no_frames_to_choose(tmp_path: Path, options: dict[str, float]) -> None:
    path = str(write(tmp_path, PICTURES["png"]))
    with pytest.raises(InputError, match="picture: is a picture; --num-frames, --fps, --start and"):
        read_clip(V2_1, path, **options)


def test_a_clip_of_a_video(clips: dict[str, Path]) -> None:
    path = str(clips["mp4"])
    frames, times = video.read(path, num_frames=6, fps=5, start=0.4, end=1.9)

    clip = read_clip(V2, path, num_frames=6, fps=5, start=0.4, end=1.9)

    assert not clip.is_picture
    np.testing.assert_array_equal(clip.pixels, video.preprocess(frames, V2))
    np.testing.assert_array_equal(clip.times, times)
    assert len(read_clip(V2, path).pixels) == 4  # as the model was trained with
    with pytest.raises(InputError, match="is no picture, and only those need --repeat-frame"):
        read_clip(V2, path, repeat_frame=True)


def test_a_video_that_is_too_short(tmp_path: Path) -> None:
    path = str(write_video(tmp_path / "short.mp4", moving_frames(3)))
    with pytest.raises(VideoError, match="num_frames = 4, but it has 3 frames; --num-frames sets"):
        read_clip(V2, path)
    with pytest.raises(VideoError, match=r"num_frames = 5, but it has 3 frames$"):
        read_clip(V2, path, num_frames=5)
