import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import compiled, random_params, random_video, relative_error, tiny_config

from jvjepa import Encoder
from jvjepa.train.mos_layers import cut, join, lower_tokens, upper_tokens

KINDS: dict[str, dict[str, Any]] = {
    "V-JEPA 2": {},
    "V-JEPA 2.1": {"levels": (0, 2, 3), "image_tokenizer": True, "rope": "interleaved"},
    "areas": {"area_layers": (1, 3)},
}


@pytest.mark.parametrize(
    ("kind", "depth"),
    [("V-JEPA 2", 0), ("V-JEPA 2", 3), ("V-JEPA 2.1", 0), ("V-JEPA 2.1", 2), ("areas", 2)],
)
def test_two_parts_are_the_whole(kind: str, depth: int) -> None:
    config = dataclasses.replace(tiny_config(num_layers=4), **KINDS[kind])
    encoder, video = Encoder(config), jnp.asarray(random_video(2, 4, 32, 64))
    params = random_params(Encoder(dataclasses.replace(config, area_layers=(0, 0))))  # the same
    lower, upper = cut(params, config, depth)

    def both(lower: Any, upper: Any) -> Any:
        tokens = lower_tokens(encoder, lower, video, depth)
        return tokens, upper_tokens(encoder, upper, tokens, (2, 4), depth)

    tokens, found = jax.jit(both)(lower, upper)
    assert relative_error(found, compiled(encoder, params, video)) <= 1e-5
    layers = compiled(encoder, params, video, method="layers").layers
    assert relative_error(tokens, layers[depth]) <= 1e-5
    whole = join(lower, upper)
    jax.tree.map(np.testing.assert_array_equal, whole, params)


def test_only_the_upper_part_has_blocks_to_train() -> None:
    config = tiny_config(num_layers=4)
    lower, upper = cut(random_params(Encoder(config)), config, 3)
    assert set(upper) == {"blocks", "norm"}
    assert set(lower) == {"blocks", "patch_embed"}
    assert {len(leaf) for leaf in jax.tree.leaves(upper["blocks"])} == {1}
    assert {len(leaf) for leaf in jax.tree.leaves(lower["blocks"])} == {3}
    assert set(cut(random_params(Encoder(config)), config, 0)[0]) == {"patch_embed"}


def test_bfloat16_and_what_is_computed_anew() -> None:
    config = tiny_config(num_layers=3)
    params = random_params(Encoder(config))
    video = jnp.asarray(random_video(1, 4, 32, 32))
    half = Encoder(config, jnp.bfloat16, remat="block")
    lower, upper = cut(params, config, 1)

    def of(upper: Any) -> Any:
        tokens = lower_tokens(half, lower, video.astype(jnp.bfloat16), 1)
        assert tokens.dtype == jnp.bfloat16
        return upper_tokens(half, upper, tokens.astype(jnp.float32), (2, 2), 1)

    tokens = jax.jit(of)(upper)
    assert tokens.dtype == jnp.bfloat16
    assert relative_error(tokens, compiled(Encoder(config), params, video)) <= 0.05
    gradient = jax.jit(jax.grad(lambda upper: of(upper).astype(jnp.float32).sum()))(upper)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
