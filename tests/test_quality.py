"""The whole model is its parts, from frames to scores, and comes back from its folder."""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from models import compiled, random_video, relative_error
from PIL import Image
from quality import (
    PROMPTS,
    in_memory,
    random_quality_params,
    tiny_quality,
    tiny_quality_config,
    write_tokenizer,
)
from qualivision import torch_head
from videofiles import decode_all, moving_frames, write_video

import jvjepa
from jvjepa import streaming, video
from jvjepa.config import ClassifierConfig, ModelConfig, PoolerConfig
from jvjepa.errors import CheckpointError, ConfigError, InputError, VideoError
from jvjepa.heads import Classifier
from jvjepa.quality import (
    HeadConfig,
    QualityConfig,
    QualityModel,
    frame_indices,
    load_quality,
    new_quality,
    read_pixels,
    running_scores,
    save_quality,
    score,
    text_features,
)
from jvjepa.quality_weights import quality_shapes
from jvjepa.text_weights import TextModel

FEATURES = ("first_token", "mean", "attentive")


@functools.cache
def models(folder: Path) -> dict[str, QualityModel]:
    return {name: in_memory(tiny_quality_config(feature=name), folder) for name in FEATURES}


@pytest.fixture
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> QualityModel:
    """By its feature; the first one where none is asked for."""
    name = getattr(request, "param", "first_token")
    return models(tmp_path_factory.getbasetemp() / "tokenizer")[name]


by_feature = pytest.mark.parametrize("model", FEATURES, indirect=True)


# --- The whole ----------------------------------------------------------------------------------


@by_feature
def test_the_whole_is_its_parts(model: QualityModel) -> None:
    clip = random_video(2, 4, 32, 48, seed=3)
    ids, mask, _ = model.tokenizer(PROMPTS[:2])
    found = compiled(model.module, model.params, clip, ids, mask)

    tokens = compiled(model.encoder, model.params["encoder"], clip)
    feature = {
        "first_token": tokens[:, 0],
        "mean": tokens.mean(axis=1),
        "attentive": tokens[:, 0],
    }[model.config.feature]
    if model.pooler is not None:
        feature = compiled(model.pooler, model.params["pooler"], tokens)[:, 0]
    text = text_features(model, PROMPTS[:2])
    joined = torch.tensor(np.concatenate([feature, text], axis=1))
    with torch.no_grad():
        expected = torch_head(model.params["head"])(joined).numpy()
    assert relative_error(found, expected) < 1e-5


@by_feature
def test_scores_of_one_video(model: QualityModel, compilations: Callable[[], int]) -> None:
    pixels = random_video(4, 32, 32, seed=4)
    first = score(model, pixels, PROMPTS[0])
    assert first.shape == (5,)
    assert first.dtype == np.float32
    before = compilations()
    assert not np.array_equal(score(model, pixels, PROMPTS[1]), first)
    assert not np.array_equal(score(model, random_video(4, 32, 32), PROMPTS[0]), first)
    assert np.array_equal(score(dataclasses.replace(model), pixels, PROMPTS[0]), first)
    assert compilations() == before


def test_scores_that_are_not_finite_are_no_scores(model: QualityModel) -> None:
    head = jax.tree.map(lambda leaf: leaf * jnp.inf, model.params["head"])
    damaged = dataclasses.replace(model, params={**model.params, "head": head})
    with pytest.raises(InputError, match="are not finite"):
        score(damaged, random_video(4, 32, 32), "a cat")


@pytest.mark.parametrize(
    ("model", "pool"),
    [("first_token", "tubelet"), ("mean", "tubelet"), ("mean", "window"), ("attentive", "window")],
    indirect=["model"],
)
def test_running_scores_are_of_the_newest_tubelet(model: QualityModel, pool: str) -> None:
    clips = random_video(2, 8, 32, 32, seed=5)
    text = text_features(model, PROMPTS[:2])
    state = streaming.init_state(model.encoder, 2, 3)
    params = model.params["encoder"]
    causal = compiled(model.encoder, params, clips, window=3)  # as a whole, but causally
    by_tubelet = causal.reshape(2, 4, -1, causal.shape[-1])
    head, pooler = jax.jit(model.head.apply), jax.jit(model.pooler.apply) if model.pooler else None
    for i in range(4):
        tubelet = clips[:, 2 * i : 2 * i + 2]
        how = {"pool": pool, "positions": "absolute"}
        state, out = streaming.step(model.encoder, params, state, tubelet, **how)
        found = running_scores(model.module, model.params, out, text)
        newest, first = by_tubelet[:, i], max(0, i - 2) if pool == "window" else i
        feature = newest[:, 0]
        if model.config.feature == "mean":
            feature = by_tubelet[:, first : i + 1].mean(axis=(1, 2))
        elif model.config.feature == "attentive":
            feature = pooler({"params": model.params["pooler"]}, newest)[:, 0]
        expected = head({"params": model.params["head"]}, feature, text)
        assert found.shape == (2, 5)
        assert relative_error(found, expected) < 1e-4


# --- Frames -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "num"), [(1, 1), (1, 64), (40, 64), (64, 64), (65, 64), (601, 7)]
)
def test_frames_are_spread_over_the_whole_video(total: int, num: int) -> None:
    found = frame_indices(total, num)
    exact = [(i * (total - 1)) // max(1, num - 1) for i in range(num)]
    assert found.tolist() == exact  # the floor, in whole numbers
    assert found[-1] == (total - 1 if num > 1 else 0)


def test_impossible_numbers_of_frames_are_refused() -> None:
    for numbers in ((0, 4), (4, 0)):
        with pytest.raises(InputError, match="must be 1 or more"):
            frame_indices(*numbers)


@pytest.mark.parametrize("count", [3, 50])
def test_pixels_are_those_of_the_chosen_frames(tmp_path: Path, count: int) -> None:
    path = write_video(tmp_path / "clip.mp4", moving_frames(count, 64, 96), 25, gop=10)
    config = tiny_quality_config(num_frames=8)
    decoded, _ = decode_all(path)
    frames = np.stack([decoded[i] for i in np.linspace(0, count - 1, 8).astype(int)])
    found = read_pixels(path, config)
    assert found.shape == (8, 32, 32, 3)
    np.testing.assert_array_equal(found, video.preprocess(frames, config))


def test_videos_that_cannot_be_read_are_an_error_and_no_pixels(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    for name in ("text.mp4", "missing.mp4"):
        with pytest.raises(VideoError, match=name):
            read_pixels(tmp_path / name, tiny_quality_config())
    Image.new("RGB", (64, 48)).save(tmp_path / "still.png")
    with pytest.raises(VideoError, match=r"still\.png: is a picture, and the scores are of videos"):
        read_pixels(tmp_path / "still.png", tiny_quality_config())


# --- Folders ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "scan"), [("mean", True), ("attentive", False)], indirect=["model"]
)
def test_a_model_comes_back_from_its_folder(
    model: QualityModel, tmp_path: Path, scan: bool
) -> None:
    save_quality(tmp_path / "model", model)
    loaded = load_quality(tmp_path / "model", scan=scan)
    assert loaded.config == model.config
    assert loaded.encoder.scan == scan
    pixels = random_video(4, 32, 32)
    expected = score(model, pixels, PROMPTS[0])
    assert relative_error(score(loaded, pixels, PROMPTS[0]), expected) < 1e-5
    save_quality(tmp_path / "again", loaded)
    for path in (tmp_path / "model").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name
    with pytest.raises(InputError, match="exists"):
        save_quality(tmp_path / "again", model)


def test_dtypes_of_a_folder(tmp_path: Path) -> None:
    tiny_quality(tmp_path / "model")
    loaded = load_quality(tmp_path / "model", dtype="bfloat16")
    assert loaded.encoder.dtype == loaded.text.dtype == loaded.head.dtype == jnp.bfloat16
    assert loaded.params["head"]["fc1"]["kernel"].dtype == jnp.float32
    with pytest.raises(ConfigError, match="dtype = 'float16'"):
        load_quality(tmp_path / "model", dtype="float16")
    with pytest.raises(ConfigError, match="attention = 'x'"):
        load_quality(tmp_path / "model", attention="x")


def test_the_right_loader_is_named(tmp_path: Path) -> None:
    tiny_quality(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"video-quality model, which .*load_quality loads"):
        jvjepa.load(tmp_path / "model")
    with pytest.raises(CheckpointError, match="is no video-quality model"):
        load_quality(tmp_path)


def change_config(folder: Path, part: str, **changes: object) -> None:
    path = folder / "config.json"
    record = json.loads(path.read_text())
    record["quality"][part] = {**record["quality"][part], **changes}
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: change_config(f, "encoder", mlp_dim=65), r"\[2, 65\] would be right"),
        (lambda f: change_config(f, "text", hidden_size=27), "head/norm/scale has shape"),
        (lambda f: change_config(f, "head", hidden=[16, 9]), "head/fc3/kernel has shape"),
        (lambda f: change_config(f, "head", bounded="0-1"), "bounded = '0-1'"),
        (lambda f: change_config(f, "head", depth=3), r"unknown fields \['depth'\]"),
        (lambda f: (f / "config.json").write_text("{}"), "is not of format"),
        (lambda f: (f / "vocab.txt").unlink(), "no tokenizer.json and no vocab.txt"),
        (lambda f: (f / "model.safetensors").unlink(), "does not exist"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "is not whole"),
    ],
)
def test_damaged_folders_are_refused(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    tiny_quality(tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_quality(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_parameters_that_do_not_fit_are_not_saved(model: QualityModel, tmp_path: Path) -> None:
    without = {name: part for name, part in model.params.items() if name != "head"}
    with pytest.raises(CheckpointError, match="missing head/fc1/kernel"):
        save_quality(tmp_path / "model", dataclasses.replace(model, params=without))
    assert list(tmp_path.iterdir()) == []


def test_configurations_are_checked() -> None:
    config = tiny_quality_config(feature="attentive", bounded="1-5")
    assert QualityConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert config.crop_size == 32
    parts = {"encoder": config.encoder, "text": config.text}
    wrong: list[tuple[dict[str, object], str]] = [
        ({"num_frames": 3}, "num_frames = 3; it must be 1 or a multiple"),
        ({"num_frames": 0}, "num_frames = 0"),
        ({"feature": "last"}, "feature = 'last'"),
        ({"feature": "attentive"}, "pooler = None; it must be there"),
        ({"pooler": PoolerConfig(num_heads=2)}, "it must be None"),
        ({"feature": "attentive", "pooler": PoolerConfig(num_heads=5)}, "num_heads = 5"),
    ]
    for changes, message in wrong:
        with pytest.raises(ConfigError, match=message):
            QualityConfig(**parts, **changes)
    for changes in ({"hidden": (3,)}, {"hidden": (3, 0)}, {"dropout": 1.0}, {"bounded": "0-5"}):
        with pytest.raises(ConfigError, match=next(iter(changes))):
            HeadConfig(**changes)
    with pytest.raises(ConfigError, match=r"missing fields .*'text'"):
        QualityConfig.from_json({"encoder": {}})


# --- Putting one together -----------------------------------------------------------------------


def classifier_model(model: QualityModel, layers: tuple[int, ...] = ()) -> jvjepa.Model:
    """A classification checkpoint whose encoder and pooler are those of `model`."""
    head = ClassifierConfig(labels=("a", "b"), num_layers=1, num_heads=2, layers=layers)
    config = ModelConfig(encoder=model.config.encoder, classifier=head)
    linear = {"kernel": jnp.ones((48, 2)), "bias": jnp.ones(2)}
    return jvjepa.Model(
        config=config,
        encoder=model.encoder,
        classifier=Classifier(head, config.encoder),
        params={
            "encoder": model.params["encoder"],
            "classifier": {"pooler": model.params["pooler"], "linear": linear},
        },
        source=None,
    )


def text_model(model: QualityModel) -> TextModel:
    return TextModel(
        config=model.config.text,
        encoder=model.text,
        params=model.params["text"],
        tokenizer=model.tokenizer,
        source=None,
    )


@pytest.mark.parametrize("model", ["attentive"], indirect=True)
def test_a_new_model_has_the_parts_of_others_and_a_random_head(
    model: QualityModel, tmp_path: Path
) -> None:
    released, text = classifier_model(model), text_model(model)
    head = HeadConfig(hidden=(16, 8), bounded="1-5", dropout=0.3)
    made = new_quality(released, text, feature="attentive", head=head, num_frames=4)
    assert made.config.pooler == model.config.pooler
    assert made.head.dropout == 0.3
    clip = random_video(1, 4, 32, 32)
    tokens = compiled(released.encoder, released.params["encoder"], clip)
    classifier = released.params["classifier"]
    pooled = compiled(released.classifier, classifier, tokens, method="pool")
    watched = compiled(made.module, made.params, clip, method="watch")
    assert relative_error(watched, pooled) < 1e-6
    save_quality(tmp_path / "model", made)
    pixels = random_video(4, 32, 32)
    loaded = load_quality(tmp_path / "model")
    assert np.array_equal(score(loaded, pixels, "a cat"), score(made, pixels, "a cat"))
    seeds = [new_quality(released, text, seed=seed).params["head"] for seed in (0, 0, 1)]
    kernels = [part["fc1"]["kernel"] for part in seeds]
    assert kernels[0].shape == (72, 512)
    assert (kernels[0] == kernels[1]).all()
    assert (kernels[0] != kernels[2]).any()


@pytest.mark.parametrize("model", ["attentive"], indirect=True)
def test_parts_that_do_not_go_together_are_refused(model: QualityModel) -> None:
    released, text = classifier_model(model), text_model(model)
    plain = dataclasses.replace(
        released, config=dataclasses.replace(released.config, classifier=None)
    )
    with pytest.raises(InputError, match="the model has none"):
        new_quality(plain, text, feature="attentive")
    with pytest.raises(InputError, match=r"one that sees layers \(0, 1\)"):
        new_quality(classifier_model(model, (0, 1)), text, feature="attentive")
    unrolled = dataclasses.replace(text, encoder=dataclasses.replace(text.encoder, scan=False))
    with pytest.raises(InputError, match="are stacked and those of the other are not"):
        new_quality(released, unrolled)
    with pytest.raises(ConfigError, match="num_frames = 5"):
        new_quality(released, text, num_frames=5)


def test_loading_takes_no_torch_and_no_network(tmp_path: Path) -> None:
    import subprocess
    import sys

    tiny_quality(tmp_path / "model")
    shutil.rmtree(tmp_path / "model-tokenizer")
    script = """
import sys, numpy as np
from jvjepa.quality import load_quality, score
model = load_quality(sys.argv[1])
score(model, np.ones((4, 32, 32, 3), np.float32), "a cat")
assert not {"torch", "transformers", "optax", "requests", "httpx"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "model")], timeout=120)
    assert done.returncode == 0


def test_without_the_tokenizer_library_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import builtins

    tiny_quality(tmp_path / "model")
    real = builtins.__import__

    def missing(name: str, *rest: object) -> object:
        if name == "tokenizers":
            raise ModuleNotFoundError("no", name="tokenizers")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(InputError, match=r"pip install 'jvjepa\[text\]'"):
        load_quality(tmp_path / "model")


def test_random_parameters_are_all_there() -> None:
    config = tiny_quality_config(feature="attentive")
    flat = flatten_dict(random_quality_params(config), sep="/")
    assert {name: leaf.shape for name, leaf in flat.items()} == quality_shapes(config)


def test_the_tokenizer_files_are_copied(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "files", as_json=True)
    model = tiny_quality(tmp_path / "model")
    assert set(model.tokenizer.files) == {
        "vocab.txt",
        "tokenizer_config.json",
        "sentence_bert_config.json",
    }
    for name, content in model.tokenizer.files.items():
        assert (tmp_path / "model-tokenizer" / name).read_bytes() == content
