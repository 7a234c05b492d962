"""From uint8 frames to the pixels that the encoder takes.

`preprocess` is Hugging Face's processor; `crops` cuts the views of Meta's evaluation.

The resize is written here, in integers, and not left to Pillow: Pillow's bilinear kernel differs
from torch's (which the reference uses) in up to 1 % of the values, by 1 and rarely by 2 of 255.
This one is equal to torch's on every pixel, and because each output pixel is computed on its own,
only the pixels that a crop keeps are computed.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from jvjepa.errors import InputError, VideoError

Frames = NDArray[np.uint8]  # [T, H, W, 3] RGB

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_RIGHT = "right is uint8 [T, H, W, 3], RGB, 0 to 255"


class HasCropSize(Protocol):
    """What `preprocess` and `crops` need of a configuration; `ModelConfig` has it."""

    @property
    def crop_size(self) -> int:
        """Pixels of a side of the square input."""
        ...


class Taps(NamedTuple):
    """One axis of a resize.

    Args:
        index: int64 [n, K], the input pixels that each output pixel is made of.
        weight: int32 [n, K], their weights, in units of 2^-shift.
        shift: bits after the point.
    """

    index: NDArray[np.int64]
    weight: NDArray[np.int32]
    shift: int


def preprocess(frames: Frames, config: HasCropSize) -> NDArray[np.float32]:
    """Resizes, crops and normalises frames for a model.

    The short side becomes `int(crop * 256 / 224)` (bilinear with antialiasing, rounded to uint8),
    the centre square is cut out, and the ImageNet mean and deviation are applied. The same as
    `transformers.VJEPA2VideoProcessor`, channels last: its uint8 resize pixel for pixel, its
    rounding of the crop's offset, its fused normalisation.

    Args:
        frames: uint8 [T, H, W, 3], RGB, 0 to 255, any size.
        config: the model's configuration; only `crop_size` is read.

    Returns:
        float32 [T, crop, crop, 3], about -2.2 to 2.7.

    Raises:
        InputError: `frames` is not uint8 [T, H, W, 3], or is empty.
    """
    _check_frames(frames)
    crop = config.crop_size
    size, corner = centre(*frames.shape[1:3], crop)
    return _cut(frames, size, [corner], crop)[0]


def crops(frames: Frames, config: HasCropSize, views: int) -> NDArray[np.float32]:
    """Cuts square views out of frames along their long side, and normalises them.

    One view is what `preprocess` gives. For more, the short side is resized to the crop exactly,
    and the views begin at equal distances: 3 are left, centre and right, or top, centre and bottom.
    The places are those of `evals/video_classification_frozen` of Meta's V-JEPA 2, the resize is
    that of `preprocess`; Meta's depends on the type that the frames happen to have.

    Args:
        frames: as in `preprocess`.
        config: as in `preprocess`.
        views: how many, M.

    Returns:
        float32 [M, T, crop, crop, 3]; a single view where the sides differ so little that all views
        are the same.

    Raises:
        InputError: `views` is below 1, or `frames` is not uint8 [T, H, W, 3], or is empty.
    """
    if views < 1:
        raise InputError(f"views = {views}; it must be 1 or more")
    if views == 1:
        return preprocess(frames, config)[None]
    _check_frames(frames)
    size, corners = view_corners(*frames.shape[1:3], config.crop_size, views)
    same = len(set(corners)) == 1
    return _cut(frames, size, corners[:1] if same else corners, config.crop_size)


def view_corners(
    height: int, width: int, crop: int, views: int
) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """The (rows, columns) that `crops` resizes to, and the (row, column) of each of the views."""
    rows, columns = scaled_size(height, width, crop)
    step = (max(rows, columns) - crop) // (views - 1)
    return (rows, columns), [
        (step * i, 0) if rows > columns else (0, step * i) for i in range(views)
    ]


def _cut(
    frames: Frames, size: tuple[int, int], corners: Sequence[tuple[int, int]], crop: int
) -> NDArray[np.float32]:
    """Cuts M `squares` out of each frame and normalises them: [M, T, crop, crop, 3]."""
    table = _normalised()
    pixels = np.empty((len(corners), len(frames), crop, crop, 3), np.float32)
    for i, found in enumerate(squares(frames, size, corners, crop)):
        for out, square in zip(pixels[:, i], found, strict=True):
            for channel in range(3):
                np.take(table[channel], square[..., channel], out=out[..., channel])
    return pixels


def squares(
    frames: Frames, size: tuple[int, int], corners: Sequence[tuple[int, int]], crop: int
) -> Iterator[list[NDArray[np.uint8]]]:
    """Resizes frames one by one, and cuts squares out of each.

    Args:
        frames: uint8 [T, H, W, 3].
        size: (rows, columns) to resize to.
        corners: (row, column) of the upper left pixel of each square, inside.
        crop: pixels of a side of the squares.

    Yields:
        For each frame its squares, uint8 [crop, crop, 3].
    """
    tops, lefts = zip(*corners, strict=True)
    top, left = min(tops), min(lefts)
    down = taps(frames.shape[1], size[0], top, max(tops) + crop)
    across = taps(frames.shape[2], size[1], left, max(lefts) + crop)
    first, last = int(down.index.min()), int(down.index.max()) + 1
    down = down._replace(index=down.index - first)

    for frame in frames:  # one by one: the sums are 4 bytes a value
        resized = resize_axis(resize_axis(frame[first:last], across, axis=1), down, axis=0)
        yield [resized[row - top :, column - left :][:crop, :crop] for row, column in corners]


def _check_frames(frames: Any) -> None:
    if not isinstance(frames, np.ndarray):
        raise InputError(f"frames are a {type(frames).__name__}; {_RIGHT}, a numpy array")
    if frames.dtype != np.uint8:
        is_float = np.issubdtype(frames.dtype, np.floating)
        bad = "" if not is_float or np.isfinite(frames).all() else " with NaN or infinite values"
        raise InputError(f"frames are {frames.dtype}{bad}; {_RIGHT}")
    if frames.ndim != 4:
        hint = "; give a single image as image[None]" if frames.ndim == 3 else ""
        raise InputError(f"frames have the shape {list(frames.shape)}; {_RIGHT}{hint}")
    if frames.shape[-1] != 3 and frames.shape[1] == 3:
        raise InputError(
            f"frames have the shape {list(frames.shape)}, which looks like channels first "
            f"([T, 3, H, W]); {_RIGHT}: use frames.transpose(0, 2, 3, 1)"
        )
    if frames.shape[-1] != 3:
        raise InputError(f"frames have {frames.shape[-1]} channels; {_RIGHT}")
    if frames.size == 0:
        raise VideoError(f"frames are empty, shape {list(frames.shape)}; {_RIGHT}")


def centre(height: int, width: int, crop: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The (rows, columns) that `preprocess` resizes to, and the (row, column) where it cuts."""
    rows, columns = scaled_size(height, width, int(crop * 256 / 224))
    return (rows, columns), (int((rows - crop) / 2.0), int((columns - crop) / 2.0))


def scaled_size(height: int, width: int, short: int) -> tuple[int, int]:
    """The (rows, columns) that make the short side `short`: torchvision's rule, which truncates."""
    if height <= width:
        return short, int(short * width / height)
    return int(short * height / width), short


@functools.lru_cache(maxsize=32)
def taps(size: int, resized: int, start: int, stop: int) -> Taps:
    """The weights of output pixels [start, stop) of a bilinear antialiased resize of one axis.

    Matches torch's kernel for uint8: weights in float64, then rounded to as many bits as keep the
    greatest of them below 2^15.

    Args:
        size: pixels of the axis.
        resized: pixels that it is to have.
        start: the first of them that is wanted.
        stop: the one behind the last.

    Returns:
        What `resize_axis` takes.
    """
    scale = size / resized
    support = max(scale, 1.0)
    centre = scale * (np.arange(resized) + 0.5)
    low = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    count = np.minimum((centre + support + 0.5).astype(np.int64), size) - low
    tap = np.arange(count.max())
    distance = np.abs((tap + low[:, None] - centre[:, None] + 0.5) * (1.0 / support))
    weight = np.maximum(1.0 - distance, 0.0) * (tap < count[:, None])
    weight /= weight.sum(axis=1, keepdims=True)

    # Over all outputs, and not only those of the crop: torch chooses the precision so.
    shift = 0
    while shift < 22 and int(0.5 + weight.max() * (1 << (shift + 1))) < 1 << 15:
        shift += 1
    index = np.minimum(low[:, None] + tap, size - 1)  # beyond the edge the weight is 0
    integer = np.floor(weight * (1 << shift) + 0.5).astype(np.int32)
    return Taps(index[start:stop], integer[start:stop], shift)


def resize_axis(frame: NDArray[np.uint8], taps: Taps, axis: int) -> NDArray[np.uint8]:
    """Resizes one axis, 0 for rows or 1 for columns, of a frame [H, W, 3] by its `taps`."""
    shape = (1, -1, 1) if axis == 1 else (-1, 1, 1)
    total: Any = np.int32(1 << (taps.shift - 1))  # rounds half up when the bits are cut off
    for index, weight in zip(taps.index.T, taps.weight.T, strict=True):
        total = total + np.take(frame, index, axis=axis) * weight.reshape(shape)
    # The rounded weights may add up to a little over 1.
    return np.minimum(total >> taps.shift, 255).astype(np.uint8)


@functools.cache
def _normalised() -> NDArray[np.float32]:
    """float32 [3, 256], (x - 255 mean) / (255 std) of each value of each channel.

    In float32 from the start, as the reference computes it.
    """
    value = np.arange(256, dtype=np.float32)
    mean = np.array(IMAGENET_MEAN, np.float32)[:, None] * np.float32(255)
    std = np.array(IMAGENET_STD, np.float32)[:, None] * np.float32(255)
    return (value - mean) / std
