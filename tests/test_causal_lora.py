import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import random_params, relative_error, tiny_config

from jvjepa import Encoder
from jvjepa.adapters import load_adapters, save_adapters
from jvjepa.config import ModelConfig
from jvjepa.errors import ConfigError
from jvjepa.lora import LoraConfig, join, merge_lora
from jvjepa.streaming import init_state, scan
from jvjepa.train.causal_lora import CausalLoraConfig, causal_lora_task, trained_adapters
from jvjepa.train.data import Batch, ClipConfig, normalise
from jvjepa.train.feeding import DataConfig
from jvjepa.train.loop import LoopConfig, begin, best_state, make_step, train
from jvjepa.train.manifest import Manifest, read_manifest
from jvjepa.train.metrics import read
from jvjepa.train.optimizer import OptimizerConfig
from jvjepa.train.regression import RegressionConfig, fidelity
from jvjepa.train.synthetic import SyntheticConfig, write_videos
from jvjepa.weights import Model

CLIP = ClipConfig(num_frames=8, fps=16.0, crop_size=32, flip=0.0)
OPTIMIZER = OptimizerConfig(learning_rate=3e-3, weight_decay=0.0, max_norm=1.0)


@pytest.fixture(scope="module")
def model() -> Model:
    config = tiny_config(head_width=32, crop_size=32, num_layers=2)
    encoder = Encoder(config)
    params = {"encoder": random_params(encoder)}
    return Model(config=ModelConfig(encoder=config), encoder=encoder, params=params, source=None)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("set") / "videos"
    sizes = SyntheticConfig(num_frames=10, height=32, width=48)
    return read_manifest(write_videos(folder, 8, sizes))


def config(**changes: Any) -> CausalLoraConfig:
    fields = {
        "lora": LoraConfig(rank=4),
        "optimizer": OPTIMIZER,
        "data": DataConfig(clip=CLIP, batch_size=4),
        "window": 3,
    }
    return CausalLoraConfig(**{**fields, **changes})


def batch(clips: int = 3, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    video = rng.integers(0, 256, (clips, 8, 32, 32, 3)).astype(np.uint8)
    return Batch(video, np.full(clips, -1, np.int32), np.arange(clips, dtype=np.int32))


def run(task: Any, batches: list[Batch]) -> tuple[Any, list[dict[str, Any]]]:
    step, state, seen = jax.jit(make_step(task)), begin(task), []
    for clips in batches:
        state, metrics = step(state, task.frozen, clips, jax.random.key(0))
        seen.append({name: float(x) for name, x in metrics.items()})
    return state, seen


def first_loss(task: Any, seed: int = 0) -> dict[str, float]:
    """The loss before any update, and the metrics; without gradients it compiles faster."""
    key = jax.random.key(seed)
    loss, metrics = jax.jit(task.loss)(task.trained, {}, task.frozen, batch(), jnp.int32(0), key)
    return {"loss": float(loss), **{name: float(x) for name, x in metrics.items()}}


def norm(x: np.ndarray) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5)


def expected(student: Any, teacher: Any, weights: RegressionConfig) -> float:
    """The loss of tokens [B, N, D], in float64."""
    total, tubelets = 0.0, student.shape[1] // 4
    pairs = [np.asarray(x, np.float64) for x in (student, teacher)]
    pooled = [x.reshape(len(x), tubelets, -1, x.shape[-1]).mean(2) for x in pairs]
    for weight, (x, y) in ((weights.token, pairs), (weights.pooled, pooled)):
        x, y = norm(x), norm(y)
        difference = np.abs(x - y)
        smooth = np.where(difference < 1, difference**2 / 2, difference - 0.5).mean(-1)
        cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
        error = (smooth + weights.cosine * (1 - cosine)).reshape(len(x), tubelets, -1).mean((0, 2))
        total += weight * (np.log(error) if weights.weighting == "relative" else error).mean()
    return total


@pytest.mark.parametrize(
    "weights",
    [
        RegressionConfig(),
        RegressionConfig(token=0.0, cosine=0.3),
        RegressionConfig(pooled=0.0, weighting="relative"),
    ],
)
def test_the_loss_is_that_of_the_causal_student(
    model: Model, manifest: Manifest, weights: RegressionConfig
) -> None:
    task = causal_lora_task(model, config(loss=weights), manifest, steps=5)
    metrics = first_loss(task)
    video = normalise(jnp.asarray(batch().video))
    params = {"params": model.params["encoder"]}
    teacher = model.encoder.apply(params, video)
    student = model.encoder.apply(params, video, window=3)  # adapters change nothing yet
    assert metrics["loss"] == pytest.approx(expected(student, teacher, weights), rel=1e-5)


def test_the_student_alone_sees_the_past(model: Model, manifest: Manifest) -> None:
    metrics = first_loss(causal_lora_task(model, config(past=1), manifest, steps=5))
    video = normalise(jnp.asarray(batch().video))
    params = {"params": model.params["encoder"]}
    teacher = model.encoder.apply(params, video[:, 2:])
    student = model.encoder.apply(params, video, window=3)[:, 4:]
    assert metrics["loss"] == pytest.approx(
        expected(student, teacher, RegressionConfig()), rel=1e-5
    )


def test_at_the_start_the_student_is_the_stream(model: Model, manifest: Manifest) -> None:
    task = causal_lora_task(model, config(window=4), manifest, steps=5)
    metrics = first_loss(task)
    video = normalise(jnp.asarray(batch().video))
    tubelets = jnp.moveaxis(video.reshape(3, 4, 2, 32, 32, 3), 1, 0)
    state = init_state(model.encoder, 3, 4)
    _, out = scan(model.encoder, model.params["encoder"], state, tubelets)
    teacher = model.encoder.apply({"params": model.params["encoder"]}, video)
    pooled = np.asarray(teacher).reshape(3, 4, 4, -1).mean(2)
    x, y = norm(np.moveaxis(np.asarray(out.embedding), 0, 1)), norm(pooled)
    cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    assert metrics["pooled_cosine"] == pytest.approx(cosine.mean(), abs=1e-5)


def test_training_brings_the_student_nearer(model: Model, manifest: Manifest) -> None:
    task = causal_lora_task(model, config(), manifest, steps=30)
    _, seen = run(task, [batch()] * 30)
    assert seen[-1]["loss"] < 0.8 * seen[0]["loss"]
    assert seen[-1]["pooled_cosine"] > seen[0]["pooled_cosine"]


def test_only_adapters_of_chosen_layers_change(model: Model, manifest: Manifest) -> None:
    lora = LoraConfig(rank=2, layers=(1,), targets=("encoder/blocks/attention/value",))
    task = causal_lora_task(model, config(lora=lora), manifest, steps=5)
    state, _ = run(task, [batch()] * 3)
    adapter = state.trained["encoder"]["blocks"]["attention"]
    assert adapter.keys() == {"value"}
    for factor in ("a", "b"):
        assert not np.any(np.asarray(adapter["value"][factor])[0])
        assert np.any(np.asarray(adapter["value"][factor])[1])


def test_dropout_differs_from_step_to_step(model: Model, manifest: Manifest) -> None:
    def losses(dropout: float) -> list[float]:
        lora = LoraConfig(rank=4, dropout=dropout)
        task = causal_lora_task(model, config(lora=lora), manifest, steps=5)
        ones = jax.tree.map(jnp.ones_like, task.trained)  # at the start b is zero
        task = dataclasses.replace(task, trained=ones)
        return [first_loss(task, seed)["loss"] for seed in (0, 1, 0)]

    with_dropout, without = losses(0.5), losses(0.0)
    assert with_dropout[0] == with_dropout[2] != with_dropout[1]
    assert without[0] == without[1]


@pytest.mark.parametrize("kind", [pytest.param("int8", marks=pytest.mark.slow), "nf4"])
def test_a_quantized_base_can_be_adapted(model: Model, manifest: Manifest, kind: str) -> None:
    task = causal_lora_task(model, config(quantize=kind), manifest, steps=30)
    state, seen = run(task, [batch()] * 30)
    assert seen[-1]["loss"] < 0.8 * seen[0]["loss"]
    adapters = trained_adapters(model, config(quantize=kind), task, state)
    whole = causal_lora_task(model, config(), manifest, steps=30)
    assert adapters.base == whole.record["base"]  # they belong to the weights before


def test_bfloat16_is_near_float32(model: Model, manifest: Manifest) -> None:
    whole, half = (
        causal_lora_task(model, config(dtype=dtype), manifest, steps=5)
        for dtype in ("float32", "bfloat16")
    )
    assert first_loss(half)["loss"] == pytest.approx(first_loss(whole)["loss"], rel=0.03)
    how = (half.frozen, batch(), jax.random.key(0))
    state, _ = jax.eval_shape(make_step(half), begin(half), *how)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trained)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("remat", [pytest.param("block", marks=pytest.mark.slow), "products"])
def test_computing_anew_changes_nothing(model: Model, manifest: Manifest, remat: str) -> None:
    states = [
        run(causal_lora_task(model, config(remat=how), manifest, steps=5), [batch()])[0]
        for how in ("none", remat)
    ]
    for a, b in zip(*(jax.tree.leaves(state.trained) for state in states), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_a_whole_run(model: Model, manifest: Manifest, tmp_path: Path) -> None:
    before = jax.tree.map(np.array, model.params)
    options, loop = config(), LoopConfig(steps=12, save_every=4, log_every=1)
    task = causal_lora_task(model, options, manifest, manifest, steps=12)
    train(task, loop, tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, model.params, before)
    rows = read(tmp_path / "run" / "metrics.jsonl")
    measured = [row["validation/pooled_cosine"] for row in rows[3::4]]
    step, state = best_state(task, loop, tmp_path / "run")
    assert step == 4 * (1 + int(np.argmax(measured)))
    adapters = trained_adapters(model, options, task, state)
    save_adapters(tmp_path / "adapters", adapters)
    lora = load_adapters(tmp_path / "adapters", model.params).lora["encoder"]
    jax.tree.map(
        np.testing.assert_array_equal,
        lora,
        join(state.trained, task.frozen["constants"])["encoder"],
    )
    merged = merge_lora(model.params["encoder"], lora)
    video = normalise(jnp.asarray(batch().video))
    given = {"params": model.params["encoder"], "lora": lora}
    apart = model.encoder.apply(given, video, window=3)
    assert relative_error(model.encoder.apply({"params": merged}, video, window=3), apart) < 1e-5
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["window"] == 3
    assert record["manifest"] == manifest.digest


def test_the_validation_is_the_mean_over_all_clips(model: Model, manifest: Manifest) -> None:
    # 8 clips in batches of 3: the last batch is filled up with what must not be counted.
    data = [DataConfig(clip=CLIP, batch_size=size) for size in (1, 3)]
    tasks = [
        causal_lora_task(model, config(data=each), manifest, manifest, steps=5) for each in data
    ]
    one, three = (
        task.evaluate(jax.device_put(task.trained, _everywhere()), {}, task.frozen)
        for task in tasks
    )
    assert one.keys() == {"validation/token_cosine", "validation/pooled_cosine"}
    for name, value in one.items():
        assert three[name] == pytest.approx(value, abs=1e-5)
        assert 0 < value < 1


def test_the_validation_leaves_the_past_out(model: Model, manifest: Manifest) -> None:
    options = config(past=1, data=DataConfig(clip=CLIP, batch_size=8))
    task = causal_lora_task(model, options, manifest, manifest, steps=5)
    found = task.evaluate(jax.device_put(task.trained, _everywhere()), {}, task.frozen)
    with options.data.evaluate(manifest) as batches:
        video = normalise(jnp.asarray(next(batches).video))
    params = {"params": model.params["encoder"]}
    student = model.encoder.apply(params, video, window=3)[:, 4:]
    teacher = model.encoder.apply(params, video[:, 2:])
    for name, value in fidelity(student, teacher, 3).items():
        assert found[f"validation/{name}"] == pytest.approx(float(jnp.mean(value)), abs=1e-5)


def _everywhere() -> Any:
    from jvjepa.train.mesh import MeshConfig, make_mesh, replicated

    return replicated(make_mesh(MeshConfig()))


def test_what_cannot_be_trained(model: Model, manifest: Manifest) -> None:
    with pytest.raises(ConfigError, match=r"window = 0; it must be 1 tubelet or more"):
        config(window=0)
    with pytest.raises(ConfigError, match=r"dtype = 'float16'; it must be one of"):
        config(dtype="float16")
    with pytest.raises(ConfigError, match=r"token = -1; it must be a weight"):
        RegressionConfig(token=-1)
    with pytest.raises(ConfigError, match=r"token = pooled = 0; there is no loss"):
        RegressionConfig(token=0, pooled=0)
    wrong = config(lora=LoraConfig(targets=("encoder/blokcs/.*",)))
    with pytest.raises(ConfigError, match=r"'encoder/blokcs/.*' matches none of the dense"):
        causal_lora_task(model, wrong, manifest, steps=5)
    short = config(data=DataConfig(clip=dataclasses.replace(CLIP, num_frames=2), batch_size=4))
    with pytest.raises(ConfigError, match=r"num_frames = 2; it must be a multiple of 2, and 4"):
        causal_lora_task(model, short, manifest, steps=5)
    with pytest.raises(ConfigError, match=r"past = -1; it must be 0 tubelets or more"):
        config(past=-1)
    message = r"num_frames = 8; it must be a multiple of 2, and 10 or more, with past = 3"
    with pytest.raises(ConfigError, match=message):
        causal_lora_task(model, config(past=3), manifest, steps=5)
    areas = dataclasses.replace(model.config.encoder, area_layers=(0, 2))
    cut = dataclasses.replace(model, encoder=Encoder(areas))
    with pytest.raises(ConfigError, match=r"areas over time, with which it cannot stream"):
        causal_lora_task(cut, config(), manifest, steps=5)
