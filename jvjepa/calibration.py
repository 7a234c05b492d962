"""Finding the gate's threshold for a camera: what each one saves, and what it costs in fidelity."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from jvjepa.errors import InputError
from jvjepa.gating import Gate
from jvjepa.live import Session, Tubelet

Criterion = Literal["worst", "mean"]
_ROUNDING = 1e-12  # surprises below this come from float32, and not from the video


class Row(NamedTuple):
    """One threshold of a sweep.

    Args:
        tau: the threshold.
        encoded: share of the tubelets that were encoded.
        mean: mean cosine of the gated stream's embeddings to the ungated stream's.
        worst: smallest of these cosines.
        seconds: time that the steps took, decoding and preprocessing left out.
    """

    tau: float
    encoded: float
    mean: float
    worst: float
    seconds: float


def sweep(
    session: Session,
    tubelets: Sequence[Tubelet],
    *,
    max_hold: int,
    settle: int,
    count: int = 10,
    progress: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """Runs the ungated stream, then gated streams with thresholds from low to high.

    Args:
        session: the stream; it is restarted for each threshold.
        tubelets: at least two.
        max_hold: of the gate.
        settle: of the gate.
        count: thresholds to try.
        progress: told what runs now.

    Yields:
        Rows, the first with tau 0, which is the ungated stream.

    Raises:
        InputError: fewer than two tubelets.
    """
    if len(tubelets) < 2:
        raise InputError(f"calibration needs at least 2 tubelets of video, not {len(tubelets)}")
    progress("ungated stream")
    exact, row = _run(session, tubelets, Gate(tau=0.0, max_hold=max_hold), None)
    yield row
    for tau in _candidates(session, tubelets, count):
        progress(f"tau {tau:g}")
        _, row = _run(session, tubelets, Gate(tau=tau, max_hold=max_hold, settle=settle), exact)
        yield row


def best(rows: Sequence[Row], target: float, criterion: Criterion) -> Row:
    """Returns the row with the largest tau up to which every row reaches the target.

    Args:
        rows: from `sweep`, tau growing.
        target: smallest acceptable cosine.
        criterion: of which column.

    Returns:
        The row; the first one, which encodes everything, if no threshold reaches the target.
    """
    good = rows[0]
    for row in rows[1:]:
        if not getattr(row, criterion) >= target:  # a NaN does not reach it
            break
        good = row
    return good


def _run(
    session: Session, tubelets: Sequence[Tubelet], gate: Gate, exact: np.ndarray | None
) -> tuple[np.ndarray, Row]:
    session.restart(gate)
    begin = time.perf_counter()
    results = [session.step(tubelet) for tubelet in tubelets]
    seconds = time.perf_counter() - begin
    embeddings = np.stack([result.embedding for result in results])
    cosines = cosine(embeddings, embeddings if exact is None else exact)
    encoded = float(np.mean([result.is_new for result in results]))
    worst, mean = float(cosines.min()), float(cosines.mean())
    return embeddings, Row(gate.tau, encoded, mean, worst, seconds)


def _candidates(session: Session, tubelets: Sequence[Tubelet], count: int) -> list[float]:
    """Thresholds that grow by one factor, over the range of surprises that this video has."""
    session.restart(Gate(tau=2.0, max_hold=len(tubelets)))  # encodes the first, compares the others
    from_first = [session.step(tubelet).surprise for tubelet in tubelets][1:]
    session.restart(Gate(tau=2.0, max_hold=len(tubelets), reference="previous"))
    from_last = [session.step(tubelet).surprise for tubelet in tubelets][1:]
    known = np.asarray(from_first + from_last)
    known = known[np.isfinite(known) & (known > _ROUNDING)]
    if known.size == 0:
        raise InputError(
            "calibration needs video in which something differs; all tubelets are equal"
        )
    low, high = np.percentile(known, 5), known.max()
    return sorted({float(f"{tau:.2g}") for tau in np.geomspace(low, high, count)})


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines of the rows of [n, D] and [n, D]."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.sum(a * b, axis=1) / norms
