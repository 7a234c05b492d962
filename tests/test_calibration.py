import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from commandline import load_npz, refused, run, save_tiny, tiny_model, write_scene
from videofiles import write_video

import jvjepa
from jvjepa import calibration
from jvjepa.calibration import Row, best, cosine, sweep
from jvjepa.errors import InputError
from jvjepa.gating import Gate
from jvjepa.live import Session, Tubelet, tubelets


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model` and `scene.mp4`."""
    folder = tmp_path_factory.mktemp("calibration")
    save_tiny(folder / "model")
    write_scene(folder / "scene.mp4")
    return folder


@pytest.fixture(scope="module")
def clip(assets: Path) -> list[Tubelet]:
    return list(tubelets(str(assets / "scene.mp4"), tiny_model()))


@pytest.fixture(scope="module")
def session() -> Session:
    return Session(tiny_model(), Gate(), window=3)


def still(count: int) -> list[Tubelet]:
    pixels = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    return [Tubelet(pixels, np.zeros((8, 8, 3), np.uint8), float(i), 0) for i in range(count)]


def rows(*cosines: float) -> list[Row]:
    """Rows with these worst cosines; the means are halfway to 1."""
    return [Row(0.1 * i, 1.0, (1 + c) / 2, c, 1.0) for i, c in enumerate(cosines)]


def test_the_first_row_is_the_ungated_stream_and_thresholds_grow(
    session: Session, clip: list[Tubelet]
) -> None:
    told: list[str] = []
    found = list(sweep(session, clip, max_hold=100, settle=0, count=6, progress=told.append))
    first, others = found[0], found[1:]
    assert (first.tau, first.encoded) == (0.0, 1.0)
    assert first.worst == pytest.approx(1.0, abs=1e-6)
    assert first.mean == pytest.approx(1.0, abs=1e-6)
    taus = [row.tau for row in others]
    assert len(taus) == 6
    assert taus == sorted(set(taus))
    assert taus[0] > 0
    shares = [row.encoded for row in others]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[-1] > 0
    assert all(row.worst <= row.mean <= 1 + 1e-6 for row in found)
    assert others[-1].worst < 0.99  # this scene has something to lose
    assert all(row.seconds > 0 for row in found)
    assert told == ["ungated stream", *(f"tau {tau:g}" for tau in taus)]


def test_a_row_is_what_a_gated_stream_gives(session: Session, clip: list[Tubelet]) -> None:
    def embeddings(gate: Gate) -> tuple[np.ndarray, float]:
        session.restart(gate)
        results = [session.step(tubelet) for tubelet in clip]
        return np.stack([r.embedding for r in results]), float(np.mean([r.is_new for r in results]))

    found = list(sweep(session, clip, max_hold=4, settle=1, count=3))
    exact, _ = embeddings(Gate(tau=0))
    for row in found[1:]:
        gated, encoded = embeddings(Gate(tau=row.tau, max_hold=4, settle=1))
        product = np.sum(exact.astype(np.float64) * gated, axis=1)
        size = np.sqrt(np.sum(np.square(exact, dtype=np.float64), 1))
        size *= np.sqrt(np.sum(np.square(gated, dtype=np.float64), 1))
        assert row.encoded == encoded
        assert row.worst == pytest.approx((product / size).min(), abs=1e-6)
        assert row.mean == pytest.approx((product / size).mean(), abs=1e-6)


def test_thresholds_span_the_surprises_of_the_video(session: Session, clip: list[Tubelet]) -> None:
    taus = [row.tau for row in sweep(session, clip, max_hold=100, settle=0)][1:]
    session.restart(Gate(tau=2.0, max_hold=100))
    from_first = np.array([session.step(tubelet).surprise for tubelet in clip[1:]][1:])
    assert taus[-1] == pytest.approx(from_first.max(), rel=0.2)
    assert taus[0] < np.median(from_first)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_tubelets(session: Session, count: int) -> None:
    with pytest.raises(InputError, match=f"at least 2 tubelets of video, not {count}"):
        list(sweep(session, still(count), max_hold=64, settle=0))


def test_equal_tubelets(session: Session) -> None:
    with pytest.raises(InputError, match="all tubelets are equal"):
        list(sweep(session, still(4), max_hold=64, settle=0))


@pytest.mark.parametrize(
    ("worst", "target", "chosen"),
    [
        ([1, 0.999, 0.995, 0.98], 0.99, 2),
        ([1, 0.999, 0.995, 0.98], 0.999, 1),
        ([1, 0.999, 0.995, 0.98], 0.9, 3),
        ([1, 0.98, 0.999], 0.99, 0),  # what is good only by chance does not count
        ([1, 0.999, 0.98, 0.999], 0.99, 1),
        ([1, np.nan, 0.999], 0.99, 0),
        ([1], 0.99, 0),
    ],
)
def test_best_takes_the_last_before_the_first_that_misses(
    worst: Sequence[float], target: float, chosen: int
) -> None:
    found = rows(*worst)
    assert best(found, target, "worst") is found[chosen]


def test_best_by_the_mean() -> None:
    found = rows(1, 0.99, 0.97)
    assert best(found, 0.985, "worst") is found[1]
    assert best(found, 0.985, "mean") is found[2]


def test_cosine() -> None:
    a = np.array([[3.0, 4.0], [1.0, 0.0], [2.0, 0.0]])
    b = np.array([[6.0, 8.0], [0.0, 5.0], [-1.0, 0.0]])
    np.testing.assert_allclose(cosine(a, b), [1, 0, -1])


def calibrate(assets: Path, *options: str | Path) -> int:
    return run("calibrate", assets / "model", assets / "scene.mp4", "--window", "3", *options)


@pytest.mark.parametrize("criterion", ["worst", "mean"])
def test_the_tau_that_calibrate_names_keeps_its_promise(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], criterion: str
) -> None:
    target = 0.97
    assert calibrate(assets, "--target-fidelity", str(target), "--criterion", criterion) == 0
    text, errors = capfd.readouterr()
    assert errors == ""
    for heading in ("tau", "encoded", "mean cosine", "worst cosine", "seconds", "speed-up"):
        assert heading in text
    assert "0 (ungated)" in text
    assert f"{criterion} cosine at least {target}" in text
    found = re.search(r"^use --tau (\S+): ", text, re.MULTILINE)
    assert found is not None
    tau = found.group(1)
    assert re.search(rf"^│ {re.escape(tau)} ", text, re.MULTILINE)  # a row of the table

    stream = ["stream", assets / "model", assets / "scene.mp4", "--window", "3", "--out"]
    assert run(*stream, tmp_path / "gated.npz", "--tau", tau) == 0
    assert run(*stream, tmp_path / "all.npz", "--tau", "0") == 0
    gated, ungated = (load_npz(tmp_path / f"{name}.npz") for name in ("gated", "all"))
    cosines = cosine(gated["embeddings"], ungated["embeddings"])
    assert not gated["is_new"].all()
    assert getattr(cosines, {"worst": "min", "mean": "mean"}[criterion])() >= target


def test_calibrate_says_when_no_threshold_is_good_enough(
    assets: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "best", lambda rows, target, criterion: rows[0])
    assert calibrate(assets) == 0
    assert "no threshold keeps the worst cosine at least 0.99" in capfd.readouterr().out


def test_calibrate_does_not_keep_the_frames(assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute of 4K would be 90 GB."""
    seen: list[int] = []
    real = calibration.sweep

    def spy(session: Session, clip: Sequence[Tubelet], **how: object) -> object:
        seen.extend(tubelet.frame.nbytes for tubelet in clip)
        return real(session, clip, **how)

    monkeypatch.setattr(calibration, "sweep", spy)
    assert calibrate(assets, "--end", "1") == 0
    assert seen == [0] * 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target-fidelity", "2"], "target-fidelity = 2.0; it must be in (0, 1]"),
        (["--target-fidelity", "0"], "target-fidelity = 0.0; it must be in (0, 1]"),
        (["--target-fidelity", "nan"], "target-fidelity = nan; it must be in (0, 1]"),
        (["--max-hold", "-1"], "max_hold = -1; it must be 0 to 2147483647"),
        (["--end", "0.05"], "calibration needs at least 2 tubelets of video, not 0"),
        (["--end", "0.15"], "calibration needs at least 2 tubelets of video, not 1"),
        (["--window", "0"], "window = 0"),
    ],
)
def test_calibrate_refuses(
    assets: Path, capfd: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    where = (assets / "model", assets / "scene.mp4")
    assert message in refused(capfd, "calibrate", *where, *options)


def test_calibrate_refuses_a_video_in_which_nothing_happens(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    black = write_video(tmp_path / "black.mp4", np.zeros((12, 48, 64, 3), np.uint8), 20)
    message = refused(capfd, "calibrate", assets / "model", black)
    assert "all tubelets are equal" in message


def test_a_released_name_is_no_folder(assets: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name = next(iter(jvjepa.registry.RELEASES))
    assert name in refused(capfd, "calibrate", name, assets / "scene.mp4")
