"""Labelled videos to try training on: something moves in one of eight directions.

It is a shape on a still background (`SyntheticConfig`): shapes, sizes, speeds, colours and
backgrounds differ, and something may stand in the way. Or it is all of the picture, a texture
(`TextureConfig`): nothing but the motion lasts, which makes it what is learned without labels.

The label is the direction, which cannot be told from a single frame. Mirroring changes it: train
with `ClipConfig(flip=0.0)`.
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
_BAND = (0.05, 0.1)  # of a texture: cycles a pixel
_CONTRAST = 48.0  # its deviation

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
class VideoConfig:
    """The size of the videos.

    Args:
        num_frames: frames of each, 2 or more.
        fps: frames per second.
        height: pixels; even, 32 or more.
        width: the same.
        crf: what their encoding loses, 0 (nothing but colour resolution) to 51.

    Raises:
        ConfigError: a value is impossible.
    """

    num_frames: int = 32
    fps: int = 16
    height: int = 96
    width: int = 128
    crf: int = 18

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
        if not 0 <= self.crf <= 51:
            raise ConfigError(f"crf = {self.crf}; it must be 0 to 51")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticConfig(VideoConfig):
    """Videos of a shape that moves over a still background.

    Args:
        num_frames: see `VideoConfig`.
        fps: the same.
        height: the same.
        width: the same.
        crf: the same.
        occluded: the share of videos in which a bar stands in the way.

    Raises:
        ConfigError: a value is impossible.
    """

    occluded: float = 0.3

    def __post_init__(self) -> None:
        """Checks every field."""
        super().__post_init__()
        if not 0 <= self.occluded <= 1:
            raise ConfigError(f"occluded = {self.occluded}; it must be a share, 0 to 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextureConfig(VideoConfig):
    """Videos of a grey random texture that drifts, all alike in brightness, contrast and detail.

    Args:
        num_frames: see `VideoConfig`.
        fps: the same.
        height: the same.
        width: the same.
        crf: the same; what is above 0 takes noise away.
        speed: (least, greatest) pixels a frame along the axis that it moves along most; above 0.
        noise: the deviation of each pixel's own noise, anew in every frame, in that of the texture.

    Raises:
        ConfigError: a value is impossible.
    """

    crf: int = 0
    speed: tuple[float, float] = (3.0, 5.0)
    noise: float = 1.5

    def __post_init__(self) -> None:
        """Checks every field."""
        super().__post_init__()
        if not 0 < self.speed[0] <= self.speed[1] < math.inf:
            raise ConfigError(f"speed = {self.speed}; it must be two numbers above 0, growing")
        if not 0 <= self.noise < math.inf:
            raise ConfigError(f"noise = {self.noise}; it must be a number, 0 or more")


def render(
    label: int,
    seed: int | tuple[int, ...],
    config: SyntheticConfig | TextureConfig | None = None,
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
    if isinstance(config, TextureConfig):
        return _texture(draw, direction, config)
    return _shape(draw, direction, config)


def _texture(
    draw: np.random.Generator, direction: NDArray[np.float64], config: TextureConfig
) -> NDArray[np.uint8]:
    """Noise of a band of frequencies, whose phases turn as it moves: by parts of pixels, too."""
    motion = direction / abs(direction).max() * draw.uniform(*config.speed)
    longest = max(config.height, config.width) + config.num_frames * abs(motion).max()
    side = 2 ** math.ceil(math.log2(longest))  # it is periodic, and longer than what is seen of it
    y, x = np.meshgrid(*[np.fft.fftfreq(side)] * 2, indexing="ij")  # cycles a pixel
    seen = np.abs(np.hypot(x, y) - np.mean(_BAND)) <= np.ptp(_BAND) / 2
    waves = np.fft.fft2(draw.standard_normal((side, side))) * seen
    steps = np.exp(-1j * math.tau * (x * motion[0] + y * motion[1]))  # of one frame
    frames = np.empty((config.num_frames, config.height, config.width))
    for frame in frames:
        frame[:] = np.fft.ifft2(waves).real[: config.height, : config.width]
        waves = waves * steps
    frames = frames / frames.std() + config.noise * draw.standard_normal(frames.shape)
    grey = 128 + _CONTRAST * frames / math.hypot(1, config.noise)
    return np.repeat(np.clip(np.round(grey), 0, 255).astype(np.uint8)[..., None], 3, axis=-1)


def _shape(
    draw: np.random.Generator, direction: NDArray[np.float64], config: SyntheticConfig
) -> NDArray[np.uint8]:
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
    config: SyntheticConfig | TextureConfig | None = None,
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
    with new_folder(folder, MANIFEST_FILE, force=force) as work:
        for i in range(count):
            label, name = i % len(DIRECTIONS), f"{i:05d}.mp4"
            frames = render(label, (seed, i), config)
            write_video(work / name, frames, config.fps, crf=config.crf)
            rows.append(f"{name} {label}\n")
        (work / MANIFEST_FILE).write_text("".join(rows), encoding="utf-8")
        (work / LABELS_FILE).write_text("\n".join(DIRECTIONS) + "\n", encoding="utf-8")
    return folder / MANIFEST_FILE


def write_video(path: Path, frames: NDArray[np.uint8], fps: int, *, crf: int = 18) -> None:
    """Writes an H.264 video; the same arguments give the same file.

    Args:
        path: the .mp4 to make.
        frames: uint8 [T, H, W, 3], RGB; H and W are even.
        fps: frames per second.
        crf: how much is lost, 0 (nothing but colour resolution) to 51.
    """
    # One thread: what x264 writes depends on how many there are.
    options = {"crf": str(crf), "g": "12", "preset": "veryfast", "threads": "1"}
    with av.open(str(path), "w") as container:
        track = container.add_stream("libx264", rate=fps, options=options)
        track.height, track.width = frames.shape[1:3]
        track.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(track.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(track.encode())
