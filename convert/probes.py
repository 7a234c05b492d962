"""Attaching an attentive probe, which Meta releases without an encoder, to a converted encoder."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from jvjepa.config import ModelConfig
from jvjepa.convert.architecture import infer_probe
from jvjepa.convert.conversion import Report, check_apart, read_pieces
from jvjepa.convert.meta import MetaWeights, meta_entries, open_parts
from jvjepa.convert.tables import Entry, expected_shapes
from jvjepa.convert.torchfile import TorchFile, open_torch
from jvjepa.errors import CheckpointError, ConfigError, InputError
from jvjepa.parameters import count_parameters, parameter_shapes
from jvjepa.storage import check_free, new_folder, open_safetensors
from jvjepa.version import __version__
from jvjepa.weights import (
    WEIGHTS_FILE,
    Source,
    check_names,
    check_stored,
    read_record,
    write_checkpoint,
)


def attach_probe(
    probe: str | Path,
    encoder: str | Path,
    out: str | Path,
    *,
    labels: tuple[str, ...],
    index: int | None = None,
    heads: int | None = None,
    layers: tuple[int, ...] | None = None,
    frames: int | None = None,
    force: bool = False,
) -> Report:
    """Makes a checkpoint of a converted encoder and a probe of Meta's.

    Args:
        probe: the probe's `.pt` file.
        encoder: a converted checkpoint without a classifier; its weights and dtype are kept.
        out: the folder to make.
        labels: names of the probe's classes, in the order of its logits.
        index: which of the classifiers in the file; None is right where there is one.
        heads: attention heads of the pooler; None means Meta's 16.
        layers: see `ClassifierConfig.layers`; None means what the released probe of that file name
            takes, else the last layer alone.
        frames: frames of the clips that the probe was trained on; None means those of the released
            probe of that file name, else as many as the encoder.
        force: replace `out`.

    Returns:
        What was written.

    Raises:
        InputError: one of the two cannot be read, they do not fit together, or `out` exists.
    """
    probe, encoder, out = Path(probe), Path(encoder), Path(out)
    check_free(out, force=force)
    check_apart(encoder, out)
    check_apart(probe, out)
    config, source = read_record(encoder)
    if config.classifier is not None:
        raise InputError(f"{encoder} has a classifier already; attach the probe to an encoder")
    with open_torch(probe) as file, open_safetensors(encoder / WEIGHTS_FILE) as stored:
        dtype = check_stored(encoder / WEIGHTS_FILE, stored, config)
        weights = open_parts(file, {"classifier": ("classifiers", _index(file, index))})
        classifier = infer_probe(
            probe, weights.shapes, labels, heads=heads, layers=layers, frames=frames
        )
        try:
            config = dataclasses.replace(config, classifier=classifier)
        except ConfigError as error:
            raise CheckpointError(f"{probe} does not fit {encoder}: {error}") from None
        wanted = [entry for entry in meta_entries(config) if entry.part == "classifier"]
        check_names(f"{probe}, for {encoder}", weights.shapes, expected_shapes(wanted))
        record = Source(
            name=str(probe),
            revision="",
            sha256=weights.sha256(),
            converter=__version__,
            keys=weights.parts,
        )
        source = dataclasses.replace(source, probe=record) if source else None
        pieces = _pieces(stored, config, weights, wanted, dtype)
        with new_folder(out, force=force) as work:
            write_checkpoint(work, config, source, dtype, pieces)
    return Report(
        out=out,
        dtype=dtype.name,
        parameters=count_parameters(config),
        num_bytes=(out / WEIGHTS_FILE).stat().st_size,
        source=source,
    )


def read_labels(path: str | Path) -> tuple[str, ...]:
    """Reads the names of classes.

    Args:
        path: a JSON list of names; a JSON object {"0": name, ..}, or one that has such an object
            under "id2label", as Hugging Face's config.json does; or a text with one name a line.

    Returns:
        The names, in the order of the logits.

    Raises:
        InputError: it is none of these.
    """
    text = Path(path).read_text(encoding="utf-8")
    if Path(path).suffix != ".json":
        names: Any = text.splitlines()
    else:
        try:
            names = json.loads(text)
        except ValueError as error:
            raise InputError(f"{path} is not JSON: {error}") from None
        if isinstance(names, dict):
            names = names.get("id2label", names)
        if isinstance(names, dict):
            if set(names) != {str(i) for i in range(len(names))}:
                raise InputError(f"{path}: the keys must be 0 to {len(names) - 1}, each once")
            names = [names[str(i)] for i in range(len(names))]
    if not isinstance(names, list) or not all(isinstance(x, str) and x.strip() for x in names):
        raise InputError(f"{path} must hold the names of the classes, none of them empty")
    return tuple(names)


def _index(file: TorchFile, asked: int | None) -> int:
    count = sum(name.startswith("classifiers[") for name in file.parts)
    if count == 0:
        raise CheckpointError(f"{file.path} has no classifiers, so it is no probe; it holds {file}")
    if asked is None and count > 1:
        raise InputError(
            f"{file.path} holds {count} classifiers, trained side by side; say which one with "
            f"--probe-index, 0 to {count - 1}"
        )
    if asked is not None and not 0 <= asked < count:
        raise InputError(f"probe-index = {asked}; {file.path} has 0 to {count - 1}")
    return asked or 0


def _pieces(
    stored: safe_open,
    config: ModelConfig,
    weights: MetaWeights,
    wanted: list[Entry],
    dtype: np.dtype,
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Our tensors, copied row by row, and at its place the classifier."""
    attached = False
    for name, shape in parameter_shapes(config).items():
        if not name.startswith("classifier/"):
            rows = stored.get_slice(name)
            for i in range(shape[0]):
                yield name, rows[i : i + 1]
        elif not attached:
            attached = True
            yield from read_pieces(weights, wanted, dtype)
