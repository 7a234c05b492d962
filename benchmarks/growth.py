"""How cost grows: a layer over tokens, with full attention and areas, and a step over the window.

    python benchmarks/growth.py                      # docs/growth.json and docs/growth.png

The exponent is the slope of a line through the upper half of the points, both axes logarithmic.
Memory is the peak of a call with weights and inputs, above that of the process; see `speed.py`.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from peers.work import Work
from rows import BASELINE, Row
from speed import HERE, Setting, find_setting, measure
from table import milliseconds

AREAS = "areas 2x2"
CLIPS = {  # tokens: (frames, pixels of a side)
    512: (16, 128),
    1152: (16, 192),
    2048: (16, 256),
    4608: (16, 384),
    8192: (64, 256),
    18432: (64, 384),
}
WINDOWS = (1, 2, 4, 8, 16, 32, 64)
STEP_LAYERS = 6
COSTS = {"seconds": "milliseconds", "bytes": "memory, MB"}
SCALES = {"seconds": 1e3, "bytes": 1e-6}

Curve = dict[str, Any]  # x, seconds and bytes of each point, and the exponents


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """Fits y = c·x^a to the upper half of the points.

    Args:
        x: ascending, above 0.
        y: above 0.

    Returns:
        a.
    """
    half = len(x) // 2
    slope, _ = np.polyfit(np.log(x[half:]), np.log(y[half:]), 1)
    return float(slope)


def curve(x: Sequence[int], facts: Sequence[dict[str, Any]]) -> Curve:
    """Puts measurements together.

    Args:
        x: tokens or windows, ascending.
        facts: of one competitor, as `speed.measure` returns them.

    Returns:
        The points and the exponents; memory is left out where the system does not tell it.
    """
    found: Curve = {"x": list(x)}
    found["seconds"] = [statistics.median(fact["seconds"]) for fact in facts]
    if all(fact["peak_bytes"] is not None for fact in facts):
        found["bytes"] = [fact["peak_bytes"] - fact["base_bytes"] for fact in facts]
    exponents = {cost: exponent(x, found[cost]) for cost in COSTS if cost in found}
    return {**found, "exponents": exponents}


def rows() -> dict[str, list[Row]]:
    """Returns what is measured, over tokens and over windows, by the curves' common axis."""
    kept = {"title": "", "rounds": 3}
    clips = [
        Row(
            key=f"clip/{tokens}",
            work=Work(kind="clip", layers=1, frames=frames, resolution=resolution),
            competitors=(BASELINE, AREAS),
            gpu_layers=1,
            **kept,
        )
        for tokens, (frames, resolution) in CLIPS.items()
    ]
    steps = [
        Row(
            key=f"step/{window}",
            work=Work(kind="step", layers=STEP_LAYERS, window=window),
            competitors=(BASELINE,),
            gpu_layers=STEP_LAYERS,
            **kept,
        )
        for window in WINDOWS
    ]
    return {"tokens": clips, "window": steps}


def measure_curves(setting: Setting, rounds: int | None, *, quick: bool) -> dict[str, Any]:
    """Measures everything.

    Args:
        setting: where.
        rounds: of each point; None means the rows' own.
        quick: tiny models; the points on the axes keep their names.

    Returns:
        For "tokens" and for "window" the curve of each competitor.

    Raises:
        RuntimeError: a point could not be measured.
    """
    curves: dict[str, Any] = {}
    for axis, points in rows().items():
        facts: dict[str, list[dict[str, Any]]] = {}
        for row in points:
            here = row.on(setting.platform)
            result = measure(here.tiny() if quick else here, setting, rounds)
            for name, reason in result["left_out"].items():
                raise RuntimeError(f"{row.key}, {name}: {reason}")
            for name, fact in result["competitors"].items():
                facts.setdefault(name, []).append(fact)
                print(row.key, name, milliseconds(fact["seconds"]), sep=" | ", flush=True)
        x = [int(row.key.partition("/")[2]) for row in points]
        curves[axis] = {name: curve(x, each) for name, each in facts.items()}
    return curves


def draw(path: Path, curves: dict[str, Any]) -> None:
    """Draws time and memory over tokens and over the window.

    Args:
        path: a .png file.
        curves: from `measure_curves`.
    """
    from matplotlib.figure import Figure

    names = {
        "tokens": {BASELINE: "full attention"},
        "window": {BASELINE: f"a step, {STEP_LAYERS} layers"},
    }
    labels = {"tokens": "tokens, one layer of ViT-L", "window": "window, tubelets of 256 tokens"}
    figure = Figure(figsize=(9, 6.4), dpi=100, layout="constrained")
    panels = figure.subplots(len(COSTS), len(curves))
    for column, (axis, competitors) in enumerate(curves.items()):
        for line, (cost, label) in enumerate(COSTS.items()):
            axes = panels[line][column]
            for name, points in competitors.items():
                if cost not in points:
                    continue
                y = [SCALES[cost] * value for value in points[cost]]
                what = f"{names[axis].get(name, name)}: {_power(points['exponents'][cost])}"
                axes.plot(points["x"], y, "o-", markersize=4, linewidth=1, label=what)
            axes.set(xscale="log", yscale="log", xlabel=labels[axis], ylabel=label)
            axes.set_xticks(points["x"], [f"{n:,}" for n in points["x"]], fontsize=7)
            axes.set_xticks([], minor=True)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _power(exponent: float) -> str:
    return f"n^{exponent:.2f}"


def main() -> int:
    """Measures, writes and draws."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs", help="folder")
    parser.add_argument("--rounds", type=int, help="of each point")
    parser.add_argument("--quick", action="store_true", help="a smoke test: tiny, meaningless")
    options = parser.parse_args()
    setting = find_setting("not asked")
    curves = measure_curves(setting, options.rounds, quick=options.quick)
    draw(options.out / "growth.png", curves)
    report = {"machine": setting.describe(), "quick": options.quick, "curves": curves}
    (options.out / "growth.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for axis, competitors in curves.items():
        for name, points in competitors.items():
            powers = ", ".join(f"{c} {_power(e)}" for c, e in points["exponents"].items())
            print(f"over {axis}: {name}: {powers}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
