"""`jvjepa quantize`, and the other commands on what it makes."""

import dataclasses
import errno
import json
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from commandline import encode, load_npz, refused, run, save_assets, tiny_model
from models import random_video, relative_error
from safetensors.numpy import load_file

import jvjepa
from jvjepa.quantization import is_quantized, nbytes, quantize
from jvjepa.quantize import compare, interleaved_seconds, nearness
from jvjepa.weights import read_quantization


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_assets(tmp_path_factory.mktemp("quantize"))
    assert run("quantize", folder / "model", folder / "int8") == 0
    return folder


def test_it_writes_what_the_library_makes(
    assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--scheme", "int4", "--tile", "16", "--exclude", ".*/fc2", ".*/key")
    assert run("quantize", assets / "model", tmp_path / "small", *options) == 0
    whole, small = jvjepa.load(assets / "model"), jvjepa.load(tmp_path / "small")
    expected = quantize(whole.params, "int4", tile=16, exclude=(".*/fc2", ".*/key"))
    assert jax.tree.structure(small.params) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(small.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    record = small.quantization
    assert (record.scheme, record.tile, record.exclude) == ("int4", 16, (".*/fc2", ".*/key"))
    assert record.model == str(assets / "model")
    text = capsys.readouterr().out
    size = (tmp_path / "small" / "model.safetensors").stat().st_size
    assert f"{size / 1e6:,.1f} MB, " in text
    for group in ("encoder patch_embed", "encoder attention", "encoder mlp", "all"):
        assert group in text
    assert re.search(r"a clip takes \S+ s, \S+ s before, on cpu; quantized in \S+ s", text)


def test_static_steps_come_from_the_videos(assets: Path, tmp_path: Path) -> None:
    video = assets / "scene.mp4"
    options = ("--scheme", "int8-static", "--calibrate", video, "--video", video)
    out = tmp_path / "static"
    assert run("quantize", assets / "model", out, *options, "--percentile", "99.9") == 0
    calibration = read_quantization(out).calibration
    assert calibration.videos == (str(video),)
    assert (calibration.num_frames, calibration.percentile) == (4, 99.9)
    scale = load_file(out / "model.safetensors")["encoder/blocks/mlp/fc1/kernel/input_scale"]
    assert scale.shape == (2,)
    assert (scale > 0).all()
    frames, _ = jvjepa.video.read(str(video), num_frames=4)
    whole, small = (encode(jvjepa.load(folder), frames) for folder in (assets / "model", out))
    assert 1e-4 < relative_error(small, whole) < 0.1


def test_the_comparison_says_how_near_each_group_is() -> None:
    model, clip = tiny_model(), random_video(4, 32, 32)
    small = quantize(model.params, "nf4", tile=16)
    rows = {row.group: row for row in compare(model.encoder, model.params, small, clip)}
    groups = ["encoder patch_embed", "encoder other", "encoder attention", "encoder mlp", "all"]
    assert sorted(rows) == sorted(groups)
    apply = jax.jit(model.encoder.apply)
    right = apply({"params": model.params["encoder"]}, clip[None])
    found = apply({"params": small["encoder"]}, clip[None])
    cosine, largest = nearness(found, right)
    assert rows["all"].cosine == pytest.approx(cosine, abs=1e-6)
    assert rows["all"].largest == pytest.approx(relative_error(found, right), rel=1e-3)
    assert rows["all"].largest == pytest.approx(largest, rel=1e-3)
    assert rows["all"].parameters == sum(x.size for x in jax.tree.leaves(model.params))
    assert rows["all"].before == nbytes(model.params)
    assert rows["all"].after == nbytes(small)
    for group in ("encoder attention", "encoder mlp"):
        assert 0.05 < rows[group].weights < 0.12
        assert 0.9 < rows[group].cosine < 1
        assert rows[group].after < rows[group].before / 4
    for group in ("encoder patch_embed", "encoder other"):
        row = rows[group]
        assert (row.weights, row.cosine, row.largest) == (None, None, None)
        assert row.after == row.before
    cosines = [rows[f"encoder {kind}"].cosine for kind in ("attention", "mlp")]
    assert rows["all"].cosine < min(cosines)


def test_nearness_is_the_mean_cosine_and_the_largest_error() -> None:
    right = np.array([[1.0, 0.0], [0.0, 2.0]])
    assert nearness(right, right) == (1.0, 0.0)
    assert nearness(np.array([[0.0, 1.0], [0.0, 2.0]]), right) == (0.5, 0.5)
    times = interleaved_seconds(
        tiny_model().encoder, (tiny_model().params,) * 2, random_video(2, 32, 32), rounds=2
    )
    assert [len(x) for x in times] == [2, 2]


def test_the_other_commands_take_it(
    assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, video = assets / "int8", assets / "scene.mp4"
    assert run("info", small) == 0
    assert "int8 in 6 dense layers or stacks of them; made of" in capsys.readouterr().out
    assert run("doctor", small) == 0
    assert "whole: every tensor is there" in capsys.readouterr().out
    assert run("embed", small, video, "--out", tmp_path / "e.npz", "--tokens") == 0
    frames, _ = jvjepa.video.read(str(video), num_frames=4)
    expected = encode(jvjepa.load(small), frames)
    assert relative_error(load_npz(tmp_path / "e.npz")["tokens"], expected) < 1e-5
    assert all(
        is_quantized(kernel["kernel"])
        for kernel in jvjepa.load(small).params["encoder"]["blocks"]["mlp"].values()
    )
    results = {}
    for cache in ("", "int8", "fp8"):
        out = tmp_path / f"s{cache}.npz"
        options = ("--cache", cache) if cache else ()
        assert run("stream", small, video, "--out", out, "--window", "2", *options) == 0
        results[cache] = load_npz(out)
        assert re.search(r"window 2, state \d\.\d MB", capsys.readouterr().out)
    for cache in ("int8", "fp8"):
        np.testing.assert_array_equal(results[cache]["is_new"], results[""]["is_new"])
        error = relative_error(results[cache]["embeddings"], results[""]["embeddings"])
        assert 1e-6 < error < 0.05


def test_those_that_need_floating_point_refuse_it(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hf, out = tmp_path / "hf", tmp_path / "out"
    assert run("convert", assets / "hf", hf) == 0
    assert run("quantize", hf, tmp_path / "small") == 0
    needs = "holds quantized weights; the floating-point ones that they were made of"
    assert needs in refused(capfd, "export-hf", tmp_path / "small", out)
    assert needs in refused(capfd, "verify", tmp_path / "small", assets / "hf")
    message = refused(capfd, "lora", "merge", tmp_path / "small", tmp_path, out)
    assert "holds int8 weights, into which no adapters can be merged" in message
    message = refused(capfd, "quantize", tmp_path / "small", out)
    assert f"is quantized already, to int8; quantize what it was made of, {hf}" in message
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--calibrate", "x.mp4"), "--calibrate is for int8-static; int8 measures nothing"),
        (("--percentile", "99"), "--percentile is for int8-static; int8 measures nothing"),
        (("--scheme", "int8-static"), "int8-static measures inputs; give it videos, --calibrate"),
        (("--scheme", "nf4"), "has 48 inputs; nf4 in tiles of 64 needs a multiple of 64"),
        (("--scheme", "int4", "--tile", "7"), "tile = 7; it must be an even number"),
        (("--exclude", "nothing"), "exclude = 'nothing' matches none of the layers"),
        (("--layers", "["), "layers = '[' is no regular expression"),
        (("--num-frames", "0"), "num-frames = 0; it must be 1 or more"),
        (("--num-frames", "3"), "video has T = 3 frames"),
        (("--video", "missing.mp4"), "missing.mp4: there is no such file"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_left(
    assets: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    assert message in refused(capfd, "quantize", assets / "model", tmp_path / "out", *options)
    assert list(tmp_path.iterdir()) == []


def test_bad_videos_and_folders_are_refused(
    assets: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = assets / "model"
    static = ("--scheme", "int8-static", "--calibrate", tmp_path / "no.mp4")
    assert "no.mp4: there is no such file" in refused(capfd, "quantize", model, "out", *static)
    assert "is no converted checkpoint" in refused(capfd, "quantize", tmp_path, tmp_path / "x")
    assert "exists; choose another" in refused(capfd, "quantize", model, assets / "int8")
    inside = refused(capfd, "quantize", model, model, "--force")
    assert f"{model} is the source, {model}" in inside
    missing = tmp_path / "no" / "out"
    assert "is not a folder; make it first" in refused(capfd, "quantize", model, missing)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    message = refused(capfd, "quantize", model, tmp_path / "out")
    assert message == f"{tmp_path}: {os.strerror(errno.EACCES)}"
    with pytest.raises(SystemExit):
        run("quantize", model, tmp_path / "out", "--scheme", "int3")
    assert list(tmp_path.iterdir()) == []


def test_force_replaces_and_the_source_stays(assets: Path, tmp_path: Path) -> None:
    before = (assets / "model" / "model.safetensors").read_bytes()
    (tmp_path / "out").mkdir()
    assert run("quantize", assets / "model", tmp_path / "out", "--scheme", "fp8", "--force") == 0
    assert read_quantization(tmp_path / "out").scheme == "fp8"
    assert (assets / "model" / "model.safetensors").read_bytes() == before
    record = json.loads((tmp_path / "out" / "config.json").read_text())
    assert record["quantization"]["base"].keys() == {"encoder"}
    model = jvjepa.load(tmp_path / "out")
    again = dataclasses.replace(model, source=None)
    jvjepa.save(tmp_path / "again", again)
    assert (tmp_path / "again" / "config.json").read_text() == (
        tmp_path / "out" / "config.json"
    ).read_text()
