"""Still pictures, against Pillow's decoders."""

import dataclasses
import io
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from models import tiny_config
from numpy.typing import NDArray
from PIL import Image, ImageOps
from videofiles import moving_frames, write_video

from jvjepa import ModelConfig, video
from jvjepa.errors import InputError, VideoError
from jvjepa.pictures import is_picture, picture_clip, read_clip, read_picture

V2 = ModelConfig(encoder=dataclasses.replace(tiny_config(), frames_per_clip=4))
V2_1 = ModelConfig(encoder=dataclasses.replace(tiny_config(), image_tokenizer=True))
Pixels = NDArray[np.uint8]
# Two good inverse cosine transforms may differ by 1 in brightness and in colour, and interpolated
# colours by another 1/2; blue is brightness + 1.772 times a colour. So 1 + 1.772 * 1.5, rounded.
JPEG = 4


def smooth(height: int = 67, width: int = 91, seed: int = 0) -> Pixels:
    """uint8 [H, W, 3]: clouds of colour with sharp edges where they saturate."""
    steps = np.random.default_rng(seed).normal(size=(height, width, 3))
    return np.clip(128 + 2 * steps.cumsum(0).cumsum(1), 0, 255).astype(np.uint8)


def encode(pixels: Pixels | Image.Image, kind: str, **options: object) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pillow(data: bytes) -> Pixels:
    """uint8 [H, W, 3], upright."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def write(folder: Path, data: bytes) -> Path:
    path = folder / "picture"
    path.write_bytes(data)
    return path


def read(folder: Path, data: bytes) -> Pixels:
    """uint8 [H, W, 3]."""
    path = write(folder, data)
    assert is_picture(path)
    pixels = read_picture(path)
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 4
    assert len(pixels) == 1
    assert pixels.flags.c_contiguous
    return pixels[0]


def difference(pixels: Pixels, reference: Pixels) -> NDArray[np.int64]:
    assert pixels.shape == reference.shape
    return np.abs(pixels.astype(np.int64) - reference.astype(np.int64))


def insert(data: bytes, at: int, what: bytes) -> bytes:
    return data[:at] + what + data[at:]


def jpeg_segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body


def png_chunk(kind: bytes, body: bytes) -> bytes:
    checksum = zlib.crc32(kind + body)
    return struct.pack(">I4s", len(body), kind) + body + checksum.to_bytes(4, "big")


AFTER_IHDR = 8 + 12 + 13


# Colours


@pytest.mark.parametrize("size", [(67, 91), (64, 96), (90, 41)])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("options", [{"quality": 60}, {"quality": 95, "progressive": True}])
def test_jpeg(
    tmp_path: Path, size: tuple[int, int], subsampling: str, options: dict[str, object]
) -> None:
    data = encode(smooth(*size), "JPEG", subsampling=subsampling, **options)

    error = difference(read(tmp_path, data), pillow(data))

    assert error.max() <= JPEG
    assert error.mean() <= 0.25


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_every_small_size(tmp_path: Path, kind: str) -> None:
    """FFmpeg's fast paths go wrong in the last columns of some."""
    for height in (1, 2, 17):
        for width in (*range(1, 21), 33, 50):
            data = encode(smooth(height, width), kind)
            assert difference(read(tmp_path, data), pillow(data)).max() <= JPEG


def test_jpeg_keeps_colours(tmp_path: Path) -> None:
    for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 60, 30), (255,) * 3, (0,) * 3):
        flat = np.full((32, 48, 3), colour, np.uint8)
        assert difference(read(tmp_path, encode(flat, "JPEG", quality=95)), flat).max() <= 3


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_jpeg_of_other_colours(tmp_path: Path, mode: str) -> None:
    data = encode(Image.fromarray(smooth()).convert(mode), "JPEG")
    assert difference(read(tmp_path, data), pillow(data)).max() <= 2


def test_jpeg_that_holds_rgb(tmp_path: Path) -> None:
    data = encode(smooth(), "JPEG", keep_rgb=True)
    assert difference(read(tmp_path, data), pillow(data)).max() <= 1


@pytest.mark.parametrize("options", [{"quality": 50}, {"quality": 95}, {"lossless": True}])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_webp(tmp_path: Path, options: dict[str, object], mode: str) -> None:
    data = encode(Image.fromarray(smooth()).convert(mode), "WEBP", **options)
    assert difference(read(tmp_path, data), pillow(data)).max() <= (
        0 if "lossless" in options else 1
    )


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_exact_kinds(tmp_path: Path, kind: str, mode: str) -> None:
    if (kind, mode) == ("BMP", "LA"):
        mode = "RGB"  # there is no such BMP
    data = encode(Image.fromarray(smooth()).convert(mode), kind)
    np.testing.assert_array_equal(read(tmp_path, data), pillow(data))


@pytest.mark.parametrize("coding", ["tiff_lzw", "tiff_deflate", "packbits"])
def test_tiff_codings(tmp_path: Path, coding: str) -> None:
    np.testing.assert_array_equal(
        read(tmp_path, encode(smooth(), "TIFF", compression=coding)), smooth()
    )


@pytest.mark.parametrize(("channels", "kind"), [(1, 0), (3, 2), (2, 4), (4, 6)])
def test_16_bits_become_8(tmp_path: Path, channels: int, kind: int) -> None:
    """Pillow takes the upper byte; the nearest one is as right."""
    values = np.random.default_rng(0).integers(0, 1 << 16, (20, 30, channels))
    if channels in (2, 4):
        values[..., -1] = 0xFFFF  # opaque
    header = struct.pack(">IIBBBBB", 30, 20, 16, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)

    pixels = read(tmp_path, data)

    colours = values[..., : channels - (channels in (2, 4))]
    upper = np.broadcast_to((colours >> 8).astype(np.uint8), pixels.shape)
    assert difference(pixels, upper).max() <= 1


def test_transparent_pixels_are_refused(tmp_path: Path) -> None:
    image = Image.fromarray(smooth(10, 20)).convert("RGBA")
    image.putpixel((3, 4), (1, 2, 3, 254))
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("WEBP", {}), ("TIFF", {})):
        path = write(tmp_path, encode(image, kind, **options))
        with pytest.raises(VideoError, match=r"picture: is transparent in 0\.5% of its pixels; "):
            read_picture(path)
    palette = Image.fromarray(smooth(10, 20)).convert("P")
    first = palette.getpixel((0, 0))
    with pytest.raises(VideoError, match="is transparent in "):
        read_picture(write(tmp_path, encode(palette, "PNG", transparency=first)))


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


def exif(orientation: int, order: str, kind: int = 3) -> bytes:
    """A TIFF structure with two tags, as a camera writes it; `kind` 3 is short, 4 long."""
    mark = {"<": b"II*\0", ">": b"MM\0*"}[order]
    value = struct.pack(order + {3: "HH", 4: "I"}[kind], *[orientation, 0][: 5 - kind])
    entries = struct.pack(order + "HHIHH", 0x0103, 3, 1, 6, 0)
    entries += struct.pack(order + "HHI", 0x0112, kind, 1) + value
    return mark + struct.pack(order + "IH", 8, 2) + entries + bytes(4)


def with_exif(pixels: Pixels, kind: str, blob: bytes) -> bytes:
    data = encode(
        pixels, kind, **{"WEBP": {"lossless": True}, "JPEG": {"quality": 98}}.get(kind, {})
    )
    if kind == "JPEG":
        return insert(data, 2, jpeg_segment(0xE1, b"Exif\0\0" + blob))
    if kind == "PNG":
        return insert(data, AFTER_IHDR, png_chunk(b"eXIf", blob))
    height, width = pixels.shape[:2]
    extended = struct.pack("<I", 8)[:4] + (width - 1).to_bytes(3, "little")
    extended += (height - 1).to_bytes(3, "little")
    chunks = b"VP8X" + struct.pack("<I", 10) + extended + data[12:]
    chunks += b"EXIF" + struct.pack("<I", len(blob)) + blob + bytes(len(blob) % 2)
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(("order", "width"), [("<", 3), (">", 3), (">", 4)])
def test_pictures_are_upright(
    tmp_path: Path, orientation: int, kind: str, order: str, width: int
) -> None:
    pixels = smooth(19, 34)
    data = with_exif(pixels, kind, exif(orientation, order, width))
    stored = pillow(with_exif(pixels, kind, exif(1, order)))

    upright = read(tmp_path, data)

    assert difference(upright, UPRIGHT[orientation](stored)).max() <= (
        JPEG if kind == "JPEG" else 0
    )
    assert difference(upright, pillow(data)).max() <= (JPEG if kind == "JPEG" else 0)


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_tiffs_are_upright(tmp_path: Path, orientation: int) -> None:
    data = encode(smooth(19, 34), "TIFF", tiffinfo={274: orientation}, compression="tiff_lzw")
    np.testing.assert_array_equal(read(tmp_path, data), UPRIGHT[orientation](smooth(19, 34)))


def test_the_first_exif_block_counts_and_unknown_numbers_do_not(tmp_path: Path) -> None:
    pixels = smooth(19, 34)
    for orientation in (0, 9, 77):
        np.testing.assert_array_equal(
            read(tmp_path, with_exif(pixels, "PNG", exif(orientation, "<"))), pixels
        )
    twice = insert(
        with_exif(pixels, "JPEG", exif(3, "<")), 2, jpeg_segment(0xE1, b"Exif\0\0" + exif(6, ">"))
    )
    assert read(tmp_path, twice).shape == (34, 19, 3)


# What is a picture

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


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("suffix", ["", ".mp4", "%03d.png"])
def test_content_decides(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(PICTURES[name])
    assert is_picture(path)
    assert is_picture(str(path))
    assert difference(read_picture(str(path))[0], pillow(PICTURES[name])).max() <= JPEG


def motion_jpeg(frames: Sequence[Pixels]) -> bytes:
    return b"".join(encode(frame, "JPEG") for frame in frames)


def animation(kind: str) -> bytes:
    first, *others = (Image.fromarray(frame) for frame in moving_frames(3))
    return encode(first, kind, save_all=True, append_images=others, duration=100)


def test_what_moves_is_no_picture(tmp_path: Path, clips: dict[str, Path]) -> None:
    for data in (
        animation("PNG"),
        animation("WEBP"),
        motion_jpeg(moving_frames(3)),
    ):
        path = write(tmp_path, data)
        assert not is_picture(path)
        with pytest.raises(VideoError, match="picture: is no still picture, but moves"):
            read_picture(path)
    for data in (animation("GIF"), *(clip.read_bytes() for clip in clips.values())):
        path = write(tmp_path, data)
        assert not is_picture(path)
        with pytest.raises(VideoError, match="is no picture; right is JPEG, PNG, WebP, BMP or"):
            read_picture(path)


def test_what_is_not_there_is_no_picture(tmp_path: Path) -> None:
    for source in (tmp_path, tmp_path / "a.png", "http://127.0.0.1/a.png", "camera:0"):
        assert not is_picture(source)
    for data in (b"", b"BM", b"BM is a car", b"II*", b"hello", b"RIFF1234WAVEfmt "):
        assert not is_picture(write(tmp_path, data))


def test_a_phones_extras_are_ignored(tmp_path: Path) -> None:
    """A preview or a gain map, announced by an MPF segment, or a film of the moment."""
    plain, small = PICTURES["jpeg"], encode(smooth(20, 30), "JPEG")
    announced = insert(plain, 2, jpeg_segment(0xE2, b"MPF\0" + exif(1, "<")))
    for data in (announced + small, announced + bytes(100) + small, plain + b"ftyp" + bytes(500)):
        np.testing.assert_array_equal(read(tmp_path, data), read(tmp_path, plain))


def test_metadata_cannot_do_harm(tmp_path: Path) -> None:
    """FFmpeg would stop at some of those of PNG and TIFF."""
    junk = np.random.default_rng(0).integers(0, 256, 300).astype(np.uint8).tobytes()
    jpeg, png = PICTURES["jpeg"], PICTURES["png"]
    for body in (junk, b"Exif\0\0" + junk, b"http://ns.adobe.com/xap/1.0/\0" + junk):
        for marker in (*range(0xE1, 0xEE), 0xEF, 0xFE):
            data = insert(jpeg, 2, jpeg_segment(marker, body))
            np.testing.assert_array_equal(read(tmp_path, data), read(tmp_path, jpeg))
    for kind in (b"iCCP", b"gAMA", b"sBIT", b"zTXt", b"eXIf", b"quIr"):
        data = insert(png, AFTER_IHDR, png_chunk(kind, junk))
        np.testing.assert_array_equal(read(tmp_path, data), smooth())
    webp = encode(smooth(), "WEBP", exif=junk, xmp=junk, icc_profile=junk)
    np.testing.assert_array_equal(read(tmp_path, webp), read(tmp_path, PICTURES["webp"]))
    tags = {305: "a program", 700: junk, 34675: junk, 65000: 7}
    data = encode(smooth(), "TIFF", tiffinfo=tags, compression="tiff_lzw")
    np.testing.assert_array_equal(read(tmp_path, data), smooth())


# Damage


def refusal(folder: Path, data: bytes) -> str:
    path = write(folder, data)
    with pytest.raises(VideoError) as caught:
        read_picture(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("name", PICTURES)
def test_a_cut_off_picture_is_an_error(tmp_path: Path, name: str) -> None:
    data = PICTURES[name]
    for length in (*range(20, len(data), max(1, len(data) // 40)), len(data) - 2, len(data) - 1):
        refusal(tmp_path, data[:length])
    assert is_picture(write(tmp_path, data[: len(data) // 2]))


@pytest.mark.parametrize("options", [{}, {"restart_marker_rows": 1}, {"subsampling": 0}])
def test_a_scan_that_ends_early_is_an_error(tmp_path: Path, options: dict[str, object]) -> None:
    """Its last bytes may be missing: a decoder reads as much into its buffer ahead."""
    data = encode(smooth(), "JPEG", **options)
    for lost in range(40, 1000, 40):
        assert "cannot be decoded" in refusal(tmp_path, data[:-lost] + b"\xff\xd9")


def test_a_hole_in_a_tiff_is_an_error(tmp_path: Path) -> None:
    data = PICTURES["lzw"]
    for at in range(1000, 9000, 1000):
        assert "cannot be decoded" in refusal(tmp_path, data[:at] + bytes(200) + data[at + 200 :])


def test_a_changed_bit_in_a_png_is_an_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(PICTURES["png"])
        data[rng.integers(12, len(data))] ^= 1 << rng.integers(8)
        refusal(tmp_path, bytes(data))
    data[len(data) // 2] ^= 1
    assert refusal(tmp_path, bytes(data)) == "is damaged: a checksum is wrong"


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_is_an_error(tmp_path: Path, kind: str) -> None:
    for blob in (exif(6, "<")[:20], b"II*\0" + bytes(4), b"MM\0*\xff\xff\xff\xff"):
        data = with_exif(smooth(), kind, blob)
        assert is_picture(write(tmp_path, data))
        assert "damaged EXIF data" in refusal(tmp_path, data)


# Bad requests


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"gone\.png: is not there"):
        read_picture(tmp_path / "gone.png")
    with pytest.raises(VideoError, match=r": is no file"):
        read_picture(tmp_path)
    assert refusal(tmp_path, b"hello") == "is no picture; right is JPEG, PNG, WebP, BMP or TIFF"
    assert refusal(tmp_path, b"") == "is no picture; right is JPEG, PNG, WebP, BMP or TIFF"


def test_tiffs_that_are_refused(tmp_path: Path) -> None:
    page, depth = Image.fromarray(smooth()), Image.fromarray(smooth()[..., 0].astype(np.float32))
    pages = encode(page, "TIFF", save_all=True, append_images=[page])
    sub = encode(page, "TIFF", tiffinfo={330: 8})
    signed = encode(page, "TIFF", tiffinfo={339: (2, 2, 2)})
    assert refusal(tmp_path, pages).startswith("holds several pictures")
    assert refusal(tmp_path, sub).startswith("holds several pictures")
    assert refusal(tmp_path, signed).startswith("holds signed or float samples")
    assert refusal(tmp_path, encode(depth, "TIFF")).startswith("holds signed or float samples")
    coded = refusal(tmp_path, encode(page, "TIFF", compression="jpeg"))
    assert coded.startswith("is a TIFF compressed as JPEG")
    unsigned = encode(page, "TIFF", tiffinfo={339: (1, 1, 1)})
    np.testing.assert_array_equal(read(tmp_path, unsigned), smooth())


def test_heif_is_named(tmp_path: Path) -> None:
    """Not left to the reader of video, which would take a tile of it for the whole."""
    for brand in (b"heic", b"mif1", b"avif"):
        data = struct.pack(">I", 24) + b"ftyp" + brand + bytes(100)
        assert is_picture(write(tmp_path, data))
        assert refusal(tmp_path, data).startswith("is a HEIF or AVIF picture; convert it to JPEG")


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
