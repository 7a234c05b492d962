"""Tiny random models whose every parameter matters."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jvjepa import Encoder, EncoderConfig
from jvjepa.typing import Array, Params


def tiny_config(
    *, head_width: int = 24, num_heads: int = 2, num_layers: int = 3, crop_size: int = 64
) -> EncoderConfig:
    return EncoderConfig(
        hidden_size=head_width * num_heads,
        num_layers=num_layers,
        num_heads=num_heads,
        mlp_dim=3 * head_width * num_heads,
        crop_size=crop_size,
    )


def random_params(encoder: Encoder, seed: int = 0) -> Params:
    """Parameters of which none is zero or one, of the size that trained ones have."""
    side = encoder.config.patch_size
    shapes = jax.eval_shape(
        encoder.init, jax.random.key(0), jnp.zeros((1, encoder.config.tubelet_size, side, side, 3))
    )
    rng = np.random.default_rng(seed)

    def draw(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.ShapeDtypeStruct) -> Array:
        name = path[-1].key
        scale = 1.0 / np.sqrt(leaf.shape[-2]) if name == "kernel" else 0.3
        value = rng.normal(size=leaf.shape) * scale + (1.0 if name == "scale" else 0.0)
        return jnp.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes["params"])


def compiled(module: nn.Module, params: Params, *args: Any, **static: Any) -> Any:
    """Applies a module as one program, which compiles faster than its operations one by one."""
    return jax.jit(functools.partial(module.apply, **static))({"params": params}, *args)


def tiny_model(seed: int = 0, **sizes: int) -> tuple[Encoder, Params]:
    encoder = Encoder(tiny_config(**sizes))
    return encoder, random_params(encoder, seed)


def random_video(*shape: int, seed: int = 0) -> np.ndarray:
    """Float32 [*shape, 3]."""
    return np.random.default_rng(seed).normal(size=(*shape, 3)).astype(np.float32)


def relative_error(value: Array, reference: Array) -> float:
    """Largest difference over the largest reference value."""
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    assert value.shape == reference.shape
    return float(np.max(np.abs(value - reference)) / np.max(np.abs(reference)))
