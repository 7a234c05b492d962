import re
import sys
from pathlib import Path

import hfcheckpoints
import numpy as np
import pytest
from commandline import listing, load_npz, refused, run, start
from videofiles import moving_frames, write_video

import jvjepa
from jvjepa import commands, demo
from jvjepa.convert import random_checkpoint

FILES = [
    *(".jvjepa-demo", "clip.mp4", "gated.npz", "huggingface"),
    *("model", "timeline.png", "ungated.npz"),
]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny checkpoint, and a clip of 20 s at 5 frames a second, still but for a moving part."""

    def save_random_checkpoint(folder: Path) -> None:
        hfcheckpoints.save_checkpoint(folder, hfcheckpoints.tiny_config())

    def save_clip(path: Path) -> None:
        still = moving_frames(1).repeat(40, 0)
        write_video(path, np.concatenate([still, moving_frames(20), still]), 5)

    monkeypatch.setattr(random_checkpoint, "save_random_checkpoint", save_random_checkpoint)
    monkeypatch.setattr(demo, "save_clip", save_clip)


def test_the_demo_does_everything_and_can_be_repeated(
    small: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "demo"
    assert run("demo", "--out", out) == 0
    text = capfd.readouterr().out
    assert listing(out) == FILES
    for command in ("convert", "verify", "stream --settle 7", "stream --tau 0"):
        assert f" jvjepa {command} " in text
    assert "FAIL" not in text
    gated, ungated = (load_npz(out / f"{name}.npz") for name in ("gated", "ungated"))
    assert ungated["is_new"].all()
    parts = re.findall(r"encoded +(\d+) of +(\d+), worst cosine \S+ \S+ \S+ \S+ (\S+)", text)
    assert sum(int(encoded) for encoded, _, _ in parts) == gated["is_new"].sum()
    assert sum(int(seen) for _, seen, _ in parts) == len(gated["times"]) == 50
    assert 0 < gated["is_new"].sum() < 50
    assert re.search(r"speed-up of all steps together: [\d.]+ x", text)
    assert "jvjepa convert vjepa2-vitl-fpc64-256 models/vitl" in text
    assert jvjepa.load(out / "model").source.name == str(out / "huggingface")

    (out / "gated.npz").write_bytes(b"old")
    assert run("demo", "--out", out) == 0
    assert listing(out) == FILES
    np.testing.assert_array_equal(load_npz(out / "gated.npz")["is_new"], gated["is_new"])


def test_the_demo_leaves_other_folders_alone(
    small: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious").touch()
    message = refused(capfd, "demo", "--out", tmp_path)
    assert message == f"{tmp_path} is not from an earlier demo; choose another with --out"
    assert listing(tmp_path) == ["precious"]
    message = refused(capfd, "demo", "--out", tmp_path / "precious")
    assert "precious is not from an earlier demo" in message


def test_the_demo_reports_weights_that_differ(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "verify", lambda options, console: 1)
    assert run("demo", "--out", tmp_path / "demo") == 1
    assert "gated.npz" not in listing(tmp_path / "demo")


def test_an_interrupted_demo_compares_nothing(
    small: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(commands, "stream_video", lambda options, console: None)
    assert run("demo", "--out", tmp_path / "demo") == 130
    text, errors = capfd.readouterr()
    assert errors.endswith("interrupted\n")
    assert "speed-up" not in text


def test_the_demo_without_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    message = refused(capfd, "demo", "--out", tmp_path / "demo")
    assert "torch" in message
    assert "pip install 'jvjepa[torch]'" in message


def test_the_scene_is_what_the_demo_says(tmp_path: Path) -> None:
    demo.save_clip(tmp_path / "clip.mp4")
    frames, times = jvjepa.video.read(tmp_path / "clip.mp4", fps=2)
    assert frames.shape == (40, 240, 320, 3)

    def change(a: float, b: float) -> float:
        """Mean difference of the frames at two times."""
        first, second = (
            frames[np.argmin(np.abs(times - seconds))].astype(int) for seconds in (a, b)
        )
        return float(np.abs(first - second).mean())

    assert change(0, 3.5) < 3  # still but for the noise
    assert change(3.5, 6) > 5  # something is there
    assert change(6, 7) < 3  # and waits
    assert change(3.5, 9.5) < 3  # and is gone
    assert change(9.5, 14.5) > 5  # a pan
    assert change(16.5, 17.5) > 20  # a cut
    assert change(17.5, 19.5) < 3


@pytest.mark.slow
def test_the_real_demo(tmp_path: Path) -> None:
    process = start("demo", "--out", tmp_path / "demo")
    text, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    assert listing(tmp_path / "demo") == FILES
    assert "Traceback" not in errors
    gated, ungated = (load_npz(tmp_path / f"demo/{name}.npz") for name in ("gated", "ungated"))
    assert len(gated["times"]) == 300
    assert gated["is_new"].mean() < 0.6
    product = np.sum(gated["embeddings"] * ungated["embeddings"], axis=1)
    norms = [np.linalg.norm(run["embeddings"], axis=1) for run in (gated, ungated)]
    assert (product / (norms[0] * norms[1])).min() > 0.99
    assert f"timeline: {tmp_path / 'demo' / 'timeline.png'}" in text
