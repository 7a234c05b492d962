import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from models import compiled, random_params, relative_error, tiny_config
from rich.console import Console

from jvjepa import Encoder, streaming
from jvjepa.adapters import weights_sha256
from jvjepa.config import ModelConfig
from jvjepa.errors import ConfigError, InputError
from jvjepa.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from jvjepa.train.data import ClipConfig, read_clip
from jvjepa.train.feature_cache import (
    Features,
    check_classes,
    check_kind,
    count_classes,
    make_features,
    open_features,
    open_or_make,
)
from jvjepa.train.frozen_features import FeatureConfig, StreamConfig
from jvjepa.train.manifest import DataError, Manifest, read_manifest
from jvjepa.train.synthetic import SyntheticConfig, write_videos
from jvjepa.weights import Model

VIDEOS = 5
CENTRE = ClipConfig(
    num_frames=4, fps=8, crop_size=32, temporal="uniform", spatial="centre", clips=2
)
MIRRORED = dataclasses.replace(CENTRE, spatial="random", scale=(0.9, 1.0), flip=1.0)
TOKENS = FeatureConfig(views=(CENTRE,))


def tiny(seed: int = 0) -> Model:
    config = tiny_config(num_layers=2, crop_size=32)
    encoder = Encoder(config)
    params = {"encoder": random_params(encoder, seed)}
    return Model(config=ModelConfig(encoder=config), encoder=encoder, params=params, source=None)


MODEL = tiny()


@jax.jit
def encode_one(video: jax.Array) -> jax.Array:
    return MODEL.encoder.apply({"params": MODEL.params["encoder"]}, video)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Five small H.264 videos with the labels 0 to 4."""
    config = SyntheticConfig(num_frames=16, fps=16, height=48, width=64)
    return read_manifest(write_videos(tmp_path_factory.mktemp("set") / "v", VIDEOS, config))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, manifest: Manifest) -> Path:
    folder = tmp_path_factory.mktemp("made") / "tokens"
    make_features(folder, MODEL, manifest, TOKENS, batch_size=2)
    return folder


def pixels(manifest: Manifest, view: ClipConfig, row: int, clip: int) -> np.ndarray:
    """float32 [1, T, crop, crop, 3]."""
    video = read_clip(manifest, view, row, clip)[None].astype(np.float64) / 255
    return ((video - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)).astype(np.float32)


def direct(manifest: Manifest, view: ClipConfig, row: int, clip: int) -> np.ndarray:
    """Tokens [t, S, D] of a clip, encoded on its own."""
    video = jnp.asarray(pixels(manifest, view, row, clip))
    tokens = encode_one(video)
    return np.asarray(tokens).reshape(2, 4, -1)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# What is in it


def test_each_clip_is_encoded_on_its_own(manifest: Manifest, made: Path) -> None:
    features = open_features(made)

    assert features.values.shape == (VIDEOS, 1, 2, 2, 4, 48)
    assert isinstance(features.values, np.memmap)
    assert features.labels.tolist() == features.ids.tolist() == [0, 1, 2, 3, 4]
    assert (len(features), features.source, features.bad) == (VIDEOS, manifest.source, {})
    assert (features.config, features.encoder) == (TOKENS, MODEL.config.encoder)
    assert features.made_of["encoder"] == weights_sha256(MODEL.params["encoder"])
    wanted = [[[direct(manifest, CENTRE, row, i) for i in (0, 1)]] for row in range(VIDEOS)]
    assert relative_error(features.values, wanted) <= 1e-5


def test_the_same_bits_whatever_the_batches_and_workers(
    manifest: Manifest, made: Path, tmp_path: Path
) -> None:
    make_features(tmp_path / "again", MODEL, manifest, TOKENS, batch_size=2)
    assert files(tmp_path / "again") == files(made)

    make_features(tmp_path / "whole", MODEL, manifest, TOKENS, batch_size=64, workers=1)
    one, other = open_features(tmp_path / "whole"), open_features(made)
    assert relative_error(one.values, other.values) <= 1e-5
    assert one.made_of == other.made_of


def test_views(manifest: Manifest, tmp_path: Path) -> None:
    config = FeatureConfig(views=(CENTRE, MIRRORED), pool="clip")
    features = open_or_make(tmp_path / "f", MODEL, manifest, config, batch_size=3)

    assert features.values.shape == (VIDEOS, 2, 2, 1, 1, 48)
    for row in (0, 4):
        for place, view in enumerate((CENTRE, MIRRORED)):
            for clip in (0, 1):
                wanted = direct(manifest, view, row, clip).mean(axis=(0, 1), dtype=np.float64)
                assert relative_error(features.values[row, place, clip, 0, 0], wanted) <= 1e-5


@pytest.mark.parametrize("pool", ["none", "tubelet", "clip"])
def test_layers_are_put_one_after_the_other(manifest: Manifest, tmp_path: Path, pool: str) -> None:
    view = dataclasses.replace(CENTRE, clips=1)
    config = FeatureConfig(views=(view,), layers=(0, 1), pool=pool)
    features = open_or_make(tmp_path / "f", MODEL, manifest, config, batch_size=5)

    video = jnp.asarray(pixels(manifest, view, 3, 0))
    levels = compiled(MODEL.encoder, MODEL.params["encoder"], video, method="levels", layers=(0, 1))
    levels = np.asarray(levels, np.float64)[:, 0].reshape(2, 2, 4, 48)  # [layers, t, S, D]
    wanted = {
        "none": np.concatenate(levels, axis=1),
        "tubelet": levels.mean(axis=2).swapaxes(0, 1),
        "clip": levels.mean(axis=(1, 2))[None],
    }[pool]
    assert relative_error(features.values[3, 0, 0], wanted) <= 1e-5


@pytest.mark.parametrize("positions", ["window", "absolute"])
@pytest.mark.parametrize("pool", ["none", "tubelet"])
def test_a_stream(manifest: Manifest, tmp_path: Path, positions: str, pool: str) -> None:
    view = dataclasses.replace(CENTRE, num_frames=8)
    stream = StreamConfig(window=2, positions=positions)
    config = FeatureConfig(views=(view,), stream=stream, pool=pool)
    features = open_or_make(tmp_path / "f", MODEL, manifest, config)

    assert features.values.shape == (VIDEOS, 1, 2, 4, 4 if pool == "none" else 1, 48)
    video = pixels(manifest, view, 2, 1)
    state = streaming.init_state(MODEL.encoder, 1, 2)
    for i in range(4):
        tubelet = jnp.asarray(video[:, 2 * i : 2 * i + 2])
        state, out = streaming.step(
            MODEL.encoder, MODEL.params["encoder"], state, tubelet, positions=positions
        )
        wanted = out.tokens[0] if pool == "none" else out.embedding
        assert relative_error(features.values[2, 0, 1, i], wanted) <= 1e-5


def test_a_picture(manifest: Manifest, tmp_path: Path) -> None:
    view = dataclasses.replace(CENTRE, num_frames=1)
    features = open_or_make(tmp_path / "f", MODEL, manifest, FeatureConfig(views=(view,)))

    assert features.values.shape == (VIDEOS, 1, 2, 1, 4, 48)


@pytest.mark.parametrize(("dtype", "error"), [("float16", 5e-4), ("bfloat16", 4e-3)])
def test_half_precision(
    manifest: Manifest, made: Path, tmp_path: Path, dtype: str, error: float
) -> None:
    config = dataclasses.replace(TOKENS, dtype=dtype)
    features = open_or_make(tmp_path / "f", MODEL, manifest, config)

    exact = open_features(made).values
    rounded = exact.astype({"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype])
    assert features.values.dtype == rounded.dtype
    apart = np.abs(features.values.astype(np.float64) - exact)
    assert (apart <= error * np.abs(exact) + 1e-5).all()
    assert (features.values == rounded).mean() > 0.99  # the others were next to a boundary
    assert (tmp_path / "f" / "features.npy").stat().st_size < (
        (made / "features.npy").stat().st_size * 0.6
    )


def test_bfloat16_encoder_computes_in_bfloat16(manifest: Manifest, tmp_path: Path) -> None:
    encoder = Encoder(MODEL.config.encoder, dtype=jnp.bfloat16)
    model = dataclasses.replace(MODEL, encoder=encoder)
    features = open_or_make(tmp_path / "f", model, manifest, TOKENS)

    assert features.made_of["computed_in"] == "bfloat16"
    assert (features.values == features.values.astype(ml_dtypes.bfloat16)).all()
    with pytest.raises(DataError, match="computed_in = bfloat16, not float32"):
        open_or_make(tmp_path / "f", MODEL, manifest, TOKENS)


def test_unreadable_files_are_left_out(manifest: Manifest, made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    shutil.copytree(Path(manifest.source).parent, folder)
    (folder / "00002.mp4").write_bytes(b"no video")
    damaged = read_manifest(folder / "manifest.csv")
    features = open_or_make(tmp_path / "f", MODEL, damaged, TOKENS, batch_size=2, max_bad=0.4)

    assert features.ids.tolist() == features.labels.tolist() == [0, 1, 3, 4]
    assert [Path(path).name for path in features.bad] == ["00002.mp4"]
    assert relative_error(features.values, open_features(made).values[[0, 1, 3, 4]]) <= 1e-6
    assert not (np.asarray(features.values) == 0).all(axis=-1).any()
    with pytest.raises(DataError, match=r"no row has 2 \(1 files could not be read\)"):
        count_classes(features)
    with pytest.raises(DataError, match=r"00002\.mp4"):
        make_features(tmp_path / "g", MODEL, damaged, TOKENS, batch_size=2)
    assert not (tmp_path / "g").exists()


def test_progress_is_shown(manifest: Manifest, tmp_path: Path) -> None:
    console = Console(force_terminal=True, file=(tmp_path / "log").open("w+"), width=80)
    make_features(tmp_path / "f", MODEL, manifest, TOKENS, batch_size=5, console=console)

    console.file.seek(0)
    assert "encoding" in console.file.read()
    console.file.close()


# When it is there


def test_a_cache_that_is_there_is_opened(
    manifest: Manifest, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jvjepa.train.feature_cache.make_features", None)

    assert len(open_or_make(made, MODEL, manifest, TOKENS)) == VIDEOS


def test_a_cache_of_something_else(manifest: Manifest, made: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"something else: encoder = \w{64}, not \w{64}; choose"):
        open_or_make(made, tiny(seed=1), manifest, TOKENS)
    other = dataclasses.replace(TOKENS, views=(dataclasses.replace(CENTRE, fps=4.0),))
    with pytest.raises(DataError, match=r"config\.views\.0\.fps = 8, not 4\.0; choose"):
        open_or_make(made, MODEL, manifest, other)
    other = dataclasses.replace(TOKENS, pool="clip", dtype="float16")
    with pytest.raises(DataError, match=r"pool = none, not clip; config\.dtype = float32, not flo"):
        open_or_make(made, MODEL, manifest, other)
    other = dataclasses.replace(TOKENS, stream=StreamConfig())
    with pytest.raises(DataError, match=r"config\.stream"):
        open_or_make(made, MODEL, manifest, other)
    fewer = dataclasses.replace(manifest, labels=manifest.labels[::-1].copy())
    with pytest.raises(DataError, match=r"manifest = \w{64}, not \w{64}; choose"):
        open_or_make(made, MODEL, fewer, TOKENS)
    assert len(open_features(made)) == VIDEOS  # nothing was touched


def test_a_replaced_file_is_noticed(manifest: Manifest, tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    shutil.copytree(Path(manifest.source).parent, folder)
    moved = read_manifest(folder / "manifest.csv")
    config = FeatureConfig(views=(dataclasses.replace(CENTRE, clips=1),), pool="clip")
    open_or_make(tmp_path / "f", MODEL, moved, config)
    shutil.copy(folder / "00001.mp4", folder / "00000.mp4")

    with pytest.raises(DataError, match="file_sizes = "):
        open_or_make(tmp_path / "f", MODEL, moved, config)


def test_nothing_half_written_stays(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def fail(values: np.ndarray) -> np.ndarray:
        seen.append(values.shape)
        if len(seen) == 2:
            raise OSError(28, "No space left on device")
        return np.ones(values.shape, bool)

    monkeypatch.setattr("jvjepa.train.feature_cache.np.isfinite", fail)
    with pytest.raises(OSError, match="No space left"):
        make_features(tmp_path / "f", MODEL, manifest, TOKENS, batch_size=2)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept(manifest: Manifest, made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "f"
    shutil.copytree(made, folder)
    with pytest.raises(InputError, match="exists"):
        make_features(folder, MODEL, manifest, TOKENS)
    pooled = dataclasses.replace(TOKENS, pool="clip")
    make_features(folder, MODEL, manifest, pooled, force=True)
    assert open_features(folder).config == pooled


def test_values_that_are_not_finite(manifest: Manifest, tmp_path: Path) -> None:
    large = jax.tree.map(jnp.copy, MODEL.params["encoder"])
    large["norm"]["scale"] = large["norm"]["scale"] * 1e5
    model = dataclasses.replace(MODEL, params={"encoder": large})
    config = dataclasses.replace(TOKENS, dtype="float16")

    with pytest.raises(DataError, match=r"row 0, .*00000\.mp4, are not finite in float16"):
        make_features(tmp_path / "f", model, manifest, config)
    assert list(tmp_path.iterdir()) == []


# Damage


@pytest.mark.parametrize("name", ["features.npy", "labels.npy", "ids.npy", "config.json"])
def test_a_missing_file(made: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(made, tmp_path / "f")
    (tmp_path / "f" / name).unlink()
    with pytest.raises(DataError, match=name):
        open_features(tmp_path / "f")


@pytest.mark.parametrize("name", ["features.npy", "labels.npy", "ids.npy", "config.json"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_a_truncated_file(made: Path, tmp_path: Path, name: str, share: float) -> None:
    shutil.copytree(made, tmp_path / "f")
    path = tmp_path / "f" / name
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(DataError, match=name):
        open_features(tmp_path / "f")


def test_files_that_do_not_belong_together(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "f")
    np.save(tmp_path / "f" / "labels.npy", np.zeros(3, np.int32))
    with pytest.raises(DataError, match=r"labels\.npy is int32 \[3\]; .* says int32 \[5\]"):
        open_features(tmp_path / "f")
    shutil.copy(made / "labels.npy", tmp_path / "f" / "labels.npy")
    np.save(tmp_path / "f" / "features.npy", np.zeros((VIDEOS, 48)))
    with pytest.raises(DataError, match=r"features\.npy is float64 \[5, 48\]"):
        open_features(tmp_path / "f")


@pytest.mark.parametrize(
    "change",
    [
        {"format": "another"},
        {"made_of": None},
        {"made_of": {}},
        {"shape": None},
        {"classes": None},
    ],
)
def test_a_damaged_record(made: Path, tmp_path: Path, change: dict[str, object]) -> None:
    shutil.copytree(made, tmp_path / "f")
    path = tmp_path / "f" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=r"config\.json"):
        open_features(tmp_path / "f")


def test_a_record_with_an_unknown_option(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "f")
    path = tmp_path / "f" / "config.json"
    record = json.loads(path.read_text())
    record["made_of"]["config"]["pool"] = "median"
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match="median"):
        open_features(tmp_path / "f")


def test_no_cache(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no features"):
        open_features(tmp_path)
    with pytest.raises(DataError, match="holds no features"):
        open_features(tmp_path / "missing")


# Labels


def labelled(made: Path, labels: list[int], ids: list[int] | None = None) -> Features:
    ids = list(range(len(labels))) if ids is None else ids
    return dataclasses.replace(
        open_features(made), labels=np.array(labels, np.int32), ids=np.array(ids, np.int32)
    )


def test_classes_are_counted(made: Path) -> None:
    assert count_classes(open_features(made)) == 5
    assert count_classes(labelled(made, [1, 0, 2, 1, 0])) == 3


def test_labels_that_are_missing(made: Path, manifest: Manifest) -> None:
    features = labelled(made, [0, -1, 1, -1, 1], [2, 3, 5, 7, 11])
    for check in (lambda: count_classes(features), lambda: check_classes(features, 2)):
        with pytest.raises(DataError, match=r"manifest\.csv: rows 3, 7 have no label"):
            check()


def test_labels_with_a_gap(made: Path) -> None:
    features = labelled(made, [0, 3, 0, 5, 5], [0, 1, 2, 3, 9])
    right = r"manifest\.csv: labels must be 0, 1, .*largest is 5, of row 3, but no row has 1, 2, 4"
    with pytest.raises(DataError, match=right):
        count_classes(features)


def test_labels_that_training_did_not_have(made: Path) -> None:
    features = labelled(made, [0, 3, 0, 5, 1], [0, 1, 2, 3, 9])
    with pytest.raises(DataError, match=r"rows 1, 3 have the labels 3, 5; .* has 0 to 2"):
        check_classes(features, 3)
    check_classes(features, 6)


def test_features_of_another_kind(made: Path) -> None:
    features = open_features(made)
    digest = features.made_of["encoder"]
    check_kind(features, dataclasses.replace(TOKENS, dtype="float16"), digest)
    with pytest.raises(InputError, match="encoder = "):
        check_kind(features, TOKENS, "0")
    for name, value in (("pool", "clip"), ("layers", (1,)), ("stream", StreamConfig())):
        with pytest.raises(InputError, match=f"its features have {name} = "):
            check_kind(features, dataclasses.replace(TOKENS, **{name: value}), digest)


# Bad values


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("views", ()),
        ("views", [CENTRE]),
        ("views", (None,)),
        ("views", (CENTRE, CENTRE)),
        ("views", (CENTRE, dataclasses.replace(CENTRE, clips=3))),
        ("views", (CENTRE, dataclasses.replace(CENTRE, num_frames=8))),
        ("views", (CENTRE, dataclasses.replace(CENTRE, crop_size=64))),
        ("stream", 8),
        ("pool", "max"),
        ("dtype", "int8"),
        ("layers", [1]),
        ("layers", (1, 0)),
        ("layers", (0, 0)),
        ("layers", (-1,)),
        ("layers", (0.5,)),
    ],
)
def test_bad_feature_options(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"FeatureConfig.{field} = "):
        FeatureConfig(**{field: value})


def test_a_stream_has_one_layer() -> None:
    with pytest.raises(ConfigError, match=r"FeatureConfig\.layers = \(1,\); .* a stream"):
        FeatureConfig(stream=StreamConfig(), layers=(1,))


@pytest.mark.parametrize(
    ("field", "value"),
    [("window", 0), ("window", 1.5), ("window", True), ("positions", "relative")],
)
def test_bad_stream_options(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"StreamConfig.{field} = "):
        StreamConfig(**{field: value})


def test_clips_that_do_not_fit_the_encoder(manifest: Manifest, tmp_path: Path) -> None:
    for config, message in (
        (FeatureConfig(views=(dataclasses.replace(CENTRE, num_frames=3),)), "num_frames = 3"),
        (
            FeatureConfig(
                views=(dataclasses.replace(CENTRE, num_frames=1),), stream=StreamConfig()
            ),
            "num_frames = 1",
        ),
        (FeatureConfig(views=(dataclasses.replace(CENTRE, crop_size=40),)), "40"),
        (FeatureConfig(views=(CENTRE,), layers=(7,)), "layers"),
    ):
        with pytest.raises(InputError, match=message):
            make_features(tmp_path / "f", MODEL, manifest, config)
    with pytest.raises(InputError, match="batch_size = 0"):
        make_features(tmp_path / "f", MODEL, manifest, TOKENS, batch_size=0)
    with pytest.raises(InputError, match="not a folder"):
        make_features(tmp_path / "no" / "f", MODEL, manifest, TOKENS)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_manifest(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DataError, match=r"empty\.csv: lists no clip"):
        read_manifest(tmp_path / "empty.csv")
