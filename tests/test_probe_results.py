"""What becomes of a probe: a classifier of a model, a linear map, accuracy over time."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from caches import CLIP, WIDTH, cache, random_cache
from models import compiled, random_params, relative_error, tiny_model
from probing import ATTENTIVE, LINEAR, run

from jvjepa import Encoder
from jvjepa.adapters import weights_sha256
from jvjepa.classification import classify
from jvjepa.config import ModelConfig
from jvjepa.errors import InputError
from jvjepa.train.data import normalise, read_clip
from jvjepa.train.feature_cache import Features, open_or_make
from jvjepa.train.frozen_features import FeatureConfig, StreamConfig
from jvjepa.train.manifest import DataError, read_manifest
from jvjepa.train.probe import (
    ProbeResult,
    accuracy_over_time,
    attach_probe,
    fold_linear,
    probe_result,
    probe_steps,
    probe_task,
)
from jvjepa.train.probe_heads import probabilities, sample_tokens
from jvjepa.train.synthetic import SyntheticConfig, write_videos
from jvjepa.weights import Model, Source, load, save


@functools.cache
def encoder_model() -> Model:
    encoder, params = tiny_model(head_width=12, num_layers=2, crop_size=32)
    source = Source(name="tiny", revision="", sha256="0", converter="0")
    return Model(
        config=ModelConfig(encoder=encoder.config),
        encoder=encoder,
        params={"encoder": params},
        source=source,
    )


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = SyntheticConfig(num_frames=16, fps=8, height=48, width=64)
    return write_videos(tmp_path_factory.mktemp("videos") / "v", 8, config)


@pytest.fixture(scope="module")
def probed(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Features, ProbeResult]:
    """A probe of two layers, two clips of two views; not trained, but with large weights."""
    clip = dataclasses.replace(CLIP, fps=8.0, clips=2)
    views = (clip, dataclasses.replace(clip, spatial="random", flip=1.0))
    config = FeatureConfig(views=views, layers=(0, 1))
    folder = tmp_path_factory.mktemp("features") / "f"
    features = open_or_make(folder, encoder_model(), read_manifest(videos), config)
    task = probe_task(ATTENTIVE, features, features)
    large = jax.tree.map(lambda leaf: leaf * 4, task.trained)
    return features, probe_result(ATTENTIVE, features, task, large)


LABELS = tuple("abcdefgh")


def test_a_probe_classifies_in_a_model(probed: tuple[Features, ProbeResult], videos: Path) -> None:
    features, result = probed
    model = attach_probe(encoder_model(), result, LABELS)
    manifest = read_manifest(videos)

    tokens = jnp.asarray(sample_tokens(features.values, "view"))
    stacked = jax.tree.map(lambda leaf: leaf[None], result.params)
    ours = np.asarray(probabilities(result.heads, stacked, result.statistics, tokens)[0])

    @jax.jit
    def tokens_of(clip: jax.Array) -> jax.Array:
        variables = {"params": model.params["encoder"]}
        layers = model.config.classifier.layers
        levels = model.encoder.apply(
            variables, normalise(clip)[None], method="levels", layers=layers
        )
        return levels.reshape(1, -1, WIDTH)

    @jax.jit
    def classified(tokens: jax.Array) -> jax.Array:
        logits = model.classifier.apply({"params": model.params["classifier"]}, tokens)
        return jax.nn.softmax(logits[0])

    for row in (0, 5):
        answers = []
        for view in features.config.views:
            clips = [jnp.asarray(read_clip(manifest, view, row, clip)) for clip in range(2)]
            together = jnp.concatenate([tokens_of(clip) for clip in clips], axis=1)
            answers.append(classified(together))
        found = np.mean(answers, axis=0)
        assert relative_error(found, ours[row]) <= 1e-5
        assert found.argmax() == ours[row].argmax()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_probed_model_is_saved_and_classifies(
    probed: tuple[Features, ProbeResult], videos: Path, tmp_path: Path, dtype: Any
) -> None:
    _, result = probed
    model = encoder_model()
    if dtype == jnp.bfloat16:
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), model.params)
        encoder = Encoder(model.config.encoder, param_dtype=dtype)
        model = dataclasses.replace(model, encoder=encoder, params=params)
        result = result._replace(encoder=weights_sha256(params["encoder"]))
    attached = attach_probe(model, result, LABELS)
    save(tmp_path / "m", attached)
    loaded = load(tmp_path / "m", dtype="float32")

    config = loaded.config.classifier
    assert (config.labels, config.layers, config.frames_per_clip) == (LABELS, (0, 1), 4)
    assert (config.num_layers, config.num_heads, config.layer_norm_eps) == (1, 3, 1e-5)
    made = attach_probe(dataclasses.replace(model, source=None), result, LABELS).source
    assert (made.sha256, made.probe) == (result.encoder, attached.source.probe)
    assert loaded.source.probe.sha256 == weights_sha256(attached.params["classifier"])
    path = read_manifest(videos).paths[3]
    one, other = (classify(some, path, clips=2, views=3) for some in (attached, loaded))
    assert one.labels == LABELS
    np.testing.assert_allclose(one.probabilities, other.probabilities, rtol=0, atol=1e-6)


def test_a_model_with_blocks_of_their_own(
    probed: tuple[Features, ProbeResult], tmp_path: Path
) -> None:
    _, result = probed
    save(tmp_path / "m", encoder_model())
    attached = attach_probe(load(tmp_path / "m", scan=False), result, LABELS)
    save(tmp_path / "p", attached)

    tokens = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, WIDTH)), jnp.float32)
    stacked = attach_probe(encoder_model(), result, LABELS)
    for model in (attached, load(tmp_path / "p")):
        assert relative_error(
            compiled(model.classifier, model.params["classifier"], tokens),
            compiled(stacked.classifier, stacked.params["classifier"], tokens),
        ) <= 1e-5  # fmt: skip


def test_probes_that_a_model_cannot_have(probed: tuple[Features, ProbeResult]) -> None:
    _, result = probed
    heads = result.heads
    other = dataclasses.replace(encoder_model(), params={
        "encoder": random_params(encoder_model().encoder, seed=9)})  # fmt: skip

    def with_(**options: Any) -> ProbeResult:
        return result._replace(heads=dataclasses.replace(heads, **options))

    pooled = dataclasses.replace(heads.features, pool="clip")
    stream = FeatureConfig(views=(CLIP,), stream=StreamConfig())
    for model, some, message in (
        (other, result, r"encoder is \w{64}; .* needs \w{64}"),
        (encoder_model(), with_(config=LINEAR), "kind is linear; .* needs attentive"),
        (encoder_model(), with_(features=pooled), "pool is clip"),
        (encoder_model(), with_(features=stream), "stream is StreamConfig"),
        (
            encoder_model(),
            with_(config=dataclasses.replace(ATTENTIVE, sees="tubelet")),
            "sees is tubelet; .* view or clip",
        ),
    ):
        with pytest.raises(InputError, match=message):
            attach_probe(model, some, LABELS)
    with pytest.raises(InputError, match=r"number of classes is 8; .* needs 3"):
        attach_probe(encoder_model(), result, ("a", "b", "c"))


def test_a_linear_probe_is_a_linear_map() -> None:
    training = random_cache(shape=(1, 2, 2, 3))
    task = probe_task(LINEAR, training, training)
    trained, _ = run(task, 4)
    result = probe_result(LINEAR, training, task, trained)
    kernel, bias = fold_linear(result)

    tokens = jnp.asarray(sample_tokens(training.values, "view"))
    logits = jax.jit(result.heads.logits)(result.params, result.statistics, tokens[:, 0])
    means = training.values.astype(np.float64).mean(axis=(1, 2, 3, 4))
    assert relative_error(means @ kernel + bias, logits) <= 1e-5
    attentive = result._replace(heads=dataclasses.replace(result.heads, config=ATTENTIVE))
    with pytest.raises(InputError, match="kind is attentive; it must be linear"):
        fold_linear(attentive)


# Over time


@pytest.mark.parametrize(
    ("kind", "sees"),
    [("linear", "view"), ("linear", "clip"), ("linear", "tubelet"), ("attentive", "tubelet")],
)
def test_accuracy_over_time(kind: str, sees: str) -> None:
    config = dataclasses.replace(ATTENTIVE, kind=kind, sees=sees, weight_decays=(0.1,))
    features = random_cache(rows=9, shape=(1, 2, 3, 1))
    features = dataclasses.replace(
        features,
        config=FeatureConfig(
            views=(dataclasses.replace(CLIP, num_frames=6, clips=2),),
            stream=StreamConfig(),
            pool="tubelet",
        ),
    )
    task = probe_task(config, features, features)
    result = probe_result(config, features, task, task.trained)

    right = []
    for i in range(3):
        seen = features.values[:, :, :, (i if sees == "tubelet" else 0) : i + 1]
        tokens = jnp.asarray(sample_tokens(seen, sees))
        stacked = jax.tree.map(lambda leaf: leaf[None], result.params)
        found = probabilities(result.heads, stacked, result.statistics, tokens)[0]
        right.append((np.asarray(found).argmax(axis=-1) == features.labels).mean())
    np.testing.assert_allclose(accuracy_over_time(result, features), right)


def test_a_probe_is_right_when_there_is_something_to_see() -> None:
    """What tells the classes apart comes with the third of four tubelets, and stays."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    values = rng.normal(size=(60, 1, 1, 4, 1, WIDTH)) * 0.3
    for t in (2, 3):
        values[np.arange(60), 0, 0, t, 0, labels] += 10
    stream = FeatureConfig(
        views=(dataclasses.replace(CLIP, num_frames=8),), stream=StreamConfig(), pool="tubelet"
    )
    features = cache(values.astype(np.float32), labels, config=stream)
    config = dataclasses.replace(
        LINEAR, sees="tubelet", epochs=20, batch_size=20, learning_rates=(0.3,)
    )
    task = probe_task(config, features, features)
    trained, _ = run(task, probe_steps(config, features))
    curve = accuracy_over_time(probe_result(config, features, task, trained), features)

    assert curve.shape == (4,)
    assert (curve[:2] < 0.7).all()
    np.testing.assert_array_equal(curve[2:], 1.0)


def test_time_needs_tubelets() -> None:
    features = random_cache()
    task = probe_task(LINEAR, features, features)
    result = probe_result(LINEAR, features, task, task.trained)
    other = dataclasses.replace(features, made_of={"encoder": "f" * 64})
    with pytest.raises(InputError, match=r"encoder = f{64}"):
        accuracy_over_time(result, other)
    with pytest.raises(DataError, match="labels 3"):
        accuracy_over_time(result, random_cache(classes=4))
    pooled = dataclasses.replace(features.config, pool="clip")
    features = dataclasses.replace(features, config=pooled)
    result = result._replace(heads=dataclasses.replace(result.heads, features=pooled))
    with pytest.raises(InputError, match='pool = "clip"; over time'):
        accuracy_over_time(result, features)
