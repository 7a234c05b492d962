"""Parameters to begin training with, drawn as Meta's code draws them.

Reference: `_init_weights` and `_rescale_blocks` of the models of Meta's V-JEPA 2 (`src/models`).
It cuts the normal distribution at -2 and 2 absolute, which is at 100 deviations, and so no cut.
(Flax's `truncated_normal` cuts at 2 deviations, which is another distribution.)
"""

import math
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from jvjepa.config import ModelConfig
from jvjepa.parameters import parameter_shapes
from jvjepa.typing import Array, Params

_DEVIATION = 0.02
_MODALITY_DEVIATION = 1e-6
_CLASSIFIER = re.compile("(classifier/linear|anticipator/(actions|verbs|nouns))/(kernel|bias)")
_RESIDUAL = re.compile(".*/blocks/(attention/proj|mlp/fc2)/kernel")
_CROSS = re.compile("(.*)/cross_attention/mlp/fc2/kernel")


def init_params(config: ModelConfig, key: Array) -> Params:
    """Draws the parameters of a model.

    Kernels and query tokens are normal with deviation 0.02. Kernels whose output is added to the
    tokens are then divided by sqrt(2 · n) in the n-th block, from 1; a pooler's cross-attention
    counts as its last block. Biases and mask tokens are 0, norms 1 and 0, modality
    embeddings normal with deviation 1e-6. Linear classifiers are uniform, as PyTorch's layers.

    Args:
        config: the architecture.
        key: of the draw; that of each array follows from its name, not from what else there is.

    Returns:
        {"encoder": .., ..}, float32, blocks stacked [L, ...].
    """
    shapes = parameter_shapes(config)
    return unflatten_dict({name: _draw(name, shapes, key) for name in shapes}, sep="/")


def _draw(name: str, shapes: dict[str, tuple[int, ...]], key: Array) -> Array:
    shape, kind = shapes[name], name.rpartition("/")[2]
    key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    if _CLASSIFIER.fullmatch(name):
        inputs = shapes[name.rpartition("/")[0] + "/kernel"][0]
        return jax.random.uniform(key, shape, jnp.float32, -1, 1) / math.sqrt(inputs)
    if kind in ("bias", "mask_tokens"):
        return jnp.asarray(np.zeros(shape, np.float32))
    if kind == "scale":
        return jnp.asarray(np.ones(shape, np.float32))
    return jax.random.normal(key, shape, jnp.float32) * jnp.asarray(_deviation(name, shapes))


def _deviation(name: str, shapes: dict[str, tuple[int, ...]]) -> np.ndarray:
    """Float32, with as many axes as the parameter: [1, 1], or [L, 1, 1] where it differs."""
    shape = shapes[name]
    number = np.full((1,) * len(shape), 0.5)
    if name.endswith(("image_embed", "video_embed")):
        return np.full((1,), _MODALITY_DEVIATION, np.float32)
    if _RESIDUAL.fullmatch(name):
        number = 1 + np.arange(shape[0]).reshape(-1, 1, 1)
    elif match := _CROSS.fullmatch(name):
        number = np.full((1, 1), shapes[f"{match[1]}/blocks/mlp/fc2/kernel"][0])
    return (_DEVIATION / np.sqrt(2 * number)).astype(np.float32)
