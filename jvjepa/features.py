"""Dense features of a clip: one vector a patch, and their principal components as colours.

What belongs together gets one colour, and keeps it over time, which shows at a glance what the
encoder sees. The idea is that of the DINOv2 paper (arXiv:2304.07193): the first component of all
patches tells the foreground from the background, and the first three components of the foreground's
patches are its red, green and blue.
"""

import functools
import io
import math
import time
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import av
import jax
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from einops import rearrange, repeat
from numpy.typing import NDArray
from rich.console import Console

from jvjepa.config import ModelConfig
from jvjepa.encoder import Encoder, token_grid
from jvjepa.errors import InputError
from jvjepa.pictures import is_picture, read_clip
from jvjepa.preprocessing import preprocess
from jvjepa.recording import check_output, named, save_npz
from jvjepa.storage import new_file
from jvjepa.typing import Array, Params
from jvjepa.weights import Model

if TYPE_CHECKING:
    from jvjepa import cli

_CLOCK = 90_000  # ticks per second of a video that is written
_SLOWEST = Fraction(1, 1001)  # frames per second that the header of a video may name
_PERCENTILES = (1, 99)  # of a component's values; they become 0 and 255
# Tokens are float32. A component whose deviation is below this share of their size is rounding.
_ROUNDING = 1e-6


class PcaImage(NamedTuple):
    """What `pca_colours` returns.

    Args:
        colours: uint8 [t, h, w, 3], RGB; the background is black.
        foreground: bool [t, h, w], the patches that have a colour.
        explained: float64 [3], the share of the foreground's variance in each component, falling.
    """

    colours: NDArray[np.uint8]
    foreground: NDArray[np.bool_]
    explained: NDArray[np.float64]


def features(model: Model, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Encodes a clip and puts its tokens where their patches are.

    Args:
        model: a loaded checkpoint.
        pixels: float32 [T, H, W, 3], as `jvjepa.video.preprocess` and `jvjepa.pictures.read_clip`
            give them.

    Returns:
        float32 [t, h, w, D], after the final norm; t is 1 for a picture.

    Raises:
        InputError: the clip cannot be encoded, see `Encoder`.
    """
    clip = pixels[None]
    tokens = _encode(model.encoder, model.params["encoder"], clip)[0]
    rows, columns = token_grid(clip, model.config.encoder)
    return rearrange(np.asarray(tokens, np.float32), "(t h w) d -> t h w d", h=rows, w=columns)


@functools.partial(jax.jit, static_argnames="encoder")
def _encode(encoder: Encoder, params: Params, clip: Array) -> Array:
    return encoder.apply({"params": params}, clip)


def pca_colours(grid: NDArray[np.float32], *, foreground: bool = True) -> PcaImage:
    """Colours the patches of a clip by the principal components of their features.

    The foreground is one side of the threshold on the first component that separates the two best
    (Otsu's): the side to which fewer patches at the border of the picture belong, or if that is
    even the smaller one. Of each colour's component the middle 98 % of the values fill the range of
    0 to 255. A component's sign, which is arbitrary, makes its value that is farthest from the mean
    positive. None of this changes if the features are rotated.

    A component that does not vary gives the middle of the range: equal patches are all grey.

    Args:
        grid: float [t, h, w, D], as `features` gives it.
        foreground: tell foreground from background; False colours all patches.

    Returns:
        Colours, the foreground, and the share of the variance that the colours show.

    Raises:
        InputError: `grid` is not float [t, h, w, D], is empty, or is not finite.
    """
    if grid.ndim != 4 or not np.issubdtype(grid.dtype, np.floating) or not grid.size:
        raise InputError(f"grid is {grid.dtype} {list(grid.shape)}; it must be float [t, h, w, D]")
    if not np.isfinite(grid).all():
        raise InputError("grid holds NaN or infinite values; all must be finite")
    tokens = grid.reshape(-1, grid.shape[-1]).astype(np.float64)
    mask = np.ones(grid.shape[:-1], np.bool_)
    if foreground:
        mask = _foreground(_components(tokens, 1).scores.reshape(mask.shape))
    shown = _components(tokens[mask.ravel()], 3)
    colours = np.zeros((*mask.shape, 3), np.uint8)
    colours[mask] = np.stack([_to_bytes(scores) for scores in shown.scores.T], axis=-1)
    return PcaImage(colours, mask, shown.explained)


class _Components(NamedTuple):
    """Principal components: scores float64 [N, n] of each token, and their shares of variance."""

    scores: NDArray[np.float64]
    explained: NDArray[np.float64]


def _components(tokens: NDArray[np.float64], count: int) -> _Components:
    """The first components of tokens [N, D]; those that are not there have scores of 0."""
    centred = tokens - tokens.mean(axis=0)
    variances, axes = np.linalg.eigh(centred.T @ centred / len(tokens))
    variances, axes = variances[::-1][:count], axes[:, ::-1][:, :count]
    varies = variances > _ROUNDING**2 * np.mean(np.sum(tokens**2, axis=-1))
    scores = np.zeros((len(tokens), count))
    scores[:, : len(varies)] = centred @ (axes * varies)
    # Of values that are as far from the mean as each other, the first decides.
    far = np.abs(scores) >= (1 - _ROUNDING) * np.abs(scores).max(axis=0)
    scores *= np.where(scores[far.argmax(axis=0), np.arange(count)] < 0, -1.0, 1.0)
    explained = np.zeros(count)
    explained[: len(varies)][varies] = variances[varies] / np.sum(centred**2) * len(tokens)
    return _Components(scores, explained)


def _foreground(scores: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which patches of scores [t, h, w] belong to the foreground; all, if there is one score."""
    ordered = np.sort(scores, axis=None)
    below = np.arange(1, ordered.size)
    distance = ordered.sum() / ordered.size - np.cumsum(ordered)[:-1] / below
    between = below / (ordered.size - below) * distance**2
    if not between.size or between.max() <= 0:
        return np.ones(scores.shape, np.bool_)
    split = int(between.argmax())
    above = scores > (ordered[split] + ordered[split + 1]) / 2
    border = np.ones(scores.shape, np.bool_)
    border[:, 1:-1, 1:-1] = False
    sides = (above, ~above)
    return min(sides, key=lambda side: (int(np.sum(side & border)), int(np.sum(side))))


def _to_bytes(scores: NDArray[np.float64]) -> NDArray[np.uint8]:
    low, high = np.percentile(scores, _PERCENTILES)
    if low == high:  # all but a few outliers are equal
        low, high = scores.min(), scores.max()
    share = (scores - low) / (high - low) if high > low else np.full(scores.shape, 0.5)
    return np.round(255 * np.clip(share, 0, 1)).astype(np.uint8)


def features_command(options: "cli.Features", console: Console) -> int:
    """`jvjepa features`."""
    _check_outputs(options)
    model = options.load()
    clip = read_clip(
        model.config,
        options.source,
        num_frames=options.num_frames,
        fps=options.fps,
        start=options.start,
        end=options.end,
        repeat_frame=options.repeat_frame,
    )
    begin = time.perf_counter()
    grid = features(model, clip.pixels)
    seconds = time.perf_counter() - begin
    what = "a picture" if clip.is_picture else f"{len(clip.pixels)} frames"
    shape = " x ".join(map(str, grid.shape))
    console.print(f"{what}, {shape} features, {seconds:.1f} s with compilation")
    if options.npz is not None:
        save_npz(options.npz, {"features": grid, "times": clip.times})
        console.print(f"wrote {options.npz}")
    if options.pca is not None:
        image = pca_colours(grid, foreground=options.foreground)
        frames = _frames(clip.pixels, model.config)
        if options.pca.suffix == ".png":
            _write(options.pca, _png(_contact_sheet(frames, image.colours)))
        else:
            # A rate may show a frame of the file more than once.
            times = clip.times if options.fps is None else np.arange(len(frames)) / options.fps
            _write(options.pca, _mp4(_pairs(frames, image.colours), times))
        shares = ", ".join(f"{share:.1%}" for share in image.explained)
        console.print(
            f"colours: {image.foreground.mean():.1%} of the patches, and of their variance {shares}"
        )
        console.print(f"wrote {options.pca}")
    return 0


def _check_outputs(options: "cli.Features") -> None:
    """Refuses, before the long work, what cannot be written."""
    pca, npz = options.pca, options.npz
    if pca is None and npz is None:
        raise InputError("there is nothing to write; give --pca, --npz or both")
    if pca is None and not options.foreground:
        raise InputError("--no-foreground is for --pca; give that too, or leave it out")
    how = {"force": options.force, "sources": (options.model, options.lora, options.source)}
    if npz is not None:
        check_output(npz, suffix=".npz", **how)
    if pca is not None:
        if pca.suffix not in (".png", ".mp4"):
            raise InputError(f"{pca} must end in .png or .mp4")
        check_output(pca, suffix=pca.suffix, **how)
        if pca.suffix == ".mp4" and is_picture(options.source):
            raise InputError(f"{pca} must end in .png, because {options.source} is a picture")


def _frames(pixels: NDArray[np.float32], config: ModelConfig) -> NDArray[np.uint8]:
    """What `preprocess` saw, cut and resized: uint8 [T, H, W, 3]."""
    ends = repeat(np.array([0, 255], np.uint8), "n -> n 1 1 3")
    black, white = preprocess(ends, config)[:, 0, 0]
    return np.round(255 * (pixels - black) / (white - black)).astype(np.uint8)


def _pairs(frames: NDArray[np.uint8], colours: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Frames [T, H, W, 3] and, to the right of each, the colours of its tubelet: [T, H, 2W, 3]."""
    sizes = zip("pqr", frames.shape[:3], colours.shape[:3], strict=True)
    factors = {name: large // small for name, large, small in sizes}
    pattern = "t h w c -> (t p) (h q) (w r) c"
    return np.concatenate([frames, repeat(colours, pattern, **factors)], axis=2)


def _contact_sheet(frames: NDArray[np.uint8], colours: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The first frame of each tubelet beside its colours, row by row in a sheet nearly square."""
    count = len(colours)
    cells = _pairs(frames[:: len(frames) // count], colours)
    columns = max(1, round(math.sqrt(count * cells.shape[1] / cells.shape[2])))
    black = np.zeros((-count % columns, *cells.shape[1:]), np.uint8)
    pattern = "(rows columns) h w c -> (rows h) (columns w) c"
    return rearrange(np.concatenate([cells, black]), pattern, columns=columns)


def _png(image: NDArray[np.uint8]) -> bytes:
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width = image.shape[:2]
    encoder.pix_fmt, encoder.time_base = "rgb24", Fraction(1, 1)
    frame = av.VideoFrame.from_ndarray(image, "rgb24")
    return b"".join(bytes(packet) for packet in (*encoder.encode(frame), *encoder.encode(None)))


def _mp4(frames: NDArray[np.uint8], times: NDArray[np.float64]) -> bytes:
    """H.264 that shows frames [T, H, W, 3] at these times, the first at once."""
    ticks = np.round((times - times[0]) * _CLOCK).astype(np.int64)
    last = ticks[-1] - ticks[-2] if len(ticks) > 1 else _CLOCK
    steps = np.diff(ticks, append=ticks[-1] + last).tolist()
    rate = max(Fraction(len(steps) * _CLOCK, sum(steps)), _SLOWEST).limit_denominator(1001)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        # Without B-frames packets come in the order of frames, of which each has a duration.
        track = container.add_stream("libx264", rate=rate, options={"crf": "16", "bf": "0"})
        track.height, track.width = frames.shape[1:3]
        encoder = track.codec_context
        encoder.pix_fmt, encoder.time_base = "yuv420p", Fraction(1, _CLOCK)
        encoder.colorspace, encoder.color_range = int(Colorspace.ITU709), int(ColorRange.MPEG)
        packets = []
        for image, tick in zip(frames, ticks.tolist(), strict=True):
            frame = av.VideoFrame.from_ndarray(image, "rgb24").reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
            )
            frame.pts, frame.time_base = tick, encoder.time_base
            packets += track.encode(frame)
        for packet, step in zip((*packets, *track.encode(None)), steps, strict=True):
            packet.duration = step
            container.mux(packet)
    return file.getvalue()


def _write(path: Path, data: bytes) -> None:
    """Writes a file that appears whole or not at all."""
    with named(path), new_file(path) as work:
        work.write_bytes(data)
