"""The parameters of a checkpoint: their names, shapes and numbers, stacked and unstacked."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from jvjepa.config import (
    ActionPredictorConfig,
    AnticipatorConfig,
    ClassifierConfig,
    EncoderConfig,
    ModelConfig,
    PredictorConfig,
)
from jvjepa.typing import Params


def _dense(inputs: int, outputs: int, *stack: int) -> dict[str, tuple[int, ...]]:
    return {"kernel": (*stack, inputs, outputs), "bias": (*stack, outputs)}


def _norm(width: int, *stack: int) -> dict[str, tuple[int, ...]]:
    return {"scale": (*stack, width), "bias": (*stack, width)}


def _blocks(layers: int, width: int, mlp_dim: int) -> dict[str, Any]:
    return {
        "norm1": _norm(width, layers),
        "attention": {
            name: _dense(width, width, layers) for name in ("query", "key", "value", "proj")
        },
        "norm2": _norm(width, layers),
        "mlp": {
            "fc1": _dense(width, mlp_dim, layers),
            "fc2": _dense(mlp_dim, width, layers),
        },
    }


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Lists every parameter of a checkpoint.

    Args:
        config: the architecture.

    Returns:
        Shape by flat name ("encoder/blocks/mlp/fc1/kernel"), in the order in which they are stored.
        The parameters of blocks are stacked, [L, ...].
    """
    parts: dict[str, Any] = {"encoder": _encoder(config.encoder)}
    if config.predictor is not None:
        parts["predictor"] = _predictor(config.predictor, config.encoder)
    if config.classifier is not None:
        parts["classifier"] = _classifier(config.classifier, config.encoder.hidden_size)
    if config.anticipator is not None:
        parts["anticipator"] = _anticipator(config.anticipator, config.encoder.hidden_size)
    if config.action_predictor is not None:
        width = config.encoder.hidden_size
        parts["action_predictor"] = _action_predictor(config.action_predictor, width)
    return flatten_dict(parts, sep="/")


def _encoder(config: EncoderConfig) -> dict[str, Any]:
    width = config.hidden_size
    shapes: dict[str, Any] = {"patch_embed": _dense(config.patch_dim, width)}
    if config.image_tokenizer:
        image_dim = config.patch_dim // config.tubelet_size
        shapes["patch_embed_image"] = _dense(image_dim, width)
        shapes |= {"image_embed": (width,), "video_embed": (width,)}
    shapes["blocks"] = _blocks(config.num_layers, width, config.mlp_dim)
    if config.levels:
        return {**shapes, "norms": _norm(width, len(config.levels))}
    return {**shapes, "norm": _norm(width)}


def _predictor(config: PredictorConfig, encoder: EncoderConfig) -> dict[str, Any]:
    inner, width = config.hidden_size, encoder.hidden_size
    inputs = config.num_levels * width
    shapes: dict[str, Any] = {
        "embed": _dense(inputs, inner),
        "mask_tokens": (config.num_mask_tokens, inner),
        "blocks": _blocks(config.num_layers, inner, config.mlp_dim),
        "norm": _norm(inner),
    }
    if config.num_levels > 1:
        shapes["embed"] = {"fc1": _dense(inputs, width), "fc2": _dense(width, inner)}
    if config.modality_embeddings:
        shapes |= {"image_embed": (inner,), "video_embed": (inner,)}
    proj = _dense(inner, config.output_dim or inputs)
    return {**shapes, "proj": proj, **({"proj_context": proj} if config.context_projection else {})}


def _classifier(config: ClassifierConfig, width: int) -> dict[str, Any]:
    return {"pooler": _pooler(config, width, 1), "linear": _dense(width, len(config.labels))}


def _anticipator(config: AnticipatorConfig, width: int) -> dict[str, Any]:
    heads = {name: _dense(width, len(getattr(config, name))) for name in config.heads}
    return {"pooler": _pooler(config, width, len(heads)), **heads}


def _pooler(
    config: ClassifierConfig | AnticipatorConfig, width: int, num_queries: int
) -> dict[str, Any]:
    mlp_dim = 4 * width  # whatever the encoder's ratio is
    cross: dict[str, Any] = {
        "norm1": _norm(width),
        "attention": {name: _dense(width, width) for name in ("query", "key", "value")},
        "norm2": _norm(width),
        "mlp": {"fc1": _dense(width, mlp_dim), "fc2": _dense(mlp_dim, width)},
    }
    return {
        "query_tokens": (num_queries, width),
        "blocks": _blocks(config.num_layers, width, mlp_dim),
        "cross_attention": cross,
    }


def _action_predictor(config: ActionPredictorConfig, width: int) -> dict[str, Any]:
    inner = config.hidden_size
    return {
        "embed": _dense(width, inner),
        "action": _dense(config.action_dim, inner),
        "state": _dense(config.action_dim, inner),
        "blocks": _blocks(config.num_layers, inner, config.mlp_dim),
        "norm": _norm(inner),
        "proj": _dense(inner, width),
    }


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Counts the parameters of each part that there is: encoder, predictor, classifier, .."""
    return count_shapes(parameter_shapes(config))


def count_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Counts the parameters of each part, from their shapes by flat name."""
    counts: dict[str, int] = {}
    for name, shape in shapes.items():
        part = name.split("/")[0]
        counts[part] = counts.get(part, 0) + math.prod(shape)
    return counts


def stack_layers(params: Params) -> Params:
    """Stacks the blocks of every part, for modules with `scan=True`.

    Args:
        params: of a whole model or of a part, with "blocks_0", "blocks_1", ...

    Returns:
        With "blocks", whose arrays are [L, ...].
    """
    rest = {name: leaf for name, leaf in params.items() if not name.startswith("blocks_")}
    stacked = {
        name: stack_layers(leaf) if isinstance(leaf, Mapping) else leaf
        for name, leaf in rest.items()
    }
    blocks = [params[f"blocks_{i}"] for i in range(len(params) - len(rest))]
    if blocks:
        stacked["blocks"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    return stacked


def unstack_layers(params: Params) -> Params:
    """Gives every block its own parameters, for modules with `scan=False`.

    Args:
        params: of a whole model or of a part, with "blocks", whose arrays are [L, ...].

    Returns:
        With "blocks_0", "blocks_1", ...; numpy arrays are views, JAX's are copies.
    """
    unstacked: dict[str, Any] = {}
    for name, leaf in params.items():
        if name == "blocks":
            for i in range(jax.tree.leaves(leaf)[0].shape[0]):
                unstacked[f"blocks_{i}"] = jax.tree.map(lambda stack, i=i: stack[i], leaf)
        else:
            unstacked[name] = unstack_layers(leaf) if isinstance(leaf, Mapping) else leaf
    return unstacked
