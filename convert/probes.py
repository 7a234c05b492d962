"""Attaching an attentive probe, which Meta releases without an encoder, to a converted encoder."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from jvjepa.config import ModelConfig
from jvjepa.convert.architecture import infer_anticipator, infer_probe
from jvjepa.convert.conversion import Report, read_pieces
from jvjepa.convert.labels import ActionLabels
from jvjepa.convert.meta import MetaWeights, meta_entries, open_parts, probe_parts
from jvjepa.convert.tables import Entry, expected_shapes
from jvjepa.convert.torchfile import TorchFile, open_torch
from jvjepa.errors import CheckpointError, ConfigError, InputError
from jvjepa.parameters import count_parameters, parameter_shapes
from jvjepa.storage import check_apart, check_free, new_folder, open_safetensors
from jvjepa.version import __version__
from jvjepa.weights import (
    WEIGHTS_FILE,
    Source,
    check_names,
    check_stored,
    made_here,
    read_record,
    write_checkpoint,
)


def attach_probe(
    probe: str | Path,
    encoder: str | Path,
    out: str | Path,
    *,
    labels: tuple[str, ...] | ActionLabels,
    index: int | None = None,
    heads: int | None = None,
    layers: tuple[int, ...] | None = None,
    frames: int | None = None,
    force: bool = False,
) -> Report:
    """Makes a checkpoint of a converted encoder and a probe of Meta's.

    Args:
        probe: the probe's `.pt` file.
        encoder: a converted checkpoint without a classifier, and with a predictor for a probe that
            anticipates actions; its weights and dtype are kept.
        out: the folder to make.
        labels: names of the probe's classes, in the order of its logits; `ActionLabels` for one
            that anticipates verbs, nouns and actions.
        index: which of the classifiers in the file; None is right where there is one.
        heads: attention heads of the pooler; None means Meta's 16.
        layers: of a classifier, see `ClassifierConfig.layers`; None means what the released probe
            of that file name takes, else the last layer alone.
        frames: frames of the clips that the probe was trained on; None means those of the released
            probe of that file name, else as many as the encoder, and 32 for anticipation.
        force: replace `out`.

    Returns:
        What was written.

    Raises:
        InputError: one of the two cannot be read, they do not fit together, or `out` exists.
    """
    probe, encoder, out = Path(probe), Path(encoder), Path(out)
    check_apart(out, encoder, probe)
    check_free(out, WEIGHTS_FILE, force=force)
    config, source = read_record(encoder)
    if config.classifier is not None or config.anticipator is not None:
        raise InputError(f"{encoder} has a classifier already; attach the probe to an encoder")
    with open_torch(probe) as file, open_safetensors(encoder / WEIGHTS_FILE) as stored:
        dtype = check_stored(encoder / WEIGHTS_FILE, stored, config)
        parts = probe_parts(file, _index(file, index))
        (part,) = parts
        weights = open_parts(file, parts)
        if part == "anticipator":
            labels = _action_labels(probe, labels, layers)
            if config.predictor is None:
                raise InputError(f"{encoder} has no predictor, without which {probe} sees nothing")
            head: Any = infer_anticipator(probe, weights.shapes, labels, heads=heads, frames=frames)
        elif isinstance(labels, ActionLabels):
            raise InputError(f"{probe} is a classifier; its labels are names, not verbs and nouns")
        else:
            how = {"heads": heads, "layers": layers, "frames": frames}
            head = infer_probe(probe, weights.shapes, labels, **how)
        try:
            config = dataclasses.replace(config, **{part: head})
        except ConfigError as error:
            raise CheckpointError(f"{probe} does not fit {encoder}: {error}") from None
        wanted = [entry for entry in meta_entries(config) if entry.part == part]
        check_names(f"{probe}, for {encoder}", weights.shapes, expected_shapes(wanted))
        record = Source(
            name=str(probe),
            revision="",
            sha256=weights.sha256(),
            converter=__version__,
            keys=weights.parts,
        )
        source = dataclasses.replace(source or made_here(encoder), probe=record)
        pieces = _pieces(stored, config, weights, wanted, dtype)
        with new_folder(out, WEIGHTS_FILE, force=force) as work:
            write_checkpoint(work, config, source, dtype, pieces)
    return Report.of(out, dtype, count_parameters(config), source)


def _action_labels(
    probe: Path, labels: tuple[str, ...] | ActionLabels, layers: tuple[int, ...] | None
) -> ActionLabels:
    if layers is not None:
        raise InputError(f"{probe} anticipates actions; --probe-layers is for classifiers")
    return labels if isinstance(labels, ActionLabels) else ActionLabels(actions=labels)


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
    """Our tensors, copied row by row, and at their place those of the probe."""
    attached = False
    probed = {entry.ours for entry in wanted}
    for name, shape in parameter_shapes(config).items():
        if name not in probed:
            rows = stored.get_slice(name)
            for i in range(shape[0]):
                yield name, rows[i : i + 1]
        elif not attached:
            attached = True
            yield from read_pieces(weights, wanted, dtype)
