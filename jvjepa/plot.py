"""A picture of a gated stream: frames above, surprise below, what was encoded marked."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jvjepa.errors import InputError
from jvjepa.recording import named
from jvjepa.storage import new_file

_FRAMES = 10  # pictures in the row above


def require_matplotlib() -> None:
    """Raises InputError, with what to install, where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("--plot needs matplotlib: pip install 'jvjepa[plot]'") from None


def timeline(
    path: Path,
    times: np.ndarray,
    surprise: np.ndarray,
    is_new: np.ndarray,
    tau: float,
    frames: Sequence[tuple[float, np.ndarray]],
) -> None:
    """Draws the timeline.

    Args:
        path: a .png file.
        times: float [n], seconds.
        surprise: float [n]; infinite and NaN values are drawn at the top.
        is_new: bool [n].
        tau: the threshold; 0 is not drawn.
        frames: (seconds, uint8 [H, W, 3]) in the order of time.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), dpi=110, layout="constrained")
    rows = figure.add_gridspec(2, 1, height_ratios=[1, 2])
    picks = np.unique(np.linspace(0, len(frames) - 1, min(_FRAMES, len(frames))).astype(int))
    strip = rows[0].subgridspec(1, len(picks), wspace=0.03)
    for place, pick in enumerate(picks):
        seconds, frame = frames[pick]
        axes = figure.add_subplot(strip[place])
        axes.imshow(frame)
        axes.set_title(f"{seconds:.1f} s", fontsize=8)
        axes.set_axis_off()

    axes = figure.add_subplot(rows[1])
    known = surprise[np.isfinite(surprise) & (surprise > 0)]
    top = 2.0 * max([tau, *known.tolist()], default=1.0) or 1.0
    bottom = 0.5 * min([*known.tolist(), *([tau] if tau else [])], default=0.1)
    drawn = np.clip(np.where(np.isfinite(surprise), surprise, top), bottom, top)
    axes.vlines(times[is_new], bottom, drawn[is_new], color="tab:orange", linewidth=1.2, alpha=0.6)
    axes.plot(times, drawn, color="tab:blue", linewidth=0.8, label="surprise")
    share = float(np.mean(is_new))
    label = f"encoded: {int(is_new.sum())} of {len(is_new)} ({share:.0%})"
    axes.plot(times[is_new], drawn[is_new], "o", color="tab:orange", markersize=3, label=label)
    if tau:
        label = f"threshold {tau:g}"
        axes.axhline(tau, color="black", linestyle="--", linewidth=0.8, label=label)
    axes.set(
        yscale="log", ylim=(bottom, 1.3 * top), xlabel="seconds", ylabel="surprise (1 - cosine)"
    )
    axes.margins(x=0.01)
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, fontsize=8, frameon=False)
    with named(path), new_file(path) as work:
        figure.savefig(work, format="png")
