"""Small weights: kernels of few bits, which `jvjepa.dense.Dense` takes in place of arrays.

    small = quantize(model.params, "int8")
    model.encoder.apply({"params": small["encoder"]}, video)

qwix rounds. Of most schemes only the weights are small: a layer turns its own kernel back into
floating point when it runs, so that in a loop over layers no more than one is whole at a time. With
"int8-dynamic" and "int8-static" a layer rounds its input to int8 too and multiplies integers.

What a kernel was made of is forgotten: adapters (`jvjepa.lora`) can be trained beside it, as in
QLoRA (arXiv:2305.14314), and it cannot. Gradients pass the rounding of inputs as if it were not
there (the straight-through estimator, arXiv:1308.3432).
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from numpy.typing import NDArray

from jvjepa.errors import ConfigError, InputError
from jvjepa.typing import Array, DType, Params

Scheme = Literal["int8", "int8-dynamic", "int8-static", "int4", "nf4", "fp8"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
TILED: tuple[Scheme, ...] = ("int4", "nf4")
INTEGER: tuple[Scheme, ...] = ("int8-dynamic", "int8-static")  # those that multiply integers
BLOCKS = ".*/blocks(_[0-9]+)?/.*"
TILE = 64  # inputs of one output that share a scale, as in QLoRA
_QTYPES = {scheme: scheme.partition("-")[0] for scheme in SCHEMES} | {"fp8": "float8_e4m3fn"}
_UNIT = np.float32(1 / 127)  # the step of an input whose largest value is 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SmallKernel:
    """A quantized kernel, or a stack of them, in plain arrays: those that are stored, too.

    XLA for CPUs would turn arrays of its own types of fewer bits back, all layers at once.

    Args:
        values: int8 [.., in, out]; of "fp8" the uint8 of the same bits; of "int4" and "nf4" two in
            a uint8 [.., in / 2, out], those of the first half of the inputs in the lower four bits.
        scale: float32 [.., 1, out], or [.., in / tile, out].
        input_scale: float32 [..], the step of the layer's input, of "int8-static" alone.
        scheme: what it was quantized with.
    """

    values: Array
    scale: Array
    input_scale: Array | None
    scheme: Scheme = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel."""
        *stack, rows, outputs = self.values.shape
        return (*stack, 2 * rows if self.scheme in TILED else rows, outputs)

    @property
    def dtype(self) -> DType:
        """Of what the kernel stands for."""
        return self.scale.dtype


def quantize(
    params: Params,
    scheme: Scheme,
    *,
    layers: str = BLOCKS,
    exclude: Sequence[str] = (),
    tile: int | None = None,
    ranges: Params | None = None,
) -> Params:
    """Quantizes kernels.

    Args:
        params: of a whole model, {"encoder": .., ..}, blocks stacked or each of its own.
        scheme: of the weights: "int8" and "fp8" (e4m3) have a scale for each output, "int4" and
            "nf4" one for each output and `tile` inputs. "int8-dynamic" and "int8-static" are "int8"
            with products of integers; the step of a layer's input is then that of the token at
            hand, or the one that `ranges` gives.
        layers: regular expression; the dense layers all of whose name it matches are quantized.
        exclude: regular expressions; layers all of whose name one of them matches are not.
        tile: of "int4" and "nf4", even; None means 64.
        ranges: of "int8-static", the largest input of each layer, see
            `jvjepa.ranges.input_ranges`; blocks as those of `params`.

    Returns:
        Parameters in which these kernels are `SmallKernel`; all else is the same arrays.

    Raises:
        ConfigError: the scheme is unknown, an expression matches no layer, a kernel cannot be
            divided into tiles or has no range, or an option is not for this scheme.
        InputError: kernels are quantized already, or qwix is not installed.
    """
    flat = flatten_dict(params, sep="/")
    shapes = {name: leaf.shape for name, leaf in flat.items()}
    chosen, tile = plan(shapes, scheme, layers=layers, exclude=exclude, tile=tile)
    if scheme == "int8-static" and ranges is None:
        raise ConfigError("int8-static needs ranges, see jvjepa.ranges.input_ranges")
    if scheme != "int8-static" and ranges is not None:
        raise ConfigError(f"ranges are for int8-static; {scheme} measures nothing")
    found = dict(flatten_dict({} if ranges is None else ranges, sep="/"))
    for name in chosen:
        kernel = flat[f"{name}/kernel"]
        if is_quantized(kernel):
            raise InputError(f"{name} is quantized already; take the floating-point weights")
        small = _quantize(jnp.asarray(kernel), scheme, tile)
        if scheme == "int8-static":
            if name not in found:
                raise ConfigError(f"ranges has nothing for {name}; exclude it, or run it too")
            small = dataclasses.replace(small, input_scale=_step(name, found[name], kernel))
        flat[f"{name}/kernel"] = small
    return unflatten_dict(flat, sep="/")


def check_scheme(scheme: str, tile: int | None) -> int | None:
    """Checks what can be known without weights.

    Args:
        scheme: should be one of `SCHEMES`.
        tile: as in `quantize`.

    Returns:
        The tile, or None where the scheme has none.

    Raises:
        ConfigError: the scheme is unknown, or the tile is impossible or not for it.
    """
    if scheme not in SCHEMES:
        raise ConfigError(f"scheme = {scheme!r}; it must be one of {', '.join(SCHEMES)}")
    if scheme not in TILED:
        if tile is not None:
            raise ConfigError(f"tile = {tile} is for {' and '.join(TILED)}; this is {scheme}")
        return None
    tile = TILE if tile is None else tile
    if type(tile) is not int or tile < 2 or tile % 2:
        raise ConfigError(f"tile = {tile!r}; it must be an even number, 2 or more")
    return tile


def plan(
    shapes: Mapping[str, tuple[int, ...]],
    scheme: str,
    *,
    layers: str = BLOCKS,
    exclude: Sequence[str] = (),
    tile: int | None = None,
) -> tuple[list[str], int | None]:
    """Says what `quantize` would do, and raises where it would, without the weights.

    Args:
        shapes: of the parameters by flat name.
        scheme: as in `quantize`.
        layers: as there.
        exclude: as there.
        tile: as there.

    Returns:
        The names of the layers, in the order of `shapes`, and the tile, None without tiles.

    Raises:
        ConfigError: as there.
    """
    tile = check_scheme(scheme, tile)
    dense = [name.removesuffix("/kernel") for name in shapes if name.endswith("/kernel")]
    chosen = _matching("layers", layers, dense)
    if not chosen:
        raise ConfigError(f"layers = {layers!r} matches none of the dense layers")
    left = list(chosen)
    for pattern in exclude:
        out = _matching("exclude", pattern, chosen)
        if not out:
            names = ", ".join(chosen)
            raise ConfigError(
                f"exclude = {pattern!r} matches none of the layers that would be quantized: {names}"
            )
        left = [name for name in left if name not in out]
    if not left:
        raise ConfigError(f"exclude = {tuple(exclude)} leaves no layer to be quantized")
    for name in left:
        inputs = shapes[f"{name}/kernel"][-2]
        if tile is not None and inputs % tile:
            raise ConfigError(
                f"{name} has {inputs} inputs; {scheme} in tiles of {tile} needs a multiple of "
                f"{tile}: choose another tile, exclude it, or take int8, which has none"
            )
    return left, tile


def _matching(what: str, pattern: str, names: Sequence[str]) -> list[str]:
    try:
        return [name for name in names if re.fullmatch(pattern, name)]
    except re.error as error:
        raise ConfigError(f"{what} = {pattern!r} is no regular expression: {error}") from None


def _quantize(kernel: Array, scheme: Scheme, tile: int | None) -> SmallKernel:
    if kernel.ndim == 2:
        return _quantize_layer(kernel, scheme, tile)
    # Layer by layer: the scales of one must not depend on another, and nf4 takes sixteen times the
    # kernel.
    layers = [_quantize_layer(kernel[i], scheme, tile) for i in range(kernel.shape[0])]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


@functools.partial(jax.jit, static_argnames=("scheme", "tile"))
def _quantize_layer(kernel: Array, scheme: Scheme, tile: int | None) -> SmallKernel:
    how = {"channelwise_axes": [1], "tiled_axes": {} if tile is None else {0: tile}}
    array = require_qwix().quantize(kernel.astype(jnp.float32), _QTYPES[scheme], **how)
    values = array.qvalue
    if scheme == "fp8":
        values = jax.lax.bitcast_convert_type(values, jnp.uint8)
    elif scheme in TILED:
        halves = jnp.split(values.astype(jnp.int8).astype(jnp.uint8) & 15, 2)
        values = halves[0] | halves[1] << 4
    return SmallKernel(values, array.scale, None, scheme)


def _step(name: str, largest: Array, kernel: Array) -> Array:
    largest = np.asarray(largest, np.float32)
    if largest.shape != kernel.shape[:-2] or not np.isfinite(largest).all():
        raise ConfigError(
            f"ranges of {name} are {largest}; they must be finite, of shape {kernel.shape[:-2]}"
        )
    return jnp.asarray(np.where(largest > 0, largest, np.float32(1)) * _UNIT)


def product(x: Array, kernel: Array | SmallKernel) -> Array:
    """Multiplies a layer's input with its kernel.

    Args:
        x: float [..., in].
        kernel: [in, out], an array or what `quantize` made of one.

    Returns:
        [..., out], in the dtype of `x`.
    """
    if is_quantized(kernel):
        if kernel.scheme in INTEGER:
            return _integer_product(x, kernel)
        kernel = dequantize(kernel)
    return jnp.matmul(x, kernel.astype(x.dtype))


@jax.custom_vjp
def _integer_product(x: Array, kernel: SmallKernel) -> Array:
    values, scale = x.astype(jnp.float32), kernel.input_scale
    if scale is None:
        largest = jnp.max(jnp.abs(values), axis=-1, keepdims=True)
        scale = jnp.where(largest == 0, jnp.ones_like(largest), largest) * _UNIT  # NaN stays
    values = jnp.clip(jnp.round(values / scale), -128, 127).astype(jnp.int8)
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    how = {"preferred_element_type": jnp.int32}
    sums = jax.lax.dot_general(values, kernel.values, contract, **how)
    outputs = kernel.scale.reshape((1,) * (x.ndim - 1) + (-1,))
    return (sums.astype(jnp.float32) * scale * outputs).astype(x.dtype)


def _forward(x: Array, kernel: SmallKernel) -> tuple[Array, SmallKernel]:
    return _integer_product(x, kernel), kernel


def _backward(kernel: SmallKernel, gradient: Array) -> tuple[Array, None]:
    return jnp.matmul(gradient, dequantize(kernel).astype(gradient.dtype).T), None


_integer_product.defvjp(_forward, _backward)


def is_quantized(kernel: object) -> bool:
    """Whether a kernel is one that `quantize` made."""
    return isinstance(kernel, SmallKernel)


def dequantize(kernel: SmallKernel) -> Array:
    """Turns a kernel back: [in, out], or [L, in, out], float32."""
    qwix, values, scheme = require_qwix(), kernel.values, kernel.scheme
    if scheme == "fp8":
        values = jax.lax.bitcast_convert_type(values, jnp.float8_e4m3fn)
    elif scheme in TILED:
        values = jnp.concatenate([values & 15, values >> 4], axis=-2)
        if scheme == "int4":
            values = (values.astype(jnp.int8) ^ 8) - 8
    return qwix.dequantize(qwix.QArray(values, kernel.scale, None, _QTYPES[scheme]))


class Int8Parts(NamedTuple):
    """A kernel of int8 in NumPy, as formats with quantization operators of their own take it.

    What the kernel stands for is values · scale. With `input_scale` the layer's input is rounded
    too: x stands for clip(round(x / input_scale), -128, 127) · input_scale, half to even, which is
    ONNX's QuantizeLinear with a zero point of 0 (int8), and so are the weights.

    Args:
        values: int8 [in, out].
        scale: float32 [out].
        input_scale: float32, or None where the input is not rounded to a step that is known before.
        is_dynamic: whether each token's input is rounded to a step of its own, max|x| / 127.
    """

    values: NDArray[np.int8]
    scale: NDArray[np.float32]
    input_scale: np.float32 | None
    is_dynamic: bool


def int8_parts(kernel: SmallKernel) -> Int8Parts:
    """Takes apart one kernel of "int8", "int8-dynamic" or "int8-static", for export.

    Args:
        kernel: of one layer, [in, out]; `jvjepa.parameters.unstack_layers` takes stacks apart.

    Returns:
        Its parts.

    Raises:
        InputError: the kernel is a stack, or of another scheme.
    """
    if not kernel.scheme.startswith("int8") or kernel.values.ndim != 2:
        what = f"{kernel.scheme} {list(kernel.shape)}"
        raise InputError(f"the kernel is {what}; it must be int8 [in, out]")
    step = kernel.input_scale
    return Int8Parts(
        values=np.asarray(kernel.values),
        scale=np.asarray(kernel.scale, np.float32)[0],
        input_scale=None if step is None else np.float32(step),
        is_dynamic=kernel.scheme == "int8-dynamic",
    )


def nbytes(params: Params) -> int:
    """Bytes that parameters take."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def require_qwix() -> Any:
    """Imports qwix, which comes with an extra; raises InputError where it is not installed."""
    try:
        import qwix
    except ModuleNotFoundError as error:
        raise InputError(
            f"quantized weights need {error.name}: pip install 'jvjepa[quantize]'"
        ) from error
    return qwix
