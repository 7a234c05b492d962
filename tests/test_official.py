"""The PyTorch port gives what Meta's code gave, and uses every weight."""

import ast
import dataclasses
import functools
import inspect
from collections.abc import Callable
from pathlib import Path

import hfcheckpoints
import jax
import jax.numpy as jnp
import numpy as np
import official
import pytest
import torch
from models import random_video, relative_error
from official import MODELS, StateDicts, frames, model, random_tokens, tensors

from jvjepa.action import ActionPredictor
from jvjepa.config import ModelConfig
from jvjepa.convert import official as port
from jvjepa.convert.official import Official
from jvjepa.errors import CheckpointError, InputError

TOLERANCE = 1e-5
V2 = "vjepa2_tiny"
V2_1 = ["vjepa2_1_tiny_teacher", "vjepa2_1_tiny_distilled"]
TEACHER = V2_1[0]


@functools.cache
def data(name: str) -> dict[str, np.ndarray]:
    return official.data(name)


def video(name: str, clip: str = "in.video") -> np.ndarray:
    return official.video(data(name)[clip])


def changed(name: str, part: str, **fields: object) -> Official:
    """The same weights under another configuration of one part."""
    config = MODELS[name][0]
    new = dataclasses.replace(getattr(config, part), **fields)
    return Official(dataclasses.replace(config, **{part: new}), tensors(name), rounding="float32")


def norm(x: np.ndarray, name: str, layer: str) -> np.ndarray:
    scale, bias = (tensors(name)["encoder"][f"{layer}.{key}"].numpy() for key in ("weight", "bias"))
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6) * scale + bias


# What Meta's code gave


@pytest.mark.parametrize("name", MODELS)
def test_video(name: str) -> None:
    assert relative_error(model(name).tokens(video(name)), data(name)["out.video"]) <= TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_masked_video(name: str) -> None:
    tokens = model(name).masked(video(name), data(name)["in.masks_x"])
    assert relative_error(tokens, data(name)["out.video_masked"]) <= TOLERANCE


@pytest.mark.parametrize("clip", ["image", "wide"])
@pytest.mark.parametrize("name", V2_1)
def test_image_and_another_grid(name: str, clip: str) -> None:
    tokens = model(name).tokens(video(name, f"in.{clip}"))
    assert relative_error(tokens, data(name)[f"out.{clip}"]) <= TOLERANCE


@pytest.mark.parametrize("name", V2_1)
def test_levels(name: str) -> None:
    levels = model(name).levels(video(name))
    for level, expected in zip(levels, [f"out.level{i}" for i in range(4)], strict=True):
        assert relative_error(level, data(name)[expected]) <= TOLERANCE


@pytest.mark.parametrize(
    ("clip", "keep", "out"),
    [
        ("in.video", None, "out.video_hier"),
        ("in.video", "in.masks_x", "out.video_masked_hier"),
        ("in.image", "in.image_masks_x", "out.image_masked_hier"),
    ],
)
@pytest.mark.parametrize("name", V2_1)
def test_hierarchical(name: str, clip: str, keep: str | None, out: str) -> None:
    levels = model(name).levels(video(name, clip), keep and data(name)[keep])
    # The distilled one was made to return its last level alone.
    tokens = np.concatenate(levels if name == TEACHER else levels[-1:], axis=-1)
    assert relative_error(tokens, data(name)[out]) <= TOLERANCE


@pytest.mark.parametrize("mask_index", [0, 1])
@pytest.mark.parametrize("name", MODELS)
def test_predictions(name: str, mask_index: int) -> None:
    known = data(name)
    tokens = known["out.video_masked" if name == V2 else "out.video_masked_hier"]
    args = (tokens, known["in.masks_x"], known["in.masks_y"], (4, 4, 4))
    targets, context = model(name).predict(*args, mask_index=mask_index)
    assert relative_error(targets, known[f"out.pred_m{mask_index}"]) <= TOLERANCE
    if name == V2:
        assert context is None
    else:
        assert relative_error(context, known[f"out.pred_context_m{mask_index}"]) <= TOLERANCE


@pytest.mark.parametrize("name", V2_1)
def test_predictions_of_images(name: str) -> None:
    known = data(name)
    ids = (known["in.image_masks_x"], known["in.image_masks_y"])
    args = (known["out.image_masked_hier"], *ids, (1, 4, 4))
    targets, context = model(name).predict(*args, mask_index=0, modality="image")
    assert relative_error(targets, known["out.image_pred"]) <= TOLERANCE
    assert relative_error(context, known["out.image_pred_context"]) <= TOLERANCE


def test_logits() -> None:
    logits = model(V2).classify(data(V2)["out.video"])
    assert relative_error(logits, data(V2)["out.logits"]) <= TOLERANCE


def test_actions() -> None:
    known = data(V2)
    args = [known[f"ac.in.{name}"] for name in ("tokens", "actions", "states")]
    assert relative_error(model(V2).next_tokens(*args, (4, 4)), known["ac.out"]) <= TOLERANCE


# What the golden outputs do not show


@pytest.mark.parametrize("name", MODELS)
def test_layers(name: str) -> None:
    config, weights = MODELS[name][0].encoder, tensors(name)["encoder"]
    layers = model(name).layers(video(name))
    assert layers.shape[0] == config.num_layers + 1
    assert layers.dtype == np.float32
    kernel = weights["patch_embed.proj.weight"].numpy()
    patches = video(name).reshape(2, 4, 2, 4, 16, 4, 16, 3)  # b t p h q w r c
    embedded = np.einsum("btphqwrc,dcpqr->bthwd", patches, kernel).reshape(2, 64, -1)
    embedded += weights["patch_embed.proj.bias"].numpy()
    if config.image_tokenizer:
        embedded += weights["video_mod_embed"].numpy()
    assert relative_error(layers[0], embedded) <= TOLERANCE
    for i, layer in enumerate(config.levels):
        normed = norm(layers[layer + 1], name, f"norms_block.{i}")
        assert relative_error(normed, data(name)[f"out.level{i}"]) <= TOLERANCE
    last = "norms_block.3" if config.levels else "norm"
    assert relative_error(norm(layers[-1], name, last), data(name)["out.video"]) <= TOLERANCE


def test_an_encoder_without_levels_has_one() -> None:
    levels = model(V2).levels(video(V2))
    assert np.array_equal(levels, model(V2).tokens(video(V2))[None])


def test_a_single_frame_is_used_twice_without_an_image_tokenizer() -> None:
    frame = random_video(2, 1, 64, 48)
    tokens = model(V2).tokens(frame)
    assert tokens.shape == (2, 12, 32)
    assert np.array_equal(tokens, model(V2).tokens(np.repeat(frame, 2, axis=1)))


@pytest.mark.parametrize("name", MODELS)
def test_a_side_of_one_patch(name: str) -> None:
    for shape in ((1, 2, 16, 64), (1, 2, 64, 16), (1, 1, 16, 16)):
        assert np.isfinite(model(name).tokens(random_video(*shape))).all()


@pytest.mark.parametrize("name", MODELS)
def test_the_order_of_ids_does_not_matter(name: str) -> None:
    order = np.random.default_rng(0).permutation(20)
    keep = data(name)["in.masks_x"]
    tokens = model(name).masked(video(name), keep)
    shuffled = model(name).masked(video(name), keep[:, order].astype(np.int32))
    assert relative_error(shuffled, tokens[:, order]) <= TOLERANCE


@pytest.mark.parametrize(("frames", "height", "width"), [(4, 64, 64), (1, 64, 64), (6, 48, 80)])
def test_positions_by_the_config_are_those_of_transformers(
    frames: int, height: int, width: int
) -> None:
    theirs = hfcheckpoints.random_model(hfcheckpoints.tiny_config(head_width=32, layers=4))
    encoder = dataclasses.replace(official.V2.encoder, hidden_size=64, rope_grid="config")
    weights = {"encoder": _as_meta(theirs.encoder.state_dict())}
    ours = Official(ModelConfig(encoder=encoder), weights, rounding="float32")
    clip = random_video(2, frames, height, width)
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(clip).movedim(-1, 2), skip_predictor=True)
    assert ours.rope_grid == "config"
    assert relative_error(ours.tokens(clip), expected.last_hidden_state) <= TOLERANCE
    by_input = ModelConfig(encoder=dataclasses.replace(encoder, rope_grid="input"))
    error = relative_error(
        Official(by_input, weights, rounding="float32").tokens(clip), expected.last_hidden_state
    )
    assert error > 1e-2 if width != height else error <= TOLERANCE


def _as_meta(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The encoder's tensors of transformers under Meta's names."""
    found = {}
    for name, value in theirs.items():
        if ".attention.query." in name:
            names = [name.replace("query", part) for part in ("query", "key", "value")]
            name, value = name.replace("query", "qkv"), torch.cat([theirs[key] for key in names])
        for old, new in (
            ("embeddings.patch_embeddings", "patch_embed"),
            ("layernorm", "norm"),
            ("layer.", "blocks."),
            ("attention", "attn"),
        ):
            name = name.replace(old, new)
        found[name] = value
    return found


def predict(
    original: Official, ids: np.ndarray, grid: tuple[int, int, int], seen: int = 9
) -> np.ndarray:
    """Predictions of the tokens after the first `seen` of `ids` [B, M + K] from random ones."""
    context = np.random.default_rng(1).normal(size=(ids.shape[0], seen, 32)).astype(np.float32)
    return original.predict(context, ids[:, :seen], ids[:, seen:], grid)[0]


def shuffled_ids(count: int) -> np.ndarray:
    return np.random.default_rng(2).permuted(np.tile(np.arange(count), (2, 1)), axis=1)


def test_the_predictor_takes_its_grid_from_its_configuration() -> None:
    ids, wide = shuffled_ids(64), (2, 8, 4)
    by_config = changed(V2, "predictor", rope_grid="config")
    assert by_config.rope_grid == "input"  # the encoder's
    expected = predict(model(V2), ids, (4, 4, 4))
    assert np.array_equal(predict(by_config, ids, wide), expected)
    assert relative_error(predict(model(V2), ids, wide), expected) > 1e-2


def test_interpolation_stretches_to_the_grid_of_256_pixels() -> None:
    stretched = changed(V2, "predictor", interpolate=True)
    ids = shuffled_ids(32)
    frame, row, column = ids // 16, ids // 4 % 4, ids % 4
    ids_of_256 = frame * 256 + row * 5 * 16 + column * 5
    expected = predict(model(V2), ids_of_256, (2, 16, 16))
    assert relative_error(predict(stretched, ids, (2, 4, 4)), expected) <= TOLERANCE
    assert np.array_equal(predict(stretched, ids_of_256, (2, 16, 16)), expected)
    assert relative_error(predict(model(V2), ids, (2, 4, 4)), expected) > 1e-2


def test_predictions_do_not_depend_on_the_order_of_ids() -> None:
    ids = shuffled_ids(64)
    order = np.concatenate([np.arange(9), 9 + np.random.default_rng(3).permutation(55)])
    predicted = predict(model(V2), ids, (4, 4, 4))
    assert predicted.shape == (2, 55, 32)
    again = predict(model(V2), ids[:, order].astype(np.int32), (4, 4, 4))
    assert relative_error(again, predicted[:, order[9:] - 9]) <= TOLERANCE


def test_a_probe_takes_tokens_in_any_number_and_order() -> None:
    tokens = random_tokens(3, 50, 32)
    logits = model(V2).classify(tokens)
    assert logits.shape == (3, 7)
    shuffled = tokens[:, np.random.default_rng(0).permutation(50)]
    assert relative_error(model(V2).classify(shuffled), logits) <= TOLERANCE
    other = changed(V2, "classifier", num_heads=4).classify(tokens)
    assert relative_error(other, logits) > 1e-2


@pytest.mark.parametrize("which", range(3))
def test_a_frame_sees_none_after_it(which: int) -> None:
    args = [array.reshape(2, 4, -1) for array in frames(4, 2, 3)]

    def run() -> np.ndarray:
        shaped = args[0].reshape(2, 24, 32), *args[1:]
        return model(V2).next_tokens(*shaped, (2, 3)).reshape(2, 4, -1)

    before = run()
    args[which] = args[which].copy()
    args[which][:, 2] += 1
    after = run()
    assert np.array_equal(after[:, :2], before[:, :2])
    assert (np.abs(after - before)[:, 2:].max(axis=(0, 2)) > 1e-3).all()


def test_ours_agrees_on_another_grid_of_frames() -> None:
    grid = (3, 5)
    args = frames(3, *grid)
    theirs = model(V2).next_tokens(*args, grid)
    params = official.action_predictor(official.weights("vjepa2_ac_tiny.pt", "predictor"))
    ours = ActionPredictor(official.V2.action_predictor, official.V2.encoder)
    apply = jax.jit(functools.partial(ours.apply, grid=grid))
    predicted = apply({"params": params}, *map(jnp.asarray, args))
    assert relative_error(predicted, theirs) <= TOLERANCE


# Weights


RUNS: dict[str, Callable[[Official], np.ndarray]] = {
    "encoder": lambda original: original.tokens(random_video(1, 2, 64, 64)),
    "predictor": lambda original: predict(original, shuffled_ids(16), (1, 4, 4)),
    "classifier": lambda original: original.classify(random_tokens(1, 5, 32)),
    "action_predictor": lambda original: original.next_tokens(*frames(2, 2, 2), (2, 2)),
}


def rounded(weights: StateDicts) -> StateDicts:
    return {
        part: {name: value.to(torch.bfloat16) for name, value in tensors.items()}
        for part, tensors in weights.items()
    }


@pytest.mark.parametrize("part", RUNS)
def test_rounding(part: str) -> None:
    before = {name: value.clone() for name, value in tensors(V2)[part].items()}
    exact, coarse = RUNS[part](model(V2)), RUNS[part](model(V2, "bfloat16"))
    stored = Official(official.V2, rounded(tensors(V2)), rounding="float32")
    assert np.array_equal(coarse, RUNS[part](stored))
    assert coarse.dtype == np.float32
    assert 1e-4 < relative_error(coarse, exact) < 0.1
    assert all(torch.equal(value, before[name]) for name, value in tensors(V2)[part].items())


def test_weights_may_stay_in_the_file() -> None:
    file = torch.load(official.GOLDEN / "vjepa2_tiny.pt", weights_only=True, mmap=True)
    weights = {
        name.removeprefix("module.backbone."): value
        for name, value in file["target_encoder"].items()
    }
    mapped = Official(official.V2, {"encoder": weights}, rounding="float32")
    assert np.array_equal(RUNS["encoder"](mapped), RUNS["encoder"](model(V2)))


class Recorder(dict):
    """A state dict that knows what was asked for."""

    def __init__(self, values: dict[str, torch.Tensor]) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.asked.add(name)
        return super().__getitem__(name)


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_is_used_but_those_that_conversion_drops(name: str) -> None:
    config = MODELS[name][0]
    weights = {part: Recorder(values) for part, values in tensors(name).items()}
    original = Official(config, weights, rounding="float32")
    assert not any(values.asked for values in weights.values())
    for number in (1, 2):
        original.levels(random_video(1, number, 64, 64))
    width = 32 * config.predictor.num_levels
    context, ids = random_tokens(1, 1, width), (np.array([[0]]), np.array([[1]]))
    for i in range(config.predictor.num_mask_tokens):
        for modality in ("video", "image"):
            original.predict(context, *ids, (1, 4, 4), i, modality)
    for part in ("classifier", "action_predictor"):
        if part in weights:
            RUNS[part](original)
    unused = {key for values in weights.values() for key in values.keys() - values.asked}
    extrinsics = {f"extrinsics_encoder.{kind}" for kind in ("weight", "bias")}
    dropped = {"pos_embed", "predictor_pos_embed"} | extrinsics
    assert unused <= (dropped if name == V2 else set())


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("encoder", "patch_embed.proj.bias"),
        ("encoder", "blocks.3.attn.qkv.weight"),
        ("encoder", "norm.weight"),
        ("predictor", "mask_tokens.1"),
        ("predictor", "predictor_embed.weight"),
        ("classifier", "pooler.cross_attention_block.xattn.kv.weight"),
        ("action_predictor", "state_encoder.bias"),
    ],
)
def test_a_missing_weight_is_named(part: str, name: str) -> None:
    weights = {**tensors(V2), part: {k: v for k, v in tensors(V2)[part].items() if k != name}}
    message = f"the original's {part} has no weight '{name}'"
    with pytest.raises(CheckpointError, match=message):
        RUNS[part](Official(official.V2, weights, rounding="float32"))


@pytest.mark.parametrize("part", RUNS)
def test_missing_parts(part: str) -> None:
    with pytest.raises(CheckpointError, match=f"{part} has no weight"):
        RUNS[part](Official(official.V2, {}, rounding="float32"))
    if part != "encoder":
        config = ModelConfig(encoder=official.V2.encoder)
        with pytest.raises(InputError, match=f"has no {part}"):
            RUNS[part](Official(config, tensors(V2), rounding="float32"))


def test_it_shares_no_code_with_our_modules() -> None:
    tree = ast.parse(Path(inspect.getfile(port)).read_text())
    ours = {
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("jvjepa")
    }
    assert ours == {"jvjepa.config", "jvjepa.errors"}
    assert not {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name.startswith(("jvjepa", "jax", "flax"))
    }
