import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from models import random_params, tiny_config

from jvjepa import Encoder, cli, load
from jvjepa.config import ModelConfig, PredictorConfig
from jvjepa.train.initialisation import init_params
from jvjepa.train.metrics import read
from jvjepa.train.synthetic import DIRECTIONS, SyntheticConfig, write_videos
from jvjepa.weights import Model, save

CLIP = ["--data.clip.num-frames", "4", "--data.clip.crop-size", "32", "--data.clip.fps", "8"]
DATA = [*CLIP, "--data.batch-size", "4"]
SHORT = ["--steps", "4", "--save-every", "2", "--log-every", "1", "--optimizer.warmup-steps", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with encoder and predictor, and 16 videos of all classes."""
    folder = tmp_path_factory.mktemp("training")
    encoder = tiny_config(head_width=24, num_layers=2, crop_size=32)
    predictor = PredictorConfig(hidden_size=24, num_layers=1, num_heads=1, mlp_dim=48)
    config = ModelConfig(encoder=encoder, predictor=predictor)
    params = init_params(config, jax.random.key(0))
    params["encoder"] = random_params(Encoder(encoder))
    save(
        folder / "model",
        Model(config=config, encoder=Encoder(encoder), params=params, source=None),
    )
    write_videos(folder / "videos", 16, SyntheticConfig(num_frames=8, height=32, width=32))
    return folder


def run(*arguments: object) -> int:
    return cli.main(["train", *map(str, arguments)])


def test_causal_lora(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["causal-lora", folder / "model", folder / "videos", tmp_path / "run"]
    options = [*DATA, *SHORT, "--lora.rank", 2, "--validation", folder / "videos"]
    assert run(*given, *options) == 0
    assert "the best by validation/pooled_cosine is step" in capsys.readouterr().out
    plain = load(folder / "model").params["encoder"]
    merged = load(folder / "model", lora=tmp_path / "run" / "adapters").params["encoder"]
    query = [p["blocks"]["attention"]["query"]["kernel"] for p in (plain, merged)]
    assert 0 < float(abs(query[0] - query[1]).max()) < 1
    assert run(*given, *options) == 2
    assert "run exists; resume it" in capsys.readouterr().err
    assert run(*given, *options, "--resume") == 0
    assert run(*given, *options, "--resume", "--lora.rank", 4) == 2
    assert "is another run's: lora = {'rank': 2" in capsys.readouterr().err.replace("\n", " ")


def test_a_preset_is_taken_and_can_be_changed(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(
        "from jvjepa.lora import LoraConfig\n"
        "from jvjepa.train.causal_lora import CausalLoraConfig\n"
        "from jvjepa.train.loop import LoopConfig\n"
        "config = CausalLoraConfig(lora=LoraConfig(rank=3), window=2)\n"
        "loop = LoopConfig(steps=100, log_every=1)\n"
    )
    given = ["causal-lora", folder / "model", folder / "videos", tmp_path / "run"]
    assert run(*given, "--preset", tmp_path / "mine.py", *DATA, *SHORT, "--window", 1) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["lora"]["rank"], record["window"], record["steps"]) == (3, 1, 4)
    assert run("distill", *given[1:], "--preset", tmp_path / "mine.py") == 2
    assert "it must define config, a DistillConfig" in capsys.readouterr().err
    assert run(*given, "--preset", "nothing") == 2
    assert "there is none; there are causal_lora_vitl" in capsys.readouterr().err
    assert run(*given, "--preset") == 2


def test_distill(folder: Path, tmp_path: Path) -> None:
    given = ["distill", folder / "model", folder / "videos", tmp_path / "run"]
    options = [*DATA, *SHORT, "--size", "vit-tiny", "--window", 2]
    assert run(*given, *options) == 0
    student = load(tmp_path / "run" / "model")
    assert student.config.encoder.hidden_size == 192
    assert student.config.encoder.crop_size == 32
    rows = read(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


@pytest.mark.parametrize("freeze", [pytest.param(0, marks=pytest.mark.slow), 0.5])
def test_finetune(folder: Path, tmp_path: Path, freeze: float) -> None:
    labelled = folder / "videos" / "manifest.csv"
    given = ["finetune", folder / "model", labelled, tmp_path / "run"]
    options = [*DATA, *SHORT, "--num-heads", 2, "--num-layers", 1, "--freeze", freeze]
    options += ["--validation", labelled]
    assert run(*given, *options) == 0
    before, after = load(folder / "model"), load(tmp_path / "run" / "model")
    assert after.config.classifier.labels == tuple(str(i) for i in range(8))
    norms = [np.asarray(m.params["encoder"]["blocks"]["norm1"]["scale"]) for m in (before, after)]
    assert (norms[0] != norms[1]).any(axis=1).tolist() == [not freeze, True]
    embed = [m.params["encoder"]["patch_embed"]["kernel"] for m in (before, after)]
    assert np.array_equal(*embed) == bool(freeze)


def test_pretrain(folder: Path, tmp_path: Path) -> None:
    given = ["pretrain", folder / "model", folder / "videos", tmp_path / "run"]
    assert run(*given, *DATA, *SHORT, "--data.clip.crop-size", 64) == 0
    model = load(tmp_path / "run" / "model")
    assert (model.config.encoder.crop_size, model.predictor is not None) == (64, True)


@pytest.mark.slow
def test_a_cooldown_begins_with_another_run(folder: Path, tmp_path: Path) -> None:
    videos, config = folder / "videos", folder / "model" / "config.json"
    options = [*DATA, *SHORT, "--data.clip.crop-size", 64]
    assert run("pretrain", config, videos, tmp_path / "first", *options) == 0
    options += ["--cooldown", tmp_path / "first", "--optimizer.learning-rate", 1e-9]
    options += ["--optimizer.start-learning-rate", 0, "--optimizer.final-learning-rate", 0]
    assert run("pretrain", config, videos, tmp_path / "second", *options) == 0
    # the mask tokens and all else stay; the teacher goes its usual small way to the student
    first, second = (load(tmp_path / name / "model").params for name in ("first", "second"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), first, second)


def test_probe(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos = folder / "videos" / "manifest.csv"
    given = ["probe", folder / "model", videos, tmp_path / "run"]
    clip = [word.replace("data.", "") for word in CLIP]
    options = [*clip, "--probe.num-heads", 2, "--probe.num-layers", 1, "--probe.epochs", 1]
    options += ["--probe.batch-size", 8, "--probe.learning-rates", 1e-3, 1e-2]
    assert run(*given, *options) == 2
    assert "--validation: the heads are compared on it" in capsys.readouterr().err
    assert run(*given, *options, "--validation", videos) == 0
    record = json.loads((tmp_path / "run" / "probe.json").read_text())
    assert 0 <= record["accuracy"] <= 1
    model = load(tmp_path / "run" / "model")
    assert len(model.config.classifier.labels) == len(DIRECTIONS)


def test_a_probe_of_a_stream(folder: Path, tmp_path: Path) -> None:
    videos = folder / "videos" / "manifest.csv"
    given = ["probe", folder / "model", videos, tmp_path / "run", "--validation", videos]
    clip = [word.replace("data.", "") for word in CLIP]
    options = [*clip, "--probe.kind", "linear", "--probe.sees", "tubelet", "--pool", "tubelet"]
    options += ["--window", 2, "--probe.epochs", 1, "--probe.batch-size", 8]
    assert run(*given, *options) == 0
    record = json.loads((tmp_path / "run" / "probe.json").read_text())
    assert len(record["accuracy_over_time"]) == 2
    assert not (tmp_path / "run" / "model").exists()


def test_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    shown = capsys.readouterr().out
    for kind in ("causal-lora", "distill", "finetune", "pretrain", "probe"):
        assert kind in shown
    assert run("dance") == 2
    assert "train dance: there is no such kind; there are causal-lora" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["causal-lora", "distill", "finetune", "pretrain", "probe"])
def test_help_names_every_option(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(kind, "--help")
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert ("--steps" in shown) == (kind != "probe")  # which has --probe.epochs
    assert "--resume" in shown


def no_videos(tmp_path: Path) -> Path:
    (tmp_path / "empty.csv").write_text("")
    return tmp_path / "empty.csv"


def test_bad_input(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*arguments: Any) -> str:
        assert run(*arguments) == 2
        return " ".join(capsys.readouterr().err.split())

    model, videos, out = folder / "model", folder / "videos", tmp_path / "run"
    assert "lists no clip" in fails("causal-lora", model, no_videos(tmp_path), out)
    words = tmp_path / "words.csv"
    words.write_text(f"{videos / '00000.mp4'} dog\n")
    assert "words.csv:1" in fails("finetune", model, words, out)
    target = ["--lora.targets", "encoder/blocks/atention/.*"]
    assert "matches none of the dense layers" in fails("causal-lora", model, videos, out, *target)
    assert "config.json does not exist" in fails("distill", tmp_path, videos, out)
    few = [*DATA, "--data.batch-size", 64]
    assert "batch_size = 64" in fails("causal-lora", model, videos, out, *few)
    mesh = ["--mesh.fsdp", 3]
    assert "there are 1 devices" in fails("causal-lora", model, videos, out, *DATA, *mesh)
    assert not out.exists() or not any((out / "checkpoints").glob("[0-9]*"))
