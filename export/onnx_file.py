"""ONNX files, by jax2onnx.

The weights go through the conversion as inputs of the function, and become initializers of their
own names afterwards: the graph is folded before it has them, so that none is changed, copied or
renamed.
"""

import logging
from collections.abc import Collection
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnx.checker
import onnx.numpy_helper
import onnx_graphsurgeon as gs
from jax2onnx import to_onnx
from polygraphy.backend.onnx import fold_constants
from polygraphy.logger import G_LOGGER

from jvjepa.errors import InputError
from jvjepa.export.artefact import Artefact, Weights
from jvjepa.export.manifest import Port
from jvjepa.export.network import Numerics
from jvjepa.export.operators import check_operators
from jvjepa.export.options import Options
from jvjepa.quantization import Int8Parts
from jvjepa.weights import Model

_INLINE_BYTES = 1 << 30  # weights above go into a file beside; protobuf ends at 2 GiB
_DTYPES = {"float32": jnp.float32, "float16": jnp.float16}


def write(path: Path, artefact: Artefact, model: Model, weights: Weights, options: Options) -> None:
    """Writes one artefact as an ONNX file, checked.

    Args:
        path: the .onnx; weights above 1 GiB go into `path` + ".data".
        artefact: what to write.
        model: the model.
        weights: from `jvjepa.export.artefact.weights_of`.
        options: precision, opset and sizes.

    Raises:
        InputError: an operator is not in TensorRT's list, or the file does not pass ONNX's checker.
    """
    dtype = _DTYPES[options.precision]
    graph = _tidy(_convert(artefact, model, weights, dtype, options.opset), weights.arrays)
    for name, parts in weights.int8.items():
        _put_int8(graph, name, parts, dtype)
    onnx_model = gs.export_onnx(graph.cleanup().toposort())
    _name_ports(onnx_model, artefact)
    arrays = {name: x.astype(dtype, copy=False) for name, x in weights.arrays.items()}
    _put_weights(onnx_model, arrays)
    _save(onnx_model, path)
    check(path)


def check(path: Path) -> None:
    """Checks a file: the standard, shapes and types by inference, and TensorRT's operators.

    Args:
        path: the .onnx.

    Raises:
        InputError: it does not pass.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise InputError(f"{path} does not pass ONNX's checker: {error}") from error
    graph = onnx.load(path, load_external_data=False).graph
    check_operators((node.name, node.domain, node.op_type) for node in graph.node)


def _convert(
    artefact: Artefact,
    model: Model,
    weights: Weights,
    dtype: jnp.dtype,
    opset: int,
) -> onnx.ModelProto:
    names = tuple(weights.arrays)
    numerics = Numerics(dtype=dtype, native_norm=True)
    function = artefact.flat(model.config.encoder, numerics, names)
    specs = [jax.ShapeDtypeStruct(port.shape, port.dtype) for port in artefact.inputs]
    specs += [jax.ShapeDtypeStruct(array.shape, dtype) for array in weights.arrays.values()]
    logging.getLogger("onnx_ir.serde").setLevel(logging.ERROR)  # it warns of every unnamed type
    return to_onnx(
        function,
        specs,
        model_name=f"jvjepa_{artefact.what}",
        opset=opset,
        input_names=[port.name for port in artefact.inputs] + list(names),
        output_names=[port.name for port in artefact.outputs],
        normalization_mode="prefer_native",
    )


def _tidy(model: onnx.ModelProto, weights: Collection[str]) -> gs.Graph:
    """Folds constants, and takes out what a compiler would only have to see through."""
    with G_LOGGER.verbosity(G_LOGGER.ERROR):
        graph = gs.import_onnx(fold_constants(model))
    for node in graph.nodes:
        if node.op != "Reshape":
            continue
        source, shape = node.inputs
        if source.name in weights:  # a bias [1, 1, D], which broadcasts as [D] too
            for user in list(node.outputs[0].outputs):
                user.inputs = [source if x is node.outputs[0] else x for x in user.inputs]
        elif shape.inputs and shape.inputs[0].op == "Concat":  # computed, for an open batch
            sizes = [
                part.values if isinstance(part, gs.Constant) else np.int64([-1])
                for part in shape.inputs[0].inputs
            ]
            sizes = np.concatenate(sizes)
            if np.count_nonzero(sizes == -1) == 1:
                node.inputs[1] = gs.Constant(f"{node.outputs[0].name}_shape", sizes)
    return graph.cleanup()


def _name_ports(model: onnx.ModelProto, artefact: Artefact) -> None:
    """Gives inputs and outputs their shapes, where the conversion left some out."""
    for values, ports in (
        (model.graph.input, artefact.inputs),
        (model.graph.output, artefact.outputs),
    ):
        by_name = {value.name: value for value in values}
        for port in ports:
            by_name[port.name].type.CopyFrom(_type(port))


def _type(port: Port) -> onnx.TypeProto:
    element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(port.dtype))
    return onnx.helper.make_tensor_type_proto(element, port.shape)


def _put_int8(graph: gs.Graph, name: str, parts: Int8Parts, dtype: jnp.dtype) -> None:
    """Makes a kernel the output of a DequantizeLinear, and rounds the inputs of its products.

    Compilers know the pattern (QDQ) and multiply integers where both factors have it.
    """
    kernel = graph.tensors()[name]
    graph.inputs.remove(kernel)
    scale = gs.Constant(f"{name}_scale", parts.scale.astype(dtype))
    stored = [gs.Constant(f"{name}_int8", np.ascontiguousarray(parts.values)), scale]
    node = gs.Node("DequantizeLinear", f"{name}_dequantize", {"axis": 1}, stored, [kernel])
    graph.nodes.append(node)
    if parts.input_scale is None:
        return
    step = gs.Constant(f"{name}_input_scale", np.asarray(parts.input_scale, dtype))
    for product in kernel.outputs:
        x = product.inputs[0]
        rounded, turned = (gs.Variable(f"{name}_input{end}", dtype) for end in ("_int8", ""))
        rounded.dtype = np.int8
        # QuantizeLinear without a zero point gives uint8.
        steps = [step, gs.Constant(f"{name}_input_zero", np.zeros((), np.int8))]
        graph.nodes.append(
            gs.Node("QuantizeLinear", rounded.name, inputs=[x, *steps], outputs=[rounded])
        )
        graph.nodes.append(
            gs.Node("DequantizeLinear", turned.name, inputs=[rounded, *steps], outputs=[turned])
        )
        product.inputs[0] = turned


def _put_weights(model: onnx.ModelProto, weights: dict[str, np.ndarray]) -> None:
    """Makes initializers of the inputs that are weights."""
    graph = model.graph
    used = {name for node in graph.node for name in node.input}
    inputs = list(graph.input)
    del graph.input[:]
    for value in inputs:
        if value.name not in weights:
            graph.input.append(value)
        elif value.name in used:
            array = np.ascontiguousarray(weights[value.name])
            graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))


def _save(model: onnx.ModelProto, path: Path) -> None:
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if size <= _INLINE_BYTES:
        onnx.save(model, path)
    else:
        place = {"location": f"{path.name}.data", "size_threshold": 1024}
        onnx.save(model, path, save_as_external_data=True, **place)
