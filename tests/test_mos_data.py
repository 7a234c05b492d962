import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jvjepa.errors import ConfigError, InputError
from jvjepa.train.manifest import DataError
from jvjepa.train.mos_data import COLUMNS, Ratings, read_ratings, split

HEADER = ("video_name", "Prompt", *COLUMNS)
GOOD = ("a.mp4", "a dog, running", 1, 2, 3.5, 4.25, 5)


def write(folder: Path, *rows: tuple[Any, ...], header: tuple[str, ...] = HEADER) -> Path:
    """A CSV, and the videos that it names, which nobody opens."""
    for row in rows:
        if row and row[0]:
            (folder / str(row[0]).strip()).touch()
    with open(folder / "labels.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return folder / "labels.csv"


def ratings(*names: str) -> Ratings:
    scores = np.full((len(names), 5), 3.0, np.float32)
    paths = tuple(Path("videos") / name for name in names)
    return Ratings(source="l.csv", names=names, paths=paths, prompts=names, scores=scores)


def test_rows_are_read_in_their_order(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD, (" b.mp4 ", " ein Vögelchen ", *"54321"))
    found = read_ratings(path)
    assert (found.names, found.prompts) == (
        ("a.mp4", "b.mp4"),
        ("a dog, running", "ein Vögelchen"),
    )
    assert found.paths == (tmp_path / "a.mp4", tmp_path / "b.mp4")
    np.testing.assert_array_equal(found.scores, [[1, 2, 3.5, 4.25, 5], [5, 4, 3, 2, 1]])
    assert found.scores.dtype == np.float32
    assert found.unrated == ()


def test_columns_are_found_by_name_and_videos_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").touch()
    header = ("id", *HEADER[::-1])
    path = write(tmp_path, (7, *GOOD[::-1]), header=header)
    path.write_text("\ufeff" + path.read_text())
    found = read_ratings(path, tmp_path / "videos")
    assert found.paths == (tmp_path / "videos" / "a.mp4",)
    np.testing.assert_array_equal(found.scores, [[1, 2, 3.5, 4.25, 5]])


@pytest.mark.parametrize("unknown", ["", "  ", "nan", "NaN", "N/A", "null"])
def test_a_video_without_all_scores_is_left_out_and_counted(tmp_path: Path, unknown: str) -> None:
    rows = [GOOD, ("b.mp4", "b", 1, unknown, 1, 1, 1), ("c.mp4", "c", *[unknown] * 5)]
    found = read_ratings(write(tmp_path, *rows))
    assert found.names == ("a.mp4",)
    assert found.unrated == ("b.mp4", "c.mp4")
    assert np.isfinite(found.scores).all()
    (tmp_path / "c.mp4").unlink()  # what is left out need not be there
    assert len(read_ratings(tmp_path / "labels.csv")) == 1
    with pytest.raises(DataError, match=r"none of its 1 videos has all of Traditional_MOS, "):
        read_ratings(write(tmp_path, rows[1]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("b.mp4", "b", 0.99, 1, 1, 1, 1), r"csv:3: Traditional_MOS = '0\.99'; .* from 1 to 5"),
        (("b.mp4", "b", 1, 1, 1, 1, 5.01), r"csv:3: Overall_MOS = '5\.01'"),
        (("b.mp4", "b", 1, 1, "inf", 1, 1), r"Aesthetic_MOS = 'inf'"),
        (("b.mp4", "b", 1, 1, 1, "good", 1), r"Temporal_MOS = 'good'"),
        (("b.mp4", "b", 1, "3,5", 1, 1, 1), r"Alignment_MOS = '3,5'"),
        (("b.mp4", " ", 1, 1, 1, 1, 1), r"csv:3: Prompt is empty"),
        (("", "b", 1, 1, 1, 1, 1), r"csv:3: video_name is empty"),
        (("a.mp4", "b", 1, 1, 1, 1, 1), r"csv:3: .*'a\.mp4' stands in line 2 too"),
        (("a.mp4", "b", 1, 1, 1, 1, ""), r"csv:3: .*'a\.mp4' stands in line 2 too"),
    ],
)
def test_bad_rows(tmp_path: Path, row: tuple[Any, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_ratings(write(tmp_path, GOOD, row))


@pytest.mark.parametrize("scores", [(1, 1, 1, 1), (1, 1, 1, 1, 1, 1)])
def test_rows_that_do_not_fit_the_header(tmp_path: Path, scores: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"csv:3: has more or fewer fields"):
        read_ratings(write(tmp_path, GOOD, ("b.mp4", "b", *scores)))


def test_bad_files(tmp_path: Path) -> None:
    header = ("video_name", "prompt", *COLUMNS[1:])
    with pytest.raises(InputError, match=r"has no column Prompt, Traditional_MOS; it has video_na"):
        read_ratings(write(tmp_path, GOOD[:-1], header=header))
    with pytest.raises(InputError, match=r"has the column Prompt more than once"):
        read_ratings(write(tmp_path, (*GOOD, "b"), header=(*HEADER, "Prompt")))
    with pytest.raises(DataError, match=r"labels\.csv: lists no video"):
        read_ratings(write(tmp_path))
    (tmp_path / "labels.csv").write_bytes(b"")
    with pytest.raises(InputError, match=r"it has none, and video_name"):
        read_ratings(tmp_path / "labels.csv")
    (tmp_path / "labels.csv").write_bytes(b"\xff\xfe1")
    with pytest.raises(InputError, match=r"is not a text in UTF-8"):
        read_ratings(tmp_path / "labels.csv")
    (tmp_path / "labels.csv").write_text(",".join(HEADER) + '\na.mp4,"a"b,1,1,1,1,1\n')
    with pytest.raises(InputError, match=r"labels\.csv:2: is no CSV"):
        read_ratings(tmp_path / "labels.csv")
    with pytest.raises(InputError, match=r"nothing\.csv: there is no such file"):
        read_ratings(tmp_path / "nothing.csv")
    path = write(tmp_path, GOOD, ("b.mp4", "b", *"12345"))
    with pytest.raises(DataError, match=r"nowhere: there is no such folder of videos"):
        read_ratings(path, tmp_path / "nowhere")
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(DataError, match=r"csv:2: .*elsewhere/a\.mp4 is not there, nor are 1 other"):
        read_ratings(path, tmp_path / "elsewhere")


def test_a_split_is_by_video_and_seed_whatever_the_order() -> None:
    names = [f"{i}.mp4" for i in range(40)]
    training, validation = split(ratings(*names), 0.3, 0)
    assert (len(training), len(validation)) == (28, 12)
    assert set(training.names) | set(validation.names) == set(names)
    assert list(training.names) == [name for name in names if name in training.names]
    shuffled = ratings(*np.random.default_rng(1).permutation(names).tolist())
    again = split(shuffled, 0.3, 0)
    assert [set(part.names) for part in again] == [set(training.names), set(validation.names)]
    assert set(split(ratings(*names), 0.3, 1)[1].names) != set(validation.names)
    assert validation.prompts == validation.names  # what belongs to a video stays with it
    assert training.digest != validation.digest


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_impossible_shares(share: float) -> None:
    with pytest.raises(ConfigError, match=r"share = .*; it must be above 0 and below 1"):
        split(ratings("a", "b"), share, 0)


def test_no_part_is_empty() -> None:
    with pytest.raises(DataError, match=r"1 videos are divided into 1 and 0"):
        split(ratings("a"), 0.2, 0)
    with pytest.raises(DataError, match=r"3 videos are divided into 0 and 3 by a share of 0\.9"):
        split(ratings("a", "b", "c"), 0.9, 0)
    assert [len(part) for part in split(ratings("a", "b"), 0.5, 0)] == [1, 1]
