"""The things that can be exported: their inputs, their outputs, and the function between."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from numpy.typing import NDArray

from jvjepa import streaming
from jvjepa.area import areas
from jvjepa.config import EncoderConfig, ModelConfig
from jvjepa.encoder import Encoder, check_video, token_grid
from jvjepa.errors import InputError
from jvjepa.export.manifest import BATCH, Port
from jvjepa.export.network import Network, Numerics
from jvjepa.export.options import Options, What
from jvjepa.parameters import unstack_layers
from jvjepa.quantization import Int8Parts, Scheme, dequantize, int8_parts, is_quantized
from jvjepa.typing import Array
from jvjepa.weights import Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Artefact:
    """One thing to export.

    Args:
        what: its name.
        inputs: in the order of the function's arguments.
        outputs: in the order of its results.
        parts: of the parameters that it needs.
        function: (network, params, *inputs) to a tuple of outputs.
    """

    what: What
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    parts: tuple[str, ...]
    function: Callable[..., tuple[Array, ...]]

    def flat(
        self, config: EncoderConfig, numerics: Numerics, names: tuple[str, ...]
    ) -> Callable[..., tuple[Array, ...]]:
        """The function of (*inputs, *parameters), the latter in the order of `names`."""
        network = Network(config=config, numerics=numerics)

        def call(*arguments: Array) -> tuple[Array, ...]:
            inputs, values = arguments[: len(self.inputs)], arguments[len(self.inputs) :]
            params = unflatten_dict(dict(zip(names, values, strict=True)), sep="/")
            return self.function(network, params, *inputs)

        return call


def artefact(what: What, config: ModelConfig, options: Options) -> Artefact:
    """Lays out one thing to export.

    Args:
        what: which.
        config: the model's.
        options: sizes and forms.

    Returns:
        The artefact.

    Raises:
        InputError: the model has no classifier, or the sizes do not fit it.
        ConfigError: the encoder's positions do not fit the sizes.
    """
    encoder = config.encoder
    sides = [
        encoder.crop_size if side is None else side for side in (options.height, options.width)
    ]
    batch = BATCH if options.batch is None else options.batch
    trained = config.classifier_frames if what == "classifier" else encoder.frames_per_clip
    frames = trained if options.frames is None else options.frames
    if what in ("step", "gate"):
        frames = encoder.tubelet_size
    some = 1 if options.batch is None else options.batch
    clip = jax.ShapeDtypeStruct((some, frames, *sides, 3), np.float32)
    check_video(clip, encoder)
    rows, columns = token_grid(clip, encoder)
    tubelets = max(1, frames // encoder.tubelet_size)
    tokens, width = tubelets * rows * columns, encoder.hidden_size
    video = Port("tubelet" if what in ("step", "gate") else "video", (batch, *clip.shape[1:]))
    embedding = Port("embedding", (batch, width))
    sequence = Port("tokens", (batch, tokens, width))
    if what in ("clip", "classifier"):
        areas(encoder, (tubelets, rows, columns))  # may raise
    if what == "clip":
        return Artefact(
            what=what,
            inputs=(video,),
            outputs=(sequence, embedding),
            parts=("encoder",),
            function=Network.clip,
        )
    if what == "classifier":
        classifier = config.classifier
        if classifier is None:
            raise InputError("the model has no classifier; convert one with it, or attach a probe")

        def classify(network: Network, params: Any, video: Array) -> tuple[Array]:
            return (network.classify(params, video, classifier),)

        return Artefact(
            what=what,
            inputs=(video,),
            outputs=(Port("logits", (batch, len(classifier.labels))),),
            parts=("encoder", "classifier"),
            function=classify,
        )
    if what == "gate":
        return Artefact(
            what=what,
            inputs=(video, Port("reference", (batch, tokens, width))),
            outputs=(Port("surprise", (batch,)), Port("descriptor", (batch, tokens, width))),
            parts=("encoder",),
            function=Network.gate,
        )
    return _step(config, options, video, embedding, sequence)


def _step(
    config: ModelConfig, options: Options, video: Port, embedding: Port, tokens: Port
) -> Artefact:
    encoder, batch = config.encoder, video.shape[0]
    heads = (encoder.num_heads, encoder.head_width)
    ring = (encoder.num_layers, batch, options.window, tokens.shape[1], *heads)
    new = ring if options.cache == "graph" else (*ring[:2], *ring[3:])
    dtype = "float32" if options.format == "litert" else options.precision
    _, _, height, width, _ = video.shape
    jax.eval_shape(  # raises where these sizes cannot be streamed
        lambda: streaming.init_state(
            Encoder(encoder), 1, options.window, height=height, width=width
        )
    )

    def step(network: Network, params: Any, *inputs: Array) -> tuple[Array, ...]:
        how = {"positions": options.positions, "cache": options.cache}
        return network.step(params, *inputs, **how)

    return Artefact(
        what="step",
        inputs=(
            video,
            Port("keys", ring, dtype),
            Port("values", ring, dtype),
            Port("time", (batch,), "int32"),
        ),
        outputs=(
            embedding,
            tokens,
            Port("new_keys", new, dtype),
            Port("new_values", new, dtype),
        ),
        parts=("encoder",),
        function=step,
    )


class Weights(NamedTuple):
    """The parameters of a graph.

    Args:
        arrays: float32 by name, "encoder/blocks_3/mlp/fc1/kernel", of all of them; the norms of
            V-JEPA 2.1's levels are "encoder/norms_0/scale" and so on.
        int8: of those that are kernels of int8, what their arrays stand for.
    """

    arrays: dict[str, NDArray[np.float32]]
    int8: dict[str, Int8Parts]


def weights_of(model: Model, parts: tuple[str, ...], scheme: Scheme | None) -> Weights:
    """Lists the parameters of a graph, layers each of its own.

    Args:
        model: a loaded model.
        parts: which of its parts.
        scheme: how its kernels are quantized, or None. Those that are not int8 are turned back.

    Returns:
        The parameters.
    """
    params: Mapping[str, Any] = {part: model.params[part] for part in parts}
    flat = flatten_dict(unstack_layers(params) if model.encoder.scan else params, sep="/")
    found = Weights({}, {})
    for name, value in flat.items():
        if is_quantized(value):
            if scheme is not None and scheme.startswith("int8"):
                found.int8[name] = int8_parts(value)
            value = dequantize(value)
        array = np.asarray(value, np.float32)
        if name.startswith("encoder/norms/"):
            for level, row in enumerate(array):
                found.arrays[name.replace("/norms/", f"/norms_{level}/")] = row
        else:
            found.arrays[name] = array
    return found
