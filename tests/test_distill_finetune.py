"""Distillation and fine-tuning: their losses, and what of a model they train."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from models import random_params, tiny_config

from jvjepa import Encoder
from jvjepa.config import ModelConfig
from jvjepa.errors import ConfigError
from jvjepa.parameters import parameter_shapes, unstack_layers
from jvjepa.train.data import Batch, ClipConfig, normalise
from jvjepa.train.distill import SIZES, DistillConfig, distill_task, student, student_config
from jvjepa.train.feeding import DataConfig
from jvjepa.train.finetune import FinetuneConfig, finetune_task, finetuned, with_classifier
from jvjepa.train.loop import begin, make_step
from jvjepa.train.manifest import DataError, Manifest
from jvjepa.train.optimizer import OptimizerConfig, ParameterGroup, freeze_first
from jvjepa.train.regression import RegressionConfig, regression_loss
from jvjepa.weights import Model, load, save

CLIP = ClipConfig(num_frames=4, crop_size=32)
DATA = DataConfig(clip=CLIP, batch_size=2)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, schedule="constant", weight_decay=0.1)


def manifest(labels: tuple[int, ...] = (0, 2, 1, 2), **changes: Any) -> Manifest:
    count = len(labels)
    columns = {"starts": np.zeros(count), "ends": np.full(count, np.inf)}
    paths = tuple(f"/nowhere/{i}.mp4" for i in range(count))
    named = {"source": "list.csv", "paths": paths, "labels": np.array(labels, np.int32)}
    return Manifest(**{**named, **columns, **changes})


def model(**sizes: int) -> Model:
    config = tiny_config(**{"head_width": 24, "num_layers": 2, "crop_size": 32, **sizes})
    params = {"encoder": random_params(Encoder(config))}
    return Model(
        config=ModelConfig(encoder=config), encoder=Encoder(config), params=params, source=None
    )


def batch() -> Batch:
    video = np.random.default_rng(0).integers(0, 256, (2, 4, 32, 32, 3)).astype(np.uint8)
    return Batch(video, np.array([2, 0], np.int32), np.array([0, 1], np.int32))


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 1])
def test_the_student_learns_what_the_teacher_gives(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"hidden_size": 24, "num_layers": 1, "num_heads": 1, "mlp_dim": 48}
    monkeypatch.setitem(SIZES, "vit-tiny", small)
    teacher, weights = model(), RegressionConfig(token=0.5, cosine=0.3)
    config = DistillConfig(
        size="vit-tiny", window=window, optimizer=OPTIMIZER, data=DATA, loss=weights
    )
    task = distill_task(teacher, config, manifest(), steps=10)
    step, state, losses = jax.jit(make_step(task)), begin(task), []
    for _ in range(10):
        state, metrics = step(state, task.frozen, batch(), jax.random.key(0))
        losses.append(float(metrics["loss"]))
    video = normalise(jnp.asarray(batch().video))
    target = teacher.encoder.apply({"params": teacher.params["encoder"]}, video)
    begun = Encoder(student_config(teacher.config.encoder, config))
    tokens = begun.apply({"params": task.trained["encoder"]}, video, window=window)
    kernel, bias = (task.trained["projection"][name] for name in ("kernel", "bias"))
    expected, _ = regression_loss(weights, tokens @ kernel + bias[None, None], target, 2)
    assert losses[0] == pytest.approx(float(expected), rel=1e-5)
    assert losses[-1] < 0.9 * losses[0]
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), state.trained, task.trained)
    assert all(jax.tree.leaves(changed))


def test_a_student_is_a_model(tmp_path: Path) -> None:
    teacher, config = model(), DistillConfig(optimizer=OPTIMIZER, data=DATA)
    task = distill_task(teacher, config, manifest(), steps=1)
    small = student(teacher, config, begin(task))
    assert small.config.encoder.hidden_size == 384
    shapes = {name: x.shape for name, x in flatten_dict(small.params, sep="/").items()}
    assert shapes == parameter_shapes(small.config)
    save(tmp_path / "small", small)
    again = load(tmp_path / "small")
    jax.tree.map(np.testing.assert_array_equal, again.params, small.params)
    assert again.source.name == "distilled from ?"


def test_students_of_a_2_1_teacher_are_plain_encoders() -> None:
    config = dataclasses.replace(
        tiny_config(crop_size=32, num_layers=2),
        rope="interleaved",
        image_tokenizer=True,
        levels=(0, 1),
        area_layers=(0, 1),
    )
    small = student_config(config, DistillConfig(data=DATA))
    assert (small.rope, small.levels, small.image_tokenizer, small.has_areas) == (
        *("interleaved", (), False),
        False,
    )


def logits_of(some: Model, params: Any) -> np.ndarray:
    video = normalise(jnp.asarray(batch().video))
    tokens = some.encoder.apply({"params": params["encoder"]}, video)
    return np.asarray(some.classifier.apply({"params": params["classifier"]}, tokens), np.float64)


@pytest.mark.parametrize("smoothing", [0.0, pytest.param(0.2, marks=pytest.mark.slow)])
def test_fine_tuning_has_the_loss_of_a_classifier(smoothing: float) -> None:
    config = FinetuneConfig(
        optimizer=OPTIMIZER, data=DATA, num_layers=1, num_heads=2, smoothing=smoothing
    )
    begun = with_classifier(model(), config, manifest(), seed=0)
    assert begun.config.classifier.labels == ("0", "1", "2")
    task = finetune_task(begun, config, manifest(), steps=5)
    state, metrics = jax.jit(make_step(task))(begin(task), task.frozen, batch(), jax.random.key(0))
    scores = logits_of(begun, begun.params)
    logs = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    target = np.eye(3)[batch().labels] * (1 - smoothing) + smoothing / 3
    assert float(metrics["loss"]) == pytest.approx(-(target * logs).sum(1).mean(), rel=1e-5)
    assert float(metrics["accuracy"]) == (scores.argmax(1) == batch().labels).mean()
    assert task.frozen == {}
    after = finetuned(begun, task, state)
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), after.params, begun.params)
    assert all(jax.tree.leaves(changed))


def test_frozen_blocks_stay_and_cost_no_memory() -> None:
    groups = (freeze_first(0.5, 2), ParameterGroup(pattern=".*"))
    optimizer = dataclasses.replace(OPTIMIZER, groups=groups)
    config = FinetuneConfig(optimizer=optimizer, data=DATA, num_layers=1, num_heads=2)
    apart = model()
    apart = dataclasses.replace(
        apart,
        encoder=Encoder(apart.config.encoder, scan=False),
        params=unstack_layers(apart.params),
    )
    begun = with_classifier(apart, config, manifest(), seed=0)
    task = finetune_task(begun, config, manifest(), steps=5)
    assert {name.split("/")[1] for name in flatten_dict(task.frozen, sep="/")} == {
        "patch_embed",
        "blocks_0",
    }
    moments = sum(x.size for x in jax.tree.leaves(begin(task).optimizer) if x.ndim)
    assert moments == 2 * sum(x.size for x in jax.tree.leaves(task.trained))
    state, metrics = jax.jit(make_step(task))(begin(task), task.frozen, batch(), jax.random.key(0))
    after = finetuned(begun, task, state).params["encoder"]
    same = jax.tree.map(lambda a, b: bool(np.all(a == b)), after, begun.params["encoder"])
    assert all(jax.tree.leaves([same["patch_embed"], same["blocks_0"]]))
    assert not any(jax.tree.leaves([same["blocks_1"], same["norm"]]))
    assert metrics["loss"] > 0


def test_what_cannot_be_tuned() -> None:
    config = FinetuneConfig(optimizer=OPTIMIZER, data=DATA, num_layers=1, num_heads=2)
    begun = with_classifier(model(), config, manifest(), seed=0)
    with pytest.raises(ConfigError, match="no classifier; give it one with with_classifier"):
        finetune_task(model(), config, manifest(), steps=1)
    with pytest.raises(DataError, match=r"list.csv: has no labels"):
        with_classifier(model(), config, manifest((-1, -1)), seed=0)
    with pytest.raises(DataError, match=r"other.csv: has label 7; the classifier has 3"):
        finetune_task(begun, config, manifest(), manifest((0, 7), source="other.csv"), steps=1)
    frozen = dataclasses.replace(
        OPTIMIZER, groups=(ParameterGroup(pattern=".*", learning_rate=0.0),)
    )
    still = dataclasses.replace(config, optimizer=frozen)
    with pytest.raises(ConfigError, match="all parameters are frozen"):
        finetune_task(begun, still, manifest(), steps=1)
    for values, message in (
        ({"smoothing": 1.0}, "smoothing = 1.0; it must be 0 to below 1"),
        ({"dtype": "float16"}, "dtype = 'float16'; it must be one of"),
    ):
        with pytest.raises(ConfigError, match=message):
            FinetuneConfig(**values)
    for values, message in (
        ({"size": "vit-huge"}, "size = 'vit-huge'; it must be one of"),
        ({"window": 0}, "window = 0; it must be None, or 1 tubelet or more"),
        ({"dtype": "float16"}, "dtype = 'float16'; it must be one of"),
    ):
        with pytest.raises(ConfigError, match=message):
            DistillConfig(**values)
