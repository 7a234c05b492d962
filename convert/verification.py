"""Proof that a converted checkpoint means the same as the PyTorch original."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jvjepa import weights as our_weights
from jvjepa.config import ModelConfig
from jvjepa.convert import hub
from jvjepa.convert.exporting import read_piece
from jvjepa.convert.huggingface import Entry, entries
from jvjepa.convert.source import Weights, open_weights, read_config
from jvjepa.encoder import Encoder
from jvjepa.errors import InputError
from jvjepa.storage import open_safetensors
from jvjepa.typing import Array

if TYPE_CHECKING:
    from jvjepa.convert.oracle import Oracle

TOLERANCE = 1e-4  # relative, for whole models in float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartCheck:
    """How far one part is from the original.

    Args:
        name: the part.
        error: largest difference over the largest value of the original.
        tolerance: the error that is still good.
        detail: what was compared, and where the error is.
    """

    name: str
    error: float
    tolerance: float
    detail: str

    @property
    def ok(self) -> bool:
        """Whether the error is within the tolerance; a NaN is not."""
        return self.error <= self.tolerance


def verify(
    model: str | Path,
    source: str,
    *,
    revision: str | None = None,
    frames: int = 4,
    clips: int = 2,
    seed: int = 0,
) -> list[PartCheck]:
    """Compares a converted checkpoint with the original, run by transformers in float32.

    Every weight must be the source's, rounded to our dtype, bit by bit. The encoder's outputs on
    random clips must agree; for a bfloat16 checkpoint with the original that has its weights
    rounded to bfloat16, so that the same tolerance holds.

    Args:
        model: the converted checkpoint.
        source: what it was converted from: a folder, a released checkpoint's name, or a hub id.
        revision: the hub's branch, tag or commit.
        frames: frames of a clip, a multiple of the tubelet size.
        clips: clips, at least 1.
        seed: of the random clips.

    Returns:
        One check for each part.

    Raises:
        InputError: one of the two cannot be read, they are not of the same architecture, or torch
            and transformers are not installed.
    """
    model, found = Path(model), hub.resolve(source, revision)
    config, _ = our_weights.read_record(model)
    tubelet = config.encoder.tubelet_size
    if frames < tubelet or frames % tubelet:
        raise InputError(f"frames = {frames}; it must be a multiple of {tubelet}")
    if clips < 1:
        raise InputError(f"clips = {clips}; it must be at least 1")
    oracle_class = _oracle_class()
    _, hf_config = read_config(found.folder)
    with open_weights(found.folder) as weights:
        expected = {entry.hf: entry.hf_shape for entry in entries(config)}
        our_weights.check_names(f"{found.folder}, for {model}", weights.shapes, expected)
        stored, checks = _check_weights(model, config, weights)
    oracle = oracle_class(
        found.folder, classifier=hf_config.classifier is not None, rounding=stored
    )
    clip = (clips, frames, config.crop_size, config.crop_size, 3)
    return [*_check_encoder(model, oracle, clip, stored, np.random.default_rng(seed)), *checks]


def _oracle_class() -> type["Oracle"]:
    try:
        from jvjepa.convert.oracle import Oracle
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers"):
            raise
        raise InputError(
            f"verify needs {error.name}: pip install 'jvjepa[torch]' brings it"
        ) from None
    return Oracle


def _check_encoder(
    model: Path,
    oracle: "Oracle",
    clip: tuple[int, ...],
    stored: str,
    rng: np.random.Generator,
) -> Iterator[PartCheck]:
    """Compares the encoder's outputs; positions are by the config's grid, as in their code."""
    loaded = our_weights.load(model, dtype="float32")
    config = dataclasses.replace(loaded.config.encoder, rope_grid="config")
    encoder: Encoder = loaded.encoder.clone(config=config)
    params = {"params": loaded.params["encoder"]}
    how = "float32"
    if stored == "bfloat16":
        how += ", the original's weights rounded to bfloat16 as ours are"

    def ours(video: NDArray[Any], keep: NDArray[Any] | None = None) -> Array:
        with jax.default_matmul_precision("float32"):
            ids = None if keep is None else jnp.asarray(keep)
            return jax.jit(encoder.apply)(params, jnp.asarray(video), ids)

    def random(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape, dtype=np.float32)

    check = functools.partial(PartCheck, tolerance=TOLERANCE)
    clips, frames, height, width, _ = clip
    video = random(*clip)
    error = relative_error(ours(video), oracle.tokens(video))
    yield check(name="encoder", error=error, detail=f"{_size(video)}, {how}")

    single = random(clips, 1, height, width, 3)
    error = relative_error(ours(single), oracle.tokens(single))
    yield check(name="encoder, one frame", error=error, detail=f"{_size(single)}, {how}")

    wide = random(clips, frames, height, width + config.patch_size, 3)
    error = relative_error(ours(wide), oracle.tokens(wide))
    yield check(
        name="encoder, another grid",
        error=error,
        detail=f"{_size(wide)}, rope_grid='config' as in their code, {how}",
    )

    num_tokens = frames // config.tubelet_size * config.config_grid**2
    ids = rng.permuted(np.tile(np.arange(num_tokens, dtype=np.int32), (clips, 1)), axis=1)
    keep = ids[:, : max(1, num_tokens // 3)]
    error = relative_error(ours(video, keep), oracle.masked(video, keep))
    seen = f"{keep.shape[1]} of {num_tokens} tokens"
    yield check(name="encoder, masked", error=error, detail=f"{_size(video)}, {seen}, {how}")

    with jax.default_matmul_precision("float32"):
        layers = jax.jit(functools.partial(encoder.apply, method="layers"))
        outputs = layers(params, jnp.asarray(video)).layers
    errors = list(map(relative_error, outputs, oracle.layers(video)))
    worst = int(np.argmax(errors))  # the first NaN, if there is one
    where = f"worst after layer {worst} of {config.num_layers}" if worst else "worst in the patches"
    yield check(name="encoder, layers", error=errors[worst], detail=f"{where}, {how}")


def _check_weights(
    model: Path, config: ModelConfig, weights: Weights
) -> tuple[str, list[PartCheck]]:
    """Compares every tensor, taken back to their layout, with theirs rounded to our dtype."""
    parts: dict[str, list[Entry]] = {}
    for entry in entries(config):
        parts.setdefault(entry.part, []).append(entry)
    checks = []
    path = model / our_weights.WEIGHTS_FILE
    with open_safetensors(path) as file:
        dtype = our_weights.check_stored(path, file, config)
        for part, members in parts.items():
            errors: dict[str, float] = {}
            for entry in members:
                theirs = weights.read(entry.hf).astype(dtype)
                ours = np.ascontiguousarray(read_piece(file, entry, config))
                if ours.tobytes() != theirs.tobytes():
                    # A zero of the other sign is a difference too.
                    errors[entry.hf] = max(relative_error(ours, theirs), 2.0**-1074)
            detail = f"{len(members)} tensors, bit by bit in {dtype}"
            if part != "encoder":
                detail = f"weights compared; no module yet; {detail}"
            if errors:
                names = sorted(errors, key=lambda name: -errors[name])
                detail += f"; {len(names)} differ: {', '.join(names[:3])}"
                detail += ", .." if len(names) > 3 else ""
            error = float(np.max([0.0, *errors.values()]))
            name = "encoder, weights" if part == "encoder" else part
            checks.append(PartCheck(name=name, error=error, tolerance=0.0, detail=detail))
    return dtype.name, checks


def relative_error(value: Any, reference: Any) -> float:
    """Largest difference over the largest value of the reference; NaN if either has one.

    Args:
        value: an array.
        reference: an array of the same shape.

    Returns:
        The error, computed in float64.
    """
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    if value.shape != reference.shape:
        raise InputError(f"the shapes {value.shape} and {reference.shape} cannot be compared")
    scale = np.max(np.abs(reference))
    difference = np.max(np.abs(value - reference))
    return float(difference / scale) if scale > 0 else float(difference)


def _size(video: NDArray[Any]) -> str:
    clips, frames, height, width, _ = video.shape
    return f"{clips} x {frames} frames of {height} x {width}"
