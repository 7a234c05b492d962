"""The outputs of a converted model beside those of the original, on random input."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jvjepa.anticipation import Anticipation, anticipate
from jvjepa.config import ModelConfig
from jvjepa.encoder import Encoder
from jvjepa.errors import InputError
from jvjepa.weights import Model

if TYPE_CHECKING:
    from jvjepa.convert.official import Official
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """How large the random input is, and how the weights are stored.

    Args:
        clips: clips of a batch.
        frames: frames of a clip.
        rounded: whether the original's weights were rounded to bfloat16, as ours are.
    """

    clips: int
    frames: int
    rounded: bool

    @property
    def how(self) -> str:
        """What is said of every comparison."""
        rounded = ", the original's weights rounded to bfloat16 as ours are"
        return f"float32{rounded if self.rounded else ''}"


def compare_parts(
    model: Model,
    config: ModelConfig,
    oracle: "Oracle | Official",
    size: Size,
    rng: np.random.Generator,
) -> Iterator[PartCheck]:
    """Compares every part of a model with the original's.

    Args:
        model: ours, to compute in float32.
        config: which parts to compare.
        oracle: the original.
        size: of the input.
        rng: makes the input.

    Yields:
        One check for each comparison.
    """
    yield from _compare_encoder(model, oracle, size, rng)
    if config.predictor is not None:
        yield from _compare_predictor(model, oracle, size, rng)
    if config.classifier is not None:
        yield compare_classifier(model, oracle, size, rng)
    if config.action_predictor is not None:
        yield _compare_action_predictor(model, oracle, size, rng)


def _compare_encoder(
    model: Model, oracle: "Oracle | Official", size: Size, rng: np.random.Generator
) -> Iterator[PartCheck]:
    config = dataclasses.replace(model.config.encoder, rope_grid=oracle.rope_grid)
    encoder: Encoder = model.encoder.clone(config=config)
    params = model.params["encoder"]
    run = functools.partial(_run, encoder.apply, params)
    check = functools.partial(_check, oracle, size)
    side, patch = config.crop_size, config.patch_size

    def random(frames: int, width: int) -> NDArray[np.float32]:
        return _normal(rng, size.clips, frames, side, width, 3)

    video = random(size.frames, side)
    yield check("encoder", run(video), oracle.tokens(video), _size(video))

    single = random(1, side)
    yield check("encoder, one frame", run(single), oracle.tokens(single), _size(single))

    wide = random(size.frames, side + patch)
    detail = _size(wide)
    if oracle.rope_grid == "config":
        detail += ", rope_grid='config' as in their code"
    yield check("encoder, another grid", run(wide), oracle.tokens(wide), detail)

    num_tokens = size.frames // config.tubelet_size * config.config_grid**2
    keep = _ids(rng, size.clips, num_tokens)[:, : max(1, num_tokens // 3)]
    seen = f"{_size(video)}, {keep.shape[1]} of {num_tokens} tokens"
    yield check("encoder, masked", run(video, keep), oracle.masked(video, keep), seen)

    outputs = _run(functools.partial(encoder.apply, method="layers"), params, video).layers
    errors = list(map(relative_error, outputs, oracle.layers(video)))
    worst = int(np.argmax(errors))  # the first NaN, if there is one
    where = f"worst after layer {worst} of {config.num_layers}" if worst else "worst in the patches"
    yield PartCheck(
        name="encoder, layers",
        error=errors[worst],
        tolerance=TOLERANCE,
        detail=f"{where}, {size.how}, against {oracle.name}",
    )
    if config.levels:
        levels = _run(functools.partial(encoder.apply, method="levels"), params, video)
        detail = f"{_size(video)}, after layers {list(config.levels)}"
        yield check("encoder, levels", levels, oracle.levels(video), detail)


def _compare_predictor(
    model: Model, oracle: "Oracle | Official", size: Size, rng: np.random.Generator
) -> Iterator[PartCheck]:
    encoder, config = model.config.encoder, model.config.predictor
    predictor = model.predictor.clone(
        config=dataclasses.replace(config, rope_grid=oracle.rope_grid)
    )
    grid = (size.frames // encoder.tubelet_size, encoder.config_grid, encoder.config_grid)
    num_tokens = int(np.prod(grid))
    tokens = _normal(rng, size.clips, num_tokens, config.num_levels * encoder.hidden_size)
    ids = _ids(rng, size.clips, num_tokens)
    context_ids, target_ids = np.split(ids, [max(1, num_tokens // 3)], axis=1)
    context = np.take_along_axis(tokens, context_ids[..., None], axis=1)
    detail = f"{context_ids.shape[1]} of {num_tokens} tokens seen, the others predicted"
    params, args = model.params["predictor"], (context, context_ids, target_ids)
    check = functools.partial(_check, oracle, size)
    if not config.modality_embeddings:
        apply = functools.partial(predictor.apply, grid=grid, mask_index=1)
        ours = _run(apply, params, *args)
        theirs = oracle.predict(tokens, context_ids, target_ids)
        yield check("predictor", ours.targets, theirs, detail)
        return
    for modality in ("video", "image"):
        how = {"grid": grid, "mask_index": 1, "modality": modality}
        ours = _run(functools.partial(predictor.apply, **how), params, *args)
        targets, seen = oracle.predict(*args, **how)
        name = f"predictor, {modality}"
        yield check(name, ours.targets, targets, detail)
        if config.context_projection:
            yield check(f"{name}, seen tokens", ours.context, seen, detail)


def compare_classifier(
    model: Model, oracle: "Oracle | Official", size: Size, rng: np.random.Generator
) -> PartCheck:
    """Compares pooler and classifier on random tokens.

    Args:
        model: as in `compare_parts`.
        oracle: as in `compare_parts`.
        size: as in `compare_parts`.
        rng: as in `compare_parts`.

    Returns:
        The check.
    """
    encoder = model.config.encoder
    count = size.frames // encoder.tubelet_size * encoder.config_grid**2
    tokens = _normal(rng, size.clips, count, encoder.hidden_size)
    ours = _run(model.classifier.apply, model.params["classifier"], tokens)
    detail = f"{size.clips} x {count} tokens, {ours.shape[1]} classes"
    return _check(oracle, size, "classifier", ours, oracle.classify(tokens), detail)


def compare_anticipator(
    model: Model, oracle: "Official", size: Size, rng: np.random.Generator
) -> PartCheck:
    """Compares pooler and classifiers of an anticipator on random tokens.

    Args:
        model: as in `compare_parts`.
        oracle: as in `compare_parts`.
        size: as in `compare_parts`.
        rng: as in `compare_parts`.

    Returns:
        The check, of the logits of all classifiers together.
    """
    encoder, config = model.config.encoder, model.config.anticipator
    count = (size.frames // encoder.tubelet_size + 1) * encoder.config_grid**2
    tokens = _normal(rng, size.clips, count, encoder.hidden_size)
    found = _run(model.anticipator.apply, model.params["anticipator"], tokens)
    classes = ", ".join(f"{len(getattr(config, kind))} {kind}" for kind in config.heads)
    detail = f"{size.clips} x {count} tokens, {classes}"
    logits = _all_logits(found, oracle.action_logits(tokens))
    return _check(oracle, size, "anticipator", *logits, detail)


def compare_anticipation(
    model: Model, oracle: "Official", size: Size, rng: np.random.Generator
) -> PartCheck:
    """Compares the whole way from a clip to the actions after it: encoder, predictor, anticipator.

    Args:
        model: as in `compare_parts`.
        oracle: the original of all three.
        size: as in `compare_parts`.
        rng: as in `compare_parts`.

    Returns:
        The check, of the logits of all classifiers together.
    """
    side = model.config.crop_size
    video = _normal(rng, size.clips, size.frames, side, side, 3)
    seconds = np.linspace(1.0, 1.75, size.clips)
    with jax.default_matmul_precision("float32"):
        parts = (model.encoder, model.predictor, model.anticipator)
        found = anticipate(*parts, model.params, jnp.asarray(video), seconds)
    detail = f"{_size(video)}, {seconds[0]:g} to {seconds[-1]:g} s ahead"
    logits = _all_logits(found, oracle.anticipate(video, seconds))
    return _check(oracle, size, "anticipation", *logits, detail)


def _all_logits(
    found: Anticipation, theirs: dict[str, NDArray[np.float32]]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Ours and theirs, the kinds of classes one after the other."""
    ours = [np.asarray(getattr(found, kind)) for kind in theirs]
    return np.concatenate(ours, axis=1), np.concatenate([*theirs.values()], axis=1)


def _compare_action_predictor(
    model: Model, oracle: "Oracle | Official", size: Size, rng: np.random.Generator
) -> PartCheck:
    side, width = model.config.encoder.config_grid, model.config.encoder.hidden_size
    steps, numbers = size.frames // 2, model.config.action_predictor.action_dim
    tokens = _normal(rng, size.clips, steps * side**2, width)
    actions, states = (_normal(rng, size.clips, steps, numbers) for _ in range(2))
    args, grid = (tokens, actions, states), (side, side)
    apply = functools.partial(model.action_predictor.apply, grid=grid)
    ours = _run(apply, model.params["action_predictor"], *args)
    theirs = oracle.next_tokens(*args, grid)
    return _check(oracle, size, "action predictor", ours, theirs, f"{steps} frames")


def _run(apply: Callable[..., Any], params: Any, *args: NDArray[Any]) -> Any:
    """Runs a module's `apply` under jit at float32's full precision."""
    with jax.default_matmul_precision("float32"):
        return jax.jit(apply)({"params": params}, *map(jnp.asarray, args))


def _check(
    oracle: "Oracle | Official", size: Size, name: str, ours: Any, theirs: Any, detail: str
) -> PartCheck:
    return PartCheck(
        name=name,
        error=relative_error(ours, theirs),
        tolerance=TOLERANCE,
        detail=f"{detail}, {size.how}, against {oracle.name}",
    )


def relative_error(value: Any, reference: Any) -> float:
    """Largest difference over the largest value of the reference; NaN if either has one.

    Args:
        value: an array.
        reference: an array of the same shape.

    Returns:
        The error, computed in float64.

    Raises:
        InputError: the shapes differ.
    """
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    if value.shape != reference.shape:
        raise InputError(f"the shapes {value.shape} and {reference.shape} cannot be compared")
    scale = np.max(np.abs(reference))
    difference = np.max(np.abs(value - reference))
    return float(difference / scale) if scale > 0 else float(difference)


def _normal(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return rng.standard_normal(shape, dtype=np.float32)


def _ids(rng: np.random.Generator, clips: int, count: int) -> NDArray[np.int32]:
    """All ids of each clip in an order of its own, [clips, count]."""
    return rng.permuted(np.tile(np.arange(count, dtype=np.int32), (clips, 1)), axis=1)


def _size(video: NDArray[Any]) -> str:
    clips, frames, height, width, _ = video.shape
    return f"{clips} x {frames} frames of {height} x {width}"
