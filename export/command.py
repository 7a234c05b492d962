"""`jvjepa export`."""

import dataclasses
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from jvjepa.area import parse_areas
from jvjepa.errors import InputError
from jvjepa.export.exporting import Source, export
from jvjepa.export.network import CacheForm
from jvjepa.export.options import LOWEST_OPSET, Format, Options, Precision, What
from jvjepa.streaming import Positions

_Positional = tyro.conf.Positional
# What an option is for, where it is not for every export.
_FOR: dict[str, tuple[str, tuple[str, ...]]] = {
    "frames": ("what", ("clip", "classifier")),
    **dict.fromkeys(("window", "positions", "cache"), ("what", ("step",))),
    **dict.fromkeys(("opset", "provider"), ("format", ("onnx", "tensorrt"))),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Write a model for a runtime without JAX, checked against the library before it is kept."""

    model: _Positional[Path]
    """A converted folder."""
    out: _Positional[Path]
    """The folder to make, with a manifest.json."""
    format: Format = "onnx"
    """What to write. tensorrt builds engines where TensorRT is installed; elsewhere it writes the
    ONNX files and the script that builds them on the box."""
    what: tuple[What, ...] = ("clip",)
    """One or several of: clip (tokens and embedding), step (a streaming step with its cache), gate
    (the surprise of a tubelet), classifier (logits)."""
    batch: str = "1"
    """Clips or streams at a time, or "open"."""
    frames: int | None = None
    """Frames of a clip; by default as many as the encoder, or the classifier, was trained with."""
    height: int | None = None
    """Pixels; by default the model's own size."""
    width: int | None = None
    """Pixels; by default the model's own size."""
    window: int = 8
    """Tubelets (pairs of frames) that a token of a stream sees."""
    positions: Positions = "window"
    """Count the frame axis in the window, or from the start of the stream."""
    cache: CacheForm = "host"
    """Let the caller write the new keys and values into the ring, or pass the ring through."""
    precision: Precision = "float32"
    """Of products, weights and the cache."""
    opset: int = LOWEST_OPSET
    """Of ONNX."""
    tolerance: float | None = None
    """Largest relative error against the library; by default 1e-4, and 2e-2 in float16."""
    provider: str = "CPUExecutionProvider"
    """The ONNX Runtime provider that the check runs on."""
    area: str | None = None
    """Area attention, SPATIALxTEMPORAL splits as 2x2; by default what was stored at conversion."""
    area_layers: str | None = None
    """START:END of the layers that have it, as 0:18; by default the first three quarters."""
    lora: Path | None = None
    """LoRA adapters to merge into the weights."""
    force: bool = False
    """Replace OUT, if it is empty or a folder of the kind that is written."""


def export_command(options: Export, console: Console) -> int:
    """Carries out `jvjepa export`."""
    if options.batch != "open" and not options.batch.isdecimal():
        raise InputError(f'--batch {options.batch}; it must be a number, or "open"')
    _refuse_unused(options)
    source = Source(
        model=options.model,
        areas=parse_areas(options.area, options.area_layers),
        lora=options.lora,
    )
    shared = {field.name for field in dataclasses.fields(Options)}
    values = {name: value for name, value in vars(options).items() if name in shared}
    values["batch"] = None if options.batch == "open" else int(options.batch)
    with console.status(f"exporting {', '.join(options.what)}"):
        exported, remarks = export(source, options.out, Options(**values), force=options.force)
    table = Table("what", "MB", "write s", "load s", "output", "error", "cosine")
    for one in exported:
        written, loaded = (f"{seconds:.1f}" for seconds in one.seconds)
        about = (one.what, f"{one.num_bytes / 1e6:,.1f}", written, loaded)
        for name, parity in one.parity.items():
            numbers = (f"{parity.relative_error:.1e}", f"{parity.cosine:.7f}")
            table.add_row(*about, name, *numbers)
            about = ("",) * 4
    console.print(table)
    console.print(f"wrote {options.out}; every output agrees with the library's model")
    for remark in remarks:
        console.print(remark)
    return 0


def _refuse_unused(options: Export) -> None:
    """Raises InputError where an option is given that nothing in this export would follow."""
    asked = {"what": options.what, "format": (options.format,)}
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    for name, (kind, right) in _FOR.items():
        given = getattr(options, name) != defaults[name]
        if given and set(right).isdisjoint(asked[kind]):
            raise InputError(
                f"--{name} is for --{kind} {' and '.join(right)}, and this is "
                f"{' '.join(asked[kind])}; leave it out"
            )
