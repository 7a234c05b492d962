"""The head gives what the original's layers give, and `video_feature` what it is to see."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from models import compiled, random_video, relative_error
from quality import random_features
from qualivision import torch_head

from jvjepa.errors import ConfigError, InputError
from jvjepa.quality import SCORES, MOSHead, video_feature
from jvjepa.typing import Params


def random_head(widths: tuple[int, int], **fields: object) -> tuple[MOSHead, Params]:
    head = MOSHead(**fields)
    shapes = jax.eval_shape(head.init, jax.random.key(0), *random_features(1, widths))["params"]
    rng = np.random.default_rng(1)
    return head, jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / leaf.shape[0] ** 0.5, jnp.float32),
        shapes,
    )


@pytest.mark.parametrize(
    ("widths", "hidden"), [((1408, 1024), (512, 256)), ((7, 5), (6, 4)), ((1, 9), (3, 11))]
)
@pytest.mark.parametrize("batch", [1, 5])
def test_the_head_is_the_originals(
    widths: tuple[int, int], hidden: tuple[int, int], batch: int
) -> None:
    head, params = random_head(widths, hidden=hidden)
    features = random_features(batch, widths, seed=2)
    joined = torch.from_numpy(np.concatenate(features, axis=1))
    with torch.no_grad():
        expected = torch_head(params)(joined).numpy()
    found = compiled(head, params, *features)
    assert found.dtype == jnp.float32
    assert found.shape == (batch, len(SCORES))
    assert relative_error(found, expected) < 1e-5


def test_bounded_scores_are_the_same_through_a_sigmoid() -> None:
    head, params = random_head((30, 20))
    features = random_features(4, (30, 20))
    free = compiled(head, params, *features)
    bounded = compiled(dataclasses.replace(head, bounded="1-5"), params, *features)
    np.testing.assert_allclose(bounded, 1 + 4 / (1 + np.exp(-np.asarray(free))), rtol=1e-6)
    far = jax.tree.map(lambda leaf: leaf * 100, params)
    extreme = compiled(dataclasses.replace(head, bounded="1-5"), far, *features)
    assert ((extreme >= 1) & (extreme <= 5)).all()


def test_dropout_is_of_training_alone_and_keeps_the_mean() -> None:
    """Without fc2's kernel the last layer is linear in what is dropped out, so both are known."""
    head, params = random_head((30, 20), dropout=0.4)
    params["fc2"]["kernel"] = jnp.zeros_like(params["fc2"]["kernel"])
    features = random_features(1, (30, 20))
    exact = compiled(head, params, *features)[0]

    @jax.jit
    @jax.vmap
    def drop(key: jax.Array) -> jax.Array:
        how = {"deterministic": False, "rngs": {"dropout": key}}
        return head.apply({"params": params}, *features, **how)[0]

    draws = np.asarray(drop(jax.random.split(jax.random.key(0), 2000)))
    hidden = jax.nn.gelu(params["fc2"]["bias"], approximate=False)
    variance = np.sum((hidden[:, None] * params["fc3"]["kernel"]) ** 2, axis=0) * 0.4 / 0.6
    # the variance of 2,000 draws is itself about 3% off, more where few units are large
    np.testing.assert_allclose(draws.var(axis=0), variance, rtol=0.2)
    assert (abs(draws.mean(axis=0) - exact) < 5 * np.sqrt(variance / len(draws))).all()
    never = dataclasses.replace(head, dropout=0.0)
    how = {"deterministic": False, "rngs": {"dropout": jax.random.key(0)}}
    assert (compiled(never, params, *features, **how)[0] == exact).all()


def test_bfloat16_scores_are_float32_and_close() -> None:
    head, params = random_head((30, 20))
    features = random_features(3, (30, 20))
    exact = compiled(head, params, *features)
    rounded = compiled(dataclasses.replace(head, dtype=jnp.bfloat16), params, *features)
    assert rounded.dtype == jnp.float32
    assert 0 < relative_error(rounded, exact) < 0.05


def test_features_that_do_not_fit_the_head_are_refused() -> None:
    head, params = random_head((30, 20))
    with pytest.raises(InputError, match=r"have 51 channels; the head was made for 50"):
        head.apply({"params": params}, *random_features(2, (31, 20)))
    clip, text = random_features(2, (30, 20))
    for wrong in ((clip, text[:1]), (clip[0], text[0]), (clip[None], text)):
        with pytest.raises(InputError, match=r"must be \[B, Dv\] and \[B, Dt\]"):
            head.apply({"params": params}, *wrong)


def test_features_of_a_video() -> None:
    tokens = random_video(2, 7)
    assert (video_feature(tokens, "first_token") == tokens[:, 0]).all()
    np.testing.assert_allclose(video_feature(tokens, "mean"), tokens.mean(axis=1), rtol=1e-5)
    rounded = video_feature(jnp.asarray(tokens, jnp.bfloat16), "mean")
    assert rounded.dtype == jnp.float32
    with pytest.raises(ConfigError, match="feature = 'attentive'"):
        video_feature(tokens, "attentive")
