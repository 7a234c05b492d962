"""TensorFlow SavedModels, by jax2tf through orbax-export, and LiteRT files made of them."""

import tempfile
from pathlib import Path

import jax
import tensorflow as tf
from orbax.export import ExportManager, JaxModule, ServingConfig
from tensorflow.lite.python.convert_phase import ConverterError

from jvjepa.errors import InputError
from jvjepa.export.artefact import Artefact, Weights
from jvjepa.export.manifest import BATCH, Arrays, Port
from jvjepa.export.network import Numerics
from jvjepa.export.options import Options
from jvjepa.typing import Array
from jvjepa.weights import Model

_SIGNATURE = "serving_default"


def write(path: Path, artefact: Artefact, model: Model, weights: Weights, options: Options) -> None:
    """Writes one artefact as a SavedModel, a folder.

    Args:
        path: the folder to make.
        artefact: what to write; a batch may be open.
        model: the model.
        weights: from `jvjepa.export.artefact.weights_of`; of them the arrays.
        options: not read further.
    """
    function = artefact.flat(model.config.encoder, Numerics(), tuple(weights.arrays))
    names = [port.name for port in artefact.inputs]

    def apply(params: dict[str, Array], inputs: dict[str, Array]) -> dict[str, Array]:
        values = (params[name] for name in weights.arrays)  # a pytree sorts names
        outputs = function(*(inputs[name] for name in names), *values)
        return dict(zip((port.name for port in artefact.outputs), outputs, strict=True))

    shapes = {
        port.name: f"({', '.join('b' if size == BATCH else str(size) for size in port.shape)},)"
        for port in artefact.inputs
    }
    module = JaxModule(weights.arrays, apply, input_polymorphic_shape=shapes)
    signature = {port.name: _spec(port) for port in artefact.inputs}
    ExportManager(module, [ServingConfig(_SIGNATURE, [signature])]).save(str(path))


def write_litert(
    path: Path, artefact: Artefact, model: Model, weights: Weights, options: Options
) -> None:
    """Writes one artefact as a .tflite of LiteRT's own operators.

    Args:
        path: the .tflite.
        artefact: what to write, with a batch of its own.
        model: the model.
        weights: from `jvjepa.export.artefact.weights_of`; of them the arrays.
        options: precision "float16" stores the weights so.

    Raises:
        InputError: LiteRT lacks an operator, or the file would be too large for its format.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as between:
        folder = Path(between) / "saved"
        write(folder, artefact, model, weights, options)
        converter = tf.lite.TFLiteConverter.from_saved_model(str(folder))
        if options.precision == "float16":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
            converter.target_spec.supported_types = [tf.float16]
        try:
            path.write_bytes(converter.convert())
        except ConverterError as error:
            raise InputError(f"LiteRT cannot take {artefact.what}: {error}") from error


class SavedModelSession:
    """A SavedModel in TensorFlow.

    Args:
        path: the folder.
        artefact: what is in it.
    """

    def __init__(self, path: Path, artefact: Artefact) -> None:
        """Loads it."""
        self._model = tf.saved_model.load(str(path))  # the signature does not keep it alive
        self._call = self._model.signatures[_SIGNATURE]
        self._outputs = [port.name for port in artefact.outputs]

    def run(self, feed: Arrays) -> Arrays:
        """Maps inputs by name to outputs by name.

        Raises:
            InputError: this TensorFlow is too old for what is in it.
        """
        try:
            outputs = self._call(**{name: tf.constant(value) for name, value in feed.items()})
        except tf.errors.InvalidArgumentError as error:
            if "deserialize" not in str(error):
                raise
            raise InputError(
                f"TensorFlow {tf.__version__} cannot read what JAX {jax.__version__} wrote; take "
                "another version of one of them, or a batch of fixed size"
            ) from error
        return {name: outputs[name].numpy() for name in self._outputs}


class LiteRTSession:
    """A .tflite in LiteRT.

    Args:
        path: the file.
        artefact: what is in it.
    """

    def __init__(self, path: Path, artefact: Artefact) -> None:
        """Loads it."""
        from ai_edge_litert.interpreter import Interpreter

        self._interpreter = Interpreter(model_path=str(path))
        self._call = self._interpreter.get_signature_runner(_SIGNATURE)

    def run(self, feed: Arrays) -> Arrays:
        """Maps inputs by name to outputs by name."""
        return dict(self._call(**feed))


def _spec(port: Port) -> tf.TensorSpec:
    shape = [None if size == BATCH else size for size in port.shape]
    return tf.TensorSpec(shape, port.dtype, name=port.name)
