"""Exports run in processes of their own: few of them, each with all there is to see."""

import dataclasses
import functools
import json
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from adapters import random_lora
from commandline import listing, refused, run, write_scene
from exports import NEW, WINDOW, saved, tiny, tokens_of
from models import random_video, relative_error

import jvjepa
from jvjepa.adapters import Adapters, base_sha256, save_adapters
from jvjepa.area import AreaOptions
from jvjepa.errors import CheckpointError, InputError
from jvjepa.export import manifest, onnx_file, operators
from jvjepa.export.exporting import Source, export
from jvjepa.export.options import Options
from jvjepa.export.sessions import OnnxSession, open_session
from jvjepa.lora import LoraConfig
from jvjepa.parameters import unstack_layers
from jvjepa.quantization import int8_parts

ALL = ("clip", "step", "gate", "classifier")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    saved(folder / "plain", tiny())
    saved(folder / "new", tiny(layers=(0, 2), **NEW))
    return folder


@pytest.fixture(scope="module")
def plain(models: Path) -> Path:
    """Everything, with an open batch."""
    options = Options(what=ALL, batch=None, window=WINDOW)
    exported, remarks = export(Source(model=models / "plain"), models / "plain.onnx", options)
    assert [one.what for one in exported] == list(ALL)
    assert all(p.relative_error < 1e-5 for one in exported for p in one.parity.values())
    assert remarks == []
    return models / "plain.onnx"


def _run(folder: Path, what: str, feed: dict) -> dict:
    found = manifest.read(folder)
    entry = found.entry(folder, what)
    return open_session(folder, what, entry, found.runtime).run(feed)


@pytest.mark.parametrize("batch", [1, 3])
def test_an_open_batch(plain: Path, models: Path, batch: int) -> None:
    video = random_video(batch, 4, 64, 64)
    found = _run(plain, "clip", {"video": video})
    right = tokens_of(jvjepa.load(models / "plain"), video)
    assert relative_error(found["tokens"], right) < 1e-5
    assert relative_error(found["embedding"], np.mean(right, axis=1)) < 1e-5


def test_one_clip_of_a_batch_does_not_change_another(plain: Path) -> None:
    video = random_video(2, 4, 64, 64)
    other = video.copy()
    other[1] += 1
    first, second = (_run(plain, "clip", {"video": x})["tokens"] for x in (video, other))
    np.testing.assert_array_equal(first[0], second[0])
    assert np.any(first[1] != second[1])


@pytest.mark.parametrize("what", ALL)
def test_the_graph_is_what_compilers_know(plain: Path, what: str) -> None:
    model = onnx.load(plain / f"{what}.onnx")
    kinds = [node.op_type for node in model.graph.node]
    assert set(kinds) <= operators.TENSORRT
    assert not {"Loop", "Scan", "ScatterND", "Einsum", "ReduceMean", "Conv"} & set(kinds)
    layers = {"clip": 3, "step": 3, "gate": 0, "classifier": 3 + 2 + 1}[what]
    assert kinds.count("LayerNormalization") == 2 * layers + (what != "gate")
    assert kinds.count("Softmax") == layers
    assert {opset.domain: opset.version for opset in model.opset_import}[""] == 17


def test_weights_keep_their_names_and_values(plain: Path, models: Path) -> None:
    graph = onnx.load(plain / "clip.onnx").graph
    there = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    params = jvjepa.load(models / "plain").params["encoder"]
    kernels = params["blocks"]["mlp"]["fc1"]["kernel"]
    np.testing.assert_array_equal(there["encoder/blocks_2/mlp/fc1/kernel"], kernels[2])
    named = {name for name in there if name.startswith("encoder/")}
    assert len(named) == 3 * 16 + 4  # blocks, patch embedding, norm
    assert [value.name for value in graph.input] == ["video"]
    assert [value.name for value in graph.output] == ["tokens", "embedding"]


def test_the_manifest_says_it_all(plain: Path) -> None:
    found = manifest.read(plain)
    assert found.runtime == "onnx"
    assert found.crop_size == 64
    assert found.stream["window"] == WINDOW
    assert found.labels == ("left", "right", "up")
    step = found.artefacts["step"]
    ports = {port.name: port for port in (*step.inputs, *step.outputs)}
    assert ports["keys"].shape == (3, "batch", WINDOW, 16, 2, 24)
    assert ports["new_keys"].shape == (3, "batch", 16, 2, 24)
    assert ports["time"].dtype == "int32"
    assert set(step.parity) == {"embedding", "tokens", "new_keys", "new_values"}
    assert all(0 <= one["relative_error"] < 1e-5 for one in step.parity.values())
    assert found.versions["jvjepa"] == jvjepa.__version__
    assert listing(plain) == sorted([*(f"{what}.onnx" for what in ALL), "manifest.json"])


@pytest.mark.slow
def test_half_precision_and_a_ring_in_the_graph(models: Path) -> None:
    out = models / "half"
    options = Options(what=ALL, window=WINDOW, precision="float16", cache="graph", batch=2)
    exported, _ = export(Source(model=models / "new"), out, options)
    errors = [parity.relative_error for one in exported for parity in one.parity.values()]
    assert 1e-5 < max(errors) < 2e-2
    graph = onnx.load(out / "step.onnx").graph
    kinds = {t.name: t.data_type for t in graph.initializer if t.name.endswith("/kernel")}
    assert set(kinds.values()) == {onnx.TensorProto.FLOAT16}
    ports = {port.name: port for port in manifest.read(out).artefacts["step"].outputs}
    assert ports["new_keys"].shape == (3, 2, WINDOW, 16, 2, 24)
    assert ports["new_keys"].dtype == "float16"
    assert ports["tokens"].dtype == "float32"
    shapes = {(p.name, p.shape) for p in manifest.read(out).artefacts["clip"].inputs}
    assert shapes == {("video", (2, 4, 64, 64, 3))}


@pytest.mark.slow
def test_adapters_and_areas_are_in_the_graph(models: Path) -> None:
    model = jvjepa.load(models / "plain")
    config = LoraConfig(rank=2)
    lora = random_lora(model.params, config)
    made = Adapters(config=config, base=base_sha256(model.params, lora), lora=lora)
    save_adapters(models / "lora", made)
    areas = AreaOptions(spatial_splits=2, temporal_splits=2, layers=(0, 2))
    source = Source(model=models / "plain", lora=models / "lora", areas=areas)
    export(source, models / "merged", Options(what=("clip",), height=48, width=80))
    video = random_video(1, 4, 48, 80)
    found = _run(models / "merged", "clip", {"video": video})["tokens"]
    right = jvjepa.load(models / "plain", lora=models / "lora", areas=areas)
    assert relative_error(found, tokens_of(right, video)) < 1e-5
    assert relative_error(found, tokens_of(model, video)) > 1e-2
    assert manifest.read(models / "merged").crop_size is None
    assert manifest.read(models / "merged").model["lora_sha256"]


@pytest.mark.slow
def test_kernels_of_int8_stay_int8(models: Path) -> None:
    """Their products are those of the library: exact where only the weights are small."""
    source = models / "int8"
    assert run("quantize", models / "plain", source, "--scheme", "int8", "--exclude", ".*fc2") == 0
    (exported,), _ = export(Source(model=source), models / "int8.onnx", Options())
    assert exported.parity["tokens"].relative_error < 1e-5
    graph = onnx.load(models / "int8.onnx" / "clip.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("DequantizeLinear") == 3 * 5
    assert "QuantizeLinear" not in kinds
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    params = unstack_layers(jvjepa.load(source).params)["encoder"]
    kernel = int8_parts(params["blocks_1"]["mlp"]["fc1"]["kernel"])
    name = "encoder/blocks_1/mlp/fc1/kernel"
    np.testing.assert_array_equal(stored[f"{name}_int8"], kernel.values)
    np.testing.assert_array_equal(stored[f"{name}_scale"], kernel.scale)
    assert stored[f"{name}_int8"].dtype == np.int8
    video = random_video(1, 4, 64, 64)
    found = _run(models / "int8.onnx", "clip", {"video": video})["tokens"]
    assert relative_error(found, tokens_of(tiny(), video)) > 1e-3  # it is the quantized model


@pytest.mark.slow
def test_inputs_of_int8_are_rounded_too(models: Path) -> None:
    source, video = models / "static", write_scene(models / "scene.mp4")
    how = ("--scheme", "int8-static", "--calibrate", video, "--num-frames", "4")
    assert run("quantize", models / "plain", source, *how) == 0
    options = Options(what=("clip", "step"), window=WINDOW, precision="float16", opset=19)
    exported, _ = export(Source(model=source), models / "static.onnx", options)
    assert max(p.relative_error for one in exported for p in one.parity.values()) < 5e-2
    graph = onnx.load(models / "static.onnx" / "step.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("QuantizeLinear") == 3 * 6
    assert kinds.count("DequantizeLinear") == 2 * 3 * 6
    products = [node for node in graph.node if node.op_type == "MatMul"]
    made = {out: node.op_type for node in graph.node for out in node.output}
    both = [{made.get(name) for name in node.input} == {"DequantizeLinear"} for node in products]
    assert sum(both) == 3 * 6


def test_weights_of_more_than_the_limit_lie_beside(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_file, "_INLINE_BYTES", 1000)
    path = tmp_path / "small.onnx"
    tensor = onnx.numpy_helper.from_array(np.arange(600, dtype=np.float32), "w")
    node = onnx.helper.make_node("Add", ["x", "w"], ["y"])
    ports = [onnx.helper.make_tensor_value_info(n, 1, [600]) for n in ("x", "y")]
    graph = onnx.helper.make_graph([node], "g", ports[:1], ports[1:], [tensor])
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    made.ir_version = 10
    onnx_file._save(made, path)
    assert listing(tmp_path) == ["small.onnx", "small.onnx.data"]
    onnx_file.check(path)
    io = [manifest.Port(name, (600,)) for name in ("x", "y")]
    entry = manifest.Entry(files={}, inputs=(io[0],), outputs=(io[1],), parity={}, tolerance=1e-4)
    found = OnnxSession(path, entry).run({"x": np.ones(600, np.float32)})
    np.testing.assert_array_equal(found["y"], np.arange(600) + 1.0)


def test_an_operator_that_tensorrt_lacks_is_named() -> None:
    nodes = [("a", "", "MatMul"), ("b", "", "Unique"), ("c", "custom", "MatMul")]
    with pytest.raises(InputError, match=r"2 nodes .* Unique \(node b\), custom::MatMul \(node c"):
        operators.check_operators(nodes)


def test_a_graph_with_such_an_operator_is_refused(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Det", ["x"], ["y"], name="the_node")
    ports = [
        onnx.helper.make_tensor_value_info("x", 1, [3, 3]),
        onnx.helper.make_tensor_value_info("y", 1, []),
    ]
    graph = onnx.helper.make_graph([node], "g", ports[:1], ports[1:])
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    onnx.save(made, tmp_path / "det.onnx")
    with pytest.raises(InputError, match=r"Det \(node the_node\)"):
        onnx_file.check(tmp_path / "det.onnx")


def test_a_graph_that_is_not_valid_is_refused(plain: Path, tmp_path: Path) -> None:
    made = onnx.load(plain / "gate.onnx")
    del made.graph.node[3]
    onnx.save(made, tmp_path / "broken.onnx")
    with pytest.raises(InputError, match="does not pass ONNX's checker"):
        onnx_file.check(tmp_path / "broken.onnx")


@pytest.mark.parametrize(
    ("feed", "message"),
    [
        ({}, "inputs .*; this artefact takes .'video'"),
        ({"clip": np.zeros((1, 4, 64, 64, 3), np.float32)}, "takes .'video'"),
        ({"video": np.zeros((1, 6, 64, 64, 3), np.float32)}, r"it was exported as float32 .'batch"),
        ({"video": np.zeros((1, 4, 64, 64), np.float32)}, r"float32 \[1, 4, 64, 64\]; it was"),
        ({"video": np.zeros((1, 4, 64, 64, 3))}, "video is float64"),
    ],
)
def test_another_shape_than_was_exported(plain: Path, feed: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _run(plain, "clip", feed)


def test_a_provider_that_is_not_there(plain: Path) -> None:
    found = manifest.read(plain)
    entry = found.entry(plain, "clip")
    with pytest.raises(InputError, match=r"'TpuProvider'; this ONNX Runtime has .*CPUExecution"):
        open_session(plain, "clip", entry, "onnx", "TpuProvider")
    with pytest.raises(InputError, match="holds clip for litert; onnx and tensorrt"):
        open_session(plain, "clip", entry, "litert")


def _copy(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_a_folder_that_is_not_whole(plain: Path, tmp_path: Path) -> None:
    folder = _copy(plain, tmp_path / "copy")
    found = manifest.read(folder)
    (folder / "clip.onnx").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"clip.onnx has 5 bytes, and .* were exported"):
        found.entry(folder, "clip")
    (folder / "step.onnx").unlink()
    with pytest.raises(CheckpointError, match=r"step.onnx is missing; manifest.json lists it"):
        found.entry(folder, "step")
    (folder / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        manifest.read(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="jvjepa export MODEL OUT"):
        manifest.read(folder)


def test_bytes_that_have_changed(plain: Path, tmp_path: Path) -> None:
    """A file of the right size whose weights are others would load."""
    folder = _copy(plain, tmp_path / "copy")
    data = (folder / "clip.onnx").read_bytes()
    middle = len(data) // 2
    (folder / "clip.onnx").write_bytes(data[:middle] + bytes(64) + data[middle + 64 :])
    with pytest.raises(CheckpointError, match=r"clip.onnx is damaged: its sha256 is .* exported"):
        _run(folder, "clip", {})


@pytest.mark.parametrize("data", [b"", b"no graph", bytes(1000)])
def test_a_file_that_onnx_runtime_cannot_load(plain: Path, tmp_path: Path, data: bytes) -> None:
    entry = manifest.read(plain).artefacts["clip"]
    (tmp_path / "clip.onnx").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"ONNX Runtime \S+ cannot load .*clip.onnx: "):
        open_session(tmp_path, "clip", entry, "onnx")


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("format",), "jvjepa-export-1", "'jvjepa-export-2' would be right: export the model anew"),
        (("runtime",), None, "lacks a field, .*: 'runtime'"),
        (("artefacts",), [], "lacks a field, .* 'items'"),
        (("artefacts", "clip", "files"), {}, "lacks a field, .*: 'files'"),
        (("artefacts", "clip", "files", "clip.onnx"), 5, "lacks a field, or it is of another kind"),
        (("artefacts", "clip", "tolerance"), None, "lacks a field, .*tolerance"),
        (("artefacts", "clip", "inputs"), [{}], "lacks a field, .*: 'name'"),
    ],
)
def test_a_manifest_that_is_not_whole(
    plain: Path, tmp_path: Path, place: tuple[str, ...], value: object, message: str
) -> None:
    record = json.loads((plain / "manifest.json").read_text())
    *way, name = place
    part = functools.reduce(dict.__getitem__, way, record)
    part[name] = value
    if value is None:
        del part[name]
    (tmp_path / "manifest.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=f"manifest.json .*{message}"):
        manifest.read(tmp_path)


def test_what_was_not_exported(plain: Path) -> None:
    found = dataclasses.replace(manifest.read(plain), artefacts={})
    with pytest.raises(InputError, match="has no step, it has ; export with --what step"):
        found.entry(plain, "step")


def test_nothing_is_kept_above_the_tolerance(
    models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ("export", models / "plain", out, "--what", "gate", "--tolerance", "1e-12")
    message = refused(capfd, *command)
    assert "against the library's model, and 1e-12 is allowed; nothing was kept" in message
    assert listing(tmp_path) == []


def test_bad_input_of_the_command(
    models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ("export", models / "plain", out)
    assert "opset = 12; it must be 17" in refused(capfd, *command, "--opset", "12")
    assert '--batch many; it must be a number, or "open"' in refused(
        capfd, *command, "--batch", "many"
    )
    out.mkdir()
    assert "exists" in refused(capfd, *command)
    (tmp_path / "file").write_text("")
    assert "file" in refused(capfd, "export", models / "plain", tmp_path / "file" / "out")
    assert listing(out) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--window 4", "--window is for --what step, and this is clip; leave it out"),
        ("--what clip gate --positions absolute", "--positions is for --what step, and this is"),
        ("--what gate --cache graph", "--cache is for --what step, and this is gate"),
        ("--what step gate --frames 8", "--frames is for --what clip and classifier, and this is"),
        ("--format litert --opset 18", "--opset is for --format onnx and tensorrt, and this is"),
        ("--format stablehlo --provider CUDAExecutionProvider", "--provider is for --format onnx"),
    ],
)
def test_options_that_nothing_would_follow(
    models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], given: str, message: str
) -> None:
    command = ("export", models / "plain", tmp_path / "out", *given.split())
    assert message in refused(capfd, *command)
    assert listing(tmp_path) == []


def test_the_command(models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("old", "manifest.json"):
        (out / name).write_text("")
    how = ("--what", "gate", "--batch", "open", "--force", "--format", "tensorrt")
    assert run("export", models / "plain", out, *how) == 0
    printed = capfd.readouterr().out
    assert "surprise" in printed
    assert "no engine was built" in printed
    assert "trtexec --onnx=gate.onnx" in printed
    assert listing(out) == ["build_engines.sh", "gate.onnx", "manifest.json"]
    script = (out / "build_engines.sh").read_text()
    assert "python3 -m jvjepa.export.tensorrt ." in script
    assert "--minShapes=tubelet:1x2x64x64x3,reference:1x16x48" in script
    assert os.access(out / "build_engines.sh", os.X_OK)
    assert manifest.read(out).runtime == "onnx"
