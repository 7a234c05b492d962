"""What `benchmarks/causal.py` compares, and the table that it makes of it."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jvjepa.lora import LoraConfig
from jvjepa.train.causal_lora import CausalLoraConfig, causal_lora_task
from jvjepa.train.data import Batch
from jvjepa.train.feeding import DataConfig
from jvjepa.train.finetune import FinetuneConfig, with_classifier
from jvjepa.train.manifest import Manifest, read_manifest
from jvjepa.train.regression import RegressionConfig
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
    assert clips.shape == (8, 16, 32, 32, 3)
    np.testing.assert_array_equal(clips[:, 0::2], clips[:, 1::2])
    assert (clips[:, 0:-2:2] != clips[:, 2::2]).any((0, 2, 3, 4)).all()


def test_adapters_and_all_weights_begin_with_the_same_loss(
    model: Model, manifest: Manifest
) -> None:
    options = CausalLoraConfig(
        lora=LoraConfig(rank=2, targets=(causal.LAYERS,)),
        data=DATA,
        loss=RegressionConfig(weighting="relative"),
    )
    adapters = causal_lora_task(model, options, manifest, steps=200)
    every = causal.all_weights_task(model, options, adapters, 200)
    clips = causal.decode(manifest)
    batch = Batch(clips, manifest.labels, np.arange(8, dtype=np.int32))
    found = []
    for task in (adapters, every):
        given = (task.trained, {}, task.frozen, batch, jnp.int32(0), jax.random.key(0))
        found.append(float(jax.jit(task.loss)(*given)[0]))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert set(every.trained) == set(model.params["encoder"])


def test_what_sees_the_whole_clip_is_itself_and_what_is_causal_is_not(
    model: Model, manifest: Manifest
) -> None:
    measure = causal.Measure(model, causal.decode(manifest), manifest.labels)
    params = {"params": model.params["encoder"]}
    whole, stream = measure(params, None), measure(params, causal.TUBELETS)
    nearness = [name for name in whole if name != "accuracy"]
    assert len(nearness) == 2 + causal.TUBELETS
    for name in nearness:
        assert whole[name] == pytest.approx(1, abs=1e-5)
        assert stream[name] < whole[name]
    tokens = measure.tokens(causal.decode(manifest), params, None)
    logits = model.classifier.apply({"params": model.params["classifier"]}, tokens)
    right = np.mean(np.argmax(logits, -1) == manifest.labels)
    assert whole["accuracy"] == measure.accuracy(tokens, model.params["classifier"]) == right


def result(shift: float) -> dict[str, Any]:
    """Of 0.5 a causal run loses 0.4, but nothing in one column; a quarter or half comes back."""
    names = ("own_accuracy", "accuracy", "token_cosine", "pooled_cosine", "tubelet_7")
    values = {"whole": 0.5, "causal": 0.1, "adapted": 0.2, "retrained": 0.3}
    rows = {row: dict.fromkeys(names, value + shift) for row, value in values.items()}
    rows["causal"]["own_accuracy"] = rows["whole"]["own_accuracy"]
    return rows


def test_the_table_has_means_and_both_ends_of_all_seeds() -> None:
    text = causal.make_table([result(0.1), result(0.2)])
    lines = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| ")}
    assert "means of 2 seeds" in text
    assert lines["| whole clip"].count("65.0 (60.0 to 70.0)") == 5
    assert lines["| causal"].count("25.0 (20.0 to 30.0)") == 4
    assert lines["| causal, with adapters"].count("35.0 (30.0 to 40.0)") == 5
    found = [line for name, line in lines.items() if name.endswith("recover")]
    for line, share in zip(found, ("25.0 (25.0 to 25.0)", "50.0 (50.0 to 50.0)"), strict=True):
        assert line.count(share) == 4
        assert line.count("not with every seed is any lost") == 1


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
