"""The commands on V-JEPA 2.1, Meta's files, probes, pictures, classes and features."""

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import official
import pytest
from commandline import encode, load_npz, refused, run, save_assets
from hfcheckpoints import save_checkpoint, tiny_config
from models import relative_error
from videofiles import moving_frames

import jvjepa
from jvjepa.convert import convert

GOLDEN = official.GOLDEN
SIZES = ("--heads", "2", "--predictor-heads", "2", "--crop-size", "64")


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, `scene.mp4`, `2.1`, `classes`, `picture.png`; read only."""
    folder = save_assets(tmp_path_factory.mktemp("models"))
    assert run("convert", GOLDEN / "vjepa2_1_tiny_teacher.pt", folder / "2.1", *SIZES) == 0
    save_checkpoint(folder / "hf_classes", tiny_config(head_width=24, labels=4))
    convert(str(folder / "hf_classes"), folder / "classes")
    frame = av.VideoFrame.from_ndarray(moving_frames(1, 80, 96)[0], format="rgb24")
    codec = av.CodecContext.create("png", "w")
    codec.width, codec.height, codec.pix_fmt, codec.time_base = 96, 80, "rgb24", Fraction(1)
    (folder / "picture.png").write_bytes(b"".join(map(bytes, codec.encode(frame))))
    return folder


# --- convert ------------------------------------------------------------------------------------


def test_convert_prints_which_encoder_was_taken(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for options, key in (((), "target_encoder"), (("--key", "encoder"), "encoder")):
        out = tmp_path / key
        assert run("convert", GOLDEN / "vjepa2_tiny.pt", out, *SIZES, *options) == 0
        text = capfd.readouterr().out
        assert f"encoder taken from '{key}'" in text
        assert "left out predictor.predictor_pos_embed: fixed sine positions" in text
        assert ("left out encoder.pos_embed" in text) == (key == "target_encoder")
        assert run("info", out) == 0
        assert f"encoder taken from '{key}'" in capfd.readouterr().out


def test_a_probe_is_attached_and_verified(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    encoder, out, labels = (tmp_path / name for name in ("encoder", "out", "labels.txt"))
    probe = GOLDEN / "vjepa2_tiny_probe.pt"
    labels.write_text("\n".join("abcdefg"))
    assert run("convert", GOLDEN / "vjepa2_tiny.pt", encoder, *SIZES) == 0
    attach = ("convert", "--probe", probe, "--encoder", encoder, "--labels", labels)
    assert run(*attach, "--probe-heads", "2", out) == 0
    assert "probe attached:" in capfd.readouterr().out
    assert run("verify", out, GOLDEN / "vjepa2_tiny.pt", "--probe", probe) == 0
    assert "ok   classifier, weights" in capfd.readouterr().out
    assert "--probe" in refused(capfd, "verify", out, GOLDEN / "vjepa2_tiny.pt")


def test_convert_refuses_options_that_do_not_belong(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, probe = tmp_path / "out", GOLDEN / "vjepa2_tiny_probe.pt"
    attach = ("convert", "--probe", probe, "--encoder", assets / "model", out)
    for arguments, message in (
        (("convert", assets / "hf"), "OUT is missing"),
        (("convert", assets / "hf", out, "--labels", "x"), "--labels is for --probe"),
        (("convert", assets / "hf", out, "--heads", "2"), "are for .pt files"),
        (("convert", "--probe", probe, out), "needs the converted encoder"),
        (attach, "does not name its classes; give --labels"),
        ((*attach, tmp_path / "other"), "one folder too many"),
        ((*attach, "--heads", "2"), "--heads is not for --probe"),
        ((*attach, "--labels", tmp_path / "none.txt"), "none.txt: No such file"),
    ):
        assert message in refused(capfd, *arguments)
        assert not out.exists()


# --- pictures -----------------------------------------------------------------------------------


def test_embed_takes_a_picture_for_2_1(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    picture = assets / "picture.png"
    assert run("embed", assets / "2.1", picture, "--out", tmp_path / "f.npz", "--tokens") == 0
    assert "a picture, 16 tokens" in capfd.readouterr().out
    arrays = load_npz(tmp_path / "f.npz")
    right = encode(jvjepa.load(assets / "2.1"), moving_frames(1, 80, 96))
    assert relative_error(arrays["tokens"], right) <= 1e-5
    assert relative_error(arrays["embedding"], right.mean(axis=0)) <= 1e-5


def test_a_picture_is_not_taken_for_a_video(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    picture, out = assets / "picture.png", tmp_path / "f.npz"
    message = refused(capfd, "embed", assets / "model", picture, "--out", out)
    assert "--repeat-frame encodes it as a still clip" in message
    assert run("embed", assets / "model", picture, "--out", out, "--repeat-frame", "--tokens") == 0
    right = encode(jvjepa.load(assets / "model"), moving_frames(1, 80, 96))
    assert relative_error(load_npz(out)["tokens"], right) <= 1e-5
    again = (assets / "2.1", picture, "--out", tmp_path / "g.npz", "--repeat-frame")
    assert "leave out --repeat-frame" in refused(capfd, "embed", *again)


def test_2_1_streams_and_embeds_videos(assets: Path, tmp_path: Path) -> None:
    scene = assets / "scene.mp4"
    assert (
        run("embed", assets / "2.1", scene, "--num-frames", "8", "--out", tmp_path / "e.npz") == 0
    )
    assert run("stream", assets / "2.1", scene, "--window", "3", "--out", tmp_path / "s.npz") == 0
    arrays = load_npz(tmp_path / "s.npz")
    assert arrays["embeddings"].shape == (35, 32)
    assert np.isfinite(arrays["embeddings"]).all()
    assert 0 < arrays["is_new"].sum() < 35


# --- classify -----------------------------------------------------------------------------------


def test_classify_prints_a_table_and_writes_json(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "classes.json"
    how = ("--top", "3", "--num-frames", "4", "--json", out)
    assert run("classify", assets / "classes", assets / "scene.mp4", *how) == 0
    lines = capfd.readouterr().out.splitlines()
    record = json.loads(out.read_text())
    assert len(record["labels"]) == len(record["probabilities"]) == 3
    assert record["probabilities"] == sorted(record["probabilities"], reverse=True)
    for line, label, share in zip(lines, record["labels"], record["probabilities"], strict=False):
        assert line.split("  ")[-1] == label
        assert float(line.split("%")[0]) == pytest.approx(100 * share, abs=0.01)
    message = refused(capfd, "classify", assets / "classes", assets / "scene.mp4", *how)
    assert "classes.json exists" in message


def test_classify_with_clips_and_views(assets: Path, capfd: pytest.CaptureFixture[str]) -> None:
    how = ("--clips", "2", "--views", "3", "--num-frames", "4")
    assert run("classify", assets / "classes", assets / "scene.mp4", *how) == 0
    assert "2 x 3 (clips x views) of 4 frames" in capfd.readouterr().out
    message = refused(capfd, "classify", assets / "model", assets / "scene.mp4")
    assert "has no classifier" in message


# --- features -----------------------------------------------------------------------------------


def test_features_of_a_video_and_of_a_picture(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    colours, raw = tmp_path / "f.mp4", tmp_path / "f.npz"
    how = ("--num-frames", "6", "--pca", colours, "--npz", raw)
    assert run("features", assets / "model", assets / "scene.mp4", *how) == 0
    assert load_npz(raw)["features"].shape == (3, 4, 4, 48)
    with av.open(str(colours)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 6
    picture = tmp_path / "f.png"
    assert run("features", assets / "2.1", assets / "picture.png", "--pca", picture) == 0
    assert picture.stat().st_size > 100
    message = refused(capfd, "features", assets / "model", assets / "scene.mp4")
    assert "give --pca, --npz or both" in message
