"""Cuts squares out of frames: random resized crops for training, the middle for evaluation.

The resize is that of `jvjepa.preprocessing`, bilinear with antialiasing and rounded to uint8, so
that a model sees in training what it will see in use. (Meta's training resizes without.)
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jvjepa.preprocessing import centre, squares, view_corners

_ATTEMPTS = 10  # windows that are drawn before the middle one is taken


class Window(NamedTuple):
    """A rectangle of a frame, in pixels."""

    top: int
    left: int
    height: int
    width: int


def random_window(
    generator: np.random.Generator,
    height: int,
    width: int,
    scale: tuple[float, float],
    aspect: tuple[float, float],
) -> Window:
    """Draws the window of a random resized crop.

    Matches `random_resized_crop` of `src/datasets/utils/video/transforms.py` of Meta's V-JEPA 2:
    the area is uniform, the aspect ratio is uniform in its logarithm, and after ten windows that do
    not fit, the largest one in the middle whose aspect is in the range is taken.

    Args:
        generator: to draw from.
        height: of the frames, in pixels.
        width: the same.
        scale: least and greatest share of the frame's area, in (0, 1].
        aspect: least and greatest width over height, above 0.

    Returns:
        A window inside the frame.
    """
    low, high = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(_ATTEMPTS):
        area = height * width * generator.uniform(*scale)
        ratio = math.exp(generator.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(generator.integers(height - h, endpoint=True))
            left = int(generator.integers(width - w, endpoint=True))
            return Window(top, left, h, w)
    w, h = width, height
    if width / height < aspect[0]:
        h = max(1, round(width / aspect[0]))
    elif width / height > aspect[1]:
        w = max(1, round(height * aspect[1]))
    return Window((height - h) // 2, (width - w) // 2, h, w)


def cut(frames: NDArray[np.uint8], window: Window, size: int, *, flip: bool) -> NDArray[np.uint8]:
    """Resizes a window of all frames to a square.

    Args:
        frames: uint8 [T, H, W, 3].
        window: what to cut out, inside the frames.
        size: pixels of a side of the square.
        flip: mirror it, left and right.

    Returns:
        uint8 [T, size, size, 3].
    """
    part = frames[:, window.top :, window.left :][:, : window.height, : window.width]
    resized = (square for (square,) in squares(part, (size, size), [(0, 0)], size))
    return np.stack([square[:, ::-1] if flip else square for square in resized])


def view(frames: NDArray[np.uint8], size: int, place: int, views: int) -> NDArray[np.uint8]:
    """Cuts a square out of frames, as `jvjepa.preprocessing.crops` does.

    Args:
        frames: uint8 [T, H, W, 3].
        size: pixels of a side of the square.
        place: which of the views, from 0.
        views: how many there are along the long side; one is the middle.

    Returns:
        uint8 [T, size, size, 3], which `crops` would have normalised.
    """
    sides = frames.shape[1:3]
    if views == 1:
        scaled, corner = centre(*sides, size)
    else:
        scaled, corners = view_corners(*sides, size, views)
        corner = corners[place]
    return np.stack([square for (square,) in squares(frames, scaled, [corner], size)])
