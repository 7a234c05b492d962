"""Small weights: kernels of few bits, which `jvjepa.layers.Dense` takes in place of arrays.

    small = quantize(model.params, "int8")
    model.encoder.apply({"params": small["encoder"]}, video)

The arrays are qwix's; a layer turns its own kernel back into floating point when it runs, so that
in a loop over layers no more than one is whole at a time. What a kernel was made of is forgotten:
adapters (`jvjepa.lora`) can be trained beside it, as in QLoRA (arXiv:2305.14314), and it cannot.
"""

import re
from typing import TYPE_CHECKING, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jvjepa.errors import ConfigError
from jvjepa.typing import Array, Params

if TYPE_CHECKING:
    import qwix

Kind = Literal["int8", "nf4"]
BLOCKS = ".*/blocks(_[0-9]+)?/.*"
_TILE = 64  # inputs of one output that share a scale in nf4, as in QLoRA


def quantize(params: Params, kind: Kind, *, layers: str = BLOCKS) -> Params:
    """Quantizes kernels.

    Args:
        params: of a whole model, {"encoder": .., ..}, blocks stacked or each of its own.
        kind: "int8" has a scale for each output, "nf4" one for each output and 64 inputs.
        layers: regular expression; the dense layers all of whose name it matches are quantized.

    Returns:
        Parameters in which these kernels are `qwix.QArray`; all else is the same arrays.

    Raises:
        ConfigError: `kind` is unknown, no layer matches, or a kernel cannot be divided into tiles.
        ModuleNotFoundError: qwix, of the extra "train", is not installed.
    """
    import qwix  # an extra

    if kind not in get_args(Kind):
        raise ConfigError(f"kind = {kind!r}; it must be one of {get_args(Kind)}")
    tiles = {0: _TILE} if kind == "nf4" else {}

    def of(kernel: Array) -> qwix.QArray:
        kernel = kernel.astype(jnp.float32)
        return qwix.quantize(kernel, kind, channelwise_axes=[1], tiled_axes=tiles)

    flat = flatten_dict(params, sep="/")
    chosen = [
        name
        for name in flat
        if name.endswith("/kernel") and re.fullmatch(layers, name.removesuffix("/kernel"))
    ]
    if not chosen:
        raise ConfigError(f"layers = {layers!r} matches none of the dense layers")
    for name in chosen:
        kernel = jnp.asarray(flat[name])
        if kind == "nf4" and kernel.shape[-2] % _TILE:
            raise ConfigError(
                f"{name} has {kernel.shape[-2]} inputs; nf4 needs a multiple of {_TILE}, "
                "int8 does not"
            )
        # A stack is quantized layer by layer: the scales of one must not depend on another.
        flat[name] = jax.vmap(of)(kernel) if kernel.ndim == 3 else of(kernel)
    return unflatten_dict(flat, sep="/")


def is_quantized(kernel: object) -> bool:
    """Whether a kernel is one that `quantize` made."""
    return not isinstance(kernel, jax.Array | np.ndarray)


def dequantize(kernel: "qwix.QArray") -> Array:
    """Turns a kernel back: [in, out], float32."""
    import qwix

    return qwix.dequantize(kernel)


def nbytes(params: Params) -> int:
    """Bytes that parameters take, with 4 bits for each value of nf4."""
    return sum(
        leaf.size * jnp.iinfo(leaf.dtype).bits // 8
        if jnp.issubdtype(leaf.dtype, jnp.integer)
        else leaf.nbytes
        for leaf in jax.tree.leaves(params)
    )
