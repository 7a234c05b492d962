"""Batches of clips for training and evaluation.

    manifest = read_manifest("train.csv")
    with batches(manifest, ClipConfig(num_frames=16, fps=4), batch_size=64, workers=8) as loader:
        for batch in loader:  # endless
            video = normalise(jnp.asarray(batch.video))  # on the device

What a step holds follows from the seed and the number of the step alone: not from the number of
workers, and over all processes together not from their number either. So the step is all that
there is to store: `batches(.., step=n)` goes on where a run was after n steps.

A clip that cannot be read is replaced by another, logged once by name, and counted; too many of
them stop the run. Workers are processes that are spawned, so that a script that uses them must
guard its main part with `if __name__ == "__main__":`.
"""

import dataclasses
import logging
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import grain
import jax.numpy as jnp
import numpy as np
from absl import flags
from numpy.typing import NDArray

from jvjepa import video
from jvjepa.config import EncoderConfig
from jvjepa.decoding import index_file
from jvjepa.errors import InputError, VideoError
from jvjepa.fields import check, check_choices, check_positive_ints, is_number, is_whole
from jvjepa.masks import Grid
from jvjepa.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from jvjepa.train.augment import cut, random_window, view
from jvjepa.train.manifest import DataError, Manifest, require_file
from jvjepa.typing import Array, DType

_log = logging.getLogger(__name__)

NOT_COUNTED = -1
_Choice = Literal["random", "uniform"]
_Crop = Literal["random", "centre"]
MAX_SEED = 2**32
_ROUNDING = 0.002  # seconds that a file's end may be wrong by; Matroska has milliseconds
_NAMED = 5  # files that an error names


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """How a clip is taken out of a video. The defaults are those of V-JEPA 2's pretraining.

    With several clips, the video (or its part from `start` to `end`) is divided into as many equal
    parts, and each clip lies in one; where a part is shorter than a clip, they overlap. A video
    that is shorter than a clip repeats its last frame, as in Meta's training.

    Args:
        num_frames: frames of a clip, T.
        fps: frames per second; each is the one that a player shows at its time.
        crop_size: pixels of a side of the square.
        temporal: "random" draws the place of a clip in its part, "uniform" takes the middle.
        clips: clips of each video and epoch.
        spatial: "random" is a random resized crop, which may be flipped; "centre" is a view of
            `jvjepa.preprocessing.crops`, by default the middle.
        scale: least and greatest share of the frame's area that a random crop takes.
        aspect: its least and greatest width over height.
        flip: probability that a random crop is mirrored, left and right.
        view: which of the views a centre crop is, from 0.
        views: how many there are along the long side.

    Raises:
        ConfigError: a value is impossible.
    """

    num_frames: int = 16
    fps: float = 4.0
    crop_size: int = 256
    temporal: _Choice = "random"
    clips: int = 1
    spatial: _Crop = "random"
    scale: tuple[float, float] = (0.3, 1.0)
    aspect: tuple[float, float] = (0.75, 1.35)
    flip: float = 0.5
    view: int = 0
    views: int = 1

    def __post_init__(self) -> None:
        """Checks every field."""
        check_positive_ints(self, "num_frames", "crop_size", "clips", "views")
        check(is_number(self.fps) and self.fps > 0, self, "fps", "a number above 0")
        check_choices(self, temporal=get_args(_Choice), spatial=get_args(_Crop))
        fits = _is_range(self.scale) and self.scale[1] <= 1
        check(fits, self, "scale", "a tuple of two shares in (0, 1], growing")
        check(_is_range(self.aspect), self, "aspect", "a tuple of two numbers above 0, growing")
        check(is_number(self.flip, 0, 1), self, "flip", "a probability, 0 to 1")
        fits = is_whole(self.view) and self.view < self.views
        check(fits, self, "view", f"0 to {self.views - 1}, below views")

    def grid(self, encoder: EncoderConfig) -> Grid:
        """The tubelets, rows and columns of a clip's tokens, (t, h, w)."""
        side = self.crop_size // encoder.patch_size
        return max(1, self.num_frames // encoder.tubelet_size), side, side

    def num_tokens(self, encoder: EncoderConfig) -> int:
        """How many tokens a clip has: N = t·h·w."""
        return math.prod(self.grid(encoder))


def _is_range(value: object) -> bool:
    pair = isinstance(value, tuple) and [is_number(x) for x in value] == [True, True]
    return pair and 0 < value[0] <= value[1]


class Batch(NamedTuple):
    """Clips of one step and process.

    Args:
        video: uint8 [B, T, crop, crop, 3], RGB.
        labels: int32 [B]; -1 where the manifest has none.
        ids: int32 [B], the manifest's rows that the clips are of. Of `evaluation_batches` -1 marks
            clips that are not to be counted: they fill up the last batch, or replace bad ones.
    """

    video: NDArray[np.uint8]
    labels: NDArray[np.int32]
    ids: NDArray[np.int32]


def batches(
    manifest: Manifest,
    config: ClipConfig,
    *,
    batch_size: int,
    seed: int = 0,
    step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    max_bad: float = 0.01,
) -> "Batches":
    """Makes the batches of a training run, without end.

    Every epoch shuffles all clips anew, and drops those at its end that do not fill a batch.

    Args:
        manifest: what there is.
        config: how clips are taken out of it.
        batch_size: clips of a step, over all processes; a multiple of `process_count`.
        seed: 0 to 2^32 - 1.
        step: which step to begin with; that many are behind a run that goes on.
        process_index: of this process, 0 to process_count - 1; `jax.process_index()`.
        process_count: how many processes share the work, each for its own part of every batch.
        workers: processes that read ahead; 0 reads in a thread of this one.
        max_bad: the share of the clips that this process reads in an epoch which may be unreadable,
            0 to 1; above it the run stops.

    Returns:
        Batches of batch_size / process_count clips.

    Raises:
        InputError: a number is impossible, or there are fewer clips than a batch takes.
    """
    count = len(manifest) * config.clips
    _check_sharing(batch_size, process_index, process_count, workers, max_bad)
    if not 0 <= seed < MAX_SEED:
        raise InputError(f"seed = {seed}; it must be 0 to {MAX_SEED - 1}")
    if step < 0:
        raise InputError(f"step = {step}; it must be 0 or more")
    steps = count // batch_size
    if not steps:
        raise InputError(
            f"batch_size = {batch_size}; {manifest.source} gives {count} clips, take no more"
        )
    epoch = steps * batch_size
    limit = _limit(manifest, config, process_count, max_bad)
    load = _Load(manifest, config, seed, epoch, limit, count=None)
    order = grain.MapDataset.source(range(count)).shuffle(seed=seed)[:epoch].repeat(None)
    dataset = _shares(order, load, batch_size, process_index, process_count)[step:]
    return Batches(dataset, manifest, workers, steps, step, limit)


def evaluation_batches(
    manifest: Manifest,
    config: ClipConfig,
    *,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    max_bad: float = 0.01,
) -> "Batches":
    """Makes batches in which every clip is once, in the manifest's order.

    All batches have the same shape, on every process: copies of the last clip fill up the last one.
    They, and what replaces unreadable clips, have the id -1.

    Args:
        manifest: what there is.
        config: how clips are taken out; `temporal="uniform", spatial="centre"` draws nothing.
        batch_size: as in `batches`.
        process_index: as in `batches`.
        process_count: as in `batches`.
        workers: as in `batches`.
        max_bad: as in `batches`.

    Returns:
        Batches of batch_size / process_count clips.

    Raises:
        InputError: a number is impossible.
    """
    _check_sharing(batch_size, process_index, process_count, workers, max_bad)
    count = len(manifest) * config.clips
    steps = math.ceil(count / batch_size)
    total = steps * batch_size
    limit = _limit(manifest, config, process_count, max_bad)
    load = _Load(manifest, config, 0, total, limit, count=count)
    order = np.minimum(np.arange(total), count - 1)
    dataset = grain.MapDataset.source(order)
    dataset = _shares(dataset, load, batch_size, process_index, process_count)
    return Batches(dataset, manifest, workers, steps, 0, limit)


class Batches(Iterator[Batch]):
    """Batches, read ahead of their use; made by `batches` and `evaluation_batches`.

    Use it in a `with` block, or call `close`: there may be processes behind it.

    Attributes:
        steps_per_epoch: batches of an epoch.
        step: the number of the next batch; what to store, to go on from there.
        bad: why files could not be read, by path, as far as this process met them.
    """

    def __init__(
        self,
        dataset: grain.MapDataset,
        manifest: Manifest,
        workers: int,
        steps_per_epoch: int,
        step: int,
        limit: int,
    ) -> None:
        """Begins to read."""
        self.steps_per_epoch, self.step = steps_per_epoch, step
        self.bad: dict[str, str] = {}
        self._manifest, self._limit = manifest, limit
        self._bad_rows: set[int] = set()  # of this epoch
        # grain's own numbers are for small elements; these are batches of many megabytes.
        ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
        reading = dataset.to_iter_dataset(ahead)
        if workers:
            # grain reads a flag of absl, whether or not this program parses any.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=1)
            reading = reading.mp_prefetch(processes)
        self._iterator: grain.DatasetIterator | None = iter(reading)

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            DataError: too many clips cannot be read.
        """
        if self._iterator is None:
            raise StopIteration
        if self.step % self.steps_per_epoch == 0:
            self._bad_rows.clear()
        batch, failures = next(self._iterator)
        self.step += 1
        for failure in failures:
            path = self._manifest.paths[failure.row]
            if path not in self.bad:
                _log.warning("%s (another clip takes its place)", failure.problem)
                self.bad[path] = failure.problem
            self._bad_rows.add(failure.row)
        if len(self._bad_rows) > self._limit:
            problems = [self.bad[self._manifest.paths[row]] for row in sorted(self._bad_rows)]
            raise _too_many(self._manifest, problems, self._limit)
        # Workers hand over shared memory; copied, it is not held until nobody uses the batch.
        return Batch(*(np.array(part) for part in batch))

    def close(self) -> None:
        """Ends the workers; there are no more batches then."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def normalise(video: Array, dtype: DType = jnp.float32) -> Array:
    """Makes of uint8 frames what the encoder takes; for the device, inside jit.

    Args:
        video: uint8 [..., H, W, 3], RGB.
        dtype: of the result; the arithmetic is float32.

    Returns:
        [..., H, W, 3], with the ImageNet mean and deviation, as `jvjepa.preprocessing.preprocess`.

    Raises:
        InputError: `video` is not uint8 with 3 channels last.
    """
    if video.dtype != jnp.uint8 or video.ndim < 3 or video.shape[-1] != 3:
        raise InputError(
            f"video is {video.dtype} {list(video.shape)}; right is uint8 [..., H, W, 3], RGB"
        )
    shape = (1,) * (video.ndim - 1) + (3,)
    mean = (np.array(IMAGENET_MEAN, np.float32) * np.float32(255)).reshape(shape)
    std = (np.array(IMAGENET_STD, np.float32) * np.float32(255)).reshape(shape)
    return ((video.astype(jnp.float32) - mean) / std).astype(dtype)


def read_clip(
    manifest: Manifest,
    config: ClipConfig,
    row: int,
    clip: int = 0,
    *,
    seed: int = 0,
    epoch: int = 0,
) -> NDArray[np.uint8]:
    """Reads one clip. What is random in it follows from the arguments alone.

    Args:
        manifest: what there is.
        config: how clips are taken out of it.
        row: which row of the manifest.
        clip: which of its clips, 0 to config.clips - 1.
        seed: of the run, 0 or more.
        epoch: 0 or more.

    Returns:
        uint8 [T, crop, crop, 3].

    Raises:
        VideoError: the file is missing or damaged, or ends before the row's start.
    """
    generator = np.random.default_rng((seed, epoch, row, clip))
    place, mirror = generator.random(2)
    path, start, end = manifest.paths[row], manifest.starts[row], manifest.ends[row]
    length = index_file(require_file(path)).seconds
    if start >= length - _ROUNDING:
        raise VideoError(f"{path}: start = {start:g}, but it lasts {length:.3f} s")
    end = min(end, length)
    begin = _begin(config, float(start), float(end), clip, place)
    # Half a frame after the last one, so that rounding neither adds nor takes one.
    stop = min(begin + (config.num_frames - 0.5) / config.fps, end)
    frames, _ = video.read(path, fps=config.fps, start=begin, end=stop)
    if config.spatial == "centre":
        pixels = view(frames, config.crop_size, config.view, config.views)
    else:
        window = random_window(generator, *frames.shape[1:3], config.scale, config.aspect)
        pixels = cut(frames, window, config.crop_size, flip=bool(mirror < config.flip))
    return pixels[np.minimum(np.arange(config.num_frames), len(pixels) - 1)]


def _begin(config: ClipConfig, start: float, end: float, clip: int, place: float) -> float:
    """The second at which a clip of [start, end) begins; `place` in [0, 1) is what was drawn."""
    span, part = config.num_frames / config.fps, (end - start) / config.clips
    if part > span:
        return start + clip * part + (place if config.temporal == "random" else 0.5) * (part - span)
    return start + clip * max(end - start - span, 0.0) / max(config.clips - 1, 1)


class _Failure(NamedTuple):
    row: int
    problem: str


class _Example(NamedTuple):
    video: NDArray[np.uint8]  # [T, crop, crop, 3]
    label: int
    id: int
    failures: tuple[_Failure, ...]


@dataclasses.dataclass(frozen=True)
class _Load:
    """Reads the clip at a position of the run; this is what workers do.

    Args:
        manifest: what there is.
        config: how clips are taken out of it.
        seed: of the run.
        epoch: positions of an epoch.
        limit: how many bad clips an epoch may have.
        count: for evaluation, how many clips there are; positions from there on, and clips that
            replace others, are not counted. None counts all.
    """

    manifest: Manifest
    config: ClipConfig
    seed: int
    epoch: int
    limit: int
    count: int | None

    def __call__(self, position: int, example: int) -> _Example:
        epoch = position // self.epoch
        first, clip = divmod(int(example), self.config.clips)
        failures: list[_Failure] = []
        for row in self._candidates(epoch, first, clip):
            try:
                pixels = read_clip(
                    self.manifest, self.config, row, clip, seed=self.seed, epoch=epoch
                )
            except (VideoError, OSError) as error:
                failures.append(_Failure(row, " ".join(str(error).split())))
                if len(failures) > self.limit:
                    break
                continue
            counted = self.count is None or (position < self.count and not failures)
            label = int(self.manifest.labels[row])
            return _Example(pixels, label, row if counted else NOT_COUNTED, tuple(failures))
        raise _too_many(self.manifest, [failure.problem for failure in failures], self.limit)

    def _candidates(self, epoch: int, row: int, clip: int) -> Iterator[int]:
        """The row, and then the others in an order of its own."""
        yield row
        generator = np.random.default_rng((self.seed, epoch, row, clip, 1))
        for other in generator.permutation(len(self.manifest)).tolist():
            if other != row:
                yield other


def _shares(
    order: grain.MapDataset, load: _Load, batch_size: int, process_index: int, process_count: int
) -> grain.MapDataset:
    """A process's share of every batch: consecutive clips, as its devices have them.

    So the batch is the same, in the same order, whatever the number of processes: what is random in
    training goes by the place in the batch.
    """
    size = batch_size // process_count

    def read(step: int, examples: NDArray[np.int64]) -> tuple[Batch, tuple[_Failure, ...]]:
        places = range(process_index * size, (process_index + 1) * size)
        return _collate([load(step * batch_size + i, examples[i]) for i in places])

    return order.batch(batch_size).map_with_index(read)


def _collate(examples: list[_Example]) -> tuple[Batch, tuple[_Failure, ...]]:
    videos, labels, ids, failures = zip(*examples, strict=True)
    batch = Batch(np.stack(videos), np.array(labels, np.int32), np.array(ids, np.int32))
    return batch, tuple(failure for some in failures for failure in some)


def _limit(manifest: Manifest, config: ClipConfig, process_count: int, max_bad: float) -> int:
    """How many rows may be bad, of those that a process reads in an epoch."""
    rows = min(len(manifest), math.ceil(len(manifest) * config.clips / process_count))
    return math.floor(max_bad * rows + 1e-9)  # 0.29 * 100 is below 29


def _too_many(manifest: Manifest, problems: list[str], limit: int) -> DataError:
    shown = "; ".join(problems[:_NAMED])
    more = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
    return DataError(
        f"{manifest.source}: {len(problems)} clips cannot be read, and max_bad allows "
        f"{limit} of those of an epoch: {shown}{more}"
    )


def _check_sharing(
    batch_size: int, process_index: int, process_count: int, workers: int, max_bad: float
) -> None:
    if process_count < 1 or not 0 <= process_index < process_count:
        raise InputError(
            f"process_index = {process_index} of process_count = {process_count}; it must be 0 or "
            "more and below it"
        )
    if batch_size < 1 or batch_size % process_count:
        raise InputError(
            f"batch_size = {batch_size}; it must be a multiple of process_count = {process_count}"
        )
    if workers < 0:
        raise InputError(f"workers = {workers}; it must be 0 or more")
    if not 0 <= max_bad <= 1:
        raise InputError(f"max_bad = {max_bad}; it must be a share, 0 to 1")
