"""What frozen parts of a video-quality model give, kept on disk by what it was made of.

A feature has a file of its own, named by a digest of all that decides its values: the bytes of the
video, or the tokens of the prompt, and the weights and options of what computed it. So several
sets and runs can share a folder, what is there is never computed again, and what has changed, if
only a replaced video, is another file.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from jvjepa.adapters import weights_sha256
from jvjepa.errors import InputError, VideoError
from jvjepa.quality import QualityModel, VideoQuality, read_pixels, text_features
from jvjepa.storage import new_file, open_safetensors, write_safetensors
from jvjepa.train.frozen_features import DTYPES, Stored
from jvjepa.train.manifest import DataError
from jvjepa.train.mos_data import Ratings
from jvjepa.train.mos_layers import cut, lower_tokens
from jvjepa.typing import Array, DType, Params

FORMAT = "jvjepa-quality-features-1"
_NAME = "feature"
_READ_AHEAD = 2  # videos for each thread
_WATCHING = ("encoder", "pooler")  # the parts that make a video's feature


@dataclasses.dataclass(frozen=True)
class Store:
    """A folder of features.

    Args:
        folder: where; made when the first feature is saved.
    """

    folder: Path

    def place(self, key: str) -> Path:
        """The file of a feature, whether or not it is there."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def has(self, key: str) -> bool:
        """Whether a feature is there."""
        return self.place(key).is_file()

    def save(self, key: str, feature: NDArray[Any]) -> None:
        """Writes a feature, whole or not at all."""
        path = self.place(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path) as work:
            shapes = {_NAME: feature.shape}
            parts = [(_NAME, feature)]
            write_safetensors(work, shapes, feature.dtype, parts, {"format": FORMAT, "key": key})

    def load(self, key: str) -> NDArray[Any]:
        """Reads a feature; raises CheckpointError where its file is damaged."""
        with open_safetensors(self.place(key)) as file:
            return file.get_tensor(_NAME)


class Kept(NamedTuple):
    """What is kept of a video.

    Args:
        depth: None keeps the feature that the head sees, [D]; a number keeps the tokens that this
            block of the encoder takes, counted from 0, [N, D].
        stored: dtype on disk.
        dtype: of the computation.
    """

    depth: int | None
    stored: Stored
    dtype: DType


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """Rated videos, and what frozen parts of a model give for them.

    Args:
        ratings: the videos that could be decoded.
        videos: the feature of each in `store`.
        texts: float32 [n, Dt], the embeddings of the prompts.
        store: where the features of the videos are.
        bad: why others could not be decoded, by name.
        made_of: what the features were made of, but for the videos themselves.
    """

    ratings: Ratings
    videos: tuple[str, ...]
    texts: NDArray[np.float32]
    store: Store
    bad: Mapping[str, str]
    made_of: Mapping[str, Any]

    def __len__(self) -> int:
        """How many videos, n."""
        return len(self.videos)

    def load(self, row: int) -> NDArray[Any]:
        """Reads what is kept of a video."""
        return self.store.load(self.videos[row])


def make_examples(
    model: QualityModel,
    ratings: Ratings,
    store: Store,
    kept: Kept,
    *,
    batch_size: int = 1,
    threads: int = 2,
    console: Console | None = None,
) -> Examples:
    """Computes what the store does not have yet.

    Args:
        model: whose frozen parts; blocks stacked.
        ratings: the videos and prompts. A video that cannot be decoded is left out and listed, and
            nothing takes its place.
        store: where to look and to keep.
        kept: what of each video.
        batch_size: videos that are encoded together.
        threads: that decode ahead.
        console: where to show progress; None shows nothing.

    Returns:
        The features of the others.

    Raises:
        InputError: a number is impossible.
        DataError: no video can be decoded, or features are not finite.
    """
    for name, number in (("batch_size", batch_size), ("threads", threads)):
        if number < 1:
            raise InputError(f"{name} = {number}; it must be 1 or more")
    origin = made_of(model, kept)
    files = [_sha256(path) for path in ratings.paths]
    keys = [_key({**origin, "video": file}) for file in files]
    missing: dict[str, int] = {}  # the first row of each
    for row, key in enumerate(keys):
        if not store.has(key):
            missing.setdefault(key, row)
    problems: dict[str, str] = {}
    batches = _batches(model, ratings, list(missing.items()), batch_size, threads, problems)
    encode = _encoder(model, kept)
    steps = -(-len(missing) // batch_size)
    hidden = console is None or not missing
    for some, pixels in track(
        batches, "encoding", steps, console=console, transient=True, disable=hidden
    ):
        found = np.asarray(encode(pixels)).astype(DTYPES[kept.stored])
        for (key, row), feature in zip(some, found, strict=False):  # what fills up is behind them
            if not np.isfinite(feature).all():
                name = f"the features of {ratings.paths[row]}"
                raise DataError(f"{ratings.source}: {name} are not finite in {kept.stored}")
            store.save(key, feature)
    rows = [row for row, key in enumerate(keys) if key not in problems]
    bad = {ratings.names[i]: problems[key] for i, key in enumerate(keys) if key in problems}
    if not rows:
        first = next(iter(bad.values()))
        raise DataError(f"{ratings.source}: none of its {len(keys)} videos can be decoded: {first}")
    ratings = ratings.take(rows)
    return Examples(
        ratings=ratings,
        videos=tuple(keys[row] for row in rows),
        texts=_texts(model, ratings.prompts, store),
        store=store,
        bad=bad,
        made_of=origin,
    )


def made_of(model: QualityModel, kept: Kept) -> dict[str, Any]:
    """All that decides what is kept of a video, but for the video; as JSON knows it."""
    params, config = model.params, model.config
    if kept.depth is None:
        weights: Params = {name: params[name] for name in _WATCHING if name in params}
        pooler = None if config.pooler is None else dataclasses.asdict(config.pooler)
        options: dict[str, Any] = {"feature": config.feature, "pooler": pooler}
    else:
        weights = cut(params["encoder"], config.encoder, kept.depth)[0]
        options = {"depth": kept.depth}
    record = {
        "format": FORMAT,
        "weights": weights_sha256(weights),
        "architecture": dataclasses.asdict(config.encoder),
        "num_frames": config.num_frames,
        "computed_in": np.dtype(kept.dtype).name,
        "stored": kept.stored,
        **options,
    }
    return json.loads(json.dumps(record))


def _key(made_of: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _encoder(model: QualityModel, kept: Kept) -> Any:
    """A function of pixels [B, T, H, W, 3] to what is kept of each clip."""
    encoder = dataclasses.replace(model.encoder, dtype=kept.dtype)
    if kept.depth is not None:
        lower, _ = cut(model.params["encoder"], model.config.encoder, kept.depth)
        return functools.partial(_lower, encoder, kept.depth, lower)
    pooler = model.pooler and dataclasses.replace(model.pooler, dtype=kept.dtype)
    module = dataclasses.replace(model.module, encoder=encoder, pooler=pooler)
    parts = {name: model.params[name] for name in _WATCHING if name in model.params}
    return functools.partial(_watch, module, parts)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _lower(encoder: Any, depth: int, lower: Params, pixels: Array) -> Array:
    return lower_tokens(encoder, lower, pixels.astype(encoder.dtype), depth)


@functools.partial(jax.jit, static_argnums=0)
def _watch(module: VideoQuality, params: Params, pixels: Array) -> Array:
    pixels = pixels.astype(module.encoder.dtype)
    return module.apply({"params": params}, pixels, method="watch")


def _batches(
    model: QualityModel,
    ratings: Ratings,
    wanted: list[tuple[str, int]],
    batch_size: int,
    threads: int,
    problems: dict[str, str],
) -> Iterator[tuple[list[tuple[str, int]], Array]]:
    """The videos that can be decoded; copies of the last one fill up the last batch.

    Args:
        model: says what is read of a video.
        ratings: the videos.
        wanted: key and row of each.
        batch_size: videos of a batch.
        threads: that decode ahead.
        problems: the reasons of the others are put there, by key.

    Yields:
        Key and row of each video of the batch, and float32 [batch_size, T, H, W, 3].
    """

    def read(at: int) -> tuple[NDArray[np.float32] | None, str]:
        path = ratings.paths[wanted[at][1]]
        try:
            return read_pixels(path, model.config), ""
        except (VideoError, OSError) as error:
            return None, " ".join(str(error).split())

    if not wanted:
        return
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=_READ_AHEAD * threads)
    source = grain.MapDataset.source(range(len(wanted))).map(lambda at: (wanted[at], read(at)))
    some: list[tuple[str, int]] = []
    pixels: list[NDArray[np.float32]] = []
    with contextlib.closing(iter(source.to_iter_dataset(ahead))) as reading:
        for which, (clip, problem) in reading:
            if clip is None:
                problems[which[0]] = problem
                continue
            some.append(which)
            pixels.append(clip)
            if len(some) == batch_size:
                yield some, jnp.asarray(np.stack(pixels))
                some, pixels = [], []
    if some:
        pixels += pixels[-1:] * (batch_size - len(some))
        yield some, jnp.asarray(np.stack(pixels))


def _texts(model: QualityModel, prompts: tuple[str, ...], store: Store) -> NDArray[np.float32]:
    """float32 [n, Dt], the embedding of each prompt."""
    text = {
        "format": FORMAT,
        "text": weights_sha256(model.params["text"]),
        "architecture": dataclasses.asdict(model.config.text),
        "computed_in": np.dtype(model.text.dtype).name,
    }
    ids, mask, _ = model.tokenizer(prompts)
    keys = [
        _key({**text, "tokens": row[seen].tolist()}) for row, seen in zip(ids, mask, strict=True)
    ]
    missing = {key: prompts[i] for i, key in enumerate(keys) if not store.has(key)}
    if missing:
        embedded = np.asarray(text_features(model, list(missing.values())))
        for key, feature in zip(missing, embedded, strict=True):
            store.save(key, feature)
    known = {key: store.load(key) for key in set(keys)}
    return np.stack([known[key] for key in keys])
