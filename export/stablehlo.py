"""StableHLO, by `jax.export`: a program without weights, and the weights beside it."""

from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file

from jvjepa.export.artefact import Artefact, Weights
from jvjepa.export.manifest import BATCH, Arrays, Port
from jvjepa.export.network import Numerics
from jvjepa.export.options import Options
from jvjepa.storage import write_safetensors
from jvjepa.typing import Array
from jvjepa.weights import Model


def write(path: Path, artefact: Artefact, model: Model, weights: Weights, options: Options) -> None:
    """Writes one artefact: `path`, and `path` + ".safetensors" with the weights.

    Args:
        path: the .stablehlo.
        artefact: what to write; a batch may be open.
        model: the model.
        weights: from `jvjepa.export.artefact.weights_of`; of them the arrays.
        options: the platforms.
    """
    function = artefact.flat(model.config.encoder, Numerics(), tuple(weights.arrays))

    def call(params: dict[str, Array], *inputs: Array) -> dict[str, Array]:
        values = (params[name] for name in weights.arrays)  # a pytree sorts names
        outputs = function(*inputs, *values)
        return dict(zip((port.name for port in artefact.outputs), outputs, strict=True))

    scope = jax.export.SymbolicScope()
    specs = [
        jax.ShapeDtypeStruct(_shape(port, scope), np.dtype(port.dtype)) for port in artefact.inputs
    ]
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in weights.arrays.items()}
    exported = jax.export.export(jax.jit(call), platforms=options.platforms)(shapes, *specs)
    path.write_bytes(exported.serialize())
    sizes = {name: array.shape for name, array in weights.arrays.items()}
    write_safetensors(weights_file(path), sizes, np.dtype(np.float32), weights.arrays.items(), {})


def weights_file(path: Path) -> Path:
    """Where the weights of a .stablehlo are."""
    return path.with_name(path.name + ".safetensors")


class StableHLOSession:
    """A .stablehlo with its weights, in JAX; any process that has JAX can run it so.

    Args:
        path: the file.
        artefact: what is in it.
    """

    def __init__(self, path: Path, artefact: Artefact) -> None:
        """Loads both."""
        self._call = jax.jit(jax.export.deserialize(path.read_bytes()).call)
        self._weights = jax.device_put(load_file(weights_file(path)))
        self._inputs = [port.name for port in artefact.inputs]

    def run(self, feed: Arrays) -> Arrays:
        """Maps inputs by name to outputs by name."""
        return jax.device_get(self._call(self._weights, *(feed[name] for name in self._inputs)))


def _shape(port: Port, scope: jax.export.SymbolicScope) -> tuple[object, ...]:
    (batch,) = jax.export.symbolic_shape("b", scope=scope)
    return tuple(batch if size == BATCH else size for size in port.shape)
