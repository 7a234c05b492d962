import dataclasses
import functools
from collections.abc import Callable

import hfcheckpoints
import jax
import jax.numpy as jnp
import numpy as np
import official
import pytest
import torch
from flax.traverse_util import flatten_dict
from models import random_video, relative_error

from jvjepa import registry, selection
from jvjepa.config import EncoderConfig, ModelConfig, PredictorConfig
from jvjepa.errors import ConfigError, InputError
from jvjepa.parameters import parameter_shapes, unstack_layers
from jvjepa.predictor import Predictor, PredictorOutput, predict_pairs
from jvjepa.typing import Array, Params

TOLERANCE = 1e-5
TINY = {
    "vjepa2_tiny": official.V2,
    "vjepa2_1_tiny_teacher": official.TEACHER,
    "vjepa2_1_tiny_distilled": official.DISTILLED,
}
V2_1 = ["vjepa2_1_tiny_teacher", "vjepa2_1_tiny_distilled"]
RELEASES = {
    name: release.config
    for name, release in registry.RELEASES.items()
    if release.config.predictor is not None
}


@pytest.mark.parametrize("config", [*TINY.values(), *RELEASES.values()], ids=[*TINY, *RELEASES])
def test_parameters_are_the_listed_ones(config: ModelConfig) -> None:
    predictor = Predictor(config.predictor, config.encoder)
    width = config.predictor.num_levels * config.encoder.hidden_size
    context = jax.ShapeDtypeStruct((1, 2, width), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    init = functools.partial(predictor.init, grid=(8, 16, 16))
    variables = jax.eval_shape(init, jax.random.key(0), context, ids, ids)
    found = flatten_dict({"predictor": variables["params"]}, sep="/")
    listed = parameter_shapes(config)
    assert {name: leaf.shape for name, leaf in found.items()} == {
        name: shape for name, shape in listed.items() if name.startswith("predictor/")
    }


GRID = (3, 3, 5)

# Nearly all of the time of these tests goes into compiling, which is also why they index in NumPy.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(compiled, static_argnames=("predictor", "grid", "mask_index", "modality"))
def predict(
    predictor: Predictor,
    params: Params,
    context: Array,
    context_ids: Array,
    target_ids: Array,
    grid: tuple[int, int, int] = GRID,
    *,
    mask_index: int = 1,
    modality: str = "video",
    context_valid: Array | None = None,
    target_valid: Array | None = None,
) -> PredictorOutput:
    """A call as one program."""
    return predictor.apply(
        {"params": params},
        *(context, context_ids, target_ids, grid),
        mask_index=mask_index,
        modality=modality,
        context_valid=context_valid,
        target_valid=target_valid,
    )


# Parity with Meta's code.


@functools.cache
def golden(name: str) -> tuple[Predictor, Params, dict[str, np.ndarray]]:
    config = TINY[name]
    params = official.predictor(official.weights(f"{name}.pt", "predictor"))
    params = jax.tree.map(np.asarray, params)
    return Predictor(config.predictor, config.encoder), params, official.data(name)


def predict_golden(
    name: str, mask_index: int, clip: str = "video", modality: str = "", **changed: str | bool
) -> PredictorOutput:
    predictor, params, data = golden(name)
    config = dataclasses.replace(predictor.config, **changed)
    levels = "_hier" if name in V2_1 else ""
    masks, tubelets = ("in.masks", 4) if clip == "video" else ("in.image_masks", 1)
    return predict(
        Predictor(config, predictor.encoder),
        params,
        data[f"out.{clip}_masked{levels}"],
        *(data[f"{masks}_x"], data[f"{masks}_y"], (tubelets, 4, 4)),
        mask_index=mask_index,
        modality=modality or clip,
    )


@pytest.mark.parametrize("mask_index", [0, 1])
@pytest.mark.parametrize("name", TINY)
def test_parity_with_meta_on_video(name: str, mask_index: int) -> None:
    out, data = predict_golden(name, mask_index), golden(name)[2]
    assert relative_error(out.targets, data[f"out.pred_m{mask_index}"]) <= TOLERANCE
    if name == "vjepa2_tiny":
        assert out.context is None
    else:
        assert relative_error(out.context, data[f"out.pred_context_m{mask_index}"]) <= TOLERANCE


@pytest.mark.parametrize("name", V2_1)
def test_parity_with_meta_on_images(name: str) -> None:
    out, data = predict_golden(name, 0, "image"), golden(name)[2]
    assert relative_error(out.targets, data["out.image_pred"]) <= TOLERANCE
    assert relative_error(out.context, data["out.image_pred_context"]) <= TOLERANCE


@pytest.mark.parametrize("changed", [{"rope": "tiled"}, {"interpolate": True}])
def test_another_rope_fails_parity(changed: dict[str, str | bool]) -> None:
    name = "vjepa2_1_tiny_teacher"
    out = predict_golden(name, 1, **changed)
    assert relative_error(out.targets, golden(name)[2]["out.pred_m1"]) > 1e-3


def test_another_modality_fails_parity() -> None:
    name = "vjepa2_1_tiny_teacher"
    out = predict_golden(name, 1, modality="image")
    assert relative_error(out.targets, golden(name)[2]["out.pred_m1"]) > 1e-3


# Parity with transformers.


def _of_transformers(model: torch.nn.Module, config: PredictorConfig) -> Params:
    """The parameters of their predictor as ours."""
    theirs = {name: value.numpy() for name, value in model.predictor.state_dict().items()}

    def dense(name: str) -> Params:
        return {"kernel": theirs[f"{name}.weight"].T, "bias": theirs[f"{name}.bias"]}

    def norm(name: str) -> Params:
        return {"scale": theirs[f"{name}.weight"], "bias": theirs[f"{name}.bias"]}

    def block(name: str) -> Params:
        parts = ("query", "key", "value", "proj")
        return {
            "norm1": norm(f"{name}.norm1"),
            "attention": {part: dense(f"{name}.attention.{part}") for part in parts},
            "norm2": norm(f"{name}.norm2"),
            "mlp": {part: dense(f"{name}.mlp.{part}") for part in ("fc1", "fc2")},
        }

    return {
        "embed": dense("embeddings.predictor_embeddings"),
        "mask_tokens": theirs["embeddings.mask_tokens"][:, 0, 0],
        **{f"blocks_{i}": block(f"layer.{i}") for i in range(config.num_layers)},
        "norm": norm("layernorm"),
        "proj": dense("proj"),
    }


@functools.cache
def pair(head_width: int) -> tuple[Predictor, Params, torch.nn.Module]:
    """Ours and transformers', the same weights; the encoder is 64 wide, for 64 pixels."""
    hf = hfcheckpoints.tiny_config()
    hf.pred_hidden_size, hf.pred_num_attention_heads = 3 * head_width, 3
    model = hfcheckpoints.random_model(hf)
    config = PredictorConfig(
        hidden_size=3 * head_width,
        num_heads=3,
        num_layers=2,
        mlp_dim=9 * head_width,
        num_mask_tokens=4,
    )
    encoder = EncoderConfig(
        hidden_size=64, num_layers=2, num_heads=2, mlp_dim=160, crop_size=64, frames_per_clip=4
    )
    return Predictor(config, encoder, scan=False), _of_transformers(model, config), model


def random_ids(batch: int, seen: int, hidden: int, num_tokens: int) -> list[np.ndarray]:
    """Context and target ids, unsorted, which do not overlap."""
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(num_tokens)[: seen + hidden] for _ in range(batch)])
    return np.split(ids, [seen], axis=1)


def random_tokens(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def test_parity_with_transformers() -> None:
    predictor, params, theirs = pair(24)
    video = torch.from_numpy(random_video(2, 6, 64, 64)).movedim(-1, 2)
    context_ids, target_ids = random_ids(2, 17, 21, 48)
    masks = {"context_mask": context_ids, "target_mask": target_ids}
    with torch.inference_mode():
        out = theirs(video, **{name: [torch.from_numpy(ids)] for name, ids in masks.items()})
    tokens = jnp.asarray(out.last_hidden_state)
    context = selection.gather(tokens, context_ids)
    assert np.array_equal(context, out.masked_hidden_state)
    hidden = selection.gather(tokens, target_ids)
    assert np.array_equal(hidden, out.predictor_output.target_hidden_state)
    ours = predict(predictor, params, context, context_ids, target_ids, (3, 4, 4))
    assert relative_error(ours.targets, out.predictor_output.last_hidden_state) <= TOLERANCE
    assert ours.context is None


def test_parity_with_transformers_without_masks() -> None:
    predictor, params, theirs = pair(8)
    with torch.inference_mode():
        out = theirs(torch.from_numpy(random_video(2, 4, 64, 64)).movedim(-1, 2))
    ids = np.broadcast_to(np.arange(32), (2, 32))
    ours = predict(predictor, params, out.last_hidden_state.numpy(), ids, ids, (2, 4, 4))
    assert relative_error(ours.targets, out.predictor_output.last_hidden_state) <= TOLERANCE


@pytest.mark.parametrize(
    ("how", "grid"),
    [("config", GRID), ("input", GRID), ("interpolate", GRID), ("interpolate", (2, 7, 1))],
)
def test_parity_with_transformers_on_other_grids(
    how: str, grid: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor, params, theirs = pair(16)
    tubelets, rows, columns = grid
    tokens = random_tokens(2, tubelets * rows * columns, 64)
    ids = random_ids(2, 5, 7, tokens.shape[1])

    def expected() -> torch.Tensor:
        with torch.inference_mode():
            masks = ([torch.from_numpy(part)] for part in ids)
            return theirs.predictor(torch.from_numpy(tokens), *masks).last_hidden_state

    def set_positions(row_scale: float, column_scale: float) -> None:
        def positions(x: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, ...]:
            ids = masks[:, None].expand(-1, 3, -1)  # [B, H, N]
            row, column = ids // columns % rows, ids % columns
            return ids // (rows * columns), row * row_scale, column * column_scale

        for layer in theirs.predictor.layer:
            monkeypatch.setattr(layer.attention, "get_position_ids", positions)

    references = {"config": expected()}  # their own positions are those of the configured grid
    set_positions(1.0, 1.0)
    references["input"] = expected()
    set_positions(15 / (rows - 1), 15 / max(columns - 1, 1))
    references["interpolate"] = expected()
    changed = {"config": {"rope_grid": "config"}, "input": {}, "interpolate": {"interpolate": True}}
    config = dataclasses.replace(predictor.config, **changed[how])
    context = np.take_along_axis(tokens, ids[0][..., None], axis=1)
    out = predict(Predictor(config, predictor.encoder, scan=False), params, context, *ids, grid)
    for other, reference in references.items():
        error = relative_error(out.targets, reference)
        assert error <= TOLERANCE if other == how else error > 1e-3


# Properties, of the largest of the tiny ones: four levels, context projection, modalities.


def teacher(
    seen: int = 9, hidden: int = 6
) -> tuple[Predictor, Params, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The predictor, its parameters, and random (context, context_ids, target_ids) of 2 clips."""
    predictor, params, _ = golden("vjepa2_1_tiny_teacher")
    return predictor, params, (random_tokens(2, seen, 128), *random_ids(2, seen, hidden, 45))


def assert_close(a: PredictorOutput, b: PredictorOutput) -> None:
    assert relative_error(a.targets, b.targets) <= TOLERANCE
    assert relative_error(a.context, b.context) <= TOLERANCE


def test_order_does_not_matter() -> None:
    predictor, params, (context, context_ids, target_ids) = teacher()
    out = predict(predictor, params, context, context_ids, target_ids)
    rng = np.random.default_rng(3)
    seen, hidden = rng.permutation(9), rng.permutation(6)
    permuted = (context[:, seen], context_ids[:, seen], target_ids[:, hidden])
    targets, context = (np.asarray(part) for part in out)
    expected = PredictorOutput(targets[:, hidden], context[:, seen])
    assert_close(predict(predictor, params, *permuted), expected)


@pytest.mark.parametrize("which", range(3), ids=["context", "context_ids", "target_ids"])
def test_every_token_and_place_matters_and_clips_do_not_mix(which: int) -> None:
    predictor, params, inputs = teacher()
    out = predict(predictor, params, *inputs)
    changed = [part.copy() for part in inputs]
    free = np.setdiff1d(np.arange(45), np.concatenate(inputs[1:], axis=1)[1])[0]
    changed[which][1, 4] = 0.0 if which == 0 else free
    other = predict(predictor, params, *changed)
    for a, b in zip(other, out, strict=True):
        difference = np.abs(np.asarray(a) - np.asarray(b)).max(axis=-1)
        assert (difference[1] > 0).all()
        assert (difference[0] == 0).all()


@pytest.mark.parametrize("attention", ["xla", "chunked"])
def test_padding_is_not_seen(attention: str) -> None:
    predictor, params, (context, context_ids, target_ids) = teacher()
    out = predict(predictor, params, context, context_ids, target_ids)
    rows = np.arange(2)[:, None]
    # Padding repeats an id, as that of jvjepa.masks does, but stands anywhere.
    seen, hidden = np.insert(np.arange(9), [2, 5, 9], [1, 4, 8]), np.insert(np.arange(6), 3, 2)
    valid = [np.diff(order, prepend=-1) > 0 for order in (seen, hidden)]
    valid = [np.stack([row, row[::-1]]) for row in valid]  # in the second clip all is reversed
    seen, hidden = (np.stack([order, order[::-1]]) for order in (seen, hidden))
    padded = predict(
        Predictor(predictor.config, predictor.encoder, attention=attention),
        params,
        np.where(valid[0][..., None], context[rows, seen], np.float32(100.0)),
        *(context_ids[rows, seen], target_ids[rows, hidden]),
        context_valid=valid[0],
        target_valid=valid[1],
    )
    targets, context = (np.asarray(part) for part in padded)
    kept = targets[valid[1]].reshape(2, 6, -1), context[valid[0]].reshape(2, 9, -1)
    assert_close(PredictorOutput(*(np.stack([x[0], x[1, ::-1]]) for x in kept)), out)


def test_padding_gets_no_gradient() -> None:
    predictor, params, (context, *ids) = teacher()
    valid = jnp.asarray([[True] * 9, [True] * 6 + [False] * 3])

    @compiled
    @jax.grad
    def gradient(context: Array) -> Array:
        out = predictor.apply({"params": params}, context, *ids, GRID, context_valid=valid)
        return jnp.sum(out.targets**2)

    reached = np.abs(gradient(context)).max(axis=-1) > 0
    assert np.array_equal(reached, valid)


def test_scanned_and_unrolled_layers_agree() -> None:
    predictor, params, inputs = teacher()
    unrolled = Predictor(predictor.config, predictor.encoder, scan=False)
    expected = predict(predictor, params, *inputs)
    assert_close(predict(unrolled, unstack_layers(params), *inputs), expected)


def test_other_ids_compile_nothing(compilations: Callable[[], int]) -> None:
    predictor, params, (context, *ids) = teacher()
    others = [(part + 1) % 45 for part in ids]
    first = predict(predictor, params, context, *ids)
    before = compilations()
    second = predict(predictor, params, context, *others)
    assert compilations() == before
    assert relative_error(first.targets, second.targets) > 1e-3


@pytest.mark.parametrize("which", [0, 1], ids=["context", "targets"])
@pytest.mark.parametrize("bad", [-1, 45])
def test_traced_ids_outside_the_clip_give_nan(which: int, bad: int) -> None:
    predictor, params, (context, *ids) = teacher()
    ids[which][1, 3] = bad
    name = ("context_ids", "target_ids")[which]
    with pytest.raises(InputError, match=f"{name} holds ids from .*{bad}.* has tokens 0 to 44"):
        predictor.apply({"params": params}, context, *ids, GRID)
    out = predict(predictor, params, context, *ids)
    assert np.isnan(out.targets[1]).all()
    assert np.isnan(out.context[1]).all()
    assert np.isfinite(out.targets[0]).all()


def test_bfloat16_is_close_to_float32_and_stays_bfloat16() -> None:
    predictor, params, inputs = teacher()
    half = Predictor(predictor.config, predictor.encoder, dtype=jnp.bfloat16)
    out = predict(half, params, *inputs, context_valid=np.ones((2, 9), bool))
    for a, b in zip(out, predict(predictor, params, *inputs), strict=True):
        assert a.dtype == jnp.bfloat16
        assert relative_error(a, b) <= 0.05  # 8 bits of mantissa


def test_several_pairs_of_masks() -> None:
    predictor, params, first = teacher()
    second = teacher(seen=5, hidden=11)[2]
    valid = np.asarray([[True] * 5, [True] * 4 + [False]])
    how = {"mask_index": 3, "modality": "image"}

    @compiled
    def pairs(*lists: list[Array]) -> list[PredictorOutput]:
        some = [None, valid]
        return predict_pairs(predictor, params, *lists, GRID, **how, context_valid=some)

    outputs = pairs(*map(list, zip(first, second, strict=True)))
    assert_close(outputs[0], predict(predictor, params, *first, **how))
    assert_close(outputs[1], predict(predictor, params, *second, **how, context_valid=valid))
    with pytest.raises(InputError, match=r"'context_ids': 2, 'target_ids': 1, .* equally many"):
        predict_pairs(predictor, params, [first[0]] * 2, [first[1]] * 2, [first[2]], GRID)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"context": np.zeros((2, 9, 32))},
            r"32 channels; this predictor takes 128: 4 level\(s\) of .* width 32 \(mixed parts",
        ),
        ({"context": np.zeros((2, 128))}, r"float64 \[2, 128\]; it must be float \[B, M, 128\]"),
        ({"context": np.zeros((2, 9, 128), int)}, r"int64 .* it must be float \[B, M, 128\]"),
        ({"context": np.zeros((2, 8, 128))}, "has 8 tokens and context_ids 9 ids a clip"),
        ({"context": np.zeros((1, 9, 128))}, r"context_ids is int64 \[2, 9\]; .* int \[1, M\]"),
        ({"context_ids": np.zeros((2, 9))}, r"context_ids is float64 .* must be int \[2, M\]"),
        ({"context_ids": np.zeros((2, 9), int)}, "context_ids of clip 0 holds id 0 twice"),
        ({"target_ids": np.ones((2, 6), int)}, "target_ids of clip 0 holds id 1 twice"),
        ({"target_ids": np.asarray([[0], [45]])}, "target_ids holds ids from 0 to 45; .* 0 to 44"),
        ({"target_ids": np.zeros((3, 1), int)}, r"target_ids is int64 \[3, 1\]"),
        ({"target_ids": np.zeros((2, 0), int)}, r"target_ids is \[2, 0\]; .* one id or more"),
        ({"grid": (3, 15)}, r"grid = \(3, 15\); it must be \(t, h, w\)"),
        ({"grid": (3, 0, 15)}, r"grid = \(3, 0, 15\); it must be"),
        ({"grid": (3, 3.0, 5)}, r"grid = \(3, 3.0, 5\); it must be"),
        ({"grid": (2, 3, 5)}, "this clip has tokens 0 to 29"),
        ({"mask_index": 8}, "mask_index = 8; this predictor has mask tokens 0 to 7"),
        ({"mask_index": -1}, "mask_index = -1; this predictor has mask tokens 0 to 7"),
        ({"modality": "audio"}, r"modality = 'audio'; it must be one of \('video', 'image'\)"),
        ({"context_valid": np.ones((2, 8), bool)}, r"bool \[2, 8\]; .* \[2, 9\], as context_ids"),
        ({"target_valid": np.ones((2, 6))}, r"float64 .* bool \[2, 6\], as target_ids"),
    ],
)
def test_wrong_arguments_are_refused(changed: dict, message: str) -> None:
    predictor, params, inputs = teacher()
    right = dict(zip(("context", "context_ids", "target_ids"), inputs, strict=True))
    with pytest.raises(InputError, match=message):
        predictor.apply({"params": params}, **{**right, "grid": GRID, **changed})


def test_an_unknown_backend_is_refused() -> None:
    predictor, params, inputs = teacher()
    other = Predictor(predictor.config, predictor.encoder, attention="flash")
    with pytest.raises(ConfigError, match="attention = 'flash'"):
        other.apply({"params": params}, *inputs, GRID)
