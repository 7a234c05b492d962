import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from models import relative_error
from pretraining import (
    AREAS,
    BLOCKS,
    STEP,
    TOLERANCE,
    V2,
    V2_1,
    WITH_IMAGES,
    branch_of,
    frames,
    quick,
    random_params,
    task_of,
)

from jvjepa.config import ModelConfig
from jvjepa.masks import Masks, sample
from jvjepa.train.data import normalise
from jvjepa.train.predictive import Masking, PredictiveLoss
from jvjepa.train.pretrain import (
    Clips,
    make_branches,
    make_loss,
)
from jvjepa.typing import Array, Params

# --- The loss, recomputed mask by mask without padding -------------------------------------------


def layer_norm(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)


def distances(context: np.ndarray, target: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
    """To the nearest target of each."""
    places = [np.stack(np.unravel_index(ids, grid), -1) for ids in (context, target)]
    return np.linalg.norm(places[0][:, None] - places[1][None], axis=-1).min(1)


def expected_losses(
    branch: PredictiveLoss, student: Params, teacher: Params, clips: np.ndarray, masks: list[Masks]
) -> tuple[float, float]:
    """Clip by clip, in float64 from what the modules give; means over tokens, then over masks."""
    encoder, predictor = branch.encoder, branch.predictor
    has_levels = bool(encoder.config.levels)

    def features(params: Params, video: Array, keep: Array | None) -> Array:
        how = {"method": "levels"} if has_levels else {}
        found = encoder.apply({"params": params}, video, keep, **how)
        return found if has_levels else found[None]

    @quick
    def predict(student: Params, video: Array, context: Array, target: Array) -> Any:
        levels = features(student["encoder"], video, context)
        tokens = jnp.concatenate(list(levels), axis=-1)
        return predictor.apply(
            {"params": student["predictor"]},
            *(tokens, context, target, branch.grid),
            mask_index=branch.mask_index,
            modality=branch.modality,
        )

    video = normalise(jnp.asarray(clips))
    levels = quick(functools.partial(features, keep=None))(teacher, video)
    targets = np.concatenate([layer_norm(level) for level in levels], axis=-1)
    predictions, contexts = [], []
    for mask in masks:
        errors: list[list[np.ndarray]] = [[], []]
        for b in range(len(clips)):
            context = np.asarray(mask.context_ids[b])[np.asarray(mask.context_valid[b])]
            target = np.asarray(mask.target_ids[b])[np.asarray(mask.target_valid[b])]
            assert sorted([*context, *target]) == list(range(int(np.prod(branch.grid))))
            out = predict(student, video[b : b + 1], context[None], target[None])
            errors[0].append(np.abs(np.asarray(out.targets[0]) - targets[b, target]).mean(-1))
            if out.context is not None:
                error = np.abs(np.asarray(out.context[0]) - targets[b, context]).mean(-1)
                near = np.sqrt(distances(context, target, branch.grid))
                errors[1].append(error / near if branch.distance_weighting else error)
        predictions.append(np.concatenate(errors[0]).mean())
        contexts.append(np.concatenate(errors[1]).mean() if errors[1] else np.nan)
    return float(np.mean(predictions)), float(np.mean(contexts))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("model", "grid", "batch", "how"),
    [
        (V2, (2, 5, 6), 1, {}),
        (V2_1, (2, 6, 5), 2, {}),
        (V2_1, (1, 5, 7), 1, {"modality": "image", "mask_index": 2}),
        pytest.param(V2, (1, 6, 7), 2, {"num_masks": 2}, marks=SLOW),
        pytest.param(V2_1, (3, 5, 4), 3, {"num_masks": 2, "mask_index": 1}, marks=SLOW),
        pytest.param(V2_1, (2, 4, 7), 2, {"distance_weighting": False}, marks=SLOW),
        pytest.param(V2, (2, 4, 6), 2, {"areas": True}, marks=SLOW),
    ],
)
def test_the_loss_is_that_of_masks_without_padding(
    model: ModelConfig, grid: tuple[int, int, int], batch: int, how: dict[str, Any]
) -> None:
    how = {"num_masks": 1, "areas": False, **how}
    num_masks, has_areas = how.pop("num_masks"), how.pop("areas")
    branch = branch_of(AREAS if has_areas else model, grid, **how)
    branch = dataclasses.replace(branch, masks=branch.masks[:num_masks])
    student, teacher = random_params(model, 0), random_params(model, 1)["encoder"]
    tubelet = 1 if branch.modality == "image" else 2
    clips = frames(batch, tubelet * grid[0], 8 * grid[1], 8 * grid[2])
    key = jax.random.key(5)
    masks = [
        quick(
            functools.partial(sample, num_context=kind[1], num_targets=kind[2]),
            static_argnums=(1, 2, 3),
        )(key, kind.config, grid, batch)
        for key, kind in zip(jax.random.split(key, num_masks), branch.masks, strict=True)
    ]
    prediction, context = expected_losses(branch, student, teacher, clips, masks)
    value, metrics = quick(branch)(student, teacher, clips, STEP, key)
    assert relative_error(metrics["prediction"], prediction) <= TOLERANCE
    if model is V2_1:
        assert relative_error(metrics["context"], context) <= TOLERANCE
        assert relative_error(value, prediction + 0.5 * 0.6 * context) <= TOLERANCE
    else:
        assert set(metrics) == {"prediction", "spread"}
        assert value == metrics["prediction"]


@pytest.mark.slow
def test_what_changes_the_loss_and_what_does_not() -> None:
    clips, student = frames(2, 4, 40, 48), random_params(V2_1, 0)
    teacher = random_params(V2_1, 1)["encoder"]

    def value(**options: Any) -> float:
        branch = branch_of(V2_1, (2, 5, 6), **options)
        return float(quick(branch)(student, teacher, clips, STEP, jax.random.key(3))[0])

    def sizes(num_context: int, num_targets: int) -> tuple[Masking, ...]:
        return (Masking(BLOCKS, num_context, num_targets),)

    base = value(masks=sizes(59, 58))
    assert relative_error(value(masks=sizes(60, 60)), base) <= TOLERANCE  # padding alone
    assert abs(value(masks=sizes(12, 12)) - base) > 1e-3 * base  # cut
    for options in ({"mask_index": 1}, {"distance_weighting": False}, {"context_ramp": (0, 17)}):
        assert abs(value(masks=sizes(59, 58), **options) - base) > 1e-3 * base, options
    branch = branch_of(V2_1, (2, 5, 6))
    half = {
        "encoder": branch.encoder.clone(dtype=jnp.bfloat16, remat="block"),
        "predictor": branch.predictor.clone(dtype=jnp.bfloat16),
    }
    rounded = value(masks=sizes(59, 58), **half)
    assert 0 < relative_error(rounded, base) < 0.02


# --- Images and clips, and gradients -------------------------------------------------------------


def test_images_and_clips_are_mixed() -> None:
    """With losses that are easily told apart."""
    video, image = make_branches(V2_1, WITH_IMAGES)
    assert image is not None
    assert (video.modality, image.modality) == ("video", "image")
    assert (video.grid, image.grid) == ((2, 6, 6), (1, 6, 6))
    assert (video.context_weight, image.context_weight) == (0.5, 0.2)
    given = []

    def stand_in(name: str) -> Callable[..., Any]:
        def loss(*args: Any) -> Any:
            given.append((name, *args[:4]))
            draw = jax.random.uniform(args[4])
            return 5 + draw, {"prediction": draw}

        return loss

    loss = make_loss(stand_in("video"), stand_in("image"), 0.3)
    args = ("student", {"encoder": "teacher"}, {}, Clips("clips", "images"), STEP)
    value, metrics = loss(*args, jax.random.key(0))
    draws = [float(metrics[name]) for name in ("prediction", "image/prediction")]
    assert draws[0] != draws[1]  # masks are drawn from keys of their own
    assert relative_error(value, 5 + 0.7 * draws[0] + 0.3 * draws[1]) <= 1e-6
    assert given == [
        ("video", "student", "teacher", "clips", STEP),
        ("image", "student", "teacher", "images", STEP),
    ]
    alone, metrics = make_loss(stand_in("video"), None, 0.3)(*args, jax.random.key(0))
    assert set(metrics) == {"prediction"}
    assert relative_error(alone, 5 + draws[0]) <= 1e-6


@functools.cache
def graded(with_images: bool) -> Callable[..., Any]:
    """Of student, teacher, batch and key: value, metrics, and gradients of the first two."""
    video, image = make_branches(V2_1, WITH_IMAGES)
    loss = make_loss(video, image if with_images else None, 0.3)

    def run(student: Params, teacher: Params, batch: Clips, key: Array) -> Any:
        return loss(student, teacher, {}, batch, STEP, key)

    return quick(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize("with_images", [False, pytest.param(True, marks=SLOW)])
def test_gradients_reach_the_student_alone(with_images: bool) -> None:
    student, teacher = random_params(V2_1, 0), {"encoder": random_params(V2_1, 1)["encoder"]}
    batch = Clips(frames(2, 4, 48, 48), frames(3, 1, 48, 48, seed=1) if with_images else None)
    args = (student, teacher, batch, jax.random.key(0))
    (value, metrics), (gradient, of_teacher) = graded(with_images)(*args)
    parts = {name: np.float64(leaf) for name, leaf in metrics.items()}
    expected = parts["prediction"] + 0.5 * 0.6 * parts["context"]
    if with_images:
        of_image = parts["image/prediction"] + 0.2 * 0.6 * parts["image/context"]
        expected = 0.3 * of_image + 0.7 * expected
    assert relative_error(value, expected) <= TOLERANCE
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_teacher))
    flat = flatten_dict(gradient, sep="/")
    idle = {name for name, leaf in flat.items() if not np.any(leaf)}
    of_images = {name for name in flat if "image" in name}
    assert len(of_images) == 4
    assert idle == (set() if with_images else of_images)
    tokens = np.any(np.asarray(flat["predictor/mask_tokens"]), axis=1)
    assert list(tokens) == [True, False, False]


def test_a_few_steps_lower_the_loss() -> None:
    task, batch = task_of(V2_1), Clips(frames(2, 4, 48, 48))
    student, teacher = task.trained, task.carried
    state = task.optimizer.transform.init(student)
    update, follow = quick(task.optimizer.transform.update), quick(task.follow)
    values = []
    for step in range(25):
        key = jax.random.fold_in(jax.random.key(1), step)
        (value, metrics), (gradient, _) = graded(False)(student, teacher, batch, key)
        change, state = update(gradient, state, student)
        student = jax.tree.map(jnp.add, student, change)
        teacher = follow(teacher, student, jnp.asarray(step, jnp.int32))
        values.append(float(value))
    assert np.isfinite(values).all()
    assert np.mean(values[-3:]) < 0.95 * np.mean(values[:3])
    assert float(metrics["spread"]) > 0.1
