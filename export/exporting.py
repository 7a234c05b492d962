"""Exports a model: every artefact is written, run in its own runtime and compared, or not kept."""

import dataclasses
import importlib
import importlib.metadata
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

from jvjepa.area import AreaOptions
from jvjepa.errors import InputError
from jvjepa.export import tensorrt
from jvjepa.export.artefact import Artefact, artefact, weights_of
from jvjepa.export.manifest import MANIFEST, Entry, Manifest, files_of
from jvjepa.export.options import HALF_SCALES, TOLERANCE, Format, Options
from jvjepa.export.parity import Parity, check
from jvjepa.export.sessions import CPU, Session, open_session
from jvjepa.export.worker import call
from jvjepa.quantization import Scheme
from jvjepa.storage import check_apart, new_folder
from jvjepa.weights import Model, load

_LIBRARIES = (
    *("jvjepa", "jax", "jax2onnx", "onnx", "onnxruntime", "tensorrt"),
    *("tensorflow-cpu", "tensorflow", "orbax-export", "ai-edge-litert"),
)


class Form(NamedTuple):
    """How a format is written and run.

    Args:
        suffix: of what is written.
        extra: of the installation, which brings the libraries.
        module: of `jvjepa.export`, imported when it is needed.
        writer: the name of its function.
        session: the name of its class that runs what was written; None where
            `jvjepa.export.sessions` does.
    """

    suffix: str
    extra: str
    module: str
    writer: str
    session: str | None


_ONNX = Form(".onnx", "export", "onnx_file", "write", None)
_FORMS: dict[Format, Form] = {
    "onnx": _ONNX,
    "tensorrt": _ONNX,  # of which the engine is built
    "saved-model": Form("", "tensorflow", "saved_model", "write", "SavedModelSession"),
    "litert": Form(".tflite", "tensorflow", "saved_model", "write_litert", "LiteRTSession"),
    "stablehlo": Form(".stablehlo", "export", "stablehlo", "write", "StableHLOSession"),
}


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
        InputError: bad input, a folder that holds the model, a library that is missing, an
            operator that TensorRT does not take, parity above the tolerance, or a process that was
            killed.
        OSError: a file cannot be written.
    """
    check_apart(out, source.model, source.lora)
    with new_folder(out, MANIFEST, force=force) as work:
        who = f"the process that exported {source.model}"
        return call(who, export_here, source, work, options)


def export_here(source: Source, folder: Path, options: Options) -> tuple[list[Exported], list[str]]:
    """Exports into a folder that exists, in this process; see `export`."""
    model = load(source.model, dtype="float32", areas=source.areas, lora=source.lora)
    scheme = None if model.quantization is None else model.quantization.scheme
    _check_scheme(scheme, options)
    if scheme == "int8-static" and options.tolerance is None:
        options = dataclasses.replace(options, tolerance=TOLERANCE["int8-static"])
    builds = options.format == "tensorrt" and tensorrt.installed()
    runtime = "onnx" if options.format == "tensorrt" and not builds else options.format
    planned = [artefact(what, model.config, options) for what in options.what]
    exported, entries = [], {}
    for one in planned:
        begin = time.perf_counter()
        path = folder / f"{one.what}{_FORMS[runtime].suffix}"
        _writer(options)(path, one, model, weights_of(model, one.parts, scheme), options)
        entry = _entry(folder, path, one, options)
        if builds:
            entry = tensorrt.build_entry(folder, entry)
        written = time.perf_counter()
        session = open_artefact(folder, one, entry, runtime, options.provider)
        loaded = time.perf_counter()
        parity = check(one, model, session.run, options)
        entries[one.what] = dataclasses.replace(
            entry, parity={name: dataclasses.asdict(found) for name, found in parity.items()}
        )
        size = sum(file.num_bytes for file in entry.files.values())
        exported.append(Exported(one.what, size, parity, (written - begin, loaded - written)))
    _manifest(model, source, options, runtime, entries).write(folder)
    remarks = []
    if scheme is not None and not (scheme.startswith("int8") and runtime in ("onnx", "tensorrt")):
        remarks.append(f"kernels of {scheme} were turned back: {runtime} has no such weights")
    if runtime != options.format:
        remarks.append(_write_recipe(folder, entries))
    return exported, remarks


def _check_scheme(scheme: Scheme | None, options: Options) -> None:
    if scheme == "int8-dynamic":
        raise InputError(
            "the model's layers round each token's input to a step of its own (int8-dynamic), for "
            "which these formats have no operator; quantize with int8-static or int8"
        )
    onnx = options.format in ("onnx", "tensorrt")
    if scheme == "int8-static" and not onnx:
        raise InputError(f"int8-static can be exported to onnx and tensorrt, not {options.format}")
    integers = onnx and scheme is not None and scheme.startswith("int8")
    if integers and options.precision == "float16" and options.opset < HALF_SCALES:
        raise InputError(
            f"opset = {options.opset}; quantized kernels in float16 need {HALF_SCALES}, the first "
            "whose DequantizeLinear gives float16"
        )


def _writer(options: Options) -> Callable[..., None]:
    form = _FORMS[options.format]
    try:
        return getattr(importlib.import_module(f"jvjepa.export.{form.module}"), form.writer)
    except ModuleNotFoundError as error:
        raise InputError(
            f"--format {options.format} needs {error.name}: pip install 'jvjepa[{form.extra}]'"
        ) from error


def open_artefact(
    folder: Path, one: Artefact, entry: Entry, runtime: Format, provider: str = CPU
) -> Session:
    """Opens one artefact of an export folder in its own runtime.

    Args:
        folder: the folder.
        one: the artefact.
        entry: what the manifest says of it.
        runtime: of the manifest.
        provider: of ONNX Runtime.

    Returns:
        The session.
    """
    form = _FORMS[runtime]
    if form.session is None:
        return open_session(folder, one.what, entry, runtime, provider)
    module = importlib.import_module(f"jvjepa.export.{form.module}")
    return getattr(module, form.session)(folder / f"{one.what}{form.suffix}", one)


def _entry(folder: Path, path: Path, one: Artefact, options: Options) -> Entry:
    """The files of an artefact: those that begin with its name, the one to open first."""
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file())
        found.sort(key=lambda file: file.name != "saved_model.pb")
    else:
        found = sorted(path.parent.glob(f"{path.name}*"))
    return Entry(
        files=files_of(folder, found),
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
        if origin.lora:
            about["lora_sha256"] = ", ".join(one["sha256"] for one in origin.lora)
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
    return (
        "TensorRT is not installed here: no engine was built. The ONNX files are whole; on the "
        f"machine with the GPU run ./{script.name}, or {commands[0]}"
    )
