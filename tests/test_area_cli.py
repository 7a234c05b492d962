"""Area attention from the command line: for one run, and stored with a model."""

from pathlib import Path

import numpy as np
import pytest
from commandline import encode, load_npz, refused, run, save_assets

import jvjepa
from jvjepa.area import AreaOptions

AREAS = ("--area", "2x1", "--area-layers", "0:1")


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, `scene.mp4`, `hf`, and `areas`, which has areas stored; read only."""
    folder = save_assets(tmp_path_factory.mktemp("areas"))
    assert run("convert", folder / "hf", folder / "areas", *AREAS) == 0
    return folder


def test_one_run_with_areas(assets: Path, tmp_path: Path) -> None:
    model = jvjepa.load(
        assets / "model", areas=AreaOptions(spatial_splits=2, temporal_splits=1, layers=(0, 1))
    )
    assert model.config.encoder.area_layers == model.encoder.config.area_layers == (0, 1)
    frames, _ = jvjepa.video.read(assets / "scene.mp4", num_frames=4)
    with_areas = encode(model, frames).mean(axis=0)
    full = encode(jvjepa.load(assets / "model"), frames).mean(axis=0)
    for name, options, expected in (("a", AREAS, with_areas), ("b", (), full)):
        out = tmp_path / f"{name}.npz"
        assert run("embed", assets / "model", assets / "scene.mp4", "--out", out, *options) == 0
        np.testing.assert_allclose(load_npz(out)["embedding"], expected, atol=1e-5)
    assert np.max(np.abs(with_areas - full)) > 1e-3


def test_a_stream_with_row_areas(assets: Path, tmp_path: Path) -> None:
    for name, options in (("a", AREAS), ("b", ())):
        out = tmp_path / f"{name}.npz"
        command = ("stream", assets / "model", assets / "scene.mp4", "--out", out, "--tau", "0")
        assert run(*command, "--end", "1", *options) == 0
    a, b = (load_npz(tmp_path / name)["embeddings"] for name in ("a.npz", "b.npz"))
    assert a.shape == b.shape
    assert np.max(np.abs(a - b)) > 1e-3


def test_areas_stored_with_a_model(assets: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = jvjepa.load(assets / "areas").config.encoder
    assert (config.area_layers, config.area_spatial_splits, config.area_temporal_splits) == (
        (0, 1),
        2,
        1,
    )
    capfd.readouterr()
    assert run("info", assets / "areas") == 0
    assert "area attention in layers 0 to 0: 2 x 1 (spatial x temporal) areas" in (
        capfd.readouterr().out
    )


def test_verify_compares_without_areas_and_says_so(
    assets: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("verify", assets / "areas", assets / "hf") == 0
    said = capfd.readouterr().out
    assert said.startswith("area attention is left out: the original has full attention")


def test_what_cannot_be_is_refused(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = refused(capfd, "export-hf", assets / "areas", tmp_path / "back")
    assert "area_layers = (0, 1): transformers has full attention alone" in said
    scene, out = assets / "scene.mp4", tmp_path / "out.npz"
    embed = ("embed", assets / "model", scene, "--out", out)
    said = refused(capfd, *embed, "--area", "2x2", "--area-layers", "0:9")
    assert "area_layers = (0, 9)" in said
    said = refused(capfd, *embed, "--area", "5x1")
    assert "area_spatial_splits = 5; this video has 4 rows of tokens" in said
    said = refused(capfd, *embed, "--area", "two")
    assert said == "--area two; it must be SPATIALxTEMPORAL splits, as 2x2"
    said = refused(capfd, "stream", assets / "model", scene, "--out", out, "--area", "2x2")
    assert "area_temporal_splits = 2" in said
    assert "must be 1" in said
    probe = ("convert", "--probe", "p.pt", "--encoder", assets / "model", "--area", "2x2")
    assert "--area is not for --probe" in refused(capfd, *probe, tmp_path / "probed")
    assert list(tmp_path.iterdir()) == []
