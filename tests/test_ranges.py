import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from models import compiled, random_params, random_video, relative_error, tiny_config

from jvjepa import Encoder, Model, ModelConfig, PredictorConfig
from jvjepa.config import ClassifierConfig
from jvjepa.dense import Dense
from jvjepa.errors import InputError
from jvjepa.heads import Classifier
from jvjepa.parameters import parameter_shapes, unstack_layers
from jvjepa.predictor import Predictor
from jvjepa.quantization import is_quantized, quantize
from jvjepa.ranges import input_ranges
from jvjepa.typing import Params


def model(*, heads: bool = False) -> Model:
    """An encoder of two layers; with `heads`, a classifier and a predictor of one each."""
    encoder = Encoder(tiny_config(num_layers=2))
    config = ModelConfig(encoder=encoder.config)
    params = {"encoder": random_params(encoder)}
    parts = {}
    if heads:
        predictor = PredictorConfig(
            hidden_size=24, num_layers=1, num_heads=2, mlp_dim=48, num_mask_tokens=2
        )
        classifier = ClassifierConfig(labels=("a", "b"), num_layers=1, num_heads=2, layers=(0, 1))
        config = ModelConfig(encoder=encoder.config, predictor=predictor, classifier=classifier)
        rng = np.random.default_rng(1)
        for name, shape in parameter_shapes(config).items():
            part, *path, last = name.split("/")
            if part != "encoder":
                into = params.setdefault(part, {})
                for key in path:
                    into = into.setdefault(key, {})
                into[last] = jnp.asarray(rng.normal(size=shape) * 0.3, jnp.float32)
        parts["predictor"] = Predictor(predictor, encoder.config)
        parts["classifier"] = Classifier(classifier, encoder.config)
    return Model(config=config, encoder=encoder, params=params, source=None, **parts)


def by_hand(given: Model, clip: np.ndarray) -> dict[str, np.ndarray]:
    """Largest |input| of some layers, from what `Encoder.layers` gives."""
    params = given.params["encoder"]
    layers = np.asarray(compiled(given.encoder, params, clip[None], method="layers").layers)

    def normed(x: np.ndarray, norm: Params, i: int) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return np.abs(x * np.asarray(norm["scale"])[i] + np.asarray(norm["bias"])[i]).max()

    first = [normed(layers[i], params["blocks"]["norm1"], i) for i in range(2)]
    return {"query": np.array(first), "key": np.array(first), "value": np.array(first)}


def test_ranges_are_the_largest_inputs_of_all_clips() -> None:
    given = model()
    clips = [random_video(4, 32, 48, seed=seed) * (1 + seed) for seed in range(2)]
    ranges = input_ranges(given, clips)["encoder"]
    assert ranges["patch_embed"] == np.abs(np.stack(clips)).max()
    each = [by_hand(given, clip) for clip in clips]
    for name in ("query", "key", "value"):
        expected = np.maximum(each[0][name], each[1][name])
        np.testing.assert_allclose(ranges["blocks"]["attention"][name], expected, rtol=1e-5)
    names = {name.removesuffix("/kernel") for name in flatten_dict(given.params, sep="/")}
    assert set(flatten_dict({"encoder": ranges}, sep="/")) <= names


def test_ranges_have_the_form_of_the_parameters() -> None:
    given = model(heads=True)
    clip = random_video(4, 32, 32)
    ranges = input_ranges(given, [clip])
    flat = flatten_dict(ranges, sep="/")
    dense = {
        name.removesuffix("/kernel"): leaf.shape[:-2]
        for name, leaf in flatten_dict(given.params, sep="/").items()
        if name.endswith("/kernel")
    }
    assert {name: leaf.shape for name, leaf in flat.items()} == dense
    assert all((np.asarray(leaf) > 0).all() for leaf in flat.values())
    parts = ("encoder", "predictor", "classifier")
    unrolled = {part: getattr(given, part).clone(scan=False) for part in parts}
    apart = dataclasses.replace(given, **unrolled, params=unstack_layers(given.params))
    found = flatten_dict(input_ranges(apart, [clip]), sep="/")
    expected = flatten_dict(unstack_layers(ranges), sep="/")
    assert set(found) == set(expected)
    for name, leaf in found.items():
        np.testing.assert_allclose(leaf, expected[name], rtol=1e-6)
    small = quantize(given.params, "int8-static", ranges=ranges, layers=".*")
    kernels = flatten_dict(small).values()
    assert sum(is_quantized(leaf) for leaf in kernels) == len(dense)
    how = {"method": "levels", "layers": (0, 1)}
    tokens = compiled(given.encoder, given.params["encoder"], clip[None], **how)
    tokens = tokens.reshape(1, -1, 48)
    right = compiled(given.classifier, given.params["classifier"], tokens)
    logits = compiled(given.classifier, small["classifier"], tokens)
    assert 1e-5 < relative_error(logits, right) < 0.1


def test_a_percentile_cuts_off_outliers() -> None:
    given, clip = model(), random_video(4, 32, 32)
    clip[0, 0, 0, 0] = 1000.0
    whole = input_ranges(given, [clip])["encoder"]["patch_embed"]
    cut = input_ranges(given, [clip], percentile=99.9)["encoder"]["patch_embed"]
    assert whole == 1000
    np.testing.assert_allclose(cut, np.percentile(np.abs(clip), 99.9), rtol=1e-5)


def test_static_steps_serve_the_clips_that_they_were_measured_on() -> None:
    given, clip = model(), random_video(4, 32, 32)
    small = quantize(given.params, "int8-static", ranges=input_ranges(given, [clip]))["encoder"]
    right = compiled(given.encoder, given.params["encoder"], clip[None])
    near = relative_error(compiled(given.encoder, small, clip[None]), right)
    assert 1e-4 < near < 0.03
    narrow = jax.tree.map(lambda x: x / 20, input_ranges(given, [clip]))
    small = quantize(given.params, "int8-static", ranges=narrow)["encoder"]
    assert relative_error(compiled(given.encoder, small, clip[None]), right) > 10 * near


def test_measuring_leaves_no_trace_in_compiled_functions() -> None:
    given, clip = model(), random_video(4, 32, 32)[None]
    forward = jax.jit(given.encoder.apply)
    before = forward({"params": given.params["encoder"]}, clip)
    input_ranges(given, [clip[0]])
    np.testing.assert_array_equal(forward({"params": given.params["encoder"]}, clip), before)
    assert Dense(3).apply(
        {"params": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}, clip[..., :2]
    ).shape == (*clip.shape[:-1], 3)


def test_what_cannot_be_measured() -> None:
    given, clip = model(), random_video(4, 32, 32)
    with pytest.raises(InputError, match="there is no clip to measure"):
        input_ranges(given, [])
    for percentile in (0, 100.5, float("nan")):
        with pytest.raises(InputError, match=r"percentile = .*; it must be above 0"):
            input_ranges(given, [clip], percentile=percentile)
    with pytest.raises(InputError, match=r"video has H = 30"):
        input_ranges(given, [clip[:, :30]])
    clip[0, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match=r"clip 1 makes inputs of encoder/.* that are not finite"):
        input_ranges(given, [clip])
