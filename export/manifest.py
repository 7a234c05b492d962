"""`manifest.json`: what an export folder holds, and whether it is whole. Needs no JAX."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jvjepa.errors import CheckpointError, InputError

MANIFEST = "manifest.json"
FORMAT = "jvjepa-export-2"
BATCH = "batch"  # what an open batch is called

Arrays = dict[str, NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class Port:
    """An input or an output.

    Args:
        name: of the tensor.
        shape: sizes; `BATCH` where it is open.
        dtype: "float32", "float16" or "int32".
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str = "float32"

    def sized(self, batch: int) -> tuple[int, ...]:
        """The shape with a batch put in where it is open."""
        return tuple(batch if size == BATCH else int(size) for size in self.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class File:
    """A file as it was written.

    Args:
        num_bytes: its size.
        sha256: of its bytes, hexadecimal.
    """

    num_bytes: int
    sha256: str

    def check(self, path: Path) -> None:
        """Raises CheckpointError unless `path` is this file."""
        if not path.exists():
            raise CheckpointError(
                f"{path} is missing; {MANIFEST} lists it, {self.num_bytes:,} bytes"
            )
        found = path.stat().st_size
        if found != self.num_bytes:
            raise CheckpointError(
                f"{path} has {found:,} bytes, and {self.num_bytes:,} were exported"
            )
        digest = _sha256(path)
        if digest != self.sha256:
            raise CheckpointError(
                f"{path} is damaged: its sha256 is {digest}, and {self.sha256} was exported"
            )


def files_of(folder: Path, paths: Iterable[Path]) -> dict[str, File]:
    """What a manifest says of files in its folder, by name."""
    return {
        path.relative_to(folder).as_posix(): File(
            num_bytes=path.stat().st_size, sha256=_sha256(path)
        )
        for path in paths
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """One artefact of a folder.

    Args:
        files: by name; the first is the one to open.
        inputs: in order.
        outputs: in order.
        parity: by output: "relative_error", max |difference| / max |value| against the library's
            own model in float32, and "cosine".
        tolerance: the relative error that was allowed.
        sources: of an engine: the ONNX file that it was built of first, and its weights, by name.
            They may be removed; an engine cannot be built anew without them.
    """

    files: dict[str, File]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    parity: dict[str, dict[str, float]]
    tolerance: float
    sources: dict[str, File] = dataclasses.field(default_factory=dict)

    @property
    def onnx(self) -> dict[str, File]:
        """The ONNX file first, and its weights: of which an engine is built, or was."""
        return self.sources or self.files

    def check_inputs(self, feed: Mapping[str, NDArray[Any]]) -> None:
        """Raises InputError, naming what would be right, unless `feed` is what was exported."""
        ports = {port.name: port for port in self.inputs}
        if set(feed) != set(ports):
            raise InputError(f"inputs {sorted(feed)}; this artefact takes {sorted(ports)}")
        for name, port in ports.items():
            shape, dtype = feed[name].shape, feed[name].dtype
            fits = len(shape) == len(port.shape) and all(
                right in (BATCH, size) for size, right in zip(shape, port.shape, strict=True)
            )
            if not fits or dtype != np.dtype(port.dtype):
                raise InputError(
                    f"{name} is {dtype} {list(shape)}; it was exported as {port.dtype} "
                    f"{list(port.shape)}"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an export folder holds.

    Args:
        runtime: "onnx", "tensorrt", "saved-model", "litert" or "stablehlo".
        artefacts: by name: "clip", "step", "gate", "classifier".
        model: name, revision and sha256 of the weights' source.
        crop_size: pixels of the square that frames are resized and cut to as
            `jvjepa.preprocessing.preprocess` does; None if the exported size is no square.
        stream: of a step: window, positions, cache.
        labels: of a classifier: the class of each logit.
        precision: of products and weights.
        versions: of the libraries that exported and checked it.
    """

    runtime: str
    artefacts: dict[str, Entry]
    model: dict[str, str]
    crop_size: int | None
    stream: dict[str, Any] | None
    labels: tuple[str, ...] | None
    precision: str
    versions: dict[str, str]

    def write(self, folder: Path) -> None:
        """Writes manifest.json."""
        record = {"format": FORMAT, **dataclasses.asdict(self)}
        record["preprocessing"] = {
            "layout": "[batch, time, height, width, RGB]",
            "resize": "short side to int(crop_size * 256 / 224), bilinear with antialiasing",
            "crop": "the centre square of crop_size",
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
        }
        text = json.dumps(record, indent=2) + "\n"
        (folder / MANIFEST).write_text(text, encoding="utf-8")

    def entry(self, folder: Path, what: str) -> Entry:
        """The artefact `what`; raises if it is not there, or one of its files is not whole."""
        if what not in self.artefacts:
            there = ", ".join(sorted(self.artefacts))
            raise InputError(f"{folder} has no {what}, it has {there}; export with --what {what}")
        entry = self.artefacts[what]
        for name, file in entry.files.items():
            file.check(folder / name)
        return entry


def read(folder: Path) -> Manifest:
    """Reads the manifest of an export folder.

    Args:
        folder: the folder.

    Returns:
        The manifest.

    Raises:
        CheckpointError: there is none, or it is not one.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise CheckpointError(
            f"{path} does not exist; `jvjepa export MODEL OUT` makes such folders"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    found = record.get("format") if isinstance(record, dict) else None
    if found != FORMAT:
        raise CheckpointError(
            f"{path} has the format {found!r}; {FORMAT!r} would be right: export the model anew"
        )
    try:
        fields = {field.name: record[field.name] for field in dataclasses.fields(Manifest)}
        fields["artefacts"] = {what: _entry(one) for what, one in record["artefacts"].items()}
        if fields["labels"] is not None:
            fields["labels"] = tuple(fields["labels"])
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} lacks a field, or it is of another kind: {error}") from error
    return Manifest(**fields)


def _entry(record: dict[str, Any]) -> Entry:
    """The artefact of a record; raises KeyError, TypeError or AttributeError if it is not one."""
    files, sources = (_files(record[name]) for name in ("files", "sources"))
    if not files:
        raise KeyError("files")
    ports = {name: _ports(record[name]) for name in ("inputs", "outputs")}
    return Entry(**{**record, **ports, "files": files, "sources": sources})


def _files(records: dict[str, dict[str, Any]]) -> dict[str, File]:
    return {name: File(**record) for name, record in records.items()}


def _ports(values: list[dict[str, Any]]) -> tuple[Port, ...]:
    return tuple(Port(v["name"], tuple(v["shape"]), v["dtype"]) for v in values)
