"""`jvjepa train probe`: its options, what it leaves behind, and several processes."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import random_params, relative_error, tiny_config

from jvjepa import Encoder, cli, streaming
from jvjepa.adapters import weights_sha256
from jvjepa.classification import classify
from jvjepa.config import ActionPredictorConfig, EncoderConfig, ModelConfig, PredictorConfig
from jvjepa.errors import CheckpointError, ConfigError, InputError
from jvjepa.predictor import Predictor
from jvjepa.records import Source
from jvjepa.train.data import ClipConfig, normalise, read_clip
from jvjepa.train.feature_cache import count_classes, open_features
from jvjepa.train.frozen_features import FeatureConfig
from jvjepa.train.loop import LoopConfig
from jvjepa.train.manifest import DataError, read_manifest
from jvjepa.train.probe import (
    ProbeLoop,
    ProbeResult,
    accuracy_over_time,
    attach_probe,
    fold_linear,
    probe_task,
    with_crop_size,
)
from jvjepa.train.probe_files import load_probe, save_probe
from jvjepa.train.probe_heads import Heads, ProbeConfig, sample_tokens
from jvjepa.train.synthetic import DIRECTIONS, SyntheticConfig, write_videos
from jvjepa.weights import Model, load, save

CLIP = ["--clip.num-frames", 4, "--clip.fps", 8]
SMALL = [*CLIP, "--clip.crop-size", 32]
ONCE = ["--probe.epochs", 1, "--probe.batch-size", 8, "--probe.learning-rates", 1e-3, 1e-2]
ATTENTIVE = [*ONCE, "--probe.num-heads", 2, "--probe.num-layers", 1]
LINEAR = [*ONCE, "--probe.kind", "linear"]
STREAM = [*LINEAR, "--probe.sees", "tubelet", "--pool", "tubelet", "--window", 2]
VIDEOS = 16


def tiny(**options: Any) -> Model:
    config = dataclasses.replace(tiny_config(num_layers=2, crop_size=32), **options)
    encoder = Encoder(config)
    return Model(
        config=ModelConfig(encoder=config),
        encoder=encoder,
        params={"encoder": random_params(encoder)},
        source=Source(
            name="tiny", revision="", sha256="0", converter="0", preprocessor={"crop": 32}
        ),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model for 32 pixels, one that counts positions on their grid, and 16 videos."""
    folder = tmp_path_factory.mktemp("probing")
    save(folder / "model", tiny())
    save(folder / "config", tiny(rope_grid="config"))
    write_videos(folder / "videos", VIDEOS, SyntheticConfig(num_frames=8, height=48, width=48))
    return folder


def arguments(
    folder: Path, out: Path, *options: object, model: str = "model", videos: Path | None = None
) -> list[str]:
    videos = folder / "videos" if videos is None else videos
    manifest = videos / "manifest.csv"
    given = ["train", "probe", folder / model, manifest, out, "--validation", manifest, *options]
    return [str(x) for x in given]


def trained(folder: Path, out: Path, *options: object, **how: Any) -> dict[str, Any]:
    """Runs it in this process; gives probe.json."""
    assert cli.main(arguments(folder, out, *options, **how)) == 0
    return json.loads((out / "probe.json").read_text())


@pytest.fixture(scope="module")
def linear(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("linear") / "run"
    trained(folder, out, *SMALL, *LINEAR)
    return out


@pytest.fixture(scope="module")
def stream(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stream") / "run"
    trained(folder, out, *SMALL, *STREAM)
    return out


# Options


def test_the_model_is_not_replaced(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments(folder, folder)) == 2
    assert "model is the source" in capsys.readouterr().err


@pytest.mark.parametrize("made", ["model", "head"])
def test_a_folder_of_another_kind_is_not_replaced(
    folder: Path, tmp_path: Path, made: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / made).mkdir()
    (tmp_path / made / "mine").touch()
    assert cli.main(arguments(folder, tmp_path)) == 2
    assert "holds mine; only an empty folder or one with" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [made]  # before anything is encoded


@pytest.mark.parametrize("option", ["--steps", "--seed", "--save-every"])
def test_what_epochs_and_the_probes_seed_say_has_no_other_option(
    folder: Path, tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments(folder, tmp_path / "run", option, 5))
    assert stopped.value.code == 2
    assert option in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_loop_of_a_probe(linear: Path) -> None:
    record = json.loads((linear / "run" / "run.json").read_text())
    assert (record["steps"], record["seed"]) == (2, 0)
    with pytest.raises(ConfigError, match=r"LoopConfig.keep = 0; it must be 1 or more"):
        ProbeLoop(keep=0)
    fields = {field.name for field in dataclasses.fields(LoopConfig)}
    left = {field.name for field in dataclasses.fields(ProbeLoop)}
    assert fields - left == {"steps", "seed", "save_every"}
    default = LoopConfig(steps=1)
    assert vars(ProbeLoop()) == {name: getattr(default, name) for name in left}


def test_presets(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    (nothing / "manifest.csv").write_text("")
    mine, other = tmp_path / "mine.py", tmp_path / "other.py"
    mine.write_text(
        "from jvjepa.train.probe import ProbeConfig, ProbeLoop\n"
        "config = ProbeConfig(kind='linear', epochs=3, batch_size=8)\n"
        "loop = ProbeLoop(log_every=1)\n"
    )
    other.write_text(
        "from jvjepa.train.loop import LoopConfig\n"
        "from jvjepa.train.probe import ProbeConfig\n"
        "config, loop = ProbeConfig(), LoopConfig(steps=5)\n"
    )

    def fails(preset: object) -> str:
        given = arguments(folder, tmp_path / "run", "--preset", preset, videos=nothing)
        assert cli.main(given) == 2
        return " ".join(capsys.readouterr().err.split())

    assert "lists no clip" in fails("probe_ssv2")  # so its options were taken
    assert "it must define loop, a ProbeLoop" in fails(other)
    options = ["--preset", mine, "--probe.epochs", 1, *SMALL]
    trained(folder, tmp_path / "run", *options)
    record = json.loads((tmp_path / "run" / "run" / "run.json").read_text())
    assert (record["probe"]["kind"], record["steps"]) == ("linear", 2)
    rows = (tmp_path / "run" / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2]


def test_unreadable_clips(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos = tmp_path / "videos"
    shutil.copytree(folder / "videos", videos)
    (videos / "00009.mp4").write_bytes(b"no video")
    given = arguments(folder, tmp_path / "run", *SMALL, *LINEAR, videos=videos)
    assert cli.main(given) == 2
    assert "max_bad allows 0" in " ".join(capsys.readouterr().err.split())
    assert list((tmp_path / "run" / "features").iterdir()) == []

    assert cli.main([*given, "--max-bad", "0.1"]) == 0
    for name in ("training", "validation"):
        features = open_features(tmp_path / "run" / "features" / name)
        assert features.ids.tolist() == [i for i in range(VIDEOS) if i != 9]
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("1 clips cannot be read and are left out") == 2


def test_a_class_whose_clips_cannot_be_read(linear: Path) -> None:
    features = open_features(linear / "features" / "training")
    names = tuple(DIRECTIONS)
    assert count_classes(dataclasses.replace(features, classes=names)) == len(names)
    more = dataclasses.replace(features, classes=(*names, "up"), bad={"a.mp4": "is no video"})
    message = r"has 9 classes, but no row of up \(1 files could not be read\)"
    with pytest.raises(DataError, match=message):
        count_classes(more)


def test_both_sets_number_the_same_classes(linear: Path) -> None:
    features = open_features(linear / "features" / "training")
    named = dataclasses.replace(features, classes=tuple(DIRECTIONS))
    others = dataclasses.replace(features, classes=tuple(reversed(DIRECTIONS)))
    with pytest.raises(DataError, match=r"its classes are .* and those of"):
        probe_task(ProbeConfig(kind="linear"), named, others)


# Heads that no model can have


def test_a_linear_head_is_saved(folder: Path, linear: Path) -> None:
    assert not (linear / "model").exists()
    record = json.loads((linear / "probe.json").read_text())
    probe = load_probe(linear / "head", load(folder / "model").params)
    assert probe.labels == tuple(map(str, range(len(DIRECTIONS))))
    assert (probe.accuracy, probe.learning_rate) == (record["accuracy"], record["learning_rate"])
    assert probe.heads.features.clip.crop_size == 32

    features = open_features(linear / "features" / "validation")
    tokens = jnp.asarray(sample_tokens(features.values, "view")[:, 0])
    logits = np.asarray(probe.logits(tokens))
    assert logits.shape == (VIDEOS, len(DIRECTIONS))
    assert (logits.argmax(axis=1) == features.labels).mean() == pytest.approx(probe.accuracy)
    kernel, bias = fold_linear(probe)
    assert relative_error(np.asarray(tokens).mean(axis=1) @ kernel + bias, logits) <= 1e-4


def test_the_head_of_a_stream_is_applied_to_a_stream(folder: Path, stream: Path) -> None:
    model = load(folder / "model")
    probe = load_probe(stream / "head", model.params)
    features = open_features(stream / "features" / "validation")
    clip = read_clip(read_manifest(folder / "videos"), features.config.clip, 3)
    pixels = normalise(jnp.asarray(clip))[None]
    state = streaming.init_state(model.encoder, 1, window=2)
    for i in range(2):
        tubelet = pixels[:, 2 * i : 2 * i + 2]
        state, out = streaming.step(model.encoder, model.params["encoder"], state, tubelet)
        logits = probe.logits(out.embedding[:, None])
        seen = probe.logits(jnp.asarray(features.values[3, 0, :, i]))
        assert relative_error(logits, seen) <= 1e-4
    record = json.loads((stream / "probe.json").read_text())
    assert accuracy_over_time(probe, features).tolist() == record["accuracy_over_time"]


def untrained(model: Model, encoder: EncoderConfig, size: int) -> ProbeResult:
    """A probe of that model, of features that the encoder made of clips of that size."""
    config = ProbeConfig(num_layers=1, num_heads=2, learning_rates=(1e-3,), weight_decays=(0.1,))
    features = FeatureConfig(views=(ClipConfig(num_frames=4, crop_size=size),), layers=(0, 1))
    heads = Heads(config=config, encoder=encoder, features=features, classes=2)
    return ProbeResult(
        heads=heads,
        labels=("a", "b"),
        head=0,
        learning_rate=1e-3,
        weight_decay=0.1,
        accuracy=0.5,
        params=jax.tree.map(lambda leaf: leaf[0], heads.init()),
        statistics={},
        encoder=weights_sha256(model.params["encoder"]),
    )


def test_an_attentive_head_is_saved(tmp_path: Path) -> None:
    model = tiny()
    probe = untrained(model, model.encoder.config, 32)
    save_probe(tmp_path / "head", probe)
    loaded = load_probe(tmp_path / "head", model.params)
    assert loaded._replace(params=None) == probe._replace(params=None)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, probe.params)
    assert attach_probe(model, loaded, loaded.labels).config.classifier.layers == (0, 1)


def test_heads_that_are_damaged(folder: Path, linear: Path, tmp_path: Path) -> None:
    other = {"encoder": random_params(Encoder(tiny_config(num_layers=2)), seed=9)}
    with pytest.raises(CheckpointError, match=r"encoder had the sha256 \w{64}, the model's have"):
        load_probe(linear / "head", other)
    with pytest.raises(CheckpointError, match="is no head of a probe"):
        load_probe(tmp_path)
    with pytest.raises(CheckpointError, match="is not of format 'jvjepa-probe-1'"):
        load_probe(folder / "model")
    with pytest.raises(InputError, match="exists"):
        save_probe(linear / "head", load_probe(linear / "head"))
    shutil.copytree(linear / "head", tmp_path / "head")
    path = tmp_path / "head" / "config.json"
    record = json.loads(path.read_text())
    for change, message in (
        ({"labels": ["a", "b"]}, r"head/kernel has shape \[48, 8\], \[48, 2\] would be right"),
        ({"labels": None}, "config.json"),
        ({"probe": {"kind": "quadratic"}}, "ProbeConfig.kind = 'quadratic'"),
        ({"features": {}}, "config.json has no 'views'"),
        ({"features": []}, "config.json"),
    ):
        path.write_text(json.dumps({**record, **change}))
        with pytest.raises(CheckpointError, match=message):
            load_probe(tmp_path / "head")
    path.write_text(json.dumps({name: x for name, x in record.items() if name != "accuracy"}))
    with pytest.raises(CheckpointError, match="has no 'accuracy'"):
        load_probe(tmp_path / "head")


# The size of the clips


@pytest.mark.parametrize("name", [pytest.param("model", marks=pytest.mark.slow), "config"])
def test_a_model_is_for_the_clips_that_its_probe_was_trained_on(
    folder: Path, tmp_path: Path, name: str
) -> None:
    size = ["--clip.crop-size", 64]
    trained(folder, tmp_path / "run", *CLIP, *size, *ATTENTIVE, model=name)
    model = load(tmp_path / "run" / "model")
    assert (model.config.crop_size, model.encoder.config.crop_size) == (64, 64)
    assert model.config.classifier.frames_per_clip == 4
    assert model.source.preprocessor is None

    # It computes what the probe was trained on, whatever its positions are counted on.
    features = open_features(tmp_path / "run" / "features" / "validation")
    manifest = read_manifest(folder / "videos")
    clip = normalise(jnp.asarray(read_clip(manifest, features.config.clip, 2)))[None]
    tokens = jax.jit(model.encoder.apply)({"params": model.params["encoder"]}, clip)[0]
    assert relative_error(tokens, features.values[2, 0, 0].reshape(tokens.shape)) <= 1e-5
    assert len(classify(model, manifest.paths[2]).probabilities) == len(DIRECTIONS)


def test_a_head_alone_is_for_the_model_as_it_is(folder: Path, tmp_path: Path) -> None:
    trained(folder, tmp_path / "run", *CLIP, "--clip.crop-size", 64, *LINEAR, model="config")
    probe = load_probe(tmp_path / "run" / "head")
    assert probe.heads.encoder == load(folder / "config").config.encoder
    assert probe.heads.features.clip.crop_size == 64


def test_a_size_that_is_no_multiple_of_patches(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(folder, tmp_path / "run", *CLIP, "--clip.crop-size", 40, *ATTENTIVE)
    assert cli.main(given) == 2
    assert "crop_size = 40; it must be a multiple of patch_size" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_features_with_positions_on_another_grid() -> None:
    def attached(model: Model, encoder: EncoderConfig) -> Model:
        probe = untrained(model, encoder, 64)
        return attach_probe(model, probe, probe.labels)

    model = tiny()
    assert attached(model, model.encoder.config).config.crop_size == 64
    model = tiny(rope_grid="config")
    with pytest.raises(InputError, match=r"rope_grid = 'config' and crop_size = 32, not 64; make"):
        attached(model, model.encoder.config)
    right = with_crop_size(model, 64)
    for given in (model, right):
        made = attached(given, right.encoder.config)
        assert made.config.encoder == made.encoder.config == right.config.encoder
        assert made.classifier.encoder == right.config.encoder


def test_parts_that_a_size_would_change() -> None:
    predictor = PredictorConfig(hidden_size=24, num_layers=1, num_heads=1, mlp_dim=48)

    def with_parts(**parts: Any) -> Model:
        model = tiny()
        config = dataclasses.replace(model.config, **parts)
        module = Predictor(predictor, config.encoder)
        return dataclasses.replace(model, config=config, predictor=module)

    sized = with_crop_size(with_parts(predictor=predictor), 64)
    assert sized.predictor.encoder == sized.encoder.config == sized.config.encoder
    assert sized.config.crop_size == 64
    counts = dataclasses.replace(predictor, rope_grid="config")
    action = ActionPredictorConfig(hidden_size=24, num_layers=1, num_heads=1)
    for name, part in (("predictor", counts), ("action_predictor", action)):
        model = with_parts(**{name: part})
        assert with_crop_size(model, 32) is model
        message = rf"clips of 64 pixels: the model's {name} counts .* grid of 32 pixels"
        with pytest.raises(InputError, match=message):
            with_crop_size(model, 64)


# Several processes


def pair(given: Sequence[str], code: str = "") -> list[tuple[int, str]]:
    """Two processes with two devices each: exit codes, and what they printed.

    Args:
        given: what the command line gets.
        code: what they run before.
    """
    with socket.socket() as here:
        here.bind(("localhost", 0))
        where = f"localhost:{here.getsockname()[1]}"
    flags = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=2"
    program = f"import sys\nfrom jvjepa import cli\n{code}\nsys.exit(cli.main(sys.argv[1:]))"
    common = [*given, "--distributed", "--coordinator", where, "--processes", "2"]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", program, *common, "--process", str(i)],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        shown = [worker.communicate(timeout=300)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    return [(worker.returncode, text) for worker, text in zip(workers, shown, strict=True)]


@pytest.mark.slow
def test_two_processes(folder: Path, stream: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    ended = pair(arguments(folder, out, *SMALL, *STREAM, "--mesh.fsdp", 2))
    assert [code for code, _ in ended] == [0, 0], ended
    assert "accuracy_over_time" in ended[0][1]
    assert "accuracy" not in ended[1][1]

    one, two = load_probe(stream / "head"), load_probe(out / "head")
    assert (one.head, one.labels, one.encoder) == (two.head, two.labels, two.encoder)
    for name, kernel in one.params.items():
        np.testing.assert_allclose(two.params[name], kernel, rtol=1e-4, atol=1e-5)
    records = [json.loads((run / "probe.json").read_text()) for run in (stream, out)]
    assert records[0].keys() == records[1].keys()
    assert records[0]["accuracy"] == pytest.approx(records[1]["accuracy"], abs=1 / VIDEOS)
    assert list((out / "features").glob(".*")) == []


@pytest.mark.slow
def test_two_processes_make_a_classifier(folder: Path, tmp_path: Path) -> None:
    record = trained(folder, tmp_path / "one", *SMALL, *ATTENTIVE)
    for options in ((), ("--resume",)):
        ended = pair(arguments(folder, tmp_path / "two", *SMALL, *ATTENTIVE, *options))
        assert [code for code, _ in ended] == [0, 0], ended
    found = json.loads((tmp_path / "two" / "probe.json").read_text())
    assert found["accuracy"] == pytest.approx(record["accuracy"], abs=1 / VIDEOS)
    one, two = (load(tmp_path / name / "model").params["classifier"] for name in ("one", "two"))
    # Adam divides gradients by their size: small ones, summed in another order, move all the same
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), one, two)


@pytest.mark.slow
def test_processes_wait_for_features_longer_than_a_collective_would(
    folder: Path, tmp_path: Path
) -> None:
    slowly = """
import time
from jvjepa.train import feature_cache
make = feature_cache.make_features
feature_cache.make_features = lambda *given, **how: (time.sleep(45), make(*given, **how))
"""
    ended = pair(arguments(folder, tmp_path / "run", *SMALL, *LINEAR), slowly)
    assert [code for code, _ in ended] == [0, 0], ended


@pytest.mark.slow
def test_an_error_of_the_process_that_encodes_ends_the_other(folder: Path, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    shutil.copytree(folder / "videos", videos)
    (videos / "00009.mp4").write_bytes(b"no video")
    (code, text), (other, _) = pair(
        arguments(folder, tmp_path / "run", *SMALL, *LINEAR, videos=videos)
    )
    assert code == 2
    assert "process 0: error: " in text
    assert "max_bad allows 0" in text
    assert other != 0
