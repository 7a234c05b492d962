"""What `benchmarks/causal.py` compares, and the table that it makes of it."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jvjepa.train.data import Batch
from jvjepa.train.feeding import DataConfig
from jvjepa.train.finetune import FinetuneConfig, with_classifier
from jvjepa.train.manifest import Manifest, read_manifest
from jvjepa.train.synthetic import write_videos
from jvjepa.weights import Model

sys.path[:0] = [str(Path(__file__).parent.parent / "benchmarks")]
causal = importlib.import_module("causal")
DATA = DataConfig(clip=causal.CLIP, batch_size=8)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("causal") / "videos"
    return read_manifest(write_videos(folder, 8, causal.VIDEOS, seed=1))


@pytest.fixture(scope="module")
def model(manifest: Manifest) -> Model:
    options = FinetuneConfig(data=DATA, num_layers=1, num_heads=3)
    return with_classifier(causal.random_model(0), options, manifest, 0)


def test_a_tubelet_is_a_still_picture_and_the_clip_moves(manifest: Manifest) -> None:
    clips = causal.decode(manifest)
    assert clips.shape == (8, 2 * causal.WINDOW, 32, 32, 3)
    np.testing.assert_array_equal(clips[:, 0::2], clips[:, 1::2])
    assert (clips[:, 0:-2:2] != clips[:, 2::2]).any((0, 2, 3, 4)).all()


@pytest.mark.parametrize("label", range(8))
def test_a_mirrored_video_moves_in_the_direction_that_it_is_given(label: int) -> None:
    def direction(video: np.ndarray) -> tuple[float, ...]:
        first, last = (np.argwhere(video[i, ..., 0])[0] for i in (0, -1))
        return tuple(np.sign(last - first))  # down, right

    def moving(label: int) -> np.ndarray:
        angle, video = label * np.pi / 4, np.zeros((3, 9, 9, 3), np.uint8)
        for t in range(3):
            x, y = np.round(4 + 3 * (t - 1) * np.array([np.cos(angle), np.sin(angle)])).astype(int)
            video[t, y, x] = 255
        return video

    draw = np.random.default_rng(label)
    given = [causal.mirrored(moving(label), label, draw) for _ in range(64)]
    assert len({changed for _, changed in given}) in (4, 8)
    for video, changed in given:
        assert direction(video) == direction(moving(changed))


def test_every_epoch_mirrors_anew_and_the_same_step_alike(manifest: Manifest) -> None:
    pixels = np.concatenate([causal.decode(manifest)] * 4)
    feed = causal.feed(pixels, np.tile(manifest.labels, 4), 0, causal.mirrored)

    def batch(step: int) -> Batch:
        with feed(step, 0, 1) as batches:
            return next(batches)

    first, again, later = batch(0), batch(0), batch(1)
    np.testing.assert_array_equal(first.video, again.video)
    np.testing.assert_array_equal(first.labels, again.labels)
    assert (np.sort(first.ids) == np.sort(later.ids)).all()
    assert (first.video != later.video).any()


def test_what_sees_the_whole_clip_is_itself_and_what_is_causal_is_not(
    model: Model, manifest: Manifest
) -> None:
    pixels = causal.decode(manifest)
    measure = causal.Measure(model, pixels, manifest.labels)
    params = {"params": model.params["encoder"]}
    rows = ("whole", "cold", "causal")
    whole, cold, stream = (measure(measure.tokens(pixels, params, row)) for row in rows)
    nearness = [name for name in whole if name != "accuracy"]
    assert len(nearness) == 2 + causal.TUBELETS
    for name in nearness:
        assert whole[name] == pytest.approx(1, abs=1e-5)
        assert cold[name] < whole[name]
        assert stream[name] < whole[name]
        assert stream[name] != cold[name]
    tokens = measure.tokens(pixels, params, "whole")
    logits = model.classifier.apply({"params": model.params["classifier"]}, tokens)
    right = np.mean(np.argmax(logits, -1) == manifest.labels)
    assert whole["accuracy"] == measure.accuracy(tokens, model.params["classifier"]) == right


def test_the_past_is_seen_by_the_stream_that_runs_alone(model: Model, manifest: Manifest) -> None:
    pixels = causal.decode(manifest)
    other = pixels.copy()
    other[:, : 2 * causal.PAST] = 255 - other[:, : 2 * causal.PAST]
    measure = causal.Measure(model, pixels, manifest.labels)
    params = {"params": model.params["encoder"]}
    for row in ("whole", "cold", "causal"):
        tokens, changed = (measure.tokens(x, params, row) for x in (pixels, other))
        assert tokens.shape == (8, causal.TUBELETS * 4, causal.ENCODER.hidden_size)
        assert (tokens != changed).any() == (row == "causal")


def result(shift: float) -> dict[str, Any]:
    """A cold start loses 0.4 of 0.5, but nothing in one column; a stream 0.3, adapters 0.2."""
    tubelets = [f"tubelet_{i}" for i in range(causal.TUBELETS)]
    names = ("own_accuracy", "accuracy", "token_cosine", "pooled_cosine", *tubelets[4:])
    values = {"whole": 0.5, "cold": 0.1, "causal": 0.2, "adapted": 0.3}
    rows = {
        row: {**dict.fromkeys(tubelets, 0.0), **dict.fromkeys(names, value + shift)}
        for row, value in values.items()
    }
    rows["cold"]["own_accuracy"] = rows["whole"]["own_accuracy"]
    return rows


def test_the_table_has_means_and_both_ends_of_all_seeds() -> None:
    text = causal.make_table([result(0.1), result(0.2)])
    lines = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| ")}
    assert "means of 2 seeds" in text
    assert lines["| whole clip"].count("65.0 (60.0 to 70.0)") == 6
    assert lines["| causal, from a cold start"].count("25.0 (20.0 to 30.0)") == 5
    assert lines["| causal, a stream that runs"].count("35.0 (30.0 to 40.0)") == 6
    assert lines["| the same, with adapters"].count("45.0 (40.0 to 50.0)") == 6
    found = [line for name, line in lines.items() if name.startswith("| share")]
    for line, share in zip(found[:2], ("25.0 (25.0 to 25.0)", "50.0 (50.0 to 50.0)"), strict=True):
        assert line.count(share) == 5
        assert line.count("not with every seed is any lost") == 1
    assert found[2].count("33.3 (33.3 to 33.3)") == 6


def test_the_second_half_is_its_own_tubelets_alone() -> None:
    given = result(0.0)
    for i, value in enumerate((0.1, 0.2, 0.3, 0.8)):
        given["adapted"][f"tubelet_{causal.TUBELETS - 4 + i}"] = value
    row = next(x for x in causal.make_table([given]).splitlines() if "with adapters |" in x)
    assert [x.split()[0] for x in row.split(" | ")[-2:]] == ["35.0", "80.0"]


def test_seeds_of_other_options_are_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "seed3").mkdir()
    record = {**result(0.1), "sizes": {"training": 1}, "weighting": "relative"}
    (tmp_path / "seed3" / "result.json").write_text(json.dumps(record))
    monkeypatch.setattr(sys, "argv", ["causal.py", "--seeds", "3", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"seed3/result\.json: is of other options"):
        causal.main()
    assert not (tmp_path / "causal.json").exists()
