"""The runtime without JAX against the library: the same numbers, frame by frame."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from commandline import load_npz, refused, run, write_scene
from exports import WINDOW, saved, tiny
from models import random_video, relative_error
from videofiles import decode_all

import jvjepa
from jvjepa import gating
from jvjepa.errors import CheckpointError, ConfigError, InputError
from jvjepa.export import manifest
from jvjepa.export.exporting import Source, export
from jvjepa.export.options import Options
from jvjepa.export.runtime import EdgeStream
from jvjepa.gate import Gate

GATES = {
    "all": Gate(tau=0.0),
    "gated": Gate(tau=0.05),
    "settling": Gate(tau=0.05, settle=2, max_hold=3),
    "previous": Gate(tau=0.02, reference="previous"),
    "never again": Gate(tau=2.0, max_hold=5),
}


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("edge")
    source = Source(model=saved(folder / "model", tiny()))
    export(source, folder / "edge", Options(what=("step", "gate"), window=WINDOW))
    graph = Options(what=("step",), window=WINDOW, cache="graph", positions="absolute", height=48)
    export(source, folder / "graph", graph)
    write_scene(folder / "scene.mp4")
    return folder


def _scene(still: int = 3, moving: int = 5) -> np.ndarray:
    """Float32 [n, 2, 64, 64, 3]: nothing happens, then everything, then a slow drift."""
    first = np.repeat(random_video(1, 2, 64, 64), still, axis=0)
    second = random_video(moving, 2, 64, 64, seed=1)
    drift = second[-1] + 0.15 * np.arange(8)[:, None, None, None, None] * random_video(2, 64, 64)
    return np.concatenate([first, second, drift.astype(np.float32)])


def _library(
    model: jvjepa.Model, tubelets: np.ndarray, gate: Gate, **how: str
) -> list[gating.GatedOutput]:
    state = gating.init_state(model.encoder, 1, WINDOW)
    outputs = []
    for tubelet in tubelets:
        params = model.params["encoder"]
        state, out = gating.step(model.encoder, params, state, tubelet[None], gate, **how)
        outputs.append(jax.device_get(out))
    return outputs


@pytest.mark.parametrize("pool", ["tubelet", "window"])
@pytest.mark.parametrize("name", list(GATES))
def test_equals_the_gated_stream(assets: Path, name: str, pool: str) -> None:
    gate, tubelets = GATES[name], _scene()
    right = _library(tiny(), tubelets, gate, pool=pool)
    stream = EdgeStream(assets / "edge", gate=gate, pool=pool)
    found = [stream.step_pixels(tubelet) for tubelet in tubelets]
    assert [one.is_new for one in found] == [bool(one.is_new[0]) for one in right]
    assert name == "all" or not all(one.is_new for one in found)
    embeddings = np.stack([one.embedding for one in found])
    assert relative_error(embeddings, np.concatenate([one.embedding for one in right])) < 1e-5
    surprises = np.array([one.surprise for one in found])
    expected = np.concatenate([one.surprise for one in right])
    assert np.isinf(surprises[0])
    np.testing.assert_allclose(surprises[1:], expected[1:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reference", ["encoded", "previous"])
def test_what_is_not_finite_is_flagged_and_forgotten(assets: Path, reference: str) -> None:
    gate, tubelets = Gate(tau=0.05, settle=1, reference=reference), _scene()
    tubelets[4, 0, 5, 6] = np.nan
    tubelets[0, 1, 0, 0] = np.inf
    right = _library(tiny(), tubelets, gate)
    stream = EdgeStream(assets / "edge", gate=gate)
    found = [stream.step_pixels(tubelet) for tubelet in tubelets]
    assert [one.is_new for one in found] == [bool(one.is_new[0]) for one in right]
    bad = [np.isnan(one.surprise) for one in found]
    assert bad == [not one.finite[0] for one in right]
    assert np.flatnonzero(bad).tolist() == [0, 4]
    for one, expected, is_bad in zip(found, right, bad, strict=True):
        assert np.isnan(one.embedding).any() == is_bad
        if not is_bad:
            assert relative_error(one.embedding, expected.embedding[0]) < 1e-5


def test_frames_wait_for_their_tubelet(assets: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 90, 120, 3), np.uint8)
    stream = EdgeStream(assets / "edge", gate=Gate(tau=0.0))
    found = [stream.step(frame) for frame in frames]
    assert [one.is_new for one in found] == [False, True, False, True, False]
    assert np.isnan(found[0].embedding).all()
    assert np.isnan([one.surprise for one in found[::2]]).all()
    np.testing.assert_array_equal(found[2].embedding, found[1].embedding)
    config = tiny().config
    tubelets = [jvjepa.video.preprocess(frames[i : i + 2], config) for i in (0, 2)]
    right = _library(tiny(), np.stack(tubelets), Gate(tau=0.0))
    for one, expected in zip(found[1::2], right, strict=True):
        assert relative_error(one.embedding, expected.embedding[0]) < 1e-5


def test_a_buffer_that_a_camera_fills_again(assets: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    stream = EdgeStream(assets / "edge", gate=Gate(tau=0.0))
    right = [stream.step(frame) for frame in frames][-1]
    stream.reset()
    buffer = frames[0].copy()
    stream.step(buffer)
    buffer[:] = frames[1]
    np.testing.assert_array_equal(stream.step(buffer).embedding, right.embedding)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (np.zeros((48, 64, 3), np.uint8), r"a frame of \[48, 64, 3\] follows one of \[64, 64, 3\]"),
        (np.zeros((64, 64), np.uint8), r"uint8 \[64, 64\]; right is uint8 \[H, W, 3\], RGB"),
        (np.zeros((64, 64, 4), np.uint8), r"uint8 \[64, 64, 4\]; right is"),
        (np.zeros((64, 64, 3), np.float32), r"float32 \[64, 64, 3\]; right is"),
    ],
)
@pytest.mark.parametrize("waiting", [0, 1])
def test_a_frame_that_is_refused_is_not_waited_with(
    assets: Path, frame: np.ndarray, message: str, waiting: int
) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    stream = EdgeStream(assets / "edge", gate=Gate(tau=0.0))
    if waiting or "follows" in message:
        stream.step(np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(InputError, match=message):
        stream.step(frame)
    found = [stream.step(frame) for frame in frames]
    assert [one.is_new for one in found] == [False, True]
    other = EdgeStream(assets / "edge", gate=Gate(tau=0.0))
    right = [other.step(frame) for frame in frames]
    np.testing.assert_array_equal(found[1].embedding, right[1].embedding)


def test_a_later_tubelet_does_not_change_what_was_given(assets: Path) -> None:
    stream = EdgeStream(assets / "edge", gate=Gate(tau=0.0))
    first = stream.step_pixels(_scene()[0]).embedding
    kept = first.copy()
    for tubelet in _scene()[1:]:
        stream.step_pixels(tubelet)
    np.testing.assert_array_equal(first, kept)


def test_reset_forgets_everything(assets: Path) -> None:
    stream = EdgeStream(assets / "edge", gate=GATES["settling"])
    first = [stream.step_pixels(tubelet) for tubelet in _scene()]
    stream.step(np.zeros((64, 64, 3), np.uint8))  # one that waits is forgotten too
    stream.reset()
    again = [stream.step_pixels(tubelet) for tubelet in _scene()]
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.embedding, two.embedding)
        assert (one.is_new, one.surprise) == (two.is_new, two.surprise)


def test_a_ring_in_the_graph_without_a_gate(assets: Path) -> None:
    stream = EdgeStream(assets / "graph", gate=Gate(tau=0.0))
    tubelets = random_video(WINDOW + 3, 2, 48, 64)
    model = tiny()
    state = jvjepa.streaming.init_state(model.encoder, 1, WINDOW, height=48)
    for tubelet in tubelets:
        found = stream.step_pixels(tubelet)
        state, out = jvjepa.streaming.step(
            model.encoder, model.params["encoder"], state, tubelet[None], positions="absolute"
        )
        assert relative_error(found.embedding, out.embedding[0]) < 1e-5
        assert np.isinf(found.surprise)
    with pytest.raises(InputError, match="exported for 48 x 64 pixels, to which frames are not"):
        stream.step(np.zeros((48, 64, 3), np.uint8))


def test_bad_input(assets: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no gate, it has step; export with --what gate"):
        EdgeStream(assets / "graph")
    with pytest.raises(ConfigError, match="pool = 'clip'"):
        EdgeStream(assets / "edge", pool="clip")
    with pytest.raises(InputError, match="this ONNX Runtime has"):
        EdgeStream(assets / "edge", provider="CUDAExecutionProvider")
    stream = EdgeStream(assets / "edge")
    with pytest.raises(InputError, match=r"float64 \[2, 64, 64, 3\]; the step was exported for"):
        stream.step_pixels(np.zeros((2, 64, 64, 3)))
    stream.step(np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(InputError, match=r"\[32, 64, 3\] follows one of \[64, 64, 3\]"):
        stream.step(np.zeros((32, 64, 3), np.uint8))
    folder = assets / "edge"
    found = manifest.read(folder)
    step = found.artefacts["step"]
    ports = [dataclasses.replace(p, shape=(4, *p.shape[1:])) for p in step.inputs]
    many = dataclasses.replace(step, inputs=tuple(ports))
    other = dataclasses.replace(found, artefacts={**found.artefacts, "step": many})
    for name in ("step.onnx", "gate.onnx"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    other.write(tmp_path)
    with pytest.raises(InputError, match="steps 4 streams at a time; export with --batch 1"):
        EdgeStream(tmp_path)


@pytest.mark.parametrize(
    ("stream", "missing"), [(None, "window"), ({"window": WINDOW, "positions": "window"}, "cache")]
)
def test_a_manifest_that_does_not_say_how_to_stream(
    assets: Path, tmp_path: Path, stream: dict | None, missing: str
) -> None:
    for name in ("step.onnx", "gate.onnx"):
        (tmp_path / name).write_bytes((assets / "edge" / name).read_bytes())
    dataclasses.replace(manifest.read(assets / "edge"), stream=stream).write(tmp_path)
    with pytest.raises(CheckpointError, match=f"manifest.json lacks '{missing}' of its step"):
        EdgeStream(tmp_path)


def test_the_command_gives_what_jax_gives(assets: Path, tmp_path: Path) -> None:
    video = assets / "scene.mp4"
    how = ("--tau", "0.01", "--settle", "1", "--pool", "window")
    out = tmp_path / "jax.npz"
    window = ("--window", str(WINDOW))
    assert run("stream", assets / "model", video, "--out", out, *window, *how) == 0
    edge = tmp_path / "onnx.npz"
    runtime = ("--runtime", "onnx")
    assert run("stream", assets / "edge", video, "--out", edge, *runtime, *how) == 0
    right, found = load_npz(out), load_npz(edge)
    np.testing.assert_array_equal(found["is_new"], right["is_new"])
    np.testing.assert_array_equal(found["times"], right["times"])
    assert 0 < found["is_new"].sum() < len(found["is_new"])
    assert relative_error(found["embeddings"], right["embeddings"]) < 1e-5
    np.testing.assert_allclose(found["surprise"][1:], right["surprise"][1:], rtol=1e-5, atol=1e-6)


def test_options_that_the_export_has_in_it(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ("stream", assets / "edge", assets / "scene.mp4", "--out", tmp_path / "o.npz")
    message = refused(capfd, *command, "--runtime", "onnx", "--window", "4")
    assert "--window belongs to jvjepa export" in message
    message = refused(capfd, *command, "--runtime", "onnx", "--provider", "TpuProvider")
    assert "this ONNX Runtime has" in message
    message = refused(capfd, *command, "--runtime", "tensorrt")
    assert message.startswith(f"--runtime tensorrt: {assets / 'edge'} was exported for onnx; ")
    provider = ("--provider", "CPUExecutionProvider")
    for name, runtime in (("model", "jax"), ("edge", "tensorrt")):
        given = ("stream", assets / name, *command[2:], "--runtime", runtime, *provider)
        message = refused(capfd, *given)
        assert f"CPUExecutionProvider is of ONNX Runtime, and --runtime is {runtime}; " in message
    message = refused(capfd, "stream", assets / "graph", *command[2:], "--runtime", "onnx")
    assert "has no gate" in message
    how = ("--runtime", "onnx", "--tau", "0")
    message = refused(capfd, "stream", assets / "graph", *command[2:], *how)
    assert "to which frames are not cut" in message


def test_nothing_of_jax_is_needed(assets: Path) -> None:
    """Whatever is not numpy, ONNX Runtime or the standard library cannot be imported."""
    frames, _ = decode_all(assets / "scene.mp4")
    np.save(assets / "frames.npy", frames)
    script = f"""
import sys
for name in ("jax", "flax", "einops", "av", "safetensors", "rich", "tyro", "onnx", "PIL"):
    sys.modules[name] = None
import numpy as np
from jvjepa.export.runtime import EdgeStream
stream = EdgeStream({str(assets / "edge")!r})
found = [stream.step(frame) for frame in np.load({str(assets / "frames.npy")!r})]
assert sum(one.is_new for one in found) > 1
np.save({str(assets / "found.npy")!r}, np.stack([one.embedding for one in found]))
"""
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True, timeout=120)
    found = np.load(assets / "found.npy")
    pixels = jvjepa.video.preprocess(frames, tiny().config)
    tubelets = pixels[: len(pixels) // 2 * 2].reshape(-1, 2, *pixels.shape[1:])
    right = np.concatenate([one.embedding for one in _library(tiny(), tubelets, Gate())])
    assert relative_error(found[1::2], right[: len(found[1::2])]) < 1e-5
