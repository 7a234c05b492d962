"""LoRA: low-rank adapters of dense layers, as pure functions of parameters (arXiv:2106.09685).

Adapters are a collection beside the parameters, of the same form, and every part of the model
reads its own:

    lora = init_lora(model.params, LoraConfig(), jax.random.key(0))
    model.encoder.apply(variables(model.params["encoder"], lora["encoder"]), video)

A layer with an adapter gives x @ kernel + bias + scale · (x @ a) @ b. The factors a [in, r] and
b [r, out] are what is trained; scale, alpha / rank, is data beside them. In a stack of layers all
are [L, ...], and layers that were not chosen have a scale of 0: their factors begin as zeros and
get gradients of exactly 0.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from jvjepa.errors import ConfigError, InputError
from jvjepa.fields import check, check_positive_ints, is_number, is_whole
from jvjepa.parameters import stack_layers, unstack_layers
from jvjepa.quantization import is_quantized
from jvjepa.typing import Array, Params

ATTENTION = "encoder/blocks/attention/(query|key|value|proj)"
FACTORS = ("a", "b")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which layers get adapters, and of what kind.

    Args:
        rank: r, columns of a and rows of b.
        alpha: the scale is alpha / rank.
        dropout: share of an adapter's inputs that training sets to zero, 0 to below 1; applied
            where a module is called with an rng "dropout".
        targets: regular expressions; a dense layer gets an adapter if one of them matches all of
            its name, which is "encoder/blocks/attention/query" or the like, see
            `jvjepa.parameters.parameter_shapes`.
        layers: ascending layers of the blocks, counted from 0, that are adapted; None means all.

    Raises:
        ConfigError: a value is impossible.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = (ATTENTION,)
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Checks every field."""
        check_positive_ints(self, "rank")
        check(is_number(self.alpha) and self.alpha > 0, self, "alpha", "a number above 0")
        fits = is_number(self.dropout, 0) and self.dropout < 1
        check(fits, self, "dropout", "a number from 0 to below 1")
        fits = isinstance(self.targets, tuple) and len(self.targets) > 0
        fits = fits and all(isinstance(target, str) for target in self.targets)
        check(fits, self, "targets", "a tuple of one or more regular expressions")
        for target in self.targets:
            try:
                re.compile(target)
            except re.error as error:
                raise ConfigError(f"LoraConfig.targets: {target!r} is wrong: {error}") from None
        fits = self.layers is None or (
            isinstance(self.layers, tuple)
            and all(is_whole(layer) for layer in self.layers)
            and list(self.layers) == sorted(set(self.layers))
            and len(self.layers) > 0
        )
        check(fits, self, "layers", "None or a tuple of ascending layers, counted from 0")


def factor_shapes(
    shapes: Mapping[str, tuple[int, ...]], config: LoraConfig
) -> dict[str, tuple[int, ...]]:
    """Lists the factors of all adapters.

    Args:
        shapes: of the parameters by flat name, blocks stacked, as `parameter_shapes` gives them.
        config: which layers.

    Returns:
        Shape by flat name: "encoder/blocks/attention/query/a" is [L, in, r], ".../b" [L, r, out].

    Raises:
        ConfigError: a target matches no dense layer, or a stack has no such layers.
    """
    dense = [name.removesuffix("/kernel") for name in shapes if name.endswith("/kernel")]
    for target in config.targets:
        if not any(re.fullmatch(target, name) for name in dense):
            raise ConfigError(
                f"LoraConfig.targets: {target!r} matches none of the dense layers: "
                f"{', '.join(dense)}"
            )
    found: dict[str, tuple[int, ...]] = {}
    for name in dense:
        if any(re.fullmatch(target, name) for target in config.targets):
            *stack, inputs, outputs = shapes[f"{name}/kernel"]
            _chosen(config, stack, name)  # may raise
            found[f"{name}/a"] = (*stack, inputs, config.rank)
            found[f"{name}/b"] = (*stack, config.rank, outputs)
    if config.layers is not None and all(len(shape) == 2 for shape in found.values()):
        raise ConfigError(f"LoraConfig.layers = {config.layers}, but no target is in blocks")
    return found


def _chosen(config: LoraConfig, stack: Sequence[int], name: str) -> np.ndarray:
    """Whether each layer of a stack is adapted: bool [L], or [] of a layer on its own."""
    if config.layers is None or not stack:
        return np.ones(stack, np.bool_)
    if config.layers[-1] >= stack[0]:
        raise ConfigError(
            f"LoraConfig.layers = {config.layers}; {name} has the layers 0 to {stack[0] - 1}"
        )
    return np.isin(np.arange(stack[0]), config.layers)


def init_lora(params: Params, config: LoraConfig, key: Array) -> Params:
    """Makes adapters that change nothing yet: b is zero.

    a is drawn as the peft library does it, from U(-1, 1) / sqrt(in).

    Args:
        params: of a whole model, {"encoder": .., ..}, blocks stacked or each of its own.
        config: which layers, and of what kind.
        key: of the draw.

    Returns:
        {"encoder": .., ..}, the collection "lora" of each adapted part, float32: beside a and b
        "scale", and "dropout" where there is any. The blocks are as those of `params`.

    Raises:
        ConfigError: a target matches nothing, or there are no such layers.
    """
    shapes = stacked_shapes(params)
    wanted = factor_shapes(shapes, config)
    factors: dict[str, Array] = {}
    for i, (name, shape) in enumerate(wanted.items()):
        factors[name] = jnp.zeros(shape, jnp.float32)
        if name.endswith("/a"):
            *stack, inputs, _ = shape
            draw = jax.random.uniform(jax.random.fold_in(key, i), shape, jnp.float32, -1.0, 1.0)
            chosen = _chosen(config, stack, name)[..., None, None]
            factors[name] = jnp.where(chosen, draw / inputs**0.5, factors[name])
    lora = with_constants(factors, config)
    return lora if shapes.keys() == flatten_dict(params, sep="/").keys() else unstack_layers(lora)


def stacked_shapes(params: Params) -> dict[str, tuple[int, ...]]:
    """Shape by flat name of parameters, as if their blocks were stacked."""
    stacked = jax.eval_shape(stack_layers, params)
    return {name: leaf.shape for name, leaf in flatten_dict(stacked, sep="/").items()}


def with_constants(factors: Mapping[str, Array], config: LoraConfig) -> Params:
    """Builds the collections of all parts, {"encoder": .., ..}, from stacked factors by name."""
    flat = dict(factors)
    for name, factor in factors.items():
        layer, _, kind = name.rpartition("/")
        if kind == "a":
            chosen = _chosen(config, factor.shape[:-2], layer)
            scale = np.where(chosen, config.alpha / config.rank, 0.0)
            flat[f"{layer}/scale"] = jnp.asarray(scale, jnp.float32)
            if config.dropout > 0:
                rate = np.full(chosen.shape, config.dropout, np.float32)
                flat[f"{layer}/dropout"] = jnp.asarray(rate)
    return unflatten_dict(flat, sep="/")


def split(lora: Params) -> tuple[Params, Params]:
    """Takes adapters apart for training; `join` is the way back.

    Args:
        lora: from `init_lora`, or of one part.

    Returns:
        The factors a and b, which an optimizer may see, and the constants, which it may not.
    """
    flat = flatten_dict(lora)
    trained = {path: leaf for path, leaf in flat.items() if path[-1] in FACTORS}
    fixed = {path: leaf for path, leaf in flat.items() if path[-1] not in FACTORS}
    return unflatten_dict(trained), unflatten_dict(fixed)


def join(trained: Params, fixed: Params) -> Params:
    """Puts together again what `split` took apart."""
    return unflatten_dict({**flatten_dict(trained), **flatten_dict(fixed)})


def variables(params: Params, lora: Params) -> dict[str, Params]:
    """What `apply` of one part takes; flax alone would ignore adapters that fit nowhere.

    Args:
        params: of the part, `model.params["encoder"]`.
        lora: of the same part, blocks stacked or not as those of `params`.

    Returns:
        {"params": params, "lora": lora}.

    Raises:
        InputError: an adapter has no layer, is not whole, or has other shapes than its layer.
    """
    check_lora(params, lora)
    return {"params": params, "lora": lora}


def check_lora(params: Params, lora: Params) -> None:
    """Raises InputError unless every adapter is whole and has a layer whose shapes it fits.

    Args:
        params: of a part, or of a whole model.
        lora: of the same.
    """
    flat = flatten_dict(params, sep="/")
    for name, adapter in _by_layer(lora).items():
        kernel = flat.get(f"{name}/kernel")
        if kernel is None:
            near = [x.removesuffix("/kernel") for x in flat if x.endswith("/kernel")]
            raise InputError(
                f"lora has {name}, which is no dense layer of params; they have {', '.join(near)}"
            )
        *stack, inputs, outputs = kernel.shape
        rank = adapter["a"].shape[-1] if "a" in adapter else 0
        right = {"a": (*stack, inputs, rank), "b": (*stack, rank, outputs), "scale": (*stack,)}
        right |= {"dropout": (*stack,)} if "dropout" in adapter else {}
        shapes = {key: tuple(leaf.shape) for key, leaf in adapter.items()}
        if shapes != right:
            raise InputError(f"lora {name} has the shapes {shapes}; right would be {right}")


def merge_lora(params: Params, lora: Params) -> Params:
    """Adds adapters to the kernels: a model that needs no adapters gives the same then.

    Args:
        params: of a whole model, or of a part; not changed.
        lora: of the same, blocks stacked or not as those of `params`.

    Returns:
        Parameters of the same names, shapes and dtypes; kernels without adapters are the same
        arrays. The product is taken in float32 and rounded once, to the kernel's dtype.

    Raises:
        InputError: the adapters do not fit, or a kernel is quantized.
    """
    check_lora(params, lora)
    flat = flatten_dict(params, sep="/")
    for name, adapter in _by_layer(lora).items():
        a, b, scale = (jnp.asarray(adapter[key], jnp.float32) for key in ("a", "b", "scale"))
        kernel = flat[f"{name}/kernel"]
        if is_quantized(kernel):
            raise InputError(
                f"{name} is quantized; adapters can be applied beside it, `variables`, or merged "
                "into the floating-point weights"
            )
        kernel = jnp.asarray(kernel)
        change = jnp.matmul(a, b, precision="highest") * scale[..., None, None]
        flat[f"{name}/kernel"] = (kernel.astype(jnp.float32) + change).astype(kernel.dtype)
    return unflatten_dict(flat, sep="/")


def _by_layer(lora: Params) -> dict[str, dict[str, Array]]:
    """The arrays of each adapter, by the flat name of its layer."""
    found: dict[str, dict[str, Array]] = {}
    for path, leaf in flatten_dict(lora, sep="/").items():
        layer, _, kind = path.rpartition("/")
        found.setdefault(layer, {})[kind] = leaf
    return found
