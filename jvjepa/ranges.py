"""The largest inputs of dense layers, measured on clips: what quantizing inputs needs beforehand.

ranges = input_ranges(model, [clip])
small = quantize(model.params, "int8-static", ranges=ranges)
"""

from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax.traverse_util import unflatten_dict
from numpy.typing import NDArray

from jvjepa.dense import Dense
from jvjepa.encoder import check_video, concatenate_levels, token_grid
from jvjepa.errors import InputError
from jvjepa.parameters import stack_layers, unstack_layers
from jvjepa.typing import Array, Params
from jvjepa.weights import Model

PARTS = ("encoder", "predictor", "classifier")  # those that take video, or what the encoder gives


def input_ranges(
    model: Model,
    clips: Iterable[NDArray[np.float32]],
    *,
    percentile: float = 100.0,
    progress: Callable[[str], None] = lambda text: None,
) -> Params:
    """Measures how large the inputs of every dense layer become.

    The model runs as it is, its blocks one after the other: the encoder on the clips, the predictor
    on the first half of a clip's tokens to predict the second, the classifier on all tokens. A
    layer takes its input in pieces, whole or 1,024 tokens at a time; of each the given percentile
    of |x| is taken, over tokens and channels, and of all pieces of all clips the largest.

    Args:
        model: with floating-point weights.
        clips: float [T, H, W, 3] each, preprocessed; at least one.
        percentile: above 0, at most 100, which is the largest |x| itself. Less cuts off outliers,
            for finer steps of all other values.
        progress: told what runs now.

    Returns:
        {"encoder": {.., "query": float32 []}, ..} of the parts that ran, [L] in stacked blocks:
        what `jvjepa.quantization.quantize` takes. The anticipator and the action predictor take
        more than a clip; they are not in it.

    Raises:
        InputError: there is no clip, one cannot be encoded, the percentile is impossible, or an
            input is not finite.
    """
    if not 0 < percentile <= 100:
        raise InputError(f"percentile = {percentile}; it must be above 0, and 100 at most")
    scan = model.encoder.scan
    params = {part: model.params[part] for part in PARTS if part in model.params}
    params = unstack_layers(params) if scan else params
    measure = jax.jit(lambda params, clip: _measure(model, params, clip, percentile))
    largest: dict[str, NDArray[np.float32]] = {}
    for i, clip in enumerate(clips):
        progress(f"measuring the ranges of clip {i + 1}")
        check_video(clip[None], model.config.encoder)
        for name, value in jax.device_get(measure(params, clip[None])).items():
            if not np.isfinite(value):
                raise InputError(f"clip {i + 1} makes inputs of {name} that are not finite")
            largest[name] = np.maximum(largest.get(name, np.float32(0)), value)
    if not largest:
        raise InputError("there is no clip to measure the ranges of inputs on")
    nested = unflatten_dict(largest, sep="/")
    return jax.tree.map(jnp.asarray, stack_layers(nested) if scan else nested)


def _measure(model: Model, params: Params, clip: Array, percentile: float) -> dict[str, Array]:
    """The range of every layer, by its flat name in blocks of their own."""
    found: dict[str, Array] = {}

    def run(part: str, *args: Any, **how: Any) -> Any:
        def record(
            call: Callable[..., Any],
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            context: nn.module.InterceptorContext,
        ) -> Any:
            if isinstance(context.module, Dense) and context.method_name == "__call__":
                name = "/".join((part, *context.module.path))
                size = jnp.abs(args[0].astype(jnp.float32))
                size = jnp.max(size) if percentile == 100 else jnp.percentile(size, percentile)
                found[name] = jnp.maximum(found.get(name, jnp.zeros(())), size)
            return call(*args, **kwargs)

        module = getattr(model, part).clone(scan=False)
        with nn.intercept_methods(record):
            return module.apply({"params": params[part]}, *args, **how)

    classifier, predictor = model.config.classifier, model.config.predictor
    tokens = run("encoder", clip)
    if classifier is not None:
        levels = tokens[None]
        if classifier.layers:
            levels = run("encoder", clip, method="levels", layers=classifier.layers)
        run("classifier", rearrange(levels, "n b t d -> b (n t) d"))
    if predictor is not None:
        context = tokens
        if predictor.num_levels > 1:
            context = concatenate_levels(run("encoder", clip, method="levels"))
        seen, (rows, columns) = context.shape[1] // 2, token_grid(clip, model.config.encoder)
        ids = jnp.arange(context.shape[1])[None]
        grid = (context.shape[1] // (rows * columns), rows, columns)
        index = 1 % predictor.num_mask_tokens
        visible = context[:, :seen], ids[:, :seen], ids[:, seen:]
        run("predictor", *visible, grid, mask_index=index)
    return found
