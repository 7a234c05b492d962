"""Random LoRA adapters that change outputs noticeably, and an encoder that wears them."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jvjepa import Encoder
from jvjepa.lora import LoraConfig, factor_shapes, stacked_shapes, with_constants
from jvjepa.parameters import unstack_layers
from jvjepa.typing import Params


def random_lora(params: Params, config: LoraConfig, seed: int = 0) -> Params:
    """Adapters of a whole model's `params` as training leaves them: b is not zero any more."""
    rng = np.random.default_rng(seed)
    shapes = factor_shapes(stacked_shapes(params), config)
    factors = {name: 0.1 * rng.normal(size=shape) for name, shape in shapes.items()}
    factors = {name: factor.astype(np.float32) for name, factor in factors.items()}
    flat = flatten_dict(with_constants(factors, config), sep="/")
    for name in factors:  # layers that were not chosen stay zeros
        chosen = np.asarray(flat[f"{name.rpartition('/')[0]}/scale"]) > 0
        flat[name] = jnp.asarray(factors[name] * chosen[..., None, None].astype(np.float32))
    lora = unflatten_dict(flat, sep="/")
    stacked = stacked_shapes(params).keys() == flatten_dict(params, sep="/").keys()
    return lora if stacked else unstack_layers(lora)


class Wearing:
    """An encoder that applies itself with adapters, for functions that pass parameters alone."""

    def __init__(self, encoder: Encoder, lora: Params) -> None:
        self.encoder, self.lora = encoder, lora
        self.config, self.dtype = encoder.config, encoder.dtype

    def apply(self, variables: dict[str, Params], *args: Any, **kwargs: Any) -> Any:
        return self.encoder.apply({**variables, "lora": self.lora}, *args, **kwargs)
