import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import compiled, relative_error
from quality import tiny_quality
from ratedvideos import damage, write_rated

from jvjepa.errors import CheckpointError, InputError
from jvjepa.quality import QualityModel, read_pixels, score, text_features
from jvjepa.train import mos_features
from jvjepa.train.manifest import DataError
from jvjepa.train.mos_data import Ratings, read_ratings
from jvjepa.train.mos_features import Kept, Store, make_examples
from jvjepa.train.mos_scorer import Scorer

FLOAT32 = jnp.dtype(jnp.float32)
FEATURE = Kept(None, "float32", FLOAT32)
TOKENS = Kept(1, "float32", FLOAT32)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rated(tmp_path_factory.mktemp("rated") / "set", 5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> QualityModel:
    return tiny_quality(tmp_path_factory.mktemp("quality") / "model", feature="mean")


@pytest.fixture
def ratings(videos: Path, tmp_path: Path) -> Ratings:
    """The videos, which may be damaged."""
    shutil.copytree(videos.parent, tmp_path / "set")
    return read_ratings(tmp_path / "set" / videos.name)


class Decoded:
    """Counts what is read, through `read_pixels`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []

        def read(path: Path, config: Any) -> np.ndarray:
            self.names.append(path.name)
            return read_pixels(path, config)

        monkeypatch.setattr(mos_features, "read_pixels", read)


@pytest.mark.parametrize("kept", [FEATURE, TOKENS])
def test_scores_of_kept_features_are_those_of_the_model(
    model: QualityModel, ratings: Ratings, tmp_path: Path, kept: Kept
) -> None:
    examples = make_examples(model, ratings, Store(tmp_path / "kept"), kept, batch_size=2)
    part = Scorer(model=model, kept=kept)
    trained, frozen = part.divide()
    found = part.predict({**trained, **frozen}, examples, 2)
    for path, prompt, scores in zip(ratings.paths, ratings.prompts, found, strict=True):
        right = score(model, read_pixels(path, model.config), prompt)
        assert relative_error(scores, right) <= 1e-4
    shape = (48,) if kept.depth is None else (2 * 2 * 2, 48)
    assert examples.load(3).shape == shape
    assert relative_error(examples.texts, text_features(model, ratings.prompts)) <= 1e-5


def test_nothing_is_computed_twice(
    model: QualityModel, ratings: Ratings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, decoded = Store(tmp_path / "kept"), Decoded(monkeypatch)
    first = make_examples(model, ratings.take([0, 1, 2]), store, FEATURE)
    assert sorted(decoded.names) == ["00000.mp4", "00001.mp4", "00002.mp4"]
    shutil.copy(ratings.paths[1], ratings.paths[4])  # the same video by another name
    decoded.names.clear()
    again = make_examples(model, ratings, store, FEATURE)
    assert decoded.names == ["00003.mp4"]
    assert again.videos[:3] == first.videos
    assert again.videos[4] == again.videos[1]
    np.testing.assert_array_equal(again.texts[:3], first.texts)
    shutil.copy(ratings.paths[0], ratings.paths[3])  # a video that is replaced is another one
    assert make_examples(model, ratings, store, FEATURE).videos[3] == first.videos[0]


def test_other_weights_and_options_have_other_files(
    model: QualityModel, ratings: Ratings, tmp_path: Path
) -> None:
    some, store = ratings.take([0]), Store(tmp_path / "kept")

    def changed(part: str) -> QualityModel:
        params = {**model.params, part: jax.tree.map(lambda x: x * 1.01, model.params[part])}
        return dataclasses.replace(model, params=params)

    config = dataclasses.replace(model.config, num_frames=2)
    models = {
        "itself": (model, FEATURE),
        "its text encoder": (changed("text"), FEATURE),
        "its head": (changed("head"), FEATURE),
        "its encoder": (changed("encoder"), FEATURE),
        "frames": (dataclasses.replace(model, config=config), FEATURE),
        "depth": (model, TOKENS),
        "half": (model, FEATURE._replace(stored="bfloat16")),
        "computed": (model, FEATURE._replace(dtype=jnp.dtype(jnp.bfloat16))),
    }
    found = {name: make_examples(*pair[:1], some, store, pair[1]) for name, pair in models.items()}
    keys = {name: examples.videos[0] for name, examples in found.items()}
    assert keys["itself"] == keys["its text encoder"] == keys["its head"]
    assert len(set(keys.values())) == len(keys) - 2
    assert not np.allclose(found["itself"].texts, found["its text encoder"].texts)
    half = found["half"].load(0)
    assert half.dtype.name == "bfloat16"
    assert relative_error(half, found["itself"].load(0)) <= 0.01
    assert relative_error(found["computed"].load(0), found["itself"].load(0)) <= 0.05


def test_upper_blocks_do_not_count_for_tokens(
    model: QualityModel, ratings: Ratings, tmp_path: Path
) -> None:
    some, store = ratings.take([0]), Store(tmp_path / "kept")
    blocks = jax.tree.map(lambda x: x.at[1:].multiply(2.0), model.params["encoder"]["blocks"])
    params = {**model.params, "encoder": {**model.params["encoder"], "blocks": blocks}}
    other = dataclasses.replace(model, params=params)
    keys = [make_examples(one, some, store, TOKENS).videos for one in (model, other)]
    assert keys[0] == keys[1]
    pixels = jnp.asarray(read_pixels(some.paths[0], model.config))[None]
    layers = compiled(model.encoder, model.params["encoder"], pixels, method="layers").layers
    assert relative_error(store.load(keys[0][0]), layers[1, 0]) <= 1e-5


def test_what_cannot_be_decoded_is_left_out_and_listed(
    model: QualityModel, ratings: Ratings, tmp_path: Path
) -> None:
    store = Store(tmp_path / "kept")
    for i in (1, 4):
        damage(ratings.paths[i])
    examples = make_examples(model, ratings, store, FEATURE, batch_size=2)
    assert examples.ratings.names == ("00000.mp4", "00002.mp4", "00003.mp4")
    np.testing.assert_array_equal(examples.ratings.scores, ratings.scores[[0, 2, 3]])
    assert set(examples.bad) == {"00001.mp4", "00004.mp4"}
    assert all("0000" in reason for reason in examples.bad.values())
    assert len(examples) == len(examples.texts) == 3
    np.testing.assert_array_equal(
        examples.load(1), make_examples(model, ratings.take([2]), store, FEATURE).load(0)
    )
    for i in (0, 2, 3):
        ratings.paths[i].write_bytes(b"no video")
    with pytest.raises(
        DataError, match=r"labels\.csv: none of its 5 videos can be decoded: .*00000"
    ):
        make_examples(model, ratings, store, FEATURE)


def test_damage_is_seen(model: QualityModel, ratings: Ratings, tmp_path: Path) -> None:
    store = Store(tmp_path / "kept")
    examples = make_examples(model, ratings.take([0]), store, FEATURE)
    damage(store.place(examples.videos[0]))
    with pytest.raises(CheckpointError, match=r"\.safetensors is not whole"):
        examples.load(0)
    params = jax.tree.map(lambda x: x * jnp.nan, model.params)
    broken = dataclasses.replace(model, params={**model.params, "encoder": params["encoder"]})
    with pytest.raises(DataError, match=r"00000\.mp4 are not finite in float32"):
        make_examples(broken, ratings, store, FEATURE)
    for name in ("batch_size", "threads"):
        with pytest.raises(InputError, match=rf"{name} = 0"):
            make_examples(model, ratings, store, FEATURE, **{name: 0})
