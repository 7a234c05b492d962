"""Labelled videos to try training on: a shape that moves in one of eight directions.

Shapes, sizes, speeds, colours and backgrounds differ, and something may stand in the way. The label
is the direction, which cannot be told from a single frame. Mirroring changes it: train with
`ClipConfig(flip=0.0)`.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from jvjepa.errors import ConfigError, InputError
from jvjepa.storage import new_folder

DIRECTIONS = ("right", "down right", "down", "down left", "left", "up left", "up", "up right")
MANIFEST_FILE = "manifest.csv"
LABELS_FILE = "labels.txt"

_Distance = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]
# Of a point (x, y), y down, to the edge of a shape that reaches about 1 from its middle; negative
# inside.
_SHAPES: tuple[_Distance, ...] = (
    lambda x, y: np.hypot(x, y) - 0.9,
    lambda x, y: np.maximum(abs(x), abs(y)) - 0.8,
    lambda x, y: (abs(x) + abs(y) - 1.1) / math.sqrt(2),
    lambda x, y: np.maximum(abs(x) * math.sqrt(0.75) + y * 0.5, -y) - 0.5,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """What the videos are like.

    Args:
        num_frames: frames of each, 2 or more.
        fps: frames per second.
        height: pixels; even, 32 or more.
        width: the same.
        occluded: the share of videos in which a bar stands in the way.

    Raises:
        ConfigError: a value is impossible.
    """

    num_frames: int = 32
    fps: int = 16
    height: int = 96
    width: int = 128
    occluded: float = 0.3

    def __post_init__(self) -> None:
        """Checks every field."""
        if self.num_frames < 2:
            raise ConfigError(f"num_frames = {self.num_frames}; it must be 2 or more")
        if self.fps < 1:
            raise ConfigError(f"fps = {self.fps}; it must be 1 or more")
        for name in ("height", "width"):
            value = getattr(self, name)
            if value < 32 or value % 2:
                raise ConfigError(f"{name} = {value}; it must be even, and 32 or more")
        if not 0 <= self.occluded <= 1:
            raise ConfigError(f"occluded = {self.occluded}; it must be a share, 0 to 1")


def render(
    label: int, seed: int | tuple[int, ...], config: SyntheticConfig | None = None
) -> NDArray[np.uint8]:
    """Draws a video; the same arguments give the same pixels.

    Args:
        label: a place in `DIRECTIONS`.
        seed: of all that is random.
        config: what it is like; None takes the defaults.

    Returns:
        uint8 [T, H, W, 3].

    Raises:
        InputError: there is no such label.
    """
    config = config or SyntheticConfig()
    if not 0 <= label < len(DIRECTIONS):
        raise InputError(f"label = {label}; it must be 0 to {len(DIRECTIONS) - 1}")
    draw = np.random.default_rng(seed)
    angle = label * math.tau / len(DIRECTIONS)
    direction = np.array([math.cos(angle), math.sin(angle)])  # x, y
    size = np.array([config.width, config.height], np.float64)
    radius = size.min() * draw.uniform(0.07, 0.14)
    occluded = draw.random() < config.occluded

    # The whole path lies inside the frame, and is so long that the shape leaves its place. Past a
    # bar it is longer, so that both ends can be seen.
    room = size - 2 * radius
    longest = min(room[i] / abs(direction[i]) for i in (0, 1) if abs(direction[i]) > 1e-9)
    shortest = max(4.2 * radius, longest * (0.7 if occluded else 0.35))
    path = direction * draw.uniform(shortest, 0.95 * longest)
    begin = radius + np.maximum(-path, 0) + draw.random(2) * (room - abs(path))
    centres = begin + np.linspace(0, 1, config.num_frames)[:, None] * path

    y, x = np.mgrid[: config.height, : config.width] + 0.5
    ground = _background(draw, config.height, config.width)
    mean = ground.mean(axis=(0, 1))
    colour = np.where(
        mean < 128, mean + draw.uniform(100, 127, 3), mean - draw.uniform(100, 127, 3)
    )
    shape = _SHAPES[draw.integers(len(_SHAPES))]
    bar = np.zeros((config.height, config.width, 1), bool)
    if occluded:
        axis = int(abs(direction[1]) > abs(direction[0]) + 1e-9)
        middle = begin[axis] + path[axis] / 2
        half = min(radius * draw.uniform(0.5, 0.9), abs(path[axis]) / 2 - radius)
        bar = (abs((x, y)[axis] - middle) < half)[..., None]
    bar_colour = draw.uniform(0, 255, 3)

    frames = np.empty((config.num_frames, config.height, config.width, 3), np.uint8)
    for frame, (cx, cy) in zip(frames, centres, strict=True):
        distance = radius * shape((x - cx) / radius, (y - cy) / radius)
        cover = np.clip(0.5 - distance, 0, 1)[
            ..., None
        ]  # soft edges: it moves by less than a pixel
        scene = ground * (1 - cover) + colour * cover
        frame[:] = np.round(np.where(bar, bar_colour, scene)).astype(np.uint8)
    return frames


def _background(draw: np.random.Generator, height: int, width: int) -> NDArray[np.float64]:
    """[H, W, 3] in 0 to 255, of little contrast: plain, a slope, stripes, or patches."""
    base = draw.uniform(30, 225, 3)
    y, x = np.mgrid[:height, :width]
    kind = draw.integers(4)
    angle, period = draw.uniform(0, math.pi), draw.uniform(8, 24)
    along = x * math.cos(angle) + y * math.sin(angle)
    patches = draw.uniform(-1, 1, (height // 8 + 1, width // 8 + 1))
    pattern = (
        np.zeros((height, width)),
        np.linspace(-1, 1, width)[None] * math.cos(angle) + np.zeros((height, 1)),
        np.sin(along * math.tau / period),
        patches.repeat(8, 0).repeat(8, 1)[:height, :width],
    )[kind]
    return np.clip(base + 25 * pattern[..., None], 0, 255)


def write_videos(
    folder: str | os.PathLike[str],
    count: int,
    config: SyntheticConfig | None = None,
    *,
    seed: int = 0,
    force: bool = False,
) -> Path:
    """Writes H.264 videos, a manifest of them, and the names of the labels.

    Args:
        folder: to make; it appears when all of it is written.
        count: videos; of eight in a row each has another label.
        config: what they are like; None takes the defaults.
        seed: of all that is random.
        force: replace `folder` where it exists.

    Returns:
        The path of the manifest, `folder`/manifest.csv; names are in labels.txt.

    Raises:
        InputError: `count` is below 1, or `folder` exists and `force` is False.
    """
    if count < 1:
        raise InputError(f"count = {count}; it must be 1 or more")
    config = config or SyntheticConfig()
    folder = Path(folder)
    rows = []
    with new_folder(folder, force=force) as work:
        for i in range(count):
            label, name = i % len(DIRECTIONS), f"{i:05d}.mp4"
            _write(work / name, render(label, (seed, i), config), config.fps)
            rows.append(f"{name} {label}\n")
        (work / MANIFEST_FILE).write_text("".join(rows), encoding="utf-8")
        (work / LABELS_FILE).write_text("\n".join(DIRECTIONS) + "\n", encoding="utf-8")
    return folder / MANIFEST_FILE


def _write(path: Path, frames: NDArray[np.uint8], fps: int) -> None:
    # One thread: what x264 writes depends on how many there are.
    options = {"crf": "18", "g": "12", "preset": "veryfast", "threads": "1"}
    with av.open(str(path), "w") as container:
        track = container.add_stream("libx264", rate=fps, options=options)
        track.height, track.width = frames.shape[1:3]
        track.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(track.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(track.encode())
