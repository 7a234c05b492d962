"""What came out, as a folder: predictions, metrics, a scatter plot of each score, and a page."""

import base64
import csv
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from jvjepa.errors import InputError
from jvjepa.quality import SCORES
from jvjepa.storage import new_folder
from jvjepa.train.mos_data import COLUMNS, HIGHEST, LOWEST, NAME, Ratings
from jvjepa.train.mos_metrics import CONFIDENCE, FINAL, METRICS, OVERALL, Interval

PREDICTIONS_FILE = "predictions.csv"
METRICS_FILE = "metrics.json"
PAGE_FILE = "report.html"

_STYLE = """\
body { font-family: sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { border: 1px solid #bbb; padding: 0.3em 0.6em; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { width: 19em; }"""


def require_plots() -> None:
    """Raises InputError, with what to install, where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise InputError(
            "scatter plots need matplotlib: pip install 'jvjepa[plot]', or pass --no-plots"
        ) from None


def write_report(
    folder: Path,
    title: str,
    ratings: Ratings,
    predictions: NDArray[np.float32],
    metrics: Mapping[str, float],
    intervals: Mapping[str, Interval],
    *,
    bad: Mapping[str, str],
    plots: bool = True,
    force: bool = False,
) -> None:
    """Writes the folder, which appears whole or not at all.

    Args:
        folder: to make: predictions.csv, metrics.json, report.html, and Traditional.png and so on.
        title: of the page.
        ratings: the videos that were scored.
        predictions: float32 [n, 5], what was predicted for them.
        metrics: from `jvjepa.train.mos_metrics.measure`.
        intervals: from `jvjepa.train.mos_metrics.intervals`, of its confidence.
        bad: why other videos could not be decoded, by name.
        plots: whether to draw.
        force: replace `folder` where it exists.

    Raises:
        InputError: the folder exists and `force` is False, or there is nothing to draw with.
    """
    if plots:
        require_plots()
    pictures: dict[str, bytes] = {}
    with new_folder(folder, PAGE_FILE, force=force) as work:
        _write_predictions(work / PREDICTIONS_FILE, ratings, predictions)
        record = {
            "source": ratings.source,
            "videos": len(ratings),
            "unrated": list(ratings.unrated),
            "bad": dict(bad),
            "metrics": {name: _known(value) for name, value in metrics.items()},
            "intervals": {name: [_known(x) for x in ends] for name, ends in intervals.items()},
        }
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        (work / METRICS_FILE).write_text(text, encoding="utf-8")
        for i, name in enumerate(SCORES if plots else ()):
            pictures[name] = _scatter(name, predictions[:, i], ratings.scores[:, i])
            (work / f"{name}.png").write_bytes(pictures[name])
        page = _page(title, ratings, metrics, intervals, bad, pictures)
        (work / PAGE_FILE).write_text(page, encoding="utf-8")


def markdown(metrics: Mapping[str, float], intervals: Mapping[str, Interval]) -> str:
    """Writes the metrics of each score as a table, and both total scores below it.

    Args:
        metrics: from `jvjepa.train.mos_metrics.measure`.
        intervals: from `jvjepa.train.mos_metrics.intervals`.

    Returns:
        The text, without a final newline.
    """
    lines = [("score", *(name.upper() for name in METRICS)), ("---",) * (1 + len(METRICS))]
    lines += _cells(metrics, intervals)
    totals = [f"{name}: {_cell(name, metrics, intervals)}" for name in (FINAL, OVERALL)]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", *totals])


def _write_predictions(path: Path, ratings: Ratings, predictions: NDArray[np.float32]) -> None:
    right = [column.replace("_MOS", "_rated") for column in COLUMNS]
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow((NAME, *COLUMNS, *right))
        for name, *rows in zip(ratings.names, predictions, ratings.scores, strict=True):
            table.writerow((name, *(f"{value:.4f}" for row in rows for value in row)))


def _known(value: float) -> float | None:
    """JSON has no nan."""
    return float(value) if np.isfinite(value) else None


def _cells(
    metrics: Mapping[str, float], intervals: Mapping[str, Interval]
) -> list[tuple[str, ...]]:
    return [
        (name, *(_cell(f"{name}/{metric}", metrics, intervals) for metric in METRICS))
        for name in SCORES
    ]


def _cell(name: str, metrics: Mapping[str, float], intervals: Mapping[str, Interval]) -> str:
    if not np.isfinite(metrics[name]):
        return "not defined"
    low, high = intervals[name]
    return f"{metrics[name]:.3f} ({low:.3f} to {high:.3f})"


def _scatter(name: str, predictions: NDArray[np.float32], scores: NDArray[np.float32]) -> bytes:
    """A .png of predictions over scores."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    low = min(LOWEST, float(predictions.min())) - 0.1
    high = max(HIGHEST, float(predictions.max())) + 0.1
    axes.plot((low, high), (low, high), color="black", linewidth=0.8, linestyle="--")
    axes.plot(scores, predictions, "o", markersize=3, alpha=0.5)
    axes.set(xlabel="rated", ylabel="predicted", title=name, xlim=(low, high), ylim=(low, high))
    axes.set_aspect("equal")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    return drawn.getvalue()


def _page(
    title: str,
    ratings: Ratings,
    metrics: Mapping[str, float],
    intervals: Mapping[str, Interval],
    bad: Mapping[str, str],
    pictures: Mapping[str, bytes],
) -> str:
    """An HTML page that needs no other file."""
    counts = f"{len(ratings)} videos of {ratings.source}"
    counts += f"; {len(ratings.unrated)} without all scores and {len(bad)} that cannot be decoded "
    counts += "are left out"
    totals = (
        f"final_score (mean SROCC and PLCC of all five): {_cell(FINAL, metrics, intervals)}",
        f"overall_score (the same of Overall alone): {_cell(OVERALL, metrics, intervals)}",
    )
    images = "".join(
        f'<img alt="{name}" src="data:image/png;base64,{base64.b64encode(picture).decode()}">\n'
        for name, picture in pictures.items()
    )
    problems = [f"{name}: {why}" for name, why in bad.items()]
    problems += [f"{name}: a score is missing" for name in ratings.unrated]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(counts)}.</p>",
        _table(("score", *(name.upper() for name in METRICS)), _cells(metrics, intervals)),
        *(f"<p>{html.escape(total)}</p>" for total in totals),
        f"<p>In brackets: {CONFIDENCE:.0%} intervals, bootstrap over videos.</p>",
        images,
    ]
    if problems:
        items = "".join(f"<li>{html.escape(problem)}</li>\n" for problem in problems)
        parts += ["<h2>Left out</h2>", f"<ul>\n{items}</ul>"]
    body = "\n".join(part for part in parts if part)
    head = (
        f'<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n<style>\n{_STYLE}\n</style>'
    )
    return f"<!doctype html>\n<html>\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(kind: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{kind}>{html.escape(x)}</{kind}>" for x in cells) + "</tr>\n"

    return f"<table>\n{line('th', head)}{''.join(line('td', row) for row in rows)}</table>"
