import dataclasses
import itertools
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from models import relative_error
from PIL import Image
from pretraining import (
    AREAS,
    BLOCK,
    BLOCKS,
    CLIP,
    CONFIG,
    NOWHERE,
    V2,
    V2_1,
    WITH_IMAGES,
    frames,
    quick,
    random_params,
    task_of,
)

from jvjepa.config import ModelConfig
from jvjepa.encoder import forward_flops
from jvjepa.errors import CheckpointError, ConfigError, InputError
from jvjepa.masks import MaskConfig
from jvjepa.parameters import parameter_shapes
from jvjepa.train.feeding import DataConfig
from jvjepa.train.initialisation import init_params
from jvjepa.train.loop import LoopConfig, begin, make_step, train
from jvjepa.train.manifest import Manifest, read_manifest
from jvjepa.train.optimizer import OptimizerConfig
from jvjepa.train.pretrain import (
    Clips,
    PretrainConfig,
    make_branches,
    make_follow,
    pretrain_task,
    pretrained,
)
from jvjepa.train.synthetic import SyntheticConfig, write_videos
from jvjepa.train.task import Task

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
    config = dataclasses.replace(WITH_IMAGES, images=images, context_ramp=None)
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
        ({"dtype": "float16"}, r"dtype = 'float16'; it must be one of \('float32', 'bfloat16'\)"),
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
