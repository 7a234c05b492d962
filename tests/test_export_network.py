import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exports import NEW, in_jax, planned, tiny, tokens_of
from models import random_video, relative_error

import jvjepa
from jvjepa import rope
from jvjepa.errors import ConfigError, InputError
from jvjepa.export.artefact import artefact, weights_of
from jvjepa.export.network import Network, Numerics
from jvjepa.export.options import Options
from jvjepa.export.parity import Parity, check

MODELS = {
    "plain": {},
    "areas": {"area_layers": (0, 2), "area_temporal_splits": 2, "area_spatial_splits": 2},
    "uneven areas": {"area_layers": (1, 3), "area_temporal_splits": 1, "area_spatial_splits": 3},
    "new": NEW,
}


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest) -> jvjepa.Model:
    return tiny(**MODELS[request.param])


SHAPES = {
    "clip": {"height": 48, "width": 80, "frames": 6, "batch": 2},
    "classifier": {"height": 80, "width": 64, "batch": None},
    "gate": {"height": 48, "width": 80, "batch": 2},
}


@pytest.mark.parametrize("what", list(SHAPES))
def test_equals_the_library(model: jvjepa.Model, what: str) -> None:
    one, options = planned(what, model, tolerance=1e-5, **SHAPES[what])
    found = check(one, model, in_jax(one, model), options)
    assert set(found) == {port.name for port in one.outputs}


@pytest.mark.parametrize("positions", ["window", "absolute"])
@pytest.mark.parametrize("cache", ["host", "graph"])
@pytest.mark.parametrize("kind", ["plain", "new"])
def test_steps_equal_the_library_past_the_end_of_the_ring(
    kind: str, cache: str, positions: str
) -> None:
    model = tiny(**MODELS[kind])
    how = {"cache": cache, "positions": positions, "height": 48, "batch": 2, "tolerance": 1e-5}
    one, options = planned("step", model, **how)
    found = check(one, model, in_jax(one, model), options)
    assert set(found) == {"embedding", "tokens", "new_keys", "new_values"}


def test_an_image() -> None:
    model = tiny(**NEW)
    one, options = planned("clip", model, frames=1, tolerance=1e-5)
    check(one, model, in_jax(one, model), options)


def test_one_frame_of_a_model_without_images_is_used_twice() -> None:
    model = tiny()
    one, options = planned("clip", model, frames=1, tolerance=1e-5)
    check(one, model, in_jax(one, model), options)


def test_a_classifier_of_several_layers() -> None:
    model = tiny(layers=(0, 2), **NEW)
    one, options = planned("classifier", model, tolerance=1e-5)
    check(one, model, in_jax(one, model), options)


def test_a_classifier_takes_the_frames_that_it_was_trained_with() -> None:
    config = tiny().config
    classifier = dataclasses.replace(config.classifier, frames_per_clip=6)
    config = dataclasses.replace(config, classifier=classifier)
    kinds = ("clip", "classifier", "step", "gate")
    frames = {what: artefact(what, config, Options()).inputs[0].shape[1] for what in kinds}
    assert frames == {"clip": 4, "classifier": 6, "step": 2, "gate": 2}
    assert artefact("classifier", config, Options(frames=8)).inputs[0].shape[1] == 8


def test_half_precision_keeps_norms_and_softmax() -> None:
    model = tiny()
    one, _ = planned("clip", model)
    names = tuple(weights := _arrays(model))
    video = random_video(1, 4, 64, 64)
    half = one.flat(model.config.encoder, Numerics(dtype=jnp.bfloat16), names)
    tokens, embedding = jax.jit(half)(video, *weights.values())
    assert tokens.dtype == embedding.dtype == jnp.float32
    error = relative_error(tokens, tokens_of(model, video))
    assert 1e-4 < error < 0.1  # bfloat16, and no more than bfloat16


@pytest.mark.parametrize("variant", ["tiled", "interleaved"])
@pytest.mark.parametrize("head_width", [24, 26, 64])
def test_frequencies_are_those_of_the_tables(head_width: int, variant: str) -> None:
    places = np.random.default_rng(0).uniform(0, 30, (7, 3)).astype(np.float32)
    angles = places @ rope.frequencies(head_width, variant)
    cos, sin = rope.tables(places, head_width, variant)
    np.testing.assert_allclose(np.cos(angles), cos, atol=2e-6)
    np.testing.assert_allclose(np.sin(angles), sin, atol=2e-6)


def test_a_wrong_output_is_not_kept() -> None:
    model = tiny()
    one, options = planned("clip", model)
    right = in_jax(one, model)

    def wrong(feed: dict) -> dict:
        out = right(feed)
        out["tokens"] = out["tokens"].copy()
        out["tokens"][0, 3, 5] += 1e-2
        return out

    with pytest.raises(InputError, match=r"clip: tokens has a relative error of .* nothing was"):
        check(one, model, wrong, options)
    check(one, model, wrong, dataclasses.replace(options, tolerance=0.1))


def test_nan_is_not_kept() -> None:
    model = tiny()
    one, options = planned("gate", model)

    right = in_jax(one, model)

    def wrong(feed: dict) -> dict:
        out = right(feed)
        return {**out, "surprise": out["surprise"] * np.nan}

    with pytest.raises(InputError, match="surprise"):
        check(one, model, wrong, options)


def test_parity_keeps_the_worst() -> None:
    parity = Parity()
    right = np.array([1.0, 2.0, -4.0])
    parity.add(right, right)
    parity.add(np.array([1.0, 2.4, -4.0]), right)
    parity.add(right, right)
    assert parity.relative_error == pytest.approx(0.1)
    assert parity.cosine < 1 - 1e-4
    parity.add(right * np.nan, right)
    parity.add(right, right)
    assert np.isnan(parity.relative_error)
    assert np.isnan(parity.cosine)


def test_a_cache_of_a_restarted_stream_is_noticed() -> None:
    """Were streams not restarted on the way, a step that shares time would pass."""
    model = tiny()
    one, options = planned("step", model, batch=2)

    right = in_jax(one, model)

    def shares_time(feed: dict) -> dict:
        return right({**feed, "time": np.repeat(feed["time"][:1], 2)})

    with pytest.raises(InputError, match="relative error"):
        check(one, model, shares_time, options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch = 0; it must be at least 1"),
        ({"opset": 16}, "opset = 16; it must be 17"),
        ({"opset": 20}, "19 .*Gelu"),
        ({"what": ("clip", "clip")}, "each thing once"),
        ({"what": ()}, "one at least"),
        ({"what": ("decoder",)}, "what = 'decoder'; it must be one of"),
        ({"format": "torch"}, "format = 'torch'; it must be one of"),
        ({"precision": "bfloat16"}, "precision = 'bfloat16'"),
        ({"cache": "device"}, "cache = 'device'"),
        ({"tolerance": 0.0}, "tolerance = 0.0"),
        ({"format": "litert", "batch": None}, "LiteRT has no open batch"),
        ({"format": "stablehlo", "precision": "float16"}, "stablehlo is exported in float32"),
        ({"platforms": ("cpu", "abacus")}, "platforms = 'abacus'"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        jvjepa.export.options.Options(**options)


@pytest.mark.parametrize(
    ("what", "fields", "options", "message"),
    [
        ("clip", {}, {"frames": 3}, "T = 3 frames"),
        ("clip", {}, {"height": 50}, "H = 50"),
        ("clip", MODELS["areas"], {"frames": 2}, "area_temporal_splits = 2"),
        ("step", MODELS["areas"], {}, "a stream has no last tubelet"),
        ("step", {"rope_grid": "config"}, {"height": 32}, "rope_grid"),
    ],
)
def test_what_does_not_fit_the_model(what: str, fields: dict, options: dict, message: str) -> None:
    model = tiny(**fields)
    with pytest.raises(InputError, match=message):
        planned(what, model, **options)


def test_no_classifier() -> None:
    model = tiny()
    bare = dataclasses.replace(model, config=dataclasses.replace(model.config, classifier=None))
    with pytest.raises(InputError, match="the model has no classifier"):
        planned("classifier", bare)


def _arrays(model: jvjepa.Model) -> dict[str, np.ndarray]:
    return weights_of(model, ("encoder",), None).arrays


def test_the_network_knows_every_weight() -> None:
    """Each kernel and each norm changes the output."""
    model = tiny()
    one, _ = planned("clip", model)
    weights = _arrays(model)
    function = jax.jit(one.flat(model.config.encoder, Numerics(), tuple(weights)))
    video = random_video(1, 4, 64, 64)
    base = np.asarray(function(video, *weights.values())[0])
    for name in weights:
        if name.endswith("key/bias"):
            continue  # tiled rotary embeddings apart, softmax does not see it
        changed = {**weights, name: weights[name] * 1.5 + 0.1}
        assert np.any(np.asarray(function(video, *changed.values())[0]) != base), name


def test_network_is_hashable() -> None:
    assert hash(Network(config=tiny().config.encoder, numerics=Numerics()))


def test_outputs_that_are_zero() -> None:
    nothing, little = np.zeros(3), np.array([0.0, 1e-3, 0.0])
    parity = Parity()
    parity.add(nothing, nothing)
    assert parity == Parity(relative_error=0.0, cosine=1.0)
    parity.add(little, nothing)  # there is no value to be relative to
    assert parity == Parity(relative_error=1e-3, cosine=0.0)
    parity.add(nothing * np.nan, nothing)
    assert np.isnan(parity.relative_error)
    assert np.isnan(parity.cosine)
