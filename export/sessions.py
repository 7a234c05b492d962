"""Runs exported files where they belong: ONNX Runtime and TensorRT. Needs no JAX."""

from pathlib import Path
from typing import Protocol

from jvjepa.errors import CheckpointError, InputError
from jvjepa.export.manifest import Arrays, Entry

CPU = "CPUExecutionProvider"


class Session(Protocol):
    """An artefact that is ready to run."""

    def run(self, feed: Arrays) -> Arrays:
        """Maps inputs by name to outputs by name."""
        ...


class OnnxSession:
    """An ONNX file in ONNX Runtime.

    Args:
        path: the .onnx.
        entry: what the manifest says of it.
        provider: the execution provider, by ONNX Runtime's name; it runs there or not at all.
        threads: of a CPU; None leaves it to ONNX Runtime.

    Raises:
        InputError: ONNX Runtime is not installed or has no such provider, or the provider does not
            start.
        CheckpointError: ONNX Runtime cannot load the file.
    """

    def __init__(
        self, path: Path, entry: Entry, *, provider: str = CPU, threads: int | None = None
    ) -> None:
        """Loads the file."""
        try:
            import onnxruntime
            from onnxruntime.capi import onnxruntime_pybind11_state as errors
        except ModuleNotFoundError as error:
            raise InputError("ONNX files need onnxruntime: pip install onnxruntime") from error
        there = onnxruntime.get_available_providers()
        if provider not in there:
            raise InputError(f"provider = {provider!r}; this ONNX Runtime has {', '.join(there)}")
        options = onnxruntime.SessionOptions()
        # Products with int8 kernels would round the other factor to int8 too, by default.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        unloadable = (
            *(errors.InvalidProtobuf, errors.InvalidGraph, errors.InvalidArgument),  # damaged
            *(errors.NotImplemented, errors.Fail),  # newer than this ONNX Runtime
        )
        try:
            session = onnxruntime.InferenceSession(path, options, providers=[provider])
        except unloadable as error:
            raise CheckpointError(
                f"ONNX Runtime {onnxruntime.__version__} cannot load {path}: {error}"
            ) from error
        if session.get_providers()[0] != provider:  # it goes on with the CPU by itself
            raise InputError(
                f"provider = {provider!r} did not start, and ONNX Runtime would go on with "
                f"{session.get_providers()[0]}; its log says why"
            )
        self._session, self._entry = session, entry
        self._outputs = [port.name for port in entry.outputs]

    def run(self, feed: Arrays) -> Arrays:
        """Maps inputs by name to outputs by name; raises InputError if they do not fit."""
        self._entry.check_inputs(feed)
        return dict(zip(self._outputs, self._session.run(self._outputs, feed), strict=True))


def open_session(
    folder: Path, what: str, entry: Entry, runtime: str, provider: str = CPU
) -> Session:
    """Opens one artefact of an export folder.

    Args:
        folder: the folder.
        what: which artefact, for messages.
        entry: of the manifest.
        runtime: of the manifest.
        provider: of ONNX Runtime.

    Returns:
        The session.

    Raises:
        InputError: neither ONNX Runtime nor TensorRT runs such files, or the runtime is missing.
    """
    path = folder / next(iter(entry.files))
    if runtime == "onnx":
        return OnnxSession(path, entry, provider=provider)
    if runtime == "tensorrt":
        from jvjepa.export.tensorrt import TensorRTSession

        return TensorRTSession(path, entry)
    raise InputError(f"{folder} holds {what} for {runtime}; onnx and tensorrt can be streamed")
