"""Exports a model: every artefact is written, run in its own runtime and compared, or not kept."""

import dataclasses
import importlib
import importlib.metadata
import multiprocessing
import shlex
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import jax

from jvjepa.area import AreaOptions
from jvjepa.errors import InputError
from jvjepa.export import tensorrt
from jvjepa.export.artefact import Artefact, Weights, artefact, weights_of
from jvjepa.export.manifest import Entry, Manifest
from jvjepa.export.options import HALF_SCALES, TOLERANCE, Options
from jvjepa.export.parity import Parity, check
from jvjepa.export.sessions import OnnxSession, Session
from jvjepa.quantization import Scheme
from jvjepa.storage import check_free, new_folder
from jvjepa.weights import Model, load, read_quantization

_LIBRARIES = (
    *("jvjepa", "jax", "jax2onnx", "onnx", "onnxruntime", "tensorrt"),
    *("tensorflow-cpu", "tensorflow", "orbax-export", "ai-edge-litert"),
)
_EXTRA = {"saved-model": "tensorflow", "litert": "tensorflow"}  # others need "export"
_SUFFIX = {"saved-model": "", "litert": ".tflite", "stablehlo": ".stablehlo"}  # others .onnx


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """The model to export, as the exporting process loads it.

    Args:
        model: a converted folder.
        areas: area attention to put in.
        lora: adapters to merge.
    """

    model: Path
    areas: AreaOptions | None = None
    lora: Path | None = None


class Exported(NamedTuple):
    """What was exported.

    Args:
        what: the artefact.
        num_bytes: of its files.
        parity: of its outputs.
        seconds: that writing it took, and that loading it in its runtime took.
    """

    what: str
    num_bytes: int
    parity: dict[str, Parity]
    seconds: tuple[float, float]


def export(
    source: Source, out: Path, options: Options, *, force: bool = False
) -> tuple[list[Exported], list[str]]:
    """Exports a model, in a process of its own: the converters patch what others import.

    The folder appears whole or not at all, and only if every artefact agrees with the library.

    Args:
        source: the model.
        out: the folder to make.
        options: what, and how.
        force: replace the folder.

    Returns:
        What was exported, and what else there is to say: that no engine was built, for instance.

    Raises:
        InputError: bad input, a library that is missing, an operator that TensorRT does not take,
            or parity above the tolerance.
        OSError: a file cannot be written.
    """
    check_free(out, force=force)
    with (
        new_folder(out, force=force) as work,
        ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process,
    ):
        try:
            return process.submit(export_here, source, work, options).result()
        except BrokenProcessPool as error:
            raise InputError(
                f"the process that exported {source.model} was killed; for lack of memory, if "
                "nobody did it: it needs about five times the size of the float32 weights"
            ) from error


def export_here(source: Source, folder: Path, options: Options) -> tuple[list[Exported], list[str]]:
    """Exports into a folder that exists, in this process; see `export`."""
    model = load(source.model, dtype="float32", areas=source.areas, lora=source.lora)
    quantization = read_quantization(source.model)
    scheme = None if quantization is None else quantization.scheme
    _check_scheme(scheme, options)
    if scheme == "int8-static" and options.tolerance is None:
        options = dataclasses.replace(options, tolerance=TOLERANCE["int8-static"])
    planned = [artefact(what, model.config, options) for what in options.what]
    exported, entries = [], {}
    for one in planned:
        begin = time.perf_counter()
        path = _write(folder, one, model, weights_of(model, one.parts, scheme), options)
        written = time.perf_counter()
        entry = _entry(folder, path, one, options)
        session = open_artefact(path, one, entry, options)
        loaded = time.perf_counter()
        parity = check(one, model, session.run, options)
        entries[one.what] = dataclasses.replace(
            entry, parity={name: dataclasses.asdict(found) for name, found in parity.items()}
        )
        size = sum(entry.files.values())
        exported.append(Exported(one.what, size, parity, (written - begin, loaded - written)))
    built = options.format == "tensorrt" and tensorrt.installed()
    runtime = "onnx" if options.format == "tensorrt" and not built else options.format
    _manifest(model, source, options, runtime, entries).write(folder)
    remarks = []
    if scheme is not None and not (scheme.startswith("int8") and runtime in ("onnx", "tensorrt")):
        remarks.append(f"kernels of {scheme} were turned back: {runtime} has no such weights")
    if options.format == "tensorrt" and not built:
        remarks.append(_write_recipe(folder, entries))
    return exported, remarks


def _write(folder: Path, one: Artefact, model: Model, weights: Weights, options: Options) -> Path:
    path = folder / f"{one.what}{_SUFFIX.get(options.format, '.onnx')}"
    _writer(options)(path, one, model, weights, options)
    if options.format == "tensorrt" and tensorrt.installed():
        plain = Entry(files={}, inputs=one.inputs, outputs=one.outputs, parity={}, tolerance=0.0)
        return tensorrt.build(path, plain)
    return path


def _check_scheme(scheme: Scheme | None, options: Options) -> None:
    if scheme == "int8-dynamic":
        raise InputError(
            "the model's layers round each token's input to a step of its own (int8-dynamic), for "
            "which these formats have no operator; quantize with int8-static or int8"
        )
    if scheme == "int8-static" and options.format not in ("onnx", "tensorrt"):
        raise InputError(f"int8-static can be exported to onnx and tensorrt, not {options.format}")
    if scheme is not None and options.precision == "float16" and options.opset < HALF_SCALES:
        raise InputError(
            f"opset = {options.opset}; quantized kernels in float16 need {HALF_SCALES}, the first "
            "whose DequantizeLinear gives float16"
        )


def _writer(options: Options) -> Callable[..., None]:
    modules = {
        "saved-model": ("saved_model", "write"),
        "litert": ("saved_model", "write_litert"),
        "stablehlo": ("stablehlo", "write"),
    }
    module, name = modules.get(options.format, ("onnx_file", "write"))
    try:
        return getattr(importlib.import_module(f"jvjepa.export.{module}"), name)
    except ModuleNotFoundError as error:
        extra = _EXTRA.get(options.format, "export")
        raise InputError(
            f"--format {options.format} needs {error.name}: pip install 'jvjepa[{extra}]'"
        ) from error


def open_artefact(path: Path, one: Artefact, entry: Entry, options: Options) -> Session:
    """Opens one artefact in its own runtime."""
    if path.suffix == ".engine":
        return tensorrt.TensorRTSession(path, entry)
    if path.suffix == ".onnx":
        return OnnxSession(path, entry, provider=options.provider)
    if path.suffix == ".stablehlo":
        from jvjepa.export.stablehlo import StableHLOSession

        return StableHLOSession(path, one)
    from jvjepa.export.saved_model import LiteRTSession, SavedModelSession

    return (LiteRTSession if path.suffix == ".tflite" else SavedModelSession)(path, one)


def _entry(folder: Path, path: Path, one: Artefact, options: Options) -> Entry:
    """The files of an artefact: those that begin with its name, the one to open first."""
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file())
        found.sort(key=lambda file: file.name != "saved_model.pb")
    else:
        found = sorted(path.parent.glob(f"{path.name}*"))
    files = {file.relative_to(folder).as_posix(): file.stat().st_size for file in found}
    return Entry(
        files=files,
        inputs=one.inputs,
        outputs=one.outputs,
        parity={},
        tolerance=options.largest_error,
    )


def _manifest(
    model: Model, source: Source, options: Options, runtime: str, entries: dict[str, Entry]
) -> Manifest:
    config, origin = model.config, model.source
    crop = config.encoder.crop_size
    sides = {crop if side is None else side for side in (options.height, options.width)}
    about = {"folder": source.model.name}
    if origin is not None:
        about |= {"name": origin.name, "revision": origin.revision, "sha256": origin.sha256}
        if origin.lora is not None:
            about["lora_sha256"] = origin.lora["sha256"]
    stream = {
        "window": options.window,
        "positions": options.positions,
        "cache": options.cache,
        "tubelet_size": config.encoder.tubelet_size,
    }
    return Manifest(
        runtime=runtime,
        artefacts=entries,
        model=about,
        crop_size=sides.pop() if len(sides) == 1 else None,
        stream=stream if "step" in entries else None,
        labels=tuple(config.classifier.labels) if "classifier" in entries else None,
        precision=options.precision,
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    there = {found.metadata["Name"].lower() for found in importlib.metadata.distributions()}
    return {name: importlib.metadata.version(name) for name in _LIBRARIES if name in there} | {
        "platform": jax.default_backend()
    }


def _write_recipe(folder: Path, entries: dict[str, Entry]) -> str:
    """Writes what to run on a machine that has TensorRT; returns the remark."""
    lines = [
        "#!/bin/sh",
        "# Builds engines on this machine, with the stamp that EdgeStream checks.",
    ]
    lines += ["set -e", 'cd "$(dirname "$0")"', "python3 -m jvjepa.export.tensorrt .", ""]
    lines += ["# NVIDIA's own tool builds the same engines, without the stamp:"]
    commands = [tensorrt.trtexec(next(iter(entry.files)), entry) for entry in entries.values()]
    script = folder / "build_engines.sh"
    script.write_text("\n".join([*lines, *(f"# {command}" for command in commands), ""]))
    script.chmod(0o755)
    where = shlex.quote(script.name)
    return (
        "TensorRT is not installed here: no engine was built. The ONNX files are whole; on the "
        f"machine with the GPU run ./{where}, or {commands[0]}"
    )
