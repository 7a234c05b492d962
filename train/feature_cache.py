"""Features of a frozen encoder, computed once and read from disk ever after.

    config = FeatureConfig(views=(ClipConfig(temporal="uniform", spatial="centre", clips=2),))
    training = open_or_make("features/train", model, read_manifest("train.csv"), config)

A cache is a folder: `features.npy` [rows, views, clips, t, n, D], `labels.npy` and `ids.npy` (the
manifest's rows) beside it, and in `config.json` what it was made of. It is there when all of it is,
and is mapped into memory, so that it may be larger than that. Bfloat16, which NumPy's format does
not know, is stored as uint16 of the same bits.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from einops import rearrange
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from jvjepa.adapters import weights_sha256
from jvjepa.config import EncoderConfig, ModelConfig
from jvjepa.errors import ConfigError, InputError, TrainingError
from jvjepa.records import CONFIG_FILE, FEATURES_FORMAT
from jvjepa.storage import check_free, new_folder
from jvjepa.train.data import Batch, evaluation_batches
from jvjepa.train.frozen_features import (
    DTYPES,
    FeatureConfig,
    check_frames,
    encode,
)
from jvjepa.train.manifest import NO_LABEL, DataError, Manifest, count_labels, few
from jvjepa.weights import Model

FEATURES_FILE = "features.npy"
LABELS_FILE = "labels.npy"
IDS_FILE = "ids.npy"

_NAMED = 5  # differences that an error names
_PATIENCE = 30 * 24 * 3600  # seconds; should process 0 end, JAX ends the others at once


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """An open cache.

    Args:
        values: float [rows, views, clips, t, n, D], mapped into memory. t are tubelets (1 where
            clips are pooled); n are the tokens of one, of each layer, or their means.
        labels: int32 [rows]; -1 where the manifest has none.
        ids: int32 [rows], ascending, which rows of the manifest these are; those whose file could
            not be read are missing.
        config: which features.
        encoder: the architecture of the encoder.
        source: where the list of videos was from; messages begin with it.
        classes: names of the labels; empty where nobody knows them.
        bad: why files could not be read, by path.
        made_of: digests and options, as JSON knows them: all that decides what the values are.
    """

    values: NDArray[Any]
    labels: NDArray[np.int32]
    ids: NDArray[np.int32]
    config: FeatureConfig
    encoder: EncoderConfig
    source: str
    classes: tuple[str, ...]
    bad: Mapping[str, str]
    made_of: Mapping[str, Any]

    def __len__(self) -> int:
        """How many videos there are features of."""
        return len(self.ids)


def open_or_make(
    folder: str | Path,
    model: Model,
    manifest: Manifest,
    config: FeatureConfig,
    *,
    batch_size: int = 8,
    workers: int = 0,
    max_bad: float = 0.01,
    console: Console | None = None,
) -> Features:
    """Opens the cache if there is one, and else makes it; see `make_features`.

    Of several processes all have to call it, with a folder that all see: process 0 makes the cache,
    and the others wait for it.

    Raises:
        DataError: the cache is damaged, or was made of something else; the message says of what.
        TrainingError: another process has died.
    """
    wanted = None
    if jax.process_index() == 0 and not os.path.lexists(folder):
        options = {"batch_size": batch_size, "workers": workers, "max_bad": max_bad}
        make_features(folder, model, manifest, config, **options, console=console)
    else:  # hashing the weights takes time: here, while process 0 encodes
        wanted = _flat(_made_of(model, manifest, config))
    _wait_for_all("features")
    features = open_features(folder)
    if wanted is None:  # they were made of it just now
        return features
    found = _flat(features.made_of)
    keys = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    if keys:
        named = [f"{key} = {found.get(key)}, not {wanted.get(key)}" for key in keys[:_NAMED]]
        more = f"; and {len(keys) - _NAMED} more differences" if len(keys) > _NAMED else ""
        raise DataError(
            f"{folder}: holds the features of something else: {'; '.join(named)}{more}; "
            "choose another folder, or remove this one"
        )
    return features


def _wait_for_all(name: str) -> None:
    """Waits until all processes are here, on the host: a collective may give up after 30 s."""
    try:
        ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=1000 * _PATIENCE)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise TrainingError(
            f"another process of the run has died ({reason}); start all again"
        ) from error


def make_features(
    folder: str | Path,
    model: Model,
    manifest: Manifest,
    config: FeatureConfig,
    *,
    batch_size: int = 8,
    workers: int = 0,
    max_bad: float = 0.01,
    force: bool = False,
    console: Console | None = None,
) -> None:
    """Encodes all videos of a manifest; the folder appears whole or not at all.

    Args:
        folder: to make; it must not exist unless `force`.
        model: its encoder is what makes the features; other parts are not looked at.
        manifest: the videos.
        config: which features.
        batch_size: videos that are encoded together, with all clips of a view.
        workers: processes that read ahead for each view, as in `jvjepa.train.data.batches`.
        max_bad: the share of videos that may be unreadable; they are left out.
        force: replace the folder.
        console: where to show progress; None shows nothing.

    Raises:
        InputError: the folder exists, or clips or layers do not fit the encoder.
        DataError: too many files cannot be read, or features are not finite in the dtype.
    """
    folder = Path(folder)
    check_free(folder, FEATURES_FILE, force=force)
    if batch_size < 1:
        raise InputError(f"batch_size = {batch_size}; it must be 1 or more")
    check_frames(model.encoder.config, config)
    rows, clip = min(batch_size, len(manifest)), config.clip
    compute = functools.partial(encode, model.encoder, jax.device_put(model.params["encoder"]))
    frames = (clip.clips, clip.num_frames, clip.crop_size, clip.crop_size, 3)
    one = jax.eval_shape(lambda: compute(config, jnp.zeros(frames, jnp.uint8)))
    shape = (len(config.views), *one.shape)
    made_of = _made_of(model, manifest, config)
    ids: list[NDArray[np.int32]] = []
    with new_folder(folder, FEATURES_FILE, force=force) as work, ExitStack() as stack:
        options = {"batch_size": rows * clip.clips, "workers": workers, "max_bad": max_bad}
        loaders = [
            stack.enter_context(evaluation_batches(manifest, view, **options))
            for view in config.views
        ]
        file = stack.enter_context(open(work / FEATURES_FILE, "wb"))
        _write_header(file, DTYPES[config.dtype], (len(manifest), *shape))
        steps = math.ceil(len(manifest) / rows)
        batches = (_next(loaders) for _ in range(steps))
        hidden = console is None
        for views in track(
            batches, "encoding", steps, console=console, transient=True, disable=hidden
        ):
            encoded = [compute(config, jnp.asarray(view.video)) for view in views]
            values = np.stack([np.asarray(view) for view in encoded], axis=1)
            values = rearrange(values, "(r c) v ... -> r v c ...", c=clip.clips)
            found = np.stack([view.ids.reshape(rows, clip.clips) for view in views])
            read = (found >= 0).all(axis=(0, 2))
            values, good = values[read], found[0, read, 0]
            _check_finite(manifest, values, good, config.dtype)
            file.write(values.reshape(-1).view(np.uint8).data)
            ids.append(good)
        kept = np.concatenate(ids)
        file.seek(0)
        _write_header(file, DTYPES[config.dtype], (len(kept), *shape))  # as long as the first one
        file.flush()
        os.fsync(file.fileno())
        np.save(work / IDS_FILE, kept)
        np.save(work / LABELS_FILE, manifest.labels[kept])
        record = {
            "format": FEATURES_FORMAT,
            "made_of": made_of,
            "source": manifest.source,
            "classes": manifest.classes,
            "bad": {path: why for loader in loaders for path, why in loader.bad.items()},
            "shape": [len(kept), *shape],
        }
        (work / CONFIG_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def open_features(folder: str | Path) -> Features:
    """Opens a cache; reads none of its features.

    Args:
        folder: what `make_features` made.

    Returns:
        The features.

    Raises:
        DataError: the folder is no cache, or a damaged one.
    """
    folder = Path(folder)
    path = folder / CONFIG_FILE
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path} does not exist; {folder} holds no features") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    if not isinstance(record, dict) or record.get("format") != FEATURES_FORMAT:
        raise DataError(f"{path} is not of format {FEATURES_FORMAT!r}")
    try:
        made_of, shape = record["made_of"], tuple(record["shape"])
        config = FeatureConfig.from_json(made_of["config"])
        encoder = ModelConfig.from_json({"encoder": made_of["architecture"]}).encoder
        named = {"source": record["source"], "bad": record["bad"]}
        classes = tuple(record["classes"])
    except (ConfigError, KeyError, TypeError) as error:
        raise DataError(f"{path}: {error!r}") from None
    dtype = DTYPES[config.dtype]
    return Features(
        values=_load(folder / FEATURES_FILE, _on_disk(dtype), shape).view(dtype),
        labels=np.array(_load(folder / LABELS_FILE, np.dtype(np.int32), shape[:1])),
        ids=np.array(_load(folder / IDS_FILE, np.dtype(np.int32), shape[:1])),
        config=config,
        encoder=encoder,
        classes=classes,
        made_of=made_of,
        **named,
    )


def count_classes(features: Features) -> int:
    """Counts the classes that there are to learn.

    Args:
        features: to train on.

    Returns:
        How many; their labels are 0 to one less, and each has a video.

    Raises:
        DataError: a video has no label, or labels are left out.
    """
    _check_labelled(features)
    unread = f" ({len(features.bad)} files could not be read)" if features.bad else ""
    count = count_labels(features.source, features.labels, features.ids, unread)
    if features.classes and len(features.classes) != count:
        raise DataError(
            f"{features.source}: has {len(features.classes)} classes, but no row of "
            f"{few(features.classes[count:])}{unread}"
        )
    return count


def check_classes(features: Features, classes: int) -> None:
    """Raises DataError unless every video has a label, 0 to classes - 1."""
    _check_labelled(features)
    beyond = features.labels >= classes
    if beyond.any():
        raise DataError(
            f"{features.source}: rows {few(features.ids[beyond])} have the labels "
            f"{few(features.labels[beyond])}; the training set has 0 to {classes - 1}"
        )


def check_kind(features: Features, config: FeatureConfig, encoder: str) -> None:
    """Raises InputError unless features fit a probe.

    Args:
        features: to use it on.
        config: of the features that it was trained on; views may differ, and the dtype on disk.
        encoder: `weights_sha256` of the encoder that made them.
    """
    pairs = [("encoder", features.made_of["encoder"], encoder)]
    for name in ("stream", "pool", "layers"):
        pairs.append((name, getattr(features.config, name), getattr(config, name)))
    for name, found, right in pairs:
        if found != right:
            raise InputError(
                f"{features.source}: its features have {name} = {found}; those that the probe is "
                f"trained on have {right}"
            )


def _check_labelled(features: Features) -> None:
    without = features.ids[features.labels == NO_LABEL]
    if len(without):
        raise DataError(
            f"{features.source}: rows {few(without)} have no label; a probe needs one of each"
        )


# What a cache is made of


def _made_of(model: Model, manifest: Manifest, config: FeatureConfig) -> dict[str, Any]:
    record = {
        "encoder": weights_sha256(model.params["encoder"]),
        "architecture": dataclasses.asdict(model.encoder.config),
        "computed_in": np.dtype(model.encoder.dtype).name,
        "config": dataclasses.asdict(config),
        "manifest": manifest.digest,
        "file_sizes": _sizes(manifest),
    }
    return json.loads(json.dumps(record))  # as it will be read again: tuples become lists


def _sizes(manifest: Manifest) -> str:
    """Sha256 of the files' sizes, most of which change when a file is replaced."""
    sizes = [os.path.getsize(path) if os.path.isfile(path) else None for path in manifest.paths]
    return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()


def _flat(record: Any, name: str = "") -> dict[str, Any]:
    """The leaves of a JSON value by their path."""
    if not isinstance(record, dict | list):
        return {name: record}
    items = record.items() if isinstance(record, dict) else enumerate(record)
    leaves = (_flat(value, f"{name}.{key}" if name else str(key)) for key, value in items)
    return {key: leaf for part in leaves for key, leaf in part.items()}


def _next(loaders: list[Iterator[Batch]]) -> list[Batch]:
    """The same clips of all views."""
    return [next(loader) for loader in loaders]


def _check_finite(
    manifest: Manifest, values: NDArray[Any], ids: NDArray[np.int32], dtype: str
) -> None:
    finite = np.isfinite(values).reshape(len(ids), -1).all(axis=1)
    if not finite.all():
        row = int(ids[finite.argmin()])
        raise DataError(
            f"{manifest.source}: the features of row {row}, {manifest.paths[row]}, are not finite "
            f"in {dtype}"
        )


# Files


def _on_disk(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.uint16) if dtype == DTYPES["bfloat16"] else dtype


def _write_header(file: BinaryIO, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """Writes the header of a .npy file, with room for any number of rows."""
    descr = np.lib.format.dtype_to_descr(_on_disk(dtype))
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _load(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> NDArray[Any]:
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is missing or damaged: {error}") from None
    if array.dtype != dtype or array.shape != shape:
        raise DataError(
            f"{path} is {array.dtype} {list(array.shape)}; {CONFIG_FILE} beside it says {dtype} "
            f"{list(shape)}"
        )
    return array
