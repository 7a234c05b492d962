"""Reading still pictures: JPEG, PNG, WebP, BMP and TIFF, told by their content.

A picture is upright (its EXIF orientation is applied) and has the colours that Pillow's decoders
give, up to rounding; colour profiles are not applied. As with video, what is damaged or cut off is
an error and never a half-grey picture. Damage that leaves a valid file cannot be seen: only PNG has
checksums.

FFmpeg decodes, and stops at the first thing that it finds wrong (`err_detect=explode`). In PNG and
TIFF that may be metadata, so it gets these without.
"""

import os
import pathlib
import re
import struct
import zlib
from typing import Literal, NamedTuple

import av
import numpy as np
from av.video.plane import VideoPlane
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from jvjepa.config import ModelConfig
from jvjepa.errors import InputError, VideoError
from jvjepa.video import preprocess, read

_ByteOrder = Literal["little", "big"]

_KINDS = "JPEG, PNG, WebP, BMP or TIFF"
_CUT_OFF = "is cut off"

_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # others stand inside of a scan
_PNG_KEPT = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
_BMP_HEADERS = {12, 40, 52, 56, 64, 108, 124}  # bytes of the header's versions
_HEIF_BRANDS = {b"heic", b"heix", b"mif1", b"avif"}
_TIFF_ORDERS: dict[bytes, _ByteOrder] = {b"II*\0": "little", b"MM\0*": "big"}
_TIFF_KEPT = {*range(256, 260), 262, 266, 273, *range(277, 280), 284, 292, 293, 317, 320}
_TIFF_KEPT |= {*range(322, 326), 347, *range(529, 533)}  # sizes, coding, and where the pixels are
_TIFF_COMPRESSION, _TIFF_ORIENTATION, _TIFF_SUB_IFDS, _TIFF_SAMPLE_FORMAT = 259, 274, 330, 339

# EXIF's orientation: transpose first, then reverse the rows, then the columns.
_UPRIGHT = {
    1: (False, 1, 1),
    2: (False, 1, -1),
    3: (False, -1, -1),
    4: (False, -1, 1),
    5: (True, 1, 1),
    6: (True, 1, -1),
    7: (True, -1, -1),
    8: (True, -1, 1),
}


class Clip(NamedTuple):
    """What an encoder takes, of a video or of a picture.

    Args:
        pixels: float32 [T, crop, crop, 3], ImageNet-normalised; T is 1 for a picture.
        times: float64 [T], seconds; 0 for a picture.
        is_picture: whether it is of a picture.
    """

    pixels: NDArray[np.float32]
    times: NDArray[np.float64]
    is_picture: bool


class _Content(NamedTuple):
    """What a picture's file holds.

    Args:
        codec: FFmpeg's name of the decoder.
        data: what the decoder gets.
        orientation: EXIF's, 1 to 8.
        is_moving: whether it is an animation or a video.
        problem: why it cannot be read; "" if nothing is known to be wrong.
    """

    codec: str
    data: bytes = b""
    orientation: int = 1
    is_moving: bool = False
    problem: str = ""


class _Entry(NamedTuple):
    """An entry of a TIFF directory: its tag, the first of its numbers, and its 12 bytes."""

    tag: int
    value: int
    raw: bytes


class _Directory(NamedTuple):
    """A TIFF directory: where it begins, its entries, and where the next one begins (0: none)."""

    start: int
    entries: list[_Entry]
    following: int

    def get(self, tag: int, default: int) -> int:
        """The first of an entry's numbers."""
        return next((entry.value for entry in self.entries if entry.tag == tag), default)


def is_picture(path: str | os.PathLike[str]) -> bool:
    """Whether a local file is a still picture, told by its content and not by its name.

    Args:
        path: a file; URLs, cameras and what does not exist are no pictures.

    Returns:
        True for JPEG, PNG, WebP, BMP and TIFF, damaged or not, and for HEIF and AVIF, which
        `read_picture` refuses. False for GIF, for animated PNG and WebP, and for motion JPEG.
    """
    file = pathlib.Path(path)
    if "://" in os.fspath(path) or not file.is_file():
        return False
    content = _parse(file)
    return content is not None and not content.is_moving


def read_picture(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Reads a still picture.

    Grey and palette pictures become RGB, and 16 bits a channel become 8. A picture with
    transparent pixels is refused: what colour shines through them is the caller's to choose.

    Args:
        path: a JPEG, PNG, WebP, BMP or TIFF file.

    Returns:
        uint8 [1, H, W, 3], RGB, upright.

    Raises:
        VideoError: the file is missing, no picture, damaged, cut off, or transparent.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise VideoError(f"{path}: is {'no file' if file.exists() else 'not there'}")
    content = _parse(file)
    if content is None:
        raise VideoError(f"{path}: is no picture; right is {_KINDS}")
    if content.is_moving:
        raise VideoError(f"{path}: is no still picture, but moves; read it as a video")
    if content.problem:
        raise VideoError(f"{path}: {content.problem}")
    try:
        image = _to_rgb(_decode(content))
    except VideoError as error:
        raise VideoError(f"{path}: {error}") from error.__cause__
    # As every viewer does, numbers that EXIF does not define are taken for 1.
    transposed, rows, columns = _UPRIGHT.get(content.orientation, _UPRIGHT[1])
    image = image.transpose(1, 0, 2) if transposed else image
    return np.ascontiguousarray(image[None, ::rows, ::columns])


def picture_clip(
    config: ModelConfig, path: str | os.PathLike[str], *, repeat_frame: bool = False
) -> NDArray[np.float32]:
    """Reads a picture and makes it the clip of one frame that a model takes.

    V-JEPA 2.1 was trained on pictures too, and has a patch embedding for them. V-JEPA 2 was trained
    on video alone; its encoder uses a single frame twice, as a clip in which nothing moves.

    Args:
        config: the model's.
        path: as `read_picture`'s.
        repeat_frame: give the picture to a V-JEPA 2 model all the same.

    Returns:
        float32 [1, crop, crop, 3].

    Raises:
        InputError: the model takes no pictures and `repeat_frame` is False, or it does and
            `repeat_frame` is True.
        VideoError: as `read_picture`.
    """
    takes_pictures = config.encoder.image_tokenizer
    if not takes_pictures and not repeat_frame:
        raise InputError(
            f"{path}: is a picture, and this model (V-JEPA 2) was trained on video; "
            "--repeat-frame encodes it as a still clip"
        )
    if takes_pictures and repeat_frame:
        raise InputError(
            f"{path}: is a picture, which this model (V-JEPA 2.1) takes as it is; leave out "
            "--repeat-frame"
        )
    return preprocess(read_picture(path), config)


def read_clip(
    config: ModelConfig,
    source: str,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    start: float = 0.0,
    end: float | None = None,
    repeat_frame: bool = False,
) -> Clip:
    """Reads a picture, or a clip of a video, and preprocesses it for a model.

    Args:
        config: the model's.
        source: a picture's file, or what `jvjepa.video.read` takes.
        num_frames: of a video; None takes as many as the model was trained with.
        fps: of a video, as the three that follow; see `jvjepa.video.read`.
        start: seconds.
        end: seconds.
        repeat_frame: of a picture, see `picture_clip`.

    Returns:
        Pixels and times.

    Raises:
        InputError: an option does not fit the kind of source, or see `picture_clip`.
        VideoError: the source cannot be read.
    """
    if is_picture(source):
        if num_frames is not None or fps is not None or start or end is not None:
            raise InputError(
                f"{source}: is a picture; --num-frames, --fps, --start and --end choose frames of "
                "a video, leave them out"
            )
        pixels = picture_clip(config, source, repeat_frame=repeat_frame)
        return Clip(pixels, np.zeros(1), is_picture=True)
    if repeat_frame:
        raise InputError(f"{source}: is no picture, and only those need --repeat-frame")
    count = config.encoder.frames_per_clip if num_frames is None else num_frames
    try:
        frames, times = read(source, num_frames=count, fps=fps, start=start, end=end)
    except VideoError as error:
        short = num_frames is None and f"num_frames = {count}" in str(error)
        hint = "; --num-frames sets another number" if short else ""
        raise VideoError(f"{error}{hint}") from error.__cause__
    return Clip(preprocess(frames, config), times, is_picture=False)


def _parse(file: pathlib.Path) -> _Content | None:
    """Takes a picture's file apart; None if it is none."""
    with open(file, "rb") as opened:
        head = opened.read(18)
        if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS:
            return _Content("", problem=f"is a HEIF or AVIF picture; convert it to {_KINDS}")
        if head.startswith(b"\xff\xd8\xff"):
            return _jpeg(head + opened.read())
        if head.startswith(b"\x89PNG\r\n\x1a\n"):
            return _png(head + opened.read())
        if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
            return _webp(head + opened.read())
        if head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
            return _bmp(head + opened.read())
        if head[:4] in _TIFF_ORDERS:
            return _tiff(head + opened.read())
        return None


def _jpeg(data: bytes) -> _Content:
    exif, at = b"", 2
    has_others = False  # a phone may append a preview or a gain map, and says so
    while (found := _JPEG_MARKER.search(data, at)) is not None:
        at = found.start()
        code = data[at + 1]
        if code == 0xD9:
            after = data[at + 2 : at + 4096].lstrip(b"\0")
            is_moving = after.startswith(b"\xff\xd8\xff") and not has_others
            return _content("mjpeg", data, exif, is_moving)
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        segment = data[at : at + 2 + length]
        if code == 0xD8 or length < 2 or len(segment) < 2 + length:
            break
        at += len(segment)
        if code == 0xE1 and segment[4:10] == b"Exif\0\0":
            exif = exif or segment[10:]
        has_others |= code == 0xE2 and segment[4:8] == b"MPF\0"
    return _Content("mjpeg", problem=_CUT_OFF)


def _png(data: bytes) -> _Content:
    kept, exif, at = [data[:8]], b"", 8
    is_moving = False
    while len(data) >= at + 12:
        length, kind = struct.unpack_from(">I4s", data, at)
        chunk = data[at : at + 12 + length]
        if len(chunk) < 12 + length:
            break
        if zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"):
            return _Content("png", is_moving=is_moving, problem="is damaged: a checksum is wrong")
        at += len(chunk)
        is_moving |= kind == b"acTL"
        if kind == b"eXIf":
            exif = chunk[8:-4]
        if kind in _PNG_KEPT:
            kept.append(chunk)
        if kind == b"IEND":
            return _content("png", b"".join(kept), exif, is_moving)
    return _Content("png", is_moving=is_moving, problem=_CUT_OFF)


def _webp(data: bytes) -> _Content:
    is_moving = data[12:16] == b"VP8X" and bool(int.from_bytes(data[20:21]) & 2)
    end = 8 + int.from_bytes(data[4:8], "little")
    if len(data) < end:
        return _Content("webp", is_moving=is_moving, problem=_CUT_OFF)
    exif, at = b"", 12
    while at + 8 <= end:
        kind, length = struct.unpack_from("<4sI", data, at)
        if kind == b"EXIF":
            exif = data[at + 8 : at + 8 + length].removeprefix(b"Exif\0\0")
        at += 8 + length + length % 2
    return _content("webp", data, exif, is_moving)


def _bmp(data: bytes) -> _Content:
    size = int.from_bytes(data[2:6], "little")
    return _Content("bmp", data, problem=_CUT_OFF if len(data) < size else "")


def _tiff(data: bytes) -> _Content:
    directory = _directory(data)
    if directory is None:
        return _Content("tiff", problem=_CUT_OFF)
    if directory.following or directory.get(_TIFF_SUB_IFDS, 0):
        return _Content("tiff", problem="holds several pictures; right is a TIFF of one")
    if directory.get(_TIFF_SAMPLE_FORMAT, 1) != 1:
        return _Content("tiff", problem="holds signed or float samples; right is unsigned ones")
    if directory.get(_TIFF_COMPRESSION, 1) in (6, 7):
        return _Content("tiff", problem="is a TIFF compressed as JPEG; right is any other coding")
    kept = [entry.raw for entry in directory.entries if entry.tag in _TIFF_KEPT]
    body = len(kept).to_bytes(2, _TIFF_ORDERS[data[:4]]) + b"".join(kept) + bytes(4)
    end = directory.start + len(body)
    return _content("tiff", data[: directory.start] + body + data[end:], data)


def _content(codec: str, data: bytes, exif: bytes, is_moving: bool = False) -> _Content:
    """Of a whole file, whose orientation is in `exif`, a TIFF structure (or nothing)."""
    orientation = 1
    if exif[:4] in _TIFF_ORDERS:
        directory = _directory(exif)
        if directory is None:
            problem = "has damaged EXIF data, so that nobody knows which side is up"
            return _Content(codec, is_moving=is_moving, problem=problem)
        orientation = directory.get(_TIFF_ORIENTATION, 1)
    return _Content(codec, data, orientation, is_moving)


def _directory(tiff: bytes) -> _Directory | None:
    """The first directory of a TIFF structure; None if it is not whole."""
    order = _TIFF_ORDERS[tiff[:4]]

    def number(at: int, width: int) -> int:
        return int.from_bytes(tiff[at : at + width], order)

    start = number(4, 4)
    end = start + 2 + 12 * number(start, 2)
    if start < 8 or len(tiff) < end:
        return None
    entries = []
    for at in range(start + 2, end, 12):
        width = {1: 1, 3: 2}.get(number(at + 2, 2), 4)  # bytes, shorts, longs
        fits = width * number(at + 4, 4) <= 4
        place = at + 8 if fits else number(at + 8, 4)
        entries.append(_Entry(number(at, 2), number(place, width), tiff[at : at + 12]))
    return _Directory(start, entries, number(end, 4))


def _decode(content: _Content) -> av.VideoFrame:
    context = av.CodecContext.create(content.codec, "r")
    context.thread_type = "SLICE"
    context.options = {"err_detect": "explode"}
    try:
        frames = [*context.decode(av.Packet(content.data)), *context.decode(None)]
    except av.FFmpegError as error:
        raise VideoError(f"cannot be decoded ({error.strerror})") from error
    if len(frames) != 1 or frames[0].is_corrupt:
        raise VideoError("is damaged")
    return frames[0]


def _to_rgb(frame: av.VideoFrame) -> NDArray[np.uint8]:
    """uint8 [H, W, 3]."""
    converter = VideoReformatter()
    if frame.format.name.startswith("yuv"):  # FFmpeg spoils the last columns of these as RGBA
        alpha = _values(frame.planes[3]) if len(frame.planes) == 4 else np.uint8(255)
        image = converter.reformat(_full_chroma(frame), format="rgb24").to_ndarray()
    else:
        rgba = converter.reformat(frame, format="rgba").to_ndarray()
        image, alpha = rgba[..., :3], rgba[..., 3]
    transparent = float(np.mean(alpha < 255))
    if transparent:
        raise VideoError(
            f"is transparent in {transparent:.1%} of its pixels; put it on a background first"
        )
    return image


def _values(plane: VideoPlane) -> NDArray[np.uint8]:
    """uint8 [h, w]."""
    rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
    return rows[:, : plane.width]


def _full_chroma(frame: av.VideoFrame) -> av.VideoFrame:
    """Gives each pixel a colour of its own, as libjpeg and libwebp do it.

    FFmpeg would put the colours half a pixel too far to the left, which makes edges differ by up to
    30 of 255.
    """
    planes = []
    for plane in frame.planes[:3]:
        values, scale = _values(plane).astype(np.uint16), 1  # 256 at most fit into 16 bits
        for axis, size in enumerate((frame.height, frame.width)):
            while values.shape[axis] < size:
                values, scale = _doubled(values, axis, size), 4 * scale
        planes.append(((values + scale // 2) // scale).astype(np.uint8))
    name = "yuvj444p" if frame.format.name.startswith("yuvj") else "yuv444p"
    full = av.VideoFrame.from_ndarray(np.stack(planes), format=name)
    full.colorspace, full.color_range = frame.colorspace, frame.color_range
    return full


def _doubled(values: NDArray[np.uint16], axis: int, size: int) -> NDArray[np.uint16]:
    """An axis at twice its resolution, cut to `size`, times 4: the near value thrice, the far once.

    Between two values lie two new ones, a quarter of the way from each.
    """
    values = np.moveaxis(values, axis, 0)
    before, after = np.concatenate([values[:1], values]), np.concatenate([values, values[-1:]])
    pairs = np.stack([3 * values + before[:-1], 3 * values + after[1:]], axis=1)
    return np.moveaxis(pairs.reshape(-1, *values.shape[1:])[:size], 0, axis)
