"""Videos longer than memory: every frame is encoded, a bounded number of tokens at a time.

`embed_clips` cuts a video into consecutive clips and encodes each as `Encoder` does, so that a
token sees its own clip and nothing else. `embed_stream` takes one tubelet after the other with the
cached step of `jvjepa.streaming`, so that a token sees the past that fits and nothing of the
future, for which the released encoders were not trained.

Frames are decoded when it is their turn, and those of one clip are kept.
"""

import contextlib
import functools
import itertools
import logging
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from jvjepa import streaming, video
from jvjepa.config import EncoderConfig
from jvjepa.decoding import Source, is_live, locate
from jvjepa.encoder import Encoder
from jvjepa.errors import InputError, VideoError
from jvjepa.pictures import is_picture
from jvjepa.recording import named, save_npz
from jvjepa.typing import Array, Params
from jvjepa.weights import Model

if TYPE_CHECKING:
    from rich.console import Console

    from jvjepa import cli

Long = Literal["clips", "stream"]

_log = logging.getLogger(__name__)


class Part(NamedTuple):
    """A part of a video, encoded: a clip, or one tubelet of a stream.

    Args:
        times: float64 [T], the seconds at which the file first shows each of its frames.
        tokens: float32 [N, D], after the final norm.
        embedding: float32 [D], their mean.
    """

    times: NDArray[np.float64]
    tokens: NDArray[np.float32]
    embedding: NDArray[np.float32]


def tubelets_that_fit(config: EncoderConfig, max_tokens: int) -> int:
    """Says how many tubelets, of the size that the model was trained with, make so many tokens.

    Args:
        config: the encoder's.
        max_tokens: tokens at most.

    Returns:
        The largest number, 1 or more.

    Raises:
        InputError: not even one fits.
    """
    tokens = config.config_grid**2
    if max_tokens < tokens:
        size = f"{config.tubelet_size} frames of {config.crop_size} x {config.crop_size} pixels"
        raise InputError(
            f"max_tokens = {max_tokens}; it must be at least {tokens}, the tokens of one tubelet "
            f"({size})"
        )
    return max_tokens // tokens


def embed_clips(
    model: Model,
    source: Source,
    *,
    max_tokens: int,
    overlap: int = 0,
    fps: float | None = None,
    frame_step: int | None = None,
    start: float = 0.0,
    end: float | None = None,
) -> Generator[Part, None, None]:
    """Encodes a video of any length as consecutive clips, each with a forward pass of its own.

    Clips are of as many whole tubelets as fit; the last one may have fewer, and is encoded at its
    own length. So at most two programs are compiled. Frames at the end that do not fill a tubelet
    are dropped, and a warning is logged.

    Args:
        model: a loaded checkpoint.
        source: a file or the URL of one.
        max_tokens: tokens of one forward pass at most.
        overlap: frames that a clip shares with the one before, a multiple of the tubelet's size;
            fewer than a clip has.
        fps: frames per second to take, as `jvjepa.video.stream` does; None takes all.
        frame_step: take every so-manyth frame instead.
        start: seconds to skip.
        end: seconds at which to stop; None goes on to the end.

    Yields:
        The clips in the order of time, at least one.

    Raises:
        InputError: a number is impossible, both `fps` and `frame_step` are given, the source is a
            picture, or the encoder takes no clip of such a length.
        VideoError: the source cannot be read, is damaged, live, or shorter than a tubelet; clips
            before the damage are good.
    """
    config = model.config.encoder
    unit = config.tubelet_size
    length = unit * tubelets_that_fit(config, max_tokens)
    if not 0 <= overlap < length or overlap % unit:
        right = f"a multiple of {unit} from 0 to {length - unit}"
        raise InputError(f"overlap = {overlap}; clips have {length} frames, so it must be {right}")
    frames = _Frames(model, source, fps, frame_step, start, end)

    def encode() -> Generator[Part, None, None]:
        with contextlib.closing(frames.clips(length, overlap)) as clips:
            for pixels, times in clips:
                try:
                    tokens = _encode(model.encoder, model.params["encoder"], pixels[None])
                except InputError as error:
                    raise InputError(
                        f"{frames.name}: the clip of {len(times)} frames from {times[0]:.2f} to "
                        f"{times[-1]:.2f} s: {error}; max_tokens and end change its length"
                    ) from None
                del pixels  # before the next clip is read
                yield _part(times, tokens)

    return encode()


@functools.partial(jax.jit, static_argnames="encoder")
def _encode(encoder: Encoder, params: Params, clip: Array) -> Array:
    """The tokens [N, D] of a clip [1, T, H, W, 3]."""
    return encoder.apply({"params": params}, clip)[0]


def embed_stream(
    model: Model,
    source: Source,
    *,
    max_tokens: int,
    fps: float | None = None,
    frame_step: int | None = None,
    start: float = 0.0,
    end: float | None = None,
) -> Generator[Part, None, None]:
    """Encodes a video of any length tubelet by tubelet, with a window of as many as fit.

    The same as `jvjepa.streaming.scan` over the whole video, with its default positions.

    Args:
        model: as in `embed_clips`.
        source: as in `embed_clips`.
        max_tokens: tokens that the window may hold; a token sees no others.
        fps: as in `embed_clips`.
        frame_step: as in `embed_clips`.
        start: as in `embed_clips`.
        end: as in `embed_clips`.

    Yields:
        The tubelets in the order of time, at least one.

    Raises:
        InputError: as `embed_clips`.
        VideoError: as `embed_clips`.
    """
    config = model.config.encoder
    window = tubelets_that_fit(config, max_tokens)
    frames = _Frames(model, source, fps, frame_step, start, end)

    def encode() -> Generator[Part, None, None]:
        params = model.params["encoder"]
        state = streaming.init_state(model.encoder, 1, window)
        with contextlib.closing(frames.clips(config.tubelet_size, 0)) as tubelets:
            for pixels, times in tubelets:
                state, out = streaming.step(model.encoder, params, state, pixels[None])
                yield _part(times, np.asarray(out.tokens)[0])

    return encode()


def _part(times: NDArray[np.float64], tokens: Array | np.ndarray) -> Part:
    tokens = np.asarray(tokens, np.float32)
    return Part(times, tokens, tokens.mean(axis=0, dtype=np.float64).astype(np.float32))


class _Frames:
    """The frames of a video, preprocessed one by one; whatever is wrong at once is raised at once.

    Args:
        model: its config says how to preprocess.
        source: as in `embed_clips`, as what follows.
        fps: or None.
        frame_step: or None.
        start: seconds.
        end: seconds, or None.
    """

    def __init__(
        self,
        model: Model,
        source: Source,
        fps: float | None,
        frame_step: int | None,
        start: float,
        end: float | None,
    ) -> None:
        """Checks everything and decodes nothing."""
        if fps is not None and frame_step is not None:
            raise InputError(f"fps = {fps} and frame_step = {frame_step}; give one of the two")
        if frame_step is not None and frame_step < 1:
            raise InputError(f"frame_step = {frame_step}; it must be 1 or more")
        if is_picture(source):
            raise InputError(f"{source}: is a picture; max_tokens is for videos, leave it out")
        place = locate(source, video.Reconnect().timeout)
        if is_live(place):
            raise VideoError(
                f"{place.name}: is live and has no end; max_tokens is for files, and jvjepa stream "
                "keeps a live embedding"
            )
        self.model, self.name = model, place.name
        self.step = 1 if frame_step is None else frame_step
        self.frames = video.stream(source, fps=fps, start=start, end=end)

    def clips(
        self, length: int, overlap: int
    ) -> Generator[tuple[NDArray[np.float32], NDArray[np.float64]], None, None]:
        """Yields clips [T, crop, crop, 3] and the times [T] of their frames, once.

        All have `length` frames but the last, which has the whole tubelets that are left; each
        begins with the last `overlap` frames of the one before, and brings new ones.
        """
        unit = self.model.config.encoder.tubelet_size
        held: list[tuple[NDArray[np.float32], float]] = []
        old = 0  # of the frames held, how many the clip before had
        count = 0
        with contextlib.closing(self.frames):
            for frame in self._preprocessed():
                held.append(frame)
                if len(held) == length:
                    clip, held, old = _stack(held), held[length - overlap :], overlap
                    count += 1
                    yield clip
                    del clip  # before the next one is read
        whole = len(held) // unit * unit
        if whole > old:
            count += 1
            yield _stack(held[:whole])
        if not count:
            raise VideoError(f"{self.name} has no whole tubelet of {unit} frames in this range")
        if len(held) > whole:
            _log.warning(
                "%d frames at the end do not fill a tubelet of %d", len(held) - whole, unit
            )

    def _preprocessed(self) -> Generator[tuple[NDArray[np.float32], float], None, None]:
        """Yields one frame [crop, crop, 3] after the other, and its time."""
        shape: tuple[int, ...] | None = None
        for frame, at in itertools.islice(self.frames, 0, None, self.step):
            shape = shape or frame.shape
            if frame.shape != shape:
                sizes = " to ".join(
                    f"{width} x {height}" for height, width, _ in (shape, frame.shape)
                )
                raise VideoError(f"{self.name}: its size changes from {sizes} at {at:.3f} s")
            yield video.preprocess(frame[None], self.model.config)[0], at


def _stack(
    held: list[tuple[NDArray[np.float32], float]],
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    frames, times = zip(*held, strict=True)
    return np.stack(frames), np.array(times, np.float64)


def is_long(options: "cli.Embed") -> bool:
    """Whether `jvjepa embed` is to encode every frame; raises InputError if options do not fit."""
    if options.max_tokens is None:
        for name in ("long", "overlap", "frame_step"):
            if getattr(options, name) is not None:
                raise InputError(f"--{name.replace('_', '-')} is for --max-tokens; give that too")
        return False
    if options.num_frames is not None:
        raise InputError("--num-frames is for one clip; --max-tokens says how long clips are")
    if options.repeat_frame:
        raise InputError("--repeat-frame is for pictures, and --max-tokens for videos")
    if options.long == "stream" and options.overlap is not None:
        raise InputError("--overlap is for --long clips; tubelets of a stream do not overlap")
    return True


def embed_long(options: "cli.Embed", console: "Console") -> int:
    """`jvjepa embed --max-tokens`."""
    model = options.load()
    config, overlap = model.config.encoder, options.overlap or 0
    reading = {name: getattr(options, name) for name in ("fps", "frame_step", "start", "end")}
    if options.long == "stream":
        parts = embed_stream(model, options.video, max_tokens=options.max_tokens, **reading)
    else:
        parts = embed_clips(
            model, options.video, max_tokens=options.max_tokens, overlap=overlap, **reading
        )
    console.print(_choice(options, config))
    begin = time.perf_counter()
    total = np.zeros(config.hidden_size)
    with _Rows(options.out) as rows, contextlib.closing(parts), console.status("") as status:
        for part in parts:
            total += len(part.tokens) * part.embedding.astype(np.float64)
            count = np.array([len(part.tokens)])
            rows.append("embeddings", part.embedding[None])
            rows.append("times", part.times[None, [0, -1]])
            rows.append("num_tokens", count)
            if options.tokens:
                rows.append("tokens", part.tokens)
            status.update(f"{part.times[-1]:.1f} s of the video are encoded")
            del part  # before the next one is made
        arrays = rows.arrays()
        counts, times = arrays["num_tokens"], arrays["times"]
        num_tokens = int(counts.sum())
        save_npz(options.out, {"embedding": np.float32(total / num_tokens), **arrays})
        lengths = counts // config.config_grid**2 * config.tubelet_size
        num_frames = int(lengths.sum()) - overlap * (len(lengths) - 1)
        console.print(
            f"{_described(lengths, options)}: {num_frames} frames from {times[0, 0]:.2f} to "
            f"{times[-1, 1]:.2f} s, {num_tokens} tokens, {time.perf_counter() - begin:.1f} s with "
            f"compilation; wrote {options.out}"
        )
    return 0


def _choice(options: "cli.Embed", config: EncoderConfig) -> str:
    """Which way a video is encoded, and why."""
    count = tubelets_that_fit(config, options.max_tokens)
    plural = "tubelet" if count == 1 else "tubelets"
    fits = f"{count} {plural} of {config.config_grid**2} tokens fit in {options.max_tokens}"
    if options.long == "stream":
        return f"stream: {fits}, so a tubelet sees itself and the {count - 1} before it"
    name = "clips" if options.long else "clips (the default: exact, each on its own)"
    shared = f", {options.overlap} of them shared with the clip before" if options.overlap else ""
    return f"{name}: {fits}, so a clip has {count * config.tubelet_size} frames{shared}"


def _described(lengths: NDArray[np.int64], options: "cli.Embed") -> str:
    what = "tubelet" if options.long == "stream" else "clip"
    last = f", the last of {lengths[-1]}" if lengths[-1] != lengths[0] else ""
    return f"{len(lengths)} {what}{'s' * (len(lengths) > 1)} of {lengths[0]} frames{last}"


class _Rows:
    """Arrays that grow row by row, on disk, so that memory does not grow with them.

    They are in files without names, in the output's folder, so that nothing is left behind. (A
    `Recorder` has one row of every column at a time; of tokens, clips have more than of the rest.)

    Args:
        out: the file that the rows are for.
    """

    def __init__(self, out: Path) -> None:
        """Begins without arrays."""
        self.out = out
        self._files: dict[str, BinaryIO] = {}
        self._kinds: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}

    def __enter__(self) -> "_Rows":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):  # a full disk: whoever wanted the rows was told
                file.close()

    def append(self, name: str, rows: NDArray[np.generic]) -> None:
        """Adds rows [n, ...] to an array; all of an array have one dtype and shape."""
        with named(self.out):
            if name not in self._files:
                self._files[name] = tempfile.TemporaryFile(dir=self.out.absolute().parent)
                self._kinds[name] = rows.dtype, rows.shape[1:]
            self._files[name].write(np.ascontiguousarray(rows).data)

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """All arrays so far, mapped from their files."""
        mapped = {}
        with named(self.out):
            for name, file in self._files.items():
                file.flush()
                dtype, shape = self._kinds[name]
                mapped[name] = np.memmap(file, dtype, "r").reshape(-1, *shape)
        return mapped
