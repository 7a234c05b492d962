"""Rated videos: a CSV of prompts and mean opinion scores, read strictly, and split by video.

    video_name,Prompt,Traditional_MOS,Alignment_MOS,Aesthetic_MOS,Temporal_MOS,Overall_MOS
    00001.mp4,a dog on a beach,3.2,4.1,3.5,2.9,3.3

A score is a number from 1 to 5. A video whose scores are not all there is left out and counted, and
never given others in their place. Other columns are not looked at.
"""

import dataclasses
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jvjepa.csv_file import read_csv
from jvjepa.errors import ConfigError
from jvjepa.score_file import COLUMNS, NAME, PROMPT
from jvjepa.train.manifest import DataError

LOWEST, HIGHEST = 1.0, 5.0

_UNKNOWN = ("", "nan", "na", "n/a", "null", "none")  # how a missing score is written


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Ratings:
    """Videos with prompts and scores, in the order of their list.

    Args:
        source: where the list is from; messages begin with it.
        names: of the videos, as the list has them, each once.
        paths: of their files.
        prompts: what each was made from.
        scores: float32 [n, 5], 1 to 5, in the order of `jvjepa.quality.SCORES`.
        unrated: names of the videos that were left out because a score is missing.
    """

    source: str
    names: tuple[str, ...]
    paths: tuple[Path, ...]
    prompts: tuple[str, ...]
    scores: NDArray[np.float32]
    unrated: tuple[str, ...] = ()

    def __len__(self) -> int:
        """How many videos, n."""
        return len(self.names)

    @property
    def digest(self) -> str:
        """The sha256 of names, prompts and scores; where the files lie does not matter."""
        digest = hashlib.sha256("\n".join([*self.names, *self.prompts]).encode())
        digest.update(self.scores.tobytes())
        return digest.hexdigest()

    def take(self, rows: Sequence[int]) -> "Ratings":
        """The videos of some rows, in the order of `rows`."""
        return dataclasses.replace(
            self,
            names=tuple(self.names[i] for i in rows),
            paths=tuple(self.paths[i] for i in rows),
            prompts=tuple(self.prompts[i] for i in rows),
            scores=self.scores[np.asarray(rows, np.int64)],
        )


class _Row(NamedTuple):
    line: int
    name: str
    prompt: str
    scores: tuple[float, ...] | None  # None where one is missing


def read_ratings(
    source: str | os.PathLike[str], videos: str | os.PathLike[str] | None = None
) -> Ratings:
    """Reads a list of rated videos; opens no video.

    Args:
        source: the CSV, with a header.
        videos: the folder that names are of; None takes that of the CSV.

    Returns:
        The videos whose five scores are all there.

    Raises:
        InputError: there is no such file, or it is no CSV with these columns.
        DataError: a row is wrong, a name stands twice, a video is not there, or no row has all
            scores; the message names file and line.
    """
    source = Path(source)
    folder = source.parent if videos is None else Path(videos)
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder of videos")
    rows = [_row(source, *row) for row in read_csv(source, (NAME, PROMPT, *COLUMNS))]
    if not rows:
        raise DataError(f"{source}: lists no video")
    lines: dict[str, int] = {}
    for row in rows:
        if row.name in lines:
            raise DataError(
                f"{source}:{row.line}: {NAME} = {row.name!r} stands in line {lines[row.name]} too; "
                "each video must stand once"
            )
        lines[row.name] = row.line
    rated = [row for row in rows if row.scores is not None]
    if not rated:
        raise DataError(f"{source}: none of its {len(rows)} videos has all of {', '.join(COLUMNS)}")
    missing = [row for row in rated if not (folder / row.name).is_file()]
    if missing:
        first = missing[0]
        others = f", nor are {len(missing) - 1} others" if len(missing) > 1 else ""
        raise DataError(f"{source}:{first.line}: {folder / first.name} is not there{others}")
    return Ratings(
        source=str(source),
        names=tuple(row.name for row in rated),
        paths=tuple(folder / row.name for row in rated),
        prompts=tuple(row.prompt for row in rated),
        scores=np.array([row.scores for row in rated], np.float32),
        unrated=tuple(row.name for row in rows if row.scores is None),
    )


def split(ratings: Ratings, share: float, seed: int) -> tuple[Ratings, Ratings]:
    """Divides videos at random; which part one is in does not depend on the order of the list.

    Args:
        ratings: all videos.
        share: of the second part, above 0 and below 1.
        seed: of the draw, 0 or more.

    Returns:
        The two parts, each in the order of the list.

    Raises:
        ConfigError: the share is impossible.
        DataError: a part would have no video.
    """
    if not 0 < share < 1:
        raise ConfigError(f"share = {share!r}; it must be above 0 and below 1")
    count = round(share * len(ratings))
    if not 0 < count < len(ratings):
        sizes = f"{len(ratings) - count} and {count}"
        raise DataError(
            f"{ratings.source}: {len(ratings)} videos are divided into {sizes} by a share of "
            f"{share:g}; both must be 1 or more"
        )
    by_name = sorted(range(len(ratings)), key=lambda i: ratings.names[i])
    drawn = np.random.default_rng(seed).permutation(len(ratings))[:count]
    second = {by_name[i] for i in drawn}
    parts = ([], sorted(second))
    parts[0].extend(i for i in range(len(ratings)) if i not in second)
    return ratings.take(parts[0]), ratings.take(parts[1])


def _row(source: Path, line: int, fields: Mapping[str, str]) -> _Row:
    where = f"{source}:{line}"
    name, prompt = fields[NAME].strip(), fields[PROMPT].strip()
    if not name:
        raise DataError(f"{where}: {NAME} is empty; it must be the name of a video file")
    if not prompt:
        raise DataError(f"{where}: {PROMPT} is empty; it must be the text that {name} is made from")
    scores = [_score(where, column, fields[column].strip()) for column in COLUMNS]
    return _Row(line, name, prompt, None if None in scores else tuple(scores))


def _score(where: str, column: str, text: str) -> float | None:
    """A score, or None where it is missing."""
    if text.lower() in _UNKNOWN:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not LOWEST <= value <= HIGHEST:
        raise DataError(
            f"{where}: {column} = {text!r}; it must be a number from 1 to 5, or empty where there "
            "is none"
        )
    return value
