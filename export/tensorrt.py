"""TensorRT engines, made from an exported ONNX folder where TensorRT is installed.

    python3 -m jvjepa.export.tensorrt FOLDER

An engine belongs to one version of TensorRT and one kind of GPU; the stamp beside it says which,
and what it was made of, and an engine is not loaded elsewhere. Needs numpy, tensorrt and polygraphy
alone, so it runs on the box itself.
"""

import argparse
import ctypes
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from jvjepa.errors import CheckpointError, InputError
from jvjepa.export.manifest import BATCH, Arrays, Entry, files_of, read

TIMING_CACHE = "timing.cache"
_WORKSPACE_MB = 4096
_MAX_BATCH = 8  # of a profile where the batch is open


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stamp:
    """What an engine was built with.

    Args:
        tensorrt: version.
        gpu: its name.
        compute_capability: as "8.7".
        onnx_sha256: of the ONNX file that it was built from.
        max_batch: of its profile.
    """

    tensorrt: str
    gpu: str
    compute_capability: str
    onnx_sha256: str
    max_batch: int

    def check(self, path: Path, here: "Stamp") -> None:
        """Raises CheckpointError where an engine of this stamp cannot run `here`."""
        for name in ("tensorrt", "gpu", "compute_capability"):
            mine, found = getattr(self, name), getattr(here, name)
            if mine != found:
                raise CheckpointError(
                    f"{path} was built with {name} = {mine}, and this machine has {found}; build "
                    f"it anew: python3 -m jvjepa.export.tensorrt {path.parent}"
                )


def stamp_of(path: Path) -> Path:
    """Where the stamp of an engine is."""
    return path.with_name(path.name + ".json")


def read_stamp(path: Path) -> Stamp:
    """Reads the stamp of an engine; raises CheckpointError if there is none."""
    where = stamp_of(path)
    try:
        return Stamp(**json.loads(where.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise CheckpointError(f"{where} is missing; {path.name} may be for any machine") from error
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{where} is not the stamp of an engine: {error}") from error


def installed() -> bool:
    """Whether TensorRT and its ONNX parser can be imported."""
    try:
        import tensorrt
    except ImportError:  # a missing libnvonnxparser raises it too
        return False
    return hasattr(tensorrt, "OnnxParser")


def this_machine(onnx_sha256: str = "", max_batch: int = 0) -> Stamp:
    """The stamp of an engine that would be built here."""
    import tensorrt

    name, capability = _gpu()
    return Stamp(
        tensorrt=tensorrt.__version__,
        gpu=name,
        compute_capability=capability,
        onnx_sha256=onnx_sha256,
        max_batch=max_batch,
    )


def build(
    onnx: Path, entry: Entry, *, workspace_mb: int = _WORKSPACE_MB, max_batch: int = _MAX_BATCH
) -> Path:
    """Builds an engine beside an ONNX file: strongly typed, so of the precision of the graph.

    Args:
        onnx: the file.
        entry: what the manifest says of it; the stamp has its digest from there.
        workspace_mb: memory that the builder may take, in MiB.
        max_batch: the largest batch, where it is open; the profile is made best for 1.

    Returns:
        The engine's file; its stamp is beside it, and the folder keeps a timing cache.

    Raises:
        InputError: TensorRT is not installed, or cannot build it.
    """
    if not installed():
        raise InputError("TensorRT with its ONNX parser is not installed; no engine was built")
    import tensorrt
    from polygraphy.backend.trt import (
        CreateConfig,
        EngineBytesFromNetwork,
        NetworkFromOnnxPath,
        Profile,
    )
    from polygraphy.exception import PolygraphyException

    profile = Profile()
    open_ports = [port for port in entry.inputs if BATCH in port.shape]
    for port in open_ports:
        profile.add(port.name, *(port.sized(batch) for batch in (1, 1, max_batch)))
    cache = str(onnx.with_name(TIMING_CACHE))
    config = CreateConfig(
        profiles=[profile] if open_ports else None,
        memory_pool_limits={tensorrt.MemoryPoolType.WORKSPACE: workspace_mb << 20},
        load_timing_cache=cache,
    )
    network = NetworkFromOnnxPath(str(onnx), strongly_typed=True)
    try:
        engine = EngineBytesFromNetwork(network, config, save_timing_cache=cache)()
    except PolygraphyException as error:
        raise InputError(f"TensorRT cannot build {onnx}: {error}") from error
    path = onnx.with_suffix(".engine")
    path.write_bytes(engine)
    stamp = this_machine(entry.onnx[onnx.name].sha256, max_batch if open_ports else 0)
    stamp_of(path).write_text(json.dumps(dataclasses.asdict(stamp), indent=2) + "\n")
    return path


class TensorRTSession:
    """An engine in TensorRT, through polygraphy's runner.

    Args:
        path: the engine; its stamp must be that of this machine.
        entry: what the manifest says of it.

    Raises:
        InputError: TensorRT is not installed.
        CheckpointError: the engine was built elsewhere.
    """

    def __init__(self, path: Path, entry: Entry) -> None:
        """Loads the engine."""
        if not installed():
            raise InputError(f"{path} needs TensorRT, which is not installed")
        read_stamp(path).check(path, this_machine())
        from polygraphy.backend.common import BytesFromPath
        from polygraphy.backend.trt import EngineFromBytes, TrtRunner

        self._runner = TrtRunner(EngineFromBytes(BytesFromPath(str(path))))
        self._runner.activate()
        self._entry = entry

    def run(self, feed: Arrays) -> Arrays:
        """Maps inputs by name to outputs by name; raises InputError if they do not fit."""
        self._entry.check_inputs(feed)
        outputs = self._runner.infer(feed)
        return {port.name: outputs[port.name].copy() for port in self._entry.outputs}


def build_entry(
    folder: Path, entry: Entry, *, workspace_mb: int = _WORKSPACE_MB, max_batch: int = _MAX_BATCH
) -> Entry:
    """Builds the engine of an artefact.

    Args:
        folder: the export.
        entry: what the manifest says of the artefact: of ONNX files, or of an engine to build anew.
        workspace_mb: see `build`.
        max_batch: see `build`.

    Returns:
        What the manifest is to say: the files of the engine, and those that it was built of.

    Raises:
        InputError: see `build`.
    """
    how = {"workspace_mb": workspace_mb, "max_batch": max_batch}
    path = build(folder / next(iter(entry.onnx)), entry, **how)
    files = files_of(folder, (path, stamp_of(path)))
    return dataclasses.replace(entry, files=files, sources=entry.onnx)


def build_folder(folder: Path, *, workspace_mb: int, max_batch: int) -> list[Path]:
    """Builds engines of all artefacts of an export, and makes them what its manifest names.

    Args:
        folder: an export for ONNX, or one whose engines are to be built anew.
        workspace_mb: see `build`.
        max_batch: see `build`.

    Returns:
        The engines.

    Raises:
        InputError: the folder is no such export, or an engine cannot be built.
        CheckpointError: the ONNX files are not whole.
    """
    manifest = read(folder)
    if manifest.runtime not in ("onnx", "tensorrt"):
        raise InputError(f"{folder} was exported for {manifest.runtime}; engines are built of onnx")
    for entry in manifest.artefacts.values():
        for name, file in entry.onnx.items():
            file.check(folder / name)
    how = {"workspace_mb": workspace_mb, "max_batch": max_batch}
    built = {what: build_entry(folder, entry, **how) for what, entry in manifest.artefacts.items()}
    dataclasses.replace(manifest, runtime="tensorrt", artefacts=built).write(folder)
    return [folder / next(iter(entry.files)) for entry in built.values()]


def trtexec(name: str, entry: Entry, *, max_batch: int = _MAX_BATCH) -> str:
    """The command that builds an engine with NVIDIA's own tool.

    Args:
        name: of the ONNX file, in the folder where the command runs.
        entry: what the manifest says of it.
        max_batch: the largest batch, where it is open.

    Returns:
        A line of shell.
    """
    parts = [f"trtexec --onnx={name} --saveEngine={Path(name).with_suffix('.engine')}"]
    parts += ["--stronglyTyped", f"--memPoolSize=workspace:{_WORKSPACE_MB}M"]
    parts.append(f"--timingCacheFile={TIMING_CACHE}")
    open_ports = [port for port in entry.inputs if BATCH in port.shape]
    for option, batch in (("min", 1), ("opt", 1), ("max", max_batch)):
        shapes = ",".join(f"{p.name}:{'x'.join(map(str, p.sized(batch)))}" for p in open_ports)
        parts += [f"--{option}Shapes={shapes}"] if shapes else []
    return " ".join(parts)


def _gpu() -> tuple[str, str]:
    """The name and the compute capability of the first GPU, by CUDA's driver."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise InputError(f"this machine has no CUDA driver: {error}") from error
    device, name, numbers = ctypes.c_int(), ctypes.create_string_buffer(256), []
    codes = [cuda.cuInit(0), cuda.cuDeviceGet(ctypes.byref(device), 0)]
    codes.append(cuda.cuDeviceGetName(name, len(name), device))
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
        value = ctypes.c_int()
        codes.append(cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device))
        numbers.append(value.value)
    if any(codes):
        raise InputError(f"CUDA's driver answers with the errors {[c for c in codes if c]}")
    return name.value.decode(), f"{numbers[0]}.{numbers[1]}"


def main(arguments: list[str] | None = None) -> int:
    """Builds the engines of a folder; returns 0, or 2 after bad input."""
    parser = argparse.ArgumentParser(prog="python3 -m jvjepa.export.tensorrt")
    parser.add_argument("folder", type=Path, help="what `jvjepa export --format onnx` made")
    parser.add_argument("--workspace-mb", type=int, default=_WORKSPACE_MB)
    parser.add_argument("--max-batch", type=int, default=_MAX_BATCH)
    options: Any = parser.parse_args(arguments)
    how = {"workspace_mb": options.workspace_mb, "max_batch": options.max_batch}
    try:
        for engine in build_folder(options.folder, **how):
            print(f"built {engine}: {engine.stat().st_size / 1e6:,.1f} MB")
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
