import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from jvjepa.errors import InputError
from jvjepa.quality import SCORES
from jvjepa.train.mos_data import Ratings
from jvjepa.train.mos_metrics import Interval, intervals, measure
from jvjepa.train.mos_report import markdown, write_report

RNG = np.random.default_rng(0)
RATED = RNG.uniform(1, 5, (12, 5)).astype(np.float32)
FOUND = (RATED + RNG.normal(size=RATED.shape)).astype(np.float32)
BAD = {"b<ad>.mp4": "is damaged & gone"}


def ratings(unrated: tuple[str, ...] = ("unrated.mp4",)) -> Ratings:
    names = tuple(f"{i}.mp4" for i in range(len(RATED)))
    return Ratings(
        source="labels.csv",
        names=names,
        paths=tuple(map(Path, names)),
        prompts=names,
        scores=RATED,
        unrated=unrated,
    )


def ends(predictions: np.ndarray) -> dict[str, Interval]:
    return intervals(predictions, RATED, resamples=20)


def write(folder: Path, predictions: np.ndarray = FOUND, *, plots: bool = True,
          force: bool = False) -> None:  # fmt: skip
    metrics = measure(predictions, RATED)
    how = {"bad": BAD, "plots": plots, "force": force}
    write_report(folder, "A <title>", ratings(), predictions, metrics, ends(predictions), **how)


def test_a_report_is_whole(tmp_path: Path) -> None:
    write(tmp_path / "report")
    names = {"predictions.csv", "metrics.json", "report.html", *(f"{s}.png" for s in SCORES)}
    assert {path.name for path in (tmp_path / "report").iterdir()} == names
    with open(tmp_path / "report" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["video_name"] for row in rows] == list(ratings().names)
    for i, name in enumerate(SCORES):
        found = [float(row[f"{name}_MOS"]) for row in rows]
        np.testing.assert_allclose(found, FOUND[:, i], atol=1e-4)
        rated = [float(row[f"{name}_rated"]) for row in rows]
        np.testing.assert_allclose(rated, RATED[:, i], atol=1e-4)
        assert (tmp_path / "report" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    record = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert record["metrics"] == pytest.approx(measure(FOUND, RATED))
    assert record["intervals"]["final_score"] == list(ends(FOUND)["final_score"])
    assert (record["videos"], record["unrated"], record["bad"]) == (12, ["unrated.mp4"], BAD)


def test_the_page_says_everything_and_needs_no_other_file(tmp_path: Path) -> None:
    write(tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    assert "A &lt;title&gt;" in page
    assert "<li>b&lt;ad&gt;.mp4: is damaged &amp; gone</li>" in page
    assert "<li>unrated.mp4: a score is missing</li>" in page
    assert "12 videos of labels.csv; 1 without all scores and 1 that cannot be decoded" in page
    metrics = measure(FOUND, RATED)
    for name in SCORES:
        assert f"{metrics[f'{name}/srocc']:.3f} (" in page
    assert "http" not in page


def test_what_is_not_defined_is_not_a_number(tmp_path: Path) -> None:
    write(tmp_path / "report", np.full_like(FOUND, 3.0), plots=False)
    assert not list((tmp_path / "report").glob("*.png"))
    record = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert record["metrics"]["final_score"] is None
    assert record["intervals"]["Overall/srocc"] == [None, None]
    assert record["metrics"]["Overall/rmse"] > 0
    assert "not defined" in (tmp_path / "report" / "report.html").read_text()


def test_the_table() -> None:
    metrics, around = measure(FOUND, RATED), ends(FOUND)
    text = markdown(metrics, around)
    lines = text.splitlines()
    assert lines[0] == "| score | SROCC | PLCC | KROCC | RMSE | MAE |"
    assert [line.split(" | ")[0] for line in lines[2:7]] == [f"| {name}" for name in SCORES]
    low, high = around["final_score"]
    assert lines[-2] == f"final_score: {metrics['final_score']:.3f} ({low:.3f} to {high:.3f})"
    assert lines[-1].startswith("overall_score: ")


def test_nothing_is_left_of_what_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "report", plots=False)
    with pytest.raises(InputError, match=r"report exists"):
        write(tmp_path / "report", plots=False)
    write(tmp_path / "report", plots=False, force=True)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InputError, match=r"pip install 'jvjepa\[plot\]', or pass --no-plots"):
        write(tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
