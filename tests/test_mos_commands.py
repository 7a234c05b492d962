import csv
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import random_params, tiny_config
from quality import tiny_quality
from ratedvideos import damage, write_rated

from jvjepa import Encoder, cli
from jvjepa.config import ModelConfig
from jvjepa.quality import SCORES, load_quality, read_pixels, score
from jvjepa.text_weights import TextModel, save_text
from jvjepa.train.mos_data import read_ratings, split
from jvjepa.weights import Model, save

SHORT = ["--steps", "4", "--save-every", "2", "--log-every", "1", "--optimizer.warmup-steps", "1"]
SHORT += ["--batch-size", "4", "--freeze", "0.5", "--no-plots"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A video-quality model, its parts, and 10 rated videos."""
    folder = tmp_path_factory.mktemp("mos")
    tiny_quality(folder / "model")
    write_rated(folder / "set", 10)
    return folder


def run(*arguments: object) -> int:
    return cli.main([*map(str, arguments)])


def predictions(folder: Path) -> dict[str, np.ndarray]:
    with open(folder / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {row["video_name"]: np.array([float(row[f"{s}_MOS"]) for s in SCORES]) for row in rows}


def test_training_leaves_a_model_that_scores_as_the_report_says(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["train", "mos", folder / "model", folder / "set" / "labels.csv", tmp_path / "run"]
    assert run(*given, *SHORT) == 0
    shown = capsys.readouterr().out
    assert "no checkpoint has a finite validation/final_score: the last one" in shown  # 2 videos
    assert "| Overall |" in shown
    model = load_quality(tmp_path / "run" / "model")
    _, validation = split(read_ratings(folder / "set" / "labels.csv"), 0.2, 0)
    found = predictions(tmp_path / "run" / "report")
    assert set(found) == set(validation.names)
    for name, path, prompt in zip(
        validation.names, validation.paths, validation.prompts, strict=True
    ):
        right = score(model, read_pixels(path, model.config), prompt)
        # Written with four decimals: half of the last is 5e-5.
        np.testing.assert_allclose(found[name], right, rtol=0, atol=6e-5)

    assert run(*given, *SHORT) == 2
    assert "run exists; resume it, or choose" in capsys.readouterr().err
    assert run(*given, *SHORT, "--resume") == 0
    assert run(*given, *SHORT, "--resume", "--head-rate", 3) == 2
    assert "head_rate = 2.0, now 3.0" in " ".join(capsys.readouterr().err.split())

    report = tmp_path / "report"
    which = [tmp_path / "run" / "model", folder / "set" / "labels.csv"]
    assert run("mos", "evaluate", *which, "--out", report, "--no-plots") == 0
    every = predictions(report)
    assert len(every) == 10
    for name in found:
        # In another batch a score may round to the next of four decimals, no further.
        np.testing.assert_allclose(every[name], found[name], rtol=0, atol=1.1e-4)
    record = json.loads((report / "metrics.json").read_text())
    assert set(record["intervals"]) == set(record["metrics"])
    assert run("mos", "evaluate", *which, "--out", report) == 2
    assert "report exists" in capsys.readouterr().err


def test_a_new_model_of_parts(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = load_quality(folder / "model")
    encoder = tiny_config(head_width=12, crop_size=32)
    params = {"encoder": random_params(Encoder(encoder))}
    config = ModelConfig(encoder=encoder)
    save(
        tmp_path / "encoder",
        Model(config=config, encoder=Encoder(encoder), params=params, source=None),
    )
    text = TextModel(
        config=whole.config.text,
        encoder=whole.text,
        params=whole.params["text"],
        tokenizer=whole.tokenizer,
        source=None,
    )
    save_text(tmp_path / "text", text)
    write_rated(tmp_path / "held-out", 4, seed=1)
    given = ["train", "mos", tmp_path / "encoder", folder / "set" / "labels.csv", tmp_path / "run"]
    options = ["--text", tmp_path / "text", "--feature", "mean", "--num-frames", 4]
    options += ["--head.hidden", 8, 4, "--head.bounded", "1-5", "--video-rate", 0]
    options += ["--validation", tmp_path / "held-out" / "labels.csv"]
    assert run(*given, *SHORT, *options) == 0
    model = load_quality(tmp_path / "run" / "model")
    assert (model.config.feature, model.config.num_frames) == ("mean", 4)
    assert model.config.head.hidden == (8, 4)
    found = predictions(tmp_path / "run" / "report")
    assert len(found) == 4
    assert all(((1 < x) & (x < 5)).all() for x in found.values())
    assert run(*given[:4], tmp_path / "other", "--validation-videos", tmp_path) == 2
    assert "--validation-videos: they are those of" in capsys.readouterr().err


def test_what_is_left_out_is_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "set", tmp_path / "set")
    labels = tmp_path / "set" / "labels.csv"
    lines = labels.read_text().splitlines()
    lines[3] = lines[3].rpartition(",")[0] + ","  # video 2 without its overall score
    labels.write_text("\n".join(lines) + "\n")
    damage(tmp_path / "set" / "00005.mp4")
    out = tmp_path / "report"
    assert run("mos", "evaluate", folder / "model", labels, "--out", out) == 0
    shown = capsys.readouterr().out
    assert "8 videos, 2 left out" in shown
    assert "00002.mp4: a score is missing" in shown
    assert "00005.mp4: " in shown
    record = json.loads((out / "metrics.json").read_text())
    assert record["videos"] == 8
    assert record["unrated"] == ["00002.mp4"]
    assert list(record["bad"]) == ["00005.mp4"]
    assert (out / "Overall.png").is_file()


def test_bad_input(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*arguments: Any) -> str:
        assert run(*arguments) == 2
        return " ".join(capsys.readouterr().err.split())

    model, labels, out = folder / "model", folder / "set" / "labels.csv", tmp_path / "run"
    (tmp_path / "empty.csv").write_text("video_name,Prompt\n")
    assert "has no column Traditional_MOS" in fails("train", "mos", model, tmp_path / "empty.csv",
                                                     out, *SHORT)  # fmt: skip
    assert "config.json does not exist" in fails("train", "mos", tmp_path, labels, out, *SHORT)
    share = ["--validation-share", 0.01]
    assert "10 videos are divided into 10 and 0" in fails("train", "mos", model, labels, out,
                                                          *SHORT, *share)  # fmt: skip
    assert "batch_size = 64" in fails("train", "mos", model, labels, out, *SHORT,
                                      "--batch-size", 64)  # fmt: skip
    assert "is not there" in fails("mos", "evaluate", model, labels, "--out", tmp_path / "report",
                                   "--videos", tmp_path)  # fmt: skip
    assert "model is the source" in fails("train", "mos", model, labels, folder, *SHORT)
    assert "holds the source" in fails("mos", "evaluate", model, labels, "--out", folder, "--force")
    for made in ("model", "report"):
        (tmp_path / f"with-{made}" / made / "mine").mkdir(parents=True)
        error = fails("train", "mos", model, labels, tmp_path / f"with-{made}", *SHORT)
        assert f"{made} holds mine; only an empty folder or one with" in error
    assert model.is_dir()
    assert not (tmp_path / "report").exists()
    assert not (out / "run").exists()


def test_plots_need_matplotlib(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    given = [folder / "model", folder / "set" / "labels.csv"]
    assert run("mos", "evaluate", *given, "--out", tmp_path / "report") == 2
    assert run("train", "mos", *given, tmp_path / "run") == 2
    assert capsys.readouterr().err.count("or pass --no-plots") == 2


def test_the_preset_is_whole(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from jvjepa.train.commands import _preset
    from jvjepa.train.mos_commands import Mos

    command = _preset(Mos, "mos_vitg")
    assert command.config.batch_size % command.loop.accumulate == 0
    with pytest.raises(SystemExit) as stopped:
        run("train", "mos", "--preset", "mos_vitg", "--help")
    assert stopped.value.code == 0
    with pytest.raises(SystemExit) as stopped:
        run("mos", "evaluate", "--help")
    assert stopped.value.code == 0
    assert "left out" in capsys.readouterr().out
