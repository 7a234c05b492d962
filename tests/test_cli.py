"""The commands that work on whole files; `stream` and `calibrate` have files of their own."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from commandline import (
    FRAMES,
    FRAMES_PER_CLIP,
    cut_short,
    encode,
    listing,
    load_npz,
    refused,
    run,
    save_assets,
)
from safetensors.numpy import load_file, save_file
from videofiles import moving_frames, serve, write_audio, write_video

import jvjepa
from jvjepa import registry


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, `scene.mp4`, and `hf`, a Hugging Face checkpoint; read only."""
    return save_assets(tmp_path_factory.mktemp("cli"))


# convert, verify, export-hf


def test_convert_verify_and_the_way_back(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, back = tmp_path / "ours", tmp_path / "back"
    assert run("convert", assets / "hf", out) == 0
    text, errors = capfd.readouterr()
    assert errors == ""
    model = jvjepa.load(out)
    lines = text.splitlines()
    size = (out / "model.safetensors").stat().st_size
    assert lines[0] == f"wrote {out}: float32, {size / 1e6:.1f} MB"
    assert lines[1] == f"converted from {assets / 'hf'} by jvjepa {jvjepa.__version__}"
    assert lines[2] == f"source's sha256: {model.source.sha256}"
    counts = {part: count_leaves(tree) for part, tree in model.params.items()}
    counts["all"] = sum(counts.values())
    found = [re.fullmatch(r"(\w+): +([\d,]+) parameters", line).groups() for line in lines[3:]]
    assert {part: int(count.replace(",", "")) for part, count in found} == counts

    assert run("verify", out, assets / "hf") == 0
    text, errors = capfd.readouterr()
    assert errors == ""
    pattern = r"ok   (\w.*?) +relative error (\S+), tolerance (\S+); .*"
    checks = [re.fullmatch(pattern, line).groups() for line in text.splitlines()]
    names = [name for name, _, _ in checks]
    assert {"encoder", "encoder, weights", "predictor"} < set(names)
    assert all(float(error) <= float(tolerance) <= 1e-3 for _, error, tolerance in checks)

    assert run("export-hf", out, back) == 0
    text, errors = capfd.readouterr()
    assert errors == ""
    assert str(back) in text
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (back, assets / "hf"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor, strict=True)
    assert listing(tmp_path) == ["back", "ours"]


def count_leaves(tree: object) -> int:
    if isinstance(tree, dict):
        return sum(count_leaves(value) for value in tree.values())
    return tree.size


def test_convert_to_another_dtype(assets: Path, tmp_path: Path) -> None:
    assert run("convert", assets / "hf", tmp_path / "ours", "--dtype", "bfloat16") == 0
    params = jvjepa.load(tmp_path / "ours").params
    assert params["encoder"]["norm"]["scale"].dtype == jnp.bfloat16


def test_verify_finds_a_changed_weight(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ours"
    assert run("convert", assets / "hf", out) == 0
    tensors = load_file(out / "model.safetensors")
    tensors["encoder/blocks/mlp/fc1/kernel"][1] += 0.1
    save_file(tensors, out / "model.safetensors")
    capfd.readouterr()
    assert run("verify", out, assets / "hf") == 1
    text, errors = capfd.readouterr()
    assert errors == ""
    verdicts = {line[5:].split("  ")[0]: line[:4] for line in text.splitlines()}
    assert verdicts["encoder"] == verdicts["encoder, weights"] == "FAIL"
    assert verdicts["predictor"] == "ok  "
    assert "mlp" in text  # which weight


@pytest.mark.parametrize("command", ["convert", "export-hf"])
def test_out_is_replaced_only_with_force(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], command: str
) -> None:
    source = {"convert": assets / "hf", "export-hf": tmp_path / "ours"}[command]
    if command == "export-hf":
        assert run("convert", assets / "hf", tmp_path / "ours") == 0
    out = tmp_path / "out"
    out.mkdir()
    for name in ("model.safetensors", "precious"):
        (out / name).touch()
    before = listing(tmp_path)
    message = refused(capfd, command, source, out)
    assert message == f"{out} exists; choose another name or pass --force to replace it"
    assert listing(out) == ["model.safetensors", "precious"]
    assert run(command, source, out, "--force") == 0
    assert listing(out) == ["config.json", "model.safetensors"]
    assert listing(tmp_path) == before


def test_convert_refuses(assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def broken(name: str) -> Path:
        return Path(shutil.copytree(assets / "hf", tmp_path / "in" / name))

    out = tmp_path / "out" / "ours"
    out.parent.mkdir()

    no_config = broken("no-config")
    (no_config / "config.json").unlink()
    message = refused(capfd, "convert", no_config, out)
    assert f"{no_config / 'config.json'} does not exist" in message

    other = broken("other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    message = refused(capfd, "convert", other, out)
    assert str(other) in message
    assert "'llama'" in message
    assert "vjepa2" in message

    truncated = broken("truncated")
    cut_short(assets / "hf/model.safetensors", truncated / "model.safetensors", 0.9)
    assert str(truncated / "model.safetensors") in refused(capfd, "convert", truncated, out)

    assert "released" in refused(capfd, "convert", "vjepa2-vitl-fpc64-255", out)
    message = refused(capfd, "convert", "vjepa2-vitl-fpc64-256", out)
    assert "facebook/vjepa2-vitl-fpc64-256 is not in the cache" in message
    assert "HF_HUB_OFFLINE" in message
    assert str(tmp_path / "none") in refused(capfd, "convert", tmp_path / "none", out)
    nowhere = tmp_path / "none" / "ours"
    message = refused(capfd, "convert", assets / "hf", nowhere)
    assert message == f"{nowhere.parent} is not a folder; make it first"
    assert listing(out.parent) == []


def test_verify_and_export_refuse(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hf, model = assets / "hf", assets / "model"
    assert "convert it first" in refused(capfd, "verify", hf, hf)
    assert str(model / "config.json") in refused(capfd, "verify", model, model)
    assert "frames = 3; it must be a multiple of 2" in refused(
        capfd, "verify", model, hf, "--frames", "3"
    )
    assert "convert it first" in refused(capfd, "export-hf", hf, tmp_path / "out")
    none = tmp_path / "none"
    assert str(none) in refused(capfd, "export-hf", none, tmp_path / "out")
    assert listing(tmp_path) == []


# info


def test_info_of_a_folder(assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("convert", assets / "hf", tmp_path / "ours", "--dtype", "bfloat16") == 0
    capfd.readouterr()
    assert run("info", tmp_path / "ours", "--shapes") == 0
    text, errors = capfd.readouterr()
    assert errors == ""
    model = jvjepa.load(tmp_path / "ours")
    weights = (tmp_path / "ours/model.safetensors").read_bytes()
    assert text.startswith(f"{tmp_path / 'ours'}: bfloat16, {len(weights) / 1e6:.1f} MB\n")
    assert f"weights' sha256: {hashlib.sha256(weights).hexdigest()}\n" in text
    assert f"converted from {assets / 'hf'} by jvjepa {jvjepa.__version__}\n" in text
    assert f"source's sha256: {model.source.sha256}\n" in text
    assert "width 48, 2 layers, 2 heads of 24, MLP 120, tiled rope" in text
    assert "trained on 4 frames of 64 x 64" in text
    assert f" {count_leaves(model.params):,} parameters" in text
    assert "  encoder/blocks/mlp/fc1/kernel [2, 48, 120]\n" in text
    assert "  predictor/mask_tokens [4, 32]\n" in text


def test_info_of_a_folder_that_was_not_converted(
    assets: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("info", assets / "model") == 0
    text = capfd.readouterr().out
    assert "made here, not converted" in text
    assert "fc1" not in text


@pytest.mark.parametrize("name", registry.RELEASES)
def test_info_of_a_release(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("info", name) == 0
    text, errors = capfd.readouterr()
    assert errors == ""
    release = registry.get(name)
    assert text.startswith(f"{name}: released as {release.source}\n")
    for count in release.num_params.values():
        assert f" {count:,} parameters\n" in text
    assert ("classes" in text) == (release.config.classifier is not None)


def test_info_refuses(assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    message = refused(capfd, "info", "vjepa3")
    assert "vjepa3 is not a folder" in message
    assert all(name in message for name in registry.RELEASES)
    assert "scene.mp4 is a file" in refused(capfd, "info", assets / "scene.mp4")
    assert "convert it first" in refused(capfd, "info", assets / "hf")
    assert str(tmp_path / "config.json") in refused(capfd, "info", tmp_path)
    shutil.copytree(assets / "model", tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    cut_short(assets / "model/model.safetensors", weights, 0.5)
    assert f"{weights} is not whole" in refused(capfd, "info", tmp_path / "cut")


# embed


def embed(assets: Path, out: Path, *options: str) -> int:
    return run("embed", assets / "model", assets / "scene.mp4", "--out", out, *options)


def test_embed(assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "clip.npz"
    assert embed(assets, out) == 0
    text, errors = capfd.readouterr()
    assert errors == ""
    assert text.startswith(f"{FRAMES_PER_CLIP} frames from 0.00 to ")
    assert text.endswith(f"wrote {out}\n")
    assert listing(tmp_path) == ["clip.npz"]

    model = jvjepa.load(assets / "model")
    frames, times = jvjepa.video.read(assets / "scene.mp4", num_frames=FRAMES_PER_CLIP)
    found = load_npz(out)
    assert set(found) == {"embedding", "times"}
    assert found["embedding"].dtype == np.float32
    assert found["embedding"].shape == (48,)
    np.testing.assert_allclose(found["embedding"], encode(model, frames).mean(0), atol=1e-5)
    np.testing.assert_array_equal(found["times"], times, strict=True)


def test_embed_with_every_option(assets: Path, tmp_path: Path) -> None:
    out = tmp_path / "clip.npz"
    options = ["--num-frames", "6", "--fps", "5", "--start", "1", "--end", "2.5", "--tokens"]
    assert embed(assets, out, *options, "--attention", "chunked") == 0
    found = load_npz(out)
    assert set(found) == {"embedding", "times", "tokens"}
    np.testing.assert_allclose(found["times"], [1.0, 1.2, 1.4, 1.6, 1.8, 2.0], atol=1e-9)
    model = jvjepa.load(assets / "model")
    frames, _ = jvjepa.video.read(assets / "scene.mp4", num_frames=6, fps=5, start=1, end=2.5)
    tokens = encode(model, frames)
    assert found["tokens"].shape == tokens.shape == (3 * 16, 48)
    np.testing.assert_allclose(found["tokens"], tokens, atol=1e-4)
    np.testing.assert_allclose(found["embedding"], tokens.mean(0), atol=1e-5)


def test_embed_one_frame_and_in_bfloat16(assets: Path, tmp_path: Path) -> None:
    one, half = tmp_path / "one.npz", tmp_path / "half.npz"
    assert embed(assets, one, "--num-frames", "1") == 0
    assert embed(assets, half, "--num-frames", "1", "--dtype", "bfloat16") == 0
    exact, rounded = load_npz(one)["embedding"], load_npz(half)["embedding"]
    assert rounded.dtype == np.float32
    assert 0 < np.abs(exact - rounded).max() < 0.1


def test_embed_reads_a_url(assets: Path, tmp_path: Path) -> None:
    data = (assets / "scene.mp4").read_bytes()
    with serve([data], sized=True, seekable=True) as (address, _):
        out = tmp_path / "url.npz"
        assert run("embed", assets / "model", f"{address}/scene.mp4", "--out", out) == 0
    assert embed(assets, tmp_path / "file.npz") == 0
    url, file = load_npz(out), load_npz(tmp_path / "file.npz")
    np.testing.assert_array_equal(url["embedding"], file["embedding"])


def test_paths_are_printed_as_they_are(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "[red]a[" / "b]:smile:"
    folder.mkdir(parents=True)
    out = folder / "c.npz"
    assert embed(assets, out) == 0
    assert f"wrote {out}\n" in capfd.readouterr().out
    assert f"{out} exists" in refused(
        capfd, "embed", assets / "model", assets / "scene.mp4", "--out", out
    )


def test_embed_replaces_only_with_force(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "clip.npz"
    out.write_bytes(b"precious")
    message = refused(capfd, "embed", assets / "model", assets / "scene.mp4", "--out", out)
    assert message == f"{out} exists; choose another name or pass --force to replace it"
    assert out.read_bytes() == b"precious"
    assert embed(assets, out, "--force") == 0
    assert load_npz(out)["embedding"].shape == (48,)
    assert listing(tmp_path) == ["clip.npz"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-frames", "0"], "num_frames = 0; it must be 1 or more"),
        (["--num-frames", "3"], "T = 3 frames; take 1, or a multiple of 2"),
        (["--num-frames", "72"], f"num_frames = 72, but it has {FRAMES} frames"),
        (["--fps", "0"], "fps = 0.0; it must be above 0"),
        (["--fps", "1", "--end", "3"], "num_frames = 4 at fps = 1.0"),
        (["--start", "100"], "start = 100.0 is past the end; the clip lasts 3.500 s"),
        (["--start", "-1"], "start = -1.0; it must be 0 or more"),
        (["--start", "2", "--end", "1"], "end = 1.0; it must be above start = 2.0"),
    ],
)
def test_embed_refuses_values(
    assets: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    out = tmp_path / "clip.npz"
    where = (assets / "model", assets / "scene.mp4", "--out", out)
    found = refused(capfd, "embed", *where, *options)
    assert message in found
    assert ("--num-frames sets another" in found) == ("--fps" in options and "--end" in options)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("command", ["embed", "stream"])
@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("none/out.npz", "none is not a folder; make it first"),
        ("out.npy", "out.npy must end in .npz"),
        ("out", "out must end in .npz"),
        ("folder.npz", "folder.npz is a folder; choose another name"),
    ],
)
def test_out_must_be_a_new_npz(
    assets: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    command: str,
    out: str,
    message: str,
) -> None:
    (tmp_path / "folder.npz").mkdir()
    where = (assets / "model", assets / "scene.mp4", "--force", "--out", tmp_path / out)
    assert message in refused(capfd, command, *where)
    assert listing(tmp_path) == ["folder.npz"]


@pytest.mark.parametrize("command", ["embed", "stream", "calibrate"])
def test_videos_that_cannot_be_used(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], command: str
) -> None:
    def message(video: str | Path) -> str:
        outs = [] if command == "calibrate" else ["--out", str(tmp_path / "o.npz")]
        return refused(capfd, command, assets / "model", video, *outs)

    videos = tmp_path / "videos"
    videos.mkdir()
    missing, empty, text = (videos / f"{name}.mp4" for name in ("missing", "empty", "text"))
    empty.touch()
    text.write_text("this is no video\n" * 100)
    assert message(missing) == f"{missing}: there is no such file"
    assert message(empty) == f"{empty}: is empty (0 bytes)"
    assert message(videos) == f"{videos}: is a directory and not a video file"
    assert f"{text}: cannot be opened as a video" in message(text)
    audio = write_audio(videos / "audio.mp4")
    assert message(audio) == f"{audio}: has no video track (it has audio)"
    normal = write_video(videos / "normal.mp4", moving_frames(40))
    no_index = cut_short(normal, videos / "cut.mp4", 0.7)  # the index was at the end
    assert f"{no_index}: cannot be opened" in message(no_index)
    assert "camera:99: there is no /dev/video99" in message("camera:99")
    assert "camera:front: a camera has a number" in message("camera:front")
    port = "http://127.0.0.1:9/x.mp4"
    assert f"{port}: cannot be opened as a video" in message(port)
    assert listing(tmp_path) == ["videos"]


def test_a_damaged_video_gives_no_embedding(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damaged = cut_short(assets / "scene.mp4", tmp_path / "cut.mp4", 0.7)
    message = refused(capfd, "embed", assets / "model", damaged, "--out", tmp_path / "o.npz")
    assert message.startswith(f"{damaged}: ")
    assert "cut off" in message
    assert listing(tmp_path) == ["cut.mp4"]


def test_a_video_shorter_than_a_clip_gets_a_hint(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    short = write_video(tmp_path / "short.mp4", moving_frames(3))
    out = tmp_path / "o.npz"
    message = refused(capfd, "embed", assets / "model", short, "--out", out)
    assert message == (
        f"{short}: num_frames = 4, but it has 3 frames; --num-frames sets another number"
    )


@pytest.mark.parametrize("command", ["embed", "stream"])
def test_models_that_cannot_be_used(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], command: str
) -> None:
    def message(model: str | Path) -> str:
        out = tmp_path / "o.npz"
        return refused(capfd, command, model, assets / "scene.mp4", "--out", out)

    models = tmp_path / "models"
    models.mkdir()
    cut = models / "cut"
    shutil.copytree(assets / "model", cut)
    cut_short(assets / "model/model.safetensors", cut / "model.safetensors", 0.5)
    found = message(assets / "hf")
    assert f"{assets / 'hf/config.json'} is not of format" in found
    assert "jvjepa convert SOURCE OUT" in found
    assert f"{models / 'config.json'} does not exist" in message(models)
    assert f"{cut / 'model.safetensors'} is not whole" in message(cut)
    (cut / "model.safetensors").unlink()
    assert f"{cut / 'model.safetensors'} does not exist" in message(cut)
    assert "vjepa2-vitl-fpc64-256" in message("vjepa2-vitl-fpc64-256")
    assert listing(tmp_path) == ["models"]


# the parser, and the process


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "convert"),
        (["dream"], "dream"),
        (["convert", "a", "b", "--dtype", "int8"], "int8"),
        (["embed", "a", "b"], "--out"),
        (["embed", "a", "b", "--out", "c.npz", "--attention", "flash"], "flash"),
        (["stream", "a", "b", "--out", "c.npz", "--positions", "relative"], "relative"),
        (["stream", "a", "b", "--out", "c.npz", "--pool", "max"], "max"),
        (["stream", "a", "b", "--out", "c.npz", "--reference", "next"], "next"),
        (["stream", "a", "b", "--out", "c.npz", "--window", "many"], "many"),
        (["stream", "a", "b", "--out", "c.npz", "--frobnicate"], "--frobnicate"),
    ],
)
def test_what_the_parser_refuses(
    arguments: list[str], named: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_code:
        run(*arguments)
    assert exit_code.value.code == 2
    text, errors = capfd.readouterr()
    assert text == ""
    assert named in errors
    assert "Traceback" not in errors
