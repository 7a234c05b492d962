"""Videos to score with their prompts, and a file of scores that grows row by row.

Both are CSV in the columns of the challenge that QualiVision was made for: video_name, Prompt, and
of scores Traditional_MOS and so on.
"""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jvjepa.clips import SUFFIXES, find_videos
from jvjepa.csv_file import read_csv
from jvjepa.errors import InputError
from jvjepa.quality_modules import SCORES
from jvjepa.recording import named

NAME, PROMPT, MODEL = "video_name", "Prompt", "model"
COLUMNS = tuple(f"{name}_MOS" for name in SCORES)
_NAMED = 5  # of many, what an error names


class Request(NamedTuple):
    """A video to score.

    Args:
        name: as the list has it.
        path: of the file.
        prompt: what the video should show.
    """

    name: str
    path: Path
    prompt: str


def read_requests(source: Path, videos: Path | None = None) -> list[Request]:
    """Reads a list of videos and their prompts; opens no video.

    Args:
        source: the CSV, with a header that has video_name and Prompt; other columns do not matter.
        videos: the folder that names are of; None takes that of the CSV.

    Returns:
        The videos, in the order of the list.

    Raises:
        InputError: the file is missing or no such CSV, a row is wrong or stands twice, or a video
            is not there.
    """
    folder = source.parent if videos is None else videos
    found: list[Request] = []
    lines: dict[tuple[str, str], int] = {}
    for line, row in read_csv(source, (NAME, PROMPT)):
        name, prompt = row[NAME].strip(), row[PROMPT].strip()
        for column, value in ((NAME, name), (PROMPT, prompt)):
            if not value:
                raise InputError(f"{source}:{line}: {column} is empty")
        if (name, prompt) in lines:
            raise InputError(
                f"{source}:{line}: {name} with this prompt stands in line {lines[name, prompt]} too"
            )
        lines[name, prompt] = line
        found.append(Request(name, folder / name, prompt))
    if not found:
        raise InputError(f"{source} lists no video")
    missing = sorted({request.name for request in found if not request.path.is_file()})
    if missing:
        names = ", ".join(missing[:_NAMED]) + (", .." if len(missing) > _NAMED else "")
        raise InputError(
            f"{folder} does not hold {len(missing)} of the videos of {source}: {names}"
        )
    return found


def folder_requests(folder: Path, prompt: str) -> list[Request]:
    """Lists the videos in a folder, and in those inside it, with one prompt for all.

    Raises:
        InputError: there is none.
    """
    found = find_videos(folder)
    if not found:
        raise InputError(f"{folder} has no video in it ({', '.join(sorted(SUFFIXES))})")
    return [Request(path.as_posix(), folder / path, prompt) for path in found]


class ScoreFile:
    """A CSV to which every scored video adds its row, at once and whole.

    What is there already counts: a file of an interrupted run goes on. A row that was being written
    when the machine stopped is taken away.

    Args:
        path: the file.
        model: a digest of the model's weights, which is in every row; scores of several models do
            not belong together.
        force: begin anew.

    Attributes:
        scores: float32 [5] by (name, prompt), of all rows.

    Raises:
        InputError: the file is no such CSV, or of another model.
    """

    def __init__(self, path: Path, model: str, *, force: bool) -> None:
        """Reads what is there, and opens the file."""
        self.path, self.model = path, model
        self.scores: dict[tuple[str, str], NDArray[np.float32]] = {}
        content = b"" if force or not path.exists() else path.read_bytes()
        whole = content[: _end_of_rows(content)]
        columns = (NAME, PROMPT, *COLUMNS, MODEL)
        if not whole and not _row(columns).startswith(content):
            raise InputError(f"{path} is no file of scores; choose another name or pass --force")
        for line, row in read_csv(path, columns, whole) if whole else ():
            if row[MODEL] != model:
                raise InputError(
                    f"{path}:{line} is of a model with other weights; choose another name or pass "
                    "--force to begin anew"
                )
            self.scores[row[NAME], row[PROMPT]] = _numbers(f"{path}:{line}", row)
        with named(path):
            self._file = open(path, "r+b" if path.exists() else "w+b")
            self._file.truncate(len(whole))
            self._file.seek(len(whole))
        if not whole:
            self._write(columns)

    def __enter__(self) -> "ScoreFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def has(self, request: Request) -> bool:
        """Whether a video is scored already."""
        return (request.name, request.prompt) in self.scores

    def add(self, request: Request, scores: NDArray[np.float32]) -> None:
        """Adds a video's scores, float32 [5]."""
        self._write([request.name, request.prompt, *map(str, scores), self.model])
        self.scores[request.name, request.prompt] = scores

    def _write(self, fields: Sequence[str]) -> None:
        with named(self.path):
            self._file.write(_row(fields))
            self._file.flush()
            os.fsync(self._file.fileno())


def _row(fields: Sequence[str]) -> bytes:
    row = io.StringIO(newline="")
    csv.writer(row).writerow(fields)
    return row.getvalue().encode()


def _numbers(where: str, row: dict[str, str]) -> NDArray[np.float32]:
    try:
        scores = np.array([float(row[name]) for name in COLUMNS], np.float32)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from None
    if not np.isfinite(scores).all():
        raise InputError(f"{where}: the scores {scores.tolist()} are not finite")
    return scores


def _end_of_rows(content: bytes) -> int:
    """Where the last whole row of a CSV ends: at a line break that is not inside of quotes."""
    end = at = quotes = 0
    for line in content.splitlines(keepends=True):
        at += len(line)
        quotes += line.count(b'"')
        if quotes % 2 == 0 and line.endswith(b"\n"):
            end = at
    return end
