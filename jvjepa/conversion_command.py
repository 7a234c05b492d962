"""`jvjepa convert`: from somebody else's checkpoint to ours."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from jvjepa.area import parse_areas
from jvjepa.errors import InputError
from jvjepa.storage import check_apart
from jvjepa.weights import Source

if TYPE_CHECKING:
    from jvjepa import cli
    from jvjepa.convert import Report

_OF_PROBE = ("encoder", "labels", "probe_index", "probe_heads", "probe_layers", "probe_frames")
_OF_PT = ("heads", "crop_size")
_OF_VIDEO = ("key", "predictor_heads", "area", "area_layers")
_USAGE = "jvjepa convert SOURCE OUT"
_QUALITY_USAGE = f"{_USAGE} --text FOLDER"
_PROBE_USAGE = "jvjepa convert --probe FILE.pt --encoder MODEL --labels FILE OUT"


def convert_command(options: "cli.Convert", console: Console) -> int:
    """`jvjepa convert`."""
    report = _convert(options) if options.probe is None else _attach(options)
    console.print(f"wrote {report.out}: {report.dtype}, {report.num_bytes / 1e6:,.1f} MB")
    print_source(report.source, console)
    print_parameters(report.parameters, console)
    return 0


def _convert(options: "cli.Convert") -> "Report":
    from jvjepa import convert

    _refuse(options, _OF_PROBE, "is for --probe", _USAGE)
    if options.out is None:
        raise InputError(f"OUT is missing: {_USAGE}")
    places = (options.source, options.out)
    how = {"dtype": options.dtype, "revision": options.revision, "force": options.force}
    if options.text is not None:
        _refuse(options, _OF_VIDEO, "is not for --text", _QUALITY_USAGE)
        hints = convert.Hints(heads=options.heads, crop_size=options.crop_size)
        return convert.convert_quality(*places, text=options.text, hints=hints, **how)
    if convert.is_text_source(options.source, options.revision):
        _refuse(options, (*_OF_PT, *_OF_VIDEO), "is not for text encoders", _USAGE)
        return convert.convert_text(*places, **how)
    return convert.convert(
        *places,
        key=options.key,
        hints=convert.Hints(
            heads=options.heads,
            predictor_heads=options.predictor_heads,
            crop_size=options.crop_size,
        ),
        areas=parse_areas(options.area, options.area_layers),
        **how,
    )


def _attach(options: "cli.Convert") -> "Report":
    from jvjepa.convert import attach_probe, read_labels

    if options.out is not None:
        raise InputError(f"one folder too many: {_PROBE_USAGE}")
    of_encoder = ("dtype", "revision", "text", *_OF_PT, *_OF_VIDEO)
    _refuse(options, of_encoder, "is not for --probe", _PROBE_USAGE)
    if options.encoder is None:
        raise InputError(f"a probe needs the converted encoder that it is for: {_PROBE_USAGE}")
    if options.labels is None:
        raise InputError(
            f"{options.probe} does not name its classes; give --labels: {_PROBE_USAGE}"
        )
    check_apart(Path(options.source), options.labels)
    return attach_probe(
        options.probe,
        options.encoder,
        options.source,
        labels=read_labels(options.labels),
        index=options.probe_index,
        heads=options.probe_heads,
        layers=options.probe_layers,
        frames=options.probe_frames,
        force=options.force,
    )


def _refuse(options: "cli.Convert", names: Sequence[str], why: str, usage: str) -> None:
    """Raises InputError if one of these options is given."""
    given = [name for name in names if getattr(options, name) is not None]
    if given:
        raise InputError(f"--{given[0].replace('_', '-')} {why}: {usage}")


def print_source(source: Source | None, console: Console) -> None:
    """Says where weights came from."""
    if source is None:
        console.print("made here, not converted")
        return
    revision = f" at {source.revision}" if source.revision else ""
    console.print(f"converted from {source.name}{revision} by jvjepa {source.converter}")
    console.print(f"source's sha256: {source.sha256}")
    for part, key in source.keys.items():
        console.print(f"{part} taken from {key!r}")
    for name, reason in source.dropped.items():
        console.print(f"left out {name}: {reason}")
    for one in source.lora:
        console.print(f"adapters merged: {one['name']}, sha256 {one['sha256']}")
    for what, part in (("probe attached", source.probe), ("text encoder", source.text)):
        if part is not None:
            console.print(f"{what}:")
            print_source(part, console)


def print_parameters(counts: dict[str, int], console: Console) -> None:
    """Says how many parameters each part has."""
    for part, count in {**counts, "all": sum(counts.values())}.items():
        console.print(f"{part + ':':17} {count:13,} parameters")
