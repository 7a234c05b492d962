"""The formats of TensorFlow and of JAX itself."""

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from commandline import listing
from exports import WINDOW, saved, tiny, tokens_of
from models import random_video, relative_error

import jvjepa
from jvjepa.errors import InputError
from jvjepa.export import exporting, manifest
from jvjepa.export.exporting import Source, export
from jvjepa.export.options import Options
from jvjepa.export.stablehlo import StableHLOSession, weights_file

ALL = ("clip", "step", "gate", "classifier")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("formats") / "model", tiny())


def _export(model: Path, out: Path, **options: object) -> dict[str, float]:
    chosen = Options(what=ALL, window=WINDOW, **options)
    exported, remarks = export(Source(model=model), out, chosen)
    assert remarks == []
    found = manifest.read(out)
    assert set(found.artefacts) == set(ALL)
    for what in ALL:
        found.entry(out, what)
    return {
        f"{one.what} {name}": parity.relative_error
        for one in exported
        for name, parity in one.parity.items()
    }


def test_stablehlo(model: Path, tmp_path: Path) -> None:
    errors = _export(model, tmp_path / "out", format="stablehlo", batch=None)
    assert max(errors.values()) < 1e-5
    path = tmp_path / "out" / "clip.stablehlo"
    assert path.stat().st_size < weights_file(path).stat().st_size / 2
    exported = jax.export.deserialize(path.read_bytes())
    assert exported.platforms == ("cpu", "cuda", "tpu")
    one = exporting.artefact("clip", tiny().config, Options(batch=None))
    video = random_video(3, 4, 64, 64)
    found = StableHLOSession(path, one).run({"video": video})["tokens"]
    assert relative_error(found, tokens_of(tiny(), video)) < 1e-5


def test_a_saved_model_with_an_open_batch(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if jax.__version_info__ >= (0, 11):  # of which TensorFlow 2.21 cannot read open sizes
        with pytest.raises(InputError, match=r"TensorFlow 2\S+ cannot read what JAX 0"):
            _export(model, out, format="saved-model", batch=None)
        assert not out.exists()
        return
    errors = _export(model, out, format="saved-model", batch=None)
    assert max(errors.values()) < 1e-5
    np.save(tmp_path / "video.npy", video := random_video(3, 4, 64, 64))
    script = f"""
import numpy as np, tensorflow as tf
model = tf.saved_model.load({str(out / "clip")!r})
video = tf.constant(np.load({str(tmp_path / "video.npy")!r}))
tokens = model.signatures["serving_default"](video=video)["tokens"]
np.save({str(tmp_path / "tokens.npy")!r}, tokens)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
    found = np.load(tmp_path / "tokens.npy")
    assert relative_error(found, tokens_of(tiny(), video)) < 1e-5


@pytest.mark.slow
def test_litert(model: Path, tmp_path: Path) -> None:
    errors = _export(model, tmp_path / "whole", format="litert", batch=2)
    assert max(errors.values()) < 1e-5
    errors = _export(model, tmp_path / "half", format="litert", precision="float16")
    assert 1e-5 < max(errors.values()) < 1e-2
    sizes = [(tmp_path / name / "clip.tflite").stat().st_size for name in ("whole", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    names = [*(f"{what}.tflite" for what in ALL), "manifest.json"]
    assert listing(tmp_path / "half") == sorted(names)


def test_a_library_that_is_missing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, extra in (("saved-model", "tensorflow"), ("onnx", "export")):
        module = {"saved-model": "saved_model", "onnx": "onnx_file"}[name]
        monkeypatch.delitem(sys.modules, f"jvjepa.export.{module}", raising=False)
        package = {"saved-model": "tensorflow", "onnx": "jax2onnx"}[name]
        monkeypatch.setitem(sys.modules, package, None)
        match = rf"--format {name} needs {package}: pip install 'jvjepa\[{extra}\]'"
        with pytest.raises(InputError, match=match):
            exporting._writer(Options(format=name))


def test_quantized_models_and_what_formats_take() -> None:
    for scheme, options, message in (
        ("int8-dynamic", Options(), "int8-dynamic"),
        ("int8-static", Options(format="stablehlo"), "onnx and tensorrt, not stablehlo"),
        ("int8", Options(precision="float16"), "opset = 17; quantized kernels in float16 need 19"),
    ):
        with pytest.raises(InputError, match=message):
            exporting._check_scheme(scheme, options)
    exporting._check_scheme(None, Options(precision="float16"))
    for scheme, form in (("int8", "litert"), ("nf4", "onnx")):  # no kernel of int8 in the graph
        exporting._check_scheme(scheme, Options(format=form, precision="float16"))
    assert jvjepa.__version__
