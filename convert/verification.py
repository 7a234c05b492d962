"""Proof that a converted checkpoint means the same as the PyTorch original."""

import contextlib
import dataclasses
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import safe_open

from jvjepa import weights as our_weights
from jvjepa.area import AreaOptions
from jvjepa.config import ModelConfig
from jvjepa.convert import hub
from jvjepa.convert.architecture import Hints
from jvjepa.convert.comparison import (
    PartCheck,
    Size,
    compare_anticipation,
    compare_anticipator,
    compare_classifier,
    compare_parts,
    relative_error,
)
from jvjepa.convert.exporting import read_piece
from jvjepa.convert.huggingface import hf_entries
from jvjepa.convert.meta import MetaWeights, meta_entries, open_parts
from jvjepa.convert.opening import Original, open_original
from jvjepa.convert.source import Weights
from jvjepa.convert.tables import Entry, expected_shapes
from jvjepa.convert.torchfile import open_torch
from jvjepa.errors import InputError
from jvjepa.storage import open_safetensors
from jvjepa.weights import Source, check_names

if TYPE_CHECKING:
    import torch

    from jvjepa.convert.official import Official
    from jvjepa.convert.oracle import Oracle


def verify(
    model: str | Path,
    source: str,
    *,
    revision: str | None = None,
    probe: str | Path | None = None,
    frames: int = 4,
    clips: int = 2,
    seed: int = 0,
) -> list[PartCheck]:
    """Compares a converted checkpoint with the original, run by PyTorch in float32.

    Every weight must be the source's, rounded to our dtype, bit by bit. The outputs of every part
    on random input must agree; for a bfloat16 checkpoint with the original that has its weights
    rounded to bfloat16, so that the same tolerance holds.

    The original runs in transformers, which has V-JEPA 2. V-JEPA 2.1, 2-AC and Meta's probes run in
    `jvjepa.convert.official`, a port of Meta's code to which its tests hold Meta's own outputs. The
    checks say which it was. With a probe that anticipates actions and a `.pt` source, the port also
    runs all parts one after the other.

    Args:
        model: the converted checkpoint.
        source: what it was converted from: a folder, a `.pt` file, a released checkpoint's name, or
            a hub id.
        revision: the hub's branch, tag or commit.
        probe: the probe that was attached to it, if one was.
        frames: frames of a clip, a multiple of the tubelet size.
        clips: clips, at least 1.
        seed: of the random input.

    Returns:
        One check for each comparison.

    Raises:
        InputError: one of them cannot be read, they are not of the same architecture, or torch and
            transformers are not installed.
    """
    model = Path(model)
    config, record = our_weights.read_record(model)
    tubelet = config.encoder.tubelet_size
    if frames < tubelet or frames % tubelet:
        raise InputError(f"frames = {frames}; it must be a multiple of {tubelet}")
    if clips < 1:
        raise InputError(f"clips = {clips}; it must be at least 1")
    attached = record.probe if record else None
    if attached and not attached.keys:
        raise InputError(f"{model} has a probe of {attached.name}, which has no PyTorch original")
    if attached and probe is None:
        raise InputError(f"{model} has the probe of {attached.name}; give it with --probe")
    if probe is not None and not attached:
        raise InputError(f"{model} was made without a probe, and there is nothing to compare")
    _require_torch()
    part = next(iter(attached.keys)) if attached else None  # classifier or anticipator
    inner = dataclasses.replace(config, **{part: None}) if part else config
    rng = np.random.default_rng(seed)
    path = model / our_weights.WEIGHTS_FILE
    with contextlib.ExitStack() as stack:
        original = stack.enter_context(_open(source, revision, inner, record))
        is_hf = original.hf_config is not None
        wanted = (hf_entries if is_hf else meta_entries)(inner)
        where = f"{original.path}, for {model}"
        check_names(where, original.weights.shapes, expected_shapes(wanted))
        file = stack.enter_context(open_safetensors(path))
        dtype = our_weights.check_stored(path, file, config)
        checks = list(_check_weights(file, original.weights, wanted, dtype))
        # The originals have full attention in all layers.
        full = AreaOptions(layers=(0, 0))
        loaded = our_weights.load(model, dtype="float32", areas=full)
        oracle = _oracle(original, inner, dtype.name)
        size = Size(clips=clips, frames=frames, rounded=dtype.name == "bfloat16")
        checks += compare_parts(loaded, inner, oracle, size, rng)
        if attached:
            theirs = stack.enter_context(_open_probe(Path(probe), attached))
            wanted = [entry for entry in meta_entries(config) if entry.part == part]
            check_names(f"{probe}, for {model}", theirs.shapes, expected_shapes(wanted))
            checks += _check_weights(file, theirs, wanted, dtype)
            weights = {part: theirs.part(part)} | ({} if is_hf else _parts(original.weights))
            port = _official(config, weights, dtype.name)
            compare = compare_classifier if part == "classifier" else compare_anticipator
            checks.append(compare(loaded, port, size, rng))
            if part == "anticipator" and not is_hf:
                checks.append(compare_anticipation(loaded, port, size, rng))
    return checks


def _require_torch() -> None:
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise InputError(f"verify needs {name}: pip install 'jvjepa[torch]' brings it")


def _open(
    source: str, revision: str | None, config: ModelConfig, record: Source | None
) -> contextlib.AbstractContextManager[Original]:
    """Opens the source as it was opened to convert it."""
    if not hub.is_torch_file(Path(source)):
        return open_original(source, revision=revision, key=None, hints=Hints())
    predictor = config.predictor or config.action_predictor
    hints = Hints(
        heads=config.encoder.num_heads,
        predictor_heads=predictor.num_heads if predictor else None,
        crop_size=config.crop_size,
    )
    key = record.keys.get("encoder") if record else None
    return open_original(source, revision=revision, key=key, hints=hints)


@contextlib.contextmanager
def _open_probe(path: Path, attached: Source) -> Iterator[MetaWeights]:
    ((part, key),) = attached.keys.items()
    index = int(key.removeprefix("classifiers[").removesuffix("]"))
    with open_torch(path) as file:
        yield open_parts(file, {part: ("classifiers", index)})


def _oracle(original: Original, config: ModelConfig, rounding: str) -> "Oracle | Official":
    from jvjepa.convert.oracle import Oracle

    if not isinstance(original.weights, MetaWeights):
        classifies = config.classifier is not None
        return Oracle.from_folder(original.path, classifier=classifies, rounding=rounding)
    weights = _parts(original.weights)
    if config.encoder.rope == "tiled" and config.predictor is not None:
        return Oracle.from_meta(config, **weights, rounding=rounding)
    return _official(config, weights, rounding)


def _parts(weights: MetaWeights) -> "dict[str, dict[str, torch.Tensor]]":
    return {part: weights.part(part) for part in weights.parts}


def _official(
    config: ModelConfig, weights: "dict[str, dict[str, torch.Tensor]]", rounding: str
) -> "Official":
    from jvjepa.convert.official import Official

    return Official(config, weights, rounding=rounding)


def _check_weights(
    file: safe_open, theirs: Weights | MetaWeights, wanted: list[Entry], dtype: np.dtype
) -> Iterator[PartCheck]:
    """Compares every tensor with theirs, brought into our layout and rounded to our dtype."""
    parts: dict[str, list[Entry]] = {}
    for entry in wanted:
        parts.setdefault(entry.part, []).append(entry)
    for part, members in parts.items():
        errors: dict[str, float] = {}
        for entry in members:
            right = np.ascontiguousarray(entry.take(theirs.read(entry.theirs)).astype(dtype))
            ours = np.ascontiguousarray(read_piece(file, entry))
            if ours.tobytes() != right.tobytes():
                # A zero of the other sign is a difference too.
                errors[entry.theirs] = max(relative_error(ours, right), 2.0**-1074)
        count = len({entry.theirs for entry in members})
        detail = f"{count} tensors, bit by bit in {dtype}"
        if errors:
            names = sorted(errors, key=lambda name: -errors[name])
            detail += f"; {len(names)} differ: {', '.join(names[:3])}"
            detail += ", .." if len(names) > 3 else ""
        error = float(np.max([0.0, *errors.values()]))
        yield PartCheck(name=f"{part}, weights", error=error, tolerance=0.0, detail=detail)
