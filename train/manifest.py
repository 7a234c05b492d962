"""Which clips there are to train on: a folder of videos, or a manifest that lists them.

    /data/a.mp4 3                  path and label, as Meta's manifests; "::" may stand for the space
    a.mp4,0.5,4.0,3                path,start,end,label; empty times mean the whole video
    {"path": "a.mp4", "label": 3}  JSON lines, in a file that ends in .jsonl

Paths are relative to the manifest's folder. Labels are whole numbers from 0; all rows have one, or
in JSON lines and in files with a header (`path,label` say) none. Of a folder every video is taken;
if they lie in folders of it, these are the classes, numbered in the order of their names.
"""

import contextlib
import csv
import dataclasses
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.progress import track

from jvjepa import video
from jvjepa.clips import SUFFIXES, find_videos
from jvjepa.decoding import Place, is_live, locate
from jvjepa.errors import InputError, VideoError

if TYPE_CHECKING:
    from rich.console import Console

    from jvjepa import cli

NO_LABEL = -1
_COLUMNS = ("path", "start", "end", "label")
_FORMS = "`path label` or `path,start,end,label`"
_META = re.compile(r"(.+)(?:::|\s)\s*(\S+)")
_LARGEST_LABEL = 2**31 - 1
_NAMED = 5  # of many values, those that a message names


class DataError(InputError):
    """Training data that cannot be used."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Manifest:
    """Clips of video files, one a row.

    Args:
        source: where the list is from; messages begin with it.
        paths: of the files, absolute, or URLs; length n, 1 or more.
        starts: float64 [n], seconds at which the clips start.
        ends: float64 [n], seconds at which they end; infinite where that is the file's end.
        labels: int32 [n], from 0; all -1 where there are none.
        classes: names of the labels; empty where nobody knows them.

    Raises:
        DataError: there is no row, or the columns differ in length.
    """

    source: str
    paths: tuple[str, ...]
    starts: NDArray[np.float64]
    ends: NDArray[np.float64]
    labels: NDArray[np.int32]
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Checks the columns."""
        if not self.paths:
            raise DataError(f"{self.source}: lists no clip")
        lengths = [len(column) for column in (self.starts, self.ends, self.labels)]
        if set(lengths) != {len(self.paths)}:
            raise DataError(
                f"{self.source}: starts, ends and labels have the lengths {lengths}; "
                f"there are {len(self.paths)} paths"
            )

    def __len__(self) -> int:
        """How many clips, n."""
        return len(self.paths)

    @property
    def labelled(self) -> bool:
        """Whether the clips have labels."""
        return bool(self.labels[0] != NO_LABEL)

    @property
    def digest(self) -> str:
        """The sha256 of the rows; paths count from the list's folder, so that both can be moved."""
        folder = os.path.dirname(os.path.abspath(self.source))
        names = [path if "://" in path else os.path.relpath(path, folder) for path in self.paths]
        digest = hashlib.sha256("\n".join(names).encode())
        for column in (self.starts, self.ends, self.labels):
            digest.update(column.tobytes())
        return digest.hexdigest()


class _Row(NamedTuple):
    """A clip as it is written down, `where` in the file."""

    where: str
    path: Any
    start: Any = None
    end: Any = None
    label: Any = None


def read_manifest(source: str | os.PathLike[str]) -> Manifest:
    """Reads a list of clips, or makes one of a folder; opens no video.

    Args:
        source: a manifest in one of the forms above, or a folder.

    Returns:
        The clips, in the order of the file; those of a folder by name.

    Raises:
        DataError: there is nothing there, or a row is wrong; the message names file and line.
    """
    path = Path(source)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise DataError(f"{path}: there is no such file or folder")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not a text in UTF-8 ({error.reason})") from None
    rows = list(_json_rows(path, lines) if path.suffix == ".jsonl" else _text_rows(path, lines))
    spans = [_span(row) for row in rows]
    return Manifest(
        source=str(path),
        paths=tuple(_path(row, path.absolute().parent) for row in rows),
        starts=np.array([start for start, _ in spans], np.float64),
        ends=np.array([end for _, end in spans], np.float64),
        labels=_labels(rows),
    )


def _read_folder(folder: Path) -> Manifest:
    found = find_videos(folder)
    if not found:
        raise DataError(f"{folder}: has no video in it ({', '.join(sorted(SUFFIXES))})")
    direct = [path for path in found if len(path.parts) == 1]
    if direct and len(direct) < len(found):
        inside = next(path for path in found if len(path.parts) > 1)
        raise DataError(
            f"{folder}: has videos of no class ({direct[0]}) beside folders of classes ({inside}); "
            "move them, or write a manifest"
        )
    classes = () if direct else tuple(sorted({path.parts[0] for path in found}))
    number = {name: label for label, name in enumerate(classes)}
    return Manifest(
        source=str(folder),
        paths=tuple(str(folder.absolute() / path) for path in found),
        starts=np.zeros(len(found)),
        ends=np.full(len(found), np.inf),
        labels=np.array([number.get(path.parts[0], NO_LABEL) for path in found], np.int32),
        classes=classes,
    )


def _text_rows(path: Path, lines: Sequence[str]) -> Iterator[_Row]:
    """The rows of a CSV, or of Meta's form; the first line tells which."""
    reader = csv.reader(lines, strict=True)
    columns: tuple[str, ...] | None = None
    try:
        for fields in reader:
            where = f"{path}:{reader.line_num}"
            if not "".join(fields).strip():
                continue
            fields = [field.strip() for field in fields]
            if columns is None:
                header = tuple(field.lower() for field in fields)
                if "path" in header and set(header) <= set(_COLUMNS):
                    columns = header
                    continue
                if len(fields) != len(_COLUMNS):
                    break
                columns = _COLUMNS
            if len(fields) != len(columns):
                right = ",".join(columns)
                raise DataError(f"{where}: has {len(fields)} fields; right is {right}")
            yield _Row(where, **dict(zip(columns, fields, strict=True)))
    except csv.Error as error:
        if columns is not None:
            raise DataError(f"{path}:{reader.line_num}: is no CSV ({error})") from None
    if columns is not None:
        return
    for number, line in enumerate(lines, 1):
        if line.strip():
            match = _META.fullmatch(line.strip())
            if match is None:
                raise DataError(f"{path}:{number}: {line.strip()!r} is not {_FORMS}")
            name, label = match[1].strip(), match[2]
            if len(name) > 1 and name[0] == name[-1] == '"':
                name = name[1:-1].replace('""', '"')
            yield _Row(f"{path}:{number}", name, label=label)


def _json_rows(path: Path, lines: Sequence[str]) -> Iterator[_Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: is no JSON ({error.msg})") from None
        if not isinstance(record, dict) or "path" not in record:
            raise DataError(f'{where}: must be an object with a path, as {{"path": "a.mp4"}}')
        unknown = sorted(set(record) - set(_COLUMNS))
        if unknown:
            raise DataError(f"{where}: has {unknown[0]!r}; right are {', '.join(_COLUMNS)}")
        yield _Row(where, **record)


def _path(row: _Row, folder: Path) -> str:
    if not isinstance(row.path, str) or not row.path:
        raise DataError(f"{row.where}: path = {row.path!r}; it must be that of a video file")
    return row.path if "://" in row.path else str(folder / row.path)


def _span(row: _Row) -> tuple[float, float]:
    """The seconds at which a clip starts and ends."""
    times = []
    for name, value, default in (("start", row.start, 0.0), ("end", row.end, math.inf)):
        if value in (None, ""):
            times.append(default)
            continue
        try:
            seconds = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            seconds = math.nan
        if not 0 <= seconds < math.inf:
            raise DataError(f"{row.where}: {name} = {value!r}; it must be 0 or more seconds")
        times.append(seconds)
    start, end = times
    if not start < end:
        raise DataError(f"{row.where}: end = {end:g}; it must be above start = {start:g} (seconds)")
    return start, end


def few(values: Sequence[Any] | NDArray[Any]) -> str:
    """The first of many values, for a message."""
    return ", ".join(map(str, values[:_NAMED])) + (", .." if len(values) > _NAMED else "")


def check_same_classes(
    source: str, classes: tuple[str, ...], other: str, others: tuple[str, ...]
) -> None:
    """Raises DataError where two sets number different classes; without names nobody knows.

    Args:
        source: of the set that is learned from.
        classes: its names of the labels, or ().
        other: the set that is measured on.
        others: its names of the labels, or ().
    """
    if classes and others and classes != others:
        raise DataError(
            f"{other}: its classes are {few(others)}, and those of {source} {few(classes)}; labels "
            "are their numbers, so that both must have the same ones, each with a clip or more"
        )


def count_labels(
    source: str, labels: NDArray[np.int32], rows: NDArray[np.integer], hint: str = ""
) -> int:
    """Counts the classes that there are to learn.

    Args:
        source: where the labels are from; the message begins with it.
        labels: int32 [n], one of every clip.
        rows: int [n], which rows of the source the clips are.
        hint: the end of the message, why a label may be missing.

    Returns:
        How many; the labels are 0 to one less, and each is there.

    Raises:
        DataError: labels are left out.
    """
    found = np.unique(labels)
    largest = int(found[-1])
    if largest + 1 != len(found):
        # Not all that are missing, which a label with a digit too many makes very many.
        some = np.arange(min(largest, len(found) + _NAMED + 1))
        raise DataError(
            f"{source}: labels must be 0, 1, 2, .. without a gap; the largest is {largest}, of row "
            f"{rows[labels.argmax()]}, but no row has {few(np.setdiff1d(some, found))}{hint}"
        )
    return len(found)


def _labels(rows: Sequence[_Row]) -> NDArray[np.int32]:
    """int32 [n]; all have a label or none."""
    labels = np.full(len(rows), NO_LABEL, np.int32)
    for i, row in enumerate(rows):
        if (row.label is None) != (rows[0].label is None):
            one, other = (row, rows[0]) if row.label is None else (rows[0], row)
            raise DataError(f"{one.where}: has no label, but {other.where} has one")
        if row.label is None:
            continue
        text = row.label if isinstance(row.label, str) else json.dumps(row.label)
        if not re.fullmatch(r"[0-9]{1,10}", text) or int(text) > _LARGEST_LABEL:
            raise DataError(
                f"{row.where}: label = {row.label!r}; it must be a whole number, 0 or more "
                f"(rows are {_FORMS})"
            )
        labels[i] = int(text)
    return labels


# Checking


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileReport:
    """What a file turned out to be when all of it was decoded.

    Args:
        frames: how many.
        seconds: until the last one has been shown, for as long as the one before.
        size: its width and height in pixels; None where it cannot be read.
        problem: why it cannot be read; None where it can.
    """

    frames: int = 0
    seconds: float = 0.0
    size: tuple[int, int] | None = None
    problem: str | None = None


def require_file(path: str) -> Place:
    """Locates a file or the URL of one; raises VideoError for a live source, which has no end."""
    place = locate(path, video.Reconnect().timeout)
    if is_live(place):
        raise VideoError(f"{place.name}: is live and has no end; training needs files")
    return place


def check_file(path: str) -> FileReport:
    """Decodes a whole file.

    Args:
        path: a path or URL.

    Returns:
        What it is; never raises because of what is in the file.
    """
    frames, last, gap, size = 0, 0.0, 0.0, None
    try:
        require_file(path)
        with contextlib.closing(video.stream(path)) as stream:
            for frame, time in stream:
                frames, last, gap = frames + 1, time, time - last
                width_height = (frame.shape[1], frame.shape[0])
                size = size or width_height
                if width_height != size:
                    sizes = " to ".join(f"{w}x{h}" for w, h in (size, width_height))
                    raise VideoError(f"{path}: changes from {sizes} pixels at {time:.3f} s")
    except (VideoError, OSError) as error:
        return FileReport(problem=str(error))
    return FileReport(frames=frames, seconds=last + gap, size=size)


def check_command(options: "cli.Data", console: "Console") -> int:
    """`jvjepa data check`."""
    if options.workers is not None and options.workers < 1:
        raise InputError(f"workers = {options.workers}; it must be 1 or more")
    manifest = read_manifest(options.manifest)
    files = tuple(dict.fromkeys(manifest.paths))
    console.print(f"{manifest.source}: {len(manifest)} clips of {len(files)} files")
    console.print(_describe_labels(manifest))
    with ThreadPoolExecutor(options.workers or os.cpu_count()) as pool:
        results = pool.map(check_file, files)
        shown = track(results, "reading", len(files), console=console, transient=True)
        reports = dict(zip(files, shown, strict=True))

    good = [report for report in reports.values() if report.problem is None]
    if good:
        hours = sum(report.seconds for report in good) / 3600
        frames = sum(report.frames for report in good)
        sizes = Counter(report.size for report in good).most_common()
        most = ", ".join(f"{w}x{h} ({count})" for (w, h), count in sizes[:5])
        more = f" and {len(sizes) - 5} other sizes" if len(sizes) > 5 else ""
        console.print(f"{len(good)} files read: {frames:,} frames, {hours:.2f} h, {most}{more}")
    problems = {path: report.problem for path, report in reports.items() if report.problem}
    bad = sum(path in problems for path in manifest.paths)
    for path, start in zip(manifest.paths, manifest.starts.tolist(), strict=True):
        if path not in problems and 0 < start >= reports[path].seconds:
            length = reports[path].seconds
            problems[f"{path} {start}"] = f"{path}: start = {start:g}, but it lasts {length:.3f} s"
            bad += 1
    for problem in problems.values():
        console.print(problem)
    console.print(
        f"{bad} of {len(manifest)} clips cannot be read ({bad / len(manifest):.2%})"
        + ("; training replaces them, and stops above --max-bad" if bad else "")
    )
    return 1 if bad else 0


def _describe_labels(manifest: Manifest) -> str:
    if not manifest.labelled:
        return "no labels"
    counts = np.bincount(manifest.labels)
    there, missing = counts[counts > 0], np.flatnonzero(counts == 0)
    text = f"{len(there)} labels, {there.min()} to {there.max()} clips each"
    if len(missing):
        text += f"; {len(missing)} below the largest ({len(counts) - 1}) have none: {few(missing)}"
    return text
