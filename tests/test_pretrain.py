import dataclasses
import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from models import relative_error
from PIL import Image

from jvjepa.area import AreaOptions
from jvjepa.config import EncoderConfig, ModelConfig, PredictorConfig
from jvjepa.encoder import forward_flops
from jvjepa.errors import CheckpointError, ConfigError, InputError
from jvjepa.masks import MaskConfig, Masks, sample
from jvjepa.parameters import parameter_shapes
from jvjepa.train.data import ClipConfig, normalise
from jvjepa.train.feeding import DataConfig
from jvjepa.train.initialisation import init_params
from jvjepa.train.loop import LoopConfig, begin, make_step, train
from jvjepa.train.manifest import Manifest, read_manifest
from jvjepa.train.optimizer import OptimizerConfig
from jvjepa.train.predictive import Masking, PredictiveLoss
from jvjepa.train.pretrain import (
    Clips,
    PretrainConfig,
    make_branches,
    make_follow,
    make_loss,
    pretrain_task,
    pretrained,
)
from jvjepa.train.synthetic import SyntheticConfig, write_videos
from jvjepa.train.task import Task
from jvjepa.typing import Array, Params

TOLERANCE = 1e-5
SIZES = {"hidden_size": 24, "num_layers": 2, "num_heads": 2, "mlp_dim": 40, "patch_size": 8}
SMALL = {"hidden_size": 12, "num_layers": 1, "num_heads": 2, "mlp_dim": 24}
V2 = ModelConfig(encoder=EncoderConfig(**SIZES, crop_size=48), predictor=PredictorConfig(**SMALL))
V2_1 = ModelConfig(
    encoder=EncoderConfig(
        **SIZES, crop_size=48, rope="interleaved", image_tokenizer=True, levels=(0, 1)
    ),
    predictor=PredictorConfig(
        **SMALL,
        num_mask_tokens=3,
        rope="interleaved",
        num_levels=2,
        context_projection=True,
        modality_embeddings=True,
    ),
)
AREAS = ModelConfig(
    encoder=AreaOptions(layers=(0, 1), temporal_splits=1).of(V2.encoder), predictor=V2.predictor
)
BLOCKS = MaskConfig(num_blocks=2, spatial_scale=(0.15, 0.3))
BLOCK = MaskConfig(num_blocks=1, spatial_scale=(0.4, 0.6))
CLIP = ClipConfig(num_frames=4, fps=8, crop_size=48)
CONFIG = PretrainConfig(
    optimizer=OptimizerConfig(learning_rate=2e-3, schedule="constant"),
    data=DataConfig(clip=CLIP, batch_size=2),
    video_masks=(BLOCKS,),
    image_masks=(BLOCKS,),
    context_ramp=(10, 20),
    momentum=0.9,
)
WITH_IMAGES = dataclasses.replace(
    CONFIG,
    images=DataConfig(clip=dataclasses.replace(CLIP, num_frames=1), batch_size=3),
    image_share=0.3,
    image_context_weight=0.2,
)
NOWHERE = Manifest(
    source="nowhere",
    paths=("a.mp4",) * 8,
    starts=np.zeros(8),
    ends=np.full(8, np.inf),
    labels=np.full(8, -1, np.int32),
)
STEP = jnp.asarray(16, jnp.int32)  # the ramp is at 0.6
# Compiling takes nearly all of the time here, and half of that optimises machine code.
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def random_params(config: ModelConfig, seed: int) -> Params:
    """Of the size that trained ones have, none of them zero."""
    rng = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> Array:
        scale = shape[-2] ** -0.5 if name.endswith("kernel") else 0.3
        value = scale * rng.normal(size=shape) + name.endswith("scale")
        return jnp.asarray(value, jnp.float32)

    shapes = parameter_shapes(config)
    return unflatten_dict({name: draw(name, shapes[name]) for name in shapes}, sep="/")


def frames(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), np.uint8)


def branch_of(model: ModelConfig, grid: tuple[int, int, int], **options: Any) -> PredictiveLoss:
    """Of clips on a grid that need not be square, with masks of which none is cut."""
    branch, _ = make_branches(model, CONFIG)
    size = int(np.prod(grid))
    masks = tuple(Masking(mask, size - 1, size - 2) for mask in (BLOCKS, BLOCK))
    return dataclasses.replace(branch, **{"grid": grid, "masks": masks, **options})


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


# --- The teacher ---------------------------------------------------------------------------------


@pytest.mark.parametrize("final", [None, 1.0])
def test_the_teacher_is_an_average(final: float | None) -> None:
    """All parameters, with the momentum of Meta's generator, which counts from 0."""
    steps = 6
    optimizer = dataclasses.replace(CONFIG.optimizer, stretch=1.5)
    config = dataclasses.replace(
        CONFIG,
        optimizer=optimizer,
        momentum=0.99925 if final is None else 0.6,
        final_momentum=final,
    )
    follow = jax.jit(make_follow(config, steps))
    students = [random_params(V2_1, seed) for seed in range(1, steps + 3)]
    teacher = {"encoder": random_params(V2_1, 0)["encoder"]}
    first = {
        name: np.array(leaf, np.float64) for name, leaf in flatten_dict(teacher, sep="/").items()
    }
    expected = dict(first)
    for step, student in enumerate(students):
        momentum = config.momentum
        if final is not None:
            momentum = min(0.6 + step * (1.0 - 0.6) / 9, 1.0)
        teacher = follow(teacher, student, jnp.asarray(step, jnp.int32))
        flat = flatten_dict(student, sep="/")
        for name in expected:
            expected[name] = momentum * expected[name] + (1 - momentum) * np.asarray(flat[name])
    assert set(teacher) == {"encoder"}
    found = flatten_dict(teacher, sep="/")
    assert found.keys() == expected.keys()
    for name, leaf in found.items():
        assert leaf.dtype == jnp.float32
        assert relative_error(leaf, expected[name]) <= 1e-6, name
        moved = relative_error(leaf - first[name], expected[name] - first[name])
        assert moved <= 1e-4, name  # of a small difference of float32
        assert not np.array_equal(leaf, first[name]), name


# --- The task ------------------------------------------------------------------------------------


def task_of(model: ModelConfig = V2_1, config: PretrainConfig = CONFIG, **options: Any) -> Task:
    images = None if config.images is None else NOWHERE
    return pretrain_task(model, config, NOWHERE, images, steps=100, **options)


def plain_task(model: ModelConfig = V2_1, config: PretrainConfig = CONFIG) -> Task:
    """With parameters that are there at once."""
    return task_of(model, config, params=random_params(model, 0))


def test_a_task_begins_with_drawn_parameters() -> None:
    task = task_of(V2_1, seed=3)
    expected = init_params(V2_1, jax.random.key(3))
    chex.assert_trees_all_equal(task.trained, expected)
    chex.assert_trees_all_equal(task.carried, {"encoder": expected["encoder"]})
    assert not np.any(task.trained["predictor"]["mask_tokens"])


def test_a_cooldown_begins_with_those_of_a_checkpoint() -> None:
    student, teacher = random_params(V2_1, 0), random_params(V2_1, 1)["encoder"]
    half = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.bfloat16), student)
    task = task_of(params=half, teacher=teacher)
    rounded = jax.tree.map(lambda leaf: leaf.astype(np.float32), half)
    chex.assert_trees_all_equal(task.trained, rounded)
    chex.assert_trees_all_equal(task.carried["encoder"], teacher)
    assert {leaf.dtype for leaf in jax.tree.leaves(task.trained)} == {jnp.dtype("float32")}
    chex.assert_trees_all_equal(task_of(params=student).carried["encoder"], student["encoder"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "config", "accumulate"),
    [
        (V2, dataclasses.replace(CONFIG, video_masks=(BLOCKS, BLOCK)), 1),
        (V2_1, WITH_IMAGES, 2),
        (AREAS, dataclasses.replace(CONFIG, remat="block"), 1),
    ],
    ids=["2", "2.1", "areas"],
)
def test_the_loop_lowers_the_loss(
    model: ModelConfig, config: PretrainConfig, accumulate: int
) -> None:
    task = task_of(model, dataclasses.replace(config, context_ramp=None))
    image = None if config.images is None else frames(2, 1, 48, 48)
    batch = Clips(frames(2, 4, 48, 48), image)
    step, state = quick(make_step(task, accumulate)), begin(task)
    values = []
    for _ in range(25):
        state, metrics = step(state, {}, batch, jax.random.key(1))
        values.append(float(metrics["loss"]))
    assert np.isfinite(values).all()
    assert np.mean(values[-3:]) < 0.95 * np.mean(values[:3])
    assert float(metrics["spread"]) > 0.1
    student, teacher = state.trained["encoder"], state.carried["encoder"]
    assert relative_error(teacher["patch_embed"]["kernel"], student["patch_embed"]["kernel"]) > 1e-3


def test_what_a_run_leaves_is_the_teacher() -> None:
    student, teacher = random_params(V2_1, 0), random_params(V2_1, 1)["encoder"]
    model = pretrained(V2_1, begin(task_of(params=student, teacher=teacher)))
    assert model.config == V2_1
    expected = {"encoder": teacher, "predictor": student["predictor"]}
    chex.assert_trees_all_equal(model.params, expected)
    flat = flatten_dict(model.params, sep="/")
    assert {name: leaf.shape for name, leaf in flat.items()} == parameter_shapes(V2_1)


def test_flops_are_those_of_the_passes() -> None:
    task = plain_task(V2)
    branch, _ = make_branches(V2, CONFIG)
    total = forward_flops(V2.encoder, 72, 72)
    for _, context, targets in branch.masks:
        both = context + targets
        layer = 2 * both * (4 * 12 * 12 + 2 * 12 * 24) + 4 * both * both * 12
        predictor = layer + 2 * context * 24 * 12 + 2 * targets * 12 * 24
        total += 3 * (forward_flops(V2.encoder, context, context) + predictor)
    assert task.flops == total
    mixed, (video, image) = plain_task(V2_1, WITH_IMAGES), make_branches(V2_1, WITH_IMAGES)
    assert image is not None
    assert mixed.flops == video.flops + 1.5 * image.flops
    context, targets = image.masks[0][1:]
    embed = context * (48 * 24 + 24 * 12)  # two layers
    projected = (context + targets) * 12 * 48
    both = context + targets
    layer = both * (4 * 12 * 12 + 2 * 12 * 24) + 2 * both * both * 12
    expected = 3 * (forward_flops(V2_1.encoder, context, context) + 2 * (embed + projected + layer))
    assert image.flops == expected + forward_flops(V2_1.encoder, 36, 36)


def test_the_record_tells_runs_apart() -> None:
    record = plain_task().record
    other = dataclasses.replace
    for task in (
        plain_task(V2),
        plain_task(config=other(CONFIG, momentum=0.95)),
        plain_task(config=other(CONFIG, video_masks=(BLOCKS, BLOCKS))),
        plain_task(config=other(CONFIG, optimizer=OptimizerConfig(learning_rate=1.0))),
        plain_task(config=other(CONFIG, data=DataConfig(clip=CLIP, batch_size=4))),
        plain_task(config=WITH_IMAGES),
    ):
        assert task.record != record
    assert plain_task(config=other(CONFIG, remat="block")).record == record


# --- Files ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("videos") / "set"
    write_videos(folder, 8, SyntheticConfig(num_frames=12, height=64, width=80), seed=0)
    return read_manifest(folder / "manifest.csv")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("pictures")
    names = [f"{i}.{kind}" for i, kind in enumerate(("jpg", "png", "jpg", "png"))]
    for i, name in enumerate(names):
        Image.fromarray(frames(60, 70 + i, seed=i)).save(folder / name)
    (folder / "list.csv").write_text("path\n" + "\n".join(names))
    return read_manifest(folder / "list.csv")


@pytest.mark.parametrize("kind", ["frames of videos", "pictures"])
def test_batches_of_clips_and_images(manifest: Manifest, pictures: Manifest, kind: str) -> None:
    images = pictures if kind == "pictures" else manifest
    task = pretrain_task(V2_1, WITH_IMAGES, manifest, images, steps=100)
    with task.feed(0, 0, 1) as batches:
        first, second = itertools.islice(batches, 2)
    assert isinstance(first, Clips)
    for part, shape in zip(first, [(2, 4, 48, 48, 3), (3, 1, 48, 48, 3)], strict=True):
        assert part.shape == shape
        assert part.dtype == np.uint8
        assert part.std() > 5
    with task.feed(1, 0, 1) as batches:
        chex.assert_trees_all_equal(next(batches), second)
    assert not np.array_equal(first.video, second.video)
    with pretrain_task(V2, CONFIG, manifest, steps=100).feed(0, 1, 2) as batches:
        share = next(batches)
    assert share.image is None
    assert np.array_equal(share.video, first.video[1:])


@pytest.mark.slow
def test_a_run_from_files(manifest: Manifest, tmp_path: Path) -> None:
    images = DataConfig(clip=dataclasses.replace(CLIP, num_frames=1), batch_size=2)
    config = dataclasses.replace(WITH_IMAGES, images=images)
    task = pretrain_task(V2_1, config, manifest, manifest, steps=2)
    state = train(task, LoopConfig(steps=2), tmp_path / "run")
    assert int(state.step) == 2
    before = task.trained["encoder"]["patch_embed_image"]["kernel"]
    after = state.trained["encoder"]["patch_embed_image"]["kernel"]
    assert relative_error(after, before) > 1e-3
    assert 0 < relative_error(state.carried["encoder"]["patch_embed_image"]["kernel"], before)


# --- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_share": 1.0}, "PretrainConfig.image_share = 1.0; it must be a number above 0 and"),
        ({"video_masks": ()}, r"video_masks = \(\); it must be a tuple of one or more MaskConfig"),
        ({"image_masks": [BLOCK]}, "image_masks = "),
        ({"mask_quantile": 1.5}, "mask_quantile = 1.5; it must be a share, 0 to 1"),
        ({"mask_index": -1}, "mask_index = -1; it must be a whole number, 0 or more"),
        ({"context_weight": -1.0}, "context_weight = -1.0"),
        ({"image_context_weight": float("nan")}, "image_context_weight = nan"),
        ({"context_ramp": (20, 10)}, r"context_ramp = \(20, 10\); it must be None or two steps"),
        ({"context_ramp": (10,)}, "context_ramp = "),
        ({"momentum": 1.1}, "momentum = 1.1; it must be a share, 0 to 1"),
        ({"final_momentum": 0.5}, "final_momentum = 0.5; it must be None, or 0.9 to 1"),
        ({"dtype": "float16"}, r"dtype = 'float16'; it must be one of \['float32', 'bfloat16'\]"),
    ],
)
def test_configs_that_cannot_be_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CONFIG, **values)


def replaced(model: ModelConfig, **predictor: Any) -> ModelConfig:
    return dataclasses.replace(model, predictor=dataclasses.replace(model.predictor, **predictor))


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (ModelConfig(encoder=V2.encoder), CONFIG, "ModelConfig.predictor = None"),
        (replaced(V2_1, num_levels=1), CONFIG, "num_levels = 1; it must be the encoder's, 2"),
        (replaced(V2, output_dim=96), CONFIG, "output_dim = 96; the targets have 24 channels"),
        (V2_1, dataclasses.replace(CONFIG, mask_index=3), "mask_index = 3; it must be below the"),
        (
            V2_1,
            dataclasses.replace(CONFIG, images=CONFIG.data),
            "ClipConfig.num_frames = 4 of images; it must be 1",
        ),
        (
            V2_1,
            dataclasses.replace(CONFIG, data=WITH_IMAGES.images),
            "ClipConfig.num_frames = 1 of clips; it must be a multiple of a tubelet",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    model: ModelConfig, config: PretrainConfig, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        task_of(model, config)


def test_data_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="images = None; pictures need both a manifest and a"):
        pretrain_task(V2_1, WITH_IMAGES, NOWHERE, steps=100)
    with pytest.raises(ConfigError, match=r"PretrainConfig.images = None; pictures need both"):
        pretrain_task(V2_1, CONFIG, NOWHERE, NOWHERE, steps=100)
    for clip, message in (
        ({"num_frames": 5}, "T = 5 frames; take 1, or a multiple of 2: 4 or 6"),
        ({"crop_size": 50}, "H = 50; take a multiple of 8: 48 or 56"),
    ):
        data = DataConfig(clip=dataclasses.replace(CLIP, **clip))
        with pytest.raises(InputError, match=message):
            task_of(config=dataclasses.replace(CONFIG, data=data))
    full = MaskConfig(num_blocks=8, spatial_scale=(1.0, 1.0))
    with pytest.raises(ConfigError, match="leaves no context on the grid"):
        task_of(config=dataclasses.replace(CONFIG, video_masks=(full,)))


def test_parameters_that_do_not_fit_are_refused() -> None:
    params = random_params(V2_1, 0)
    with pytest.raises(CheckpointError, match=r"params: .* missing predictor/proj_context"):
        task_of(params=random_params(V2, 0))
    with pytest.raises(CheckpointError, match=r"params: .* missing predictor/embed"):
        task_of(params={"encoder": params["encoder"]})
    with pytest.raises(CheckpointError, match=r"teacher: .* missing encoder/norms"):
        task_of(params=params, teacher=random_params(V2, 0)["encoder"])
