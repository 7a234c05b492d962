"""Encoding with fewer tokens, against NumPy, one token at a time."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import official
import pytest
import reductions
from models import compiled, random_params, random_video, relative_error, tiny_config, tiny_model

from jvjepa import Classifier, ClassifierConfig, Encoder, EncoderConfig
from jvjepa.errors import ConfigError, InputError
from jvjepa.parameters import unstack_layers
from jvjepa.quantization import quantize
from jvjepa.reduced import unmerge
from jvjepa.reduction import (
    DropPredictable,
    Merge,
    MergeStatic,
    Plan,
    count_tokens,
    encode,
    merge_schedule,
)
from jvjepa.typing import Array, DType

MODULE = 1e-5  # these encoders are small enough for the tolerance of one module
GRID = (4, 3, 5)
V2 = tiny_config(head_width=24, num_layers=3)
V2_1 = dataclasses.replace(official.TEACHER.encoder, num_layers=3, levels=(0, 2))
MIXED = (
    MergeStatic(columns=5, segment=2),
    Merge(layer=0, remove=9),
    DropPredictable(layer=1, remove=6, neighbours=4),
    Merge(layer=1, remove=8),
    Merge(layer=2, remove=7),
)
PLANS = [
    merge_schedule(9, range(3)),
    (MergeStatic(layer=1, columns=8, segment=4),),
    (DropPredictable(layer=0, remove=30), DropPredictable(layer=2, remove=10)),
    MIXED,
]


@pytest.mark.parametrize(
    ("config", "plan"),
    [*((V2, plan) for plan in PLANS), (V2_1, MIXED)],
    ids=["merge", "static", "drop", "mixed", "mixed-2.1"],
)
def test_the_encoder_under_a_plan_equals_numpy(config: EncoderConfig, plan: Plan) -> None:
    encoder = Encoder(config)
    params = random_params(encoder)
    video = random_video(2, 8, 48, 80)
    video[:, 2:] = video[:, :1] + 0.4 * video[:, 2:]  # so that something is static
    out = encode(encoder, params, video, plan)
    patches = encoder.apply({"params": params}, video, method="embed_patches")
    counts = count_tokens(plan, config, GRID)
    assert out.tokens.shape == (2, counts[-1], config.hidden_size)
    expected = []
    for clip in range(2):
        tokens, embedding = reductions.encode(config, params, patches[clip], GRID, plan)
        assert len(tokens) == counts[-1]
        expected.append(tokens)
        assert relative_error(out.embedding[clip], embedding) <= MODULE
    reductions.check_equal(out, expected)


@pytest.mark.parametrize("config", [V2, V2_1], ids=["2", "2.1"])
@pytest.mark.parametrize(
    ("scan", "dtype"), [(True, jnp.float32), (False, jnp.float32), (True, jnp.bfloat16)]
)
def test_without_steps_it_is_the_encoder(config: EncoderConfig, scan: bool, dtype: DType) -> None:
    encoder = Encoder(config, dtype=dtype, scan=scan)
    params = random_params(Encoder(config))
    params = params if scan else unstack_layers(params)
    video = random_video(2, 6, 32, 80)
    out = encode(encoder, params, video, ())
    expected = compiled(encoder, params, video)
    assert out.tokens.dtype == dtype
    assert relative_error(out.tokens, expected) <= (MODULE if dtype == jnp.float32 else 0.02)
    mean = jnp.mean(expected.astype(jnp.float32), axis=1)
    assert relative_error(out.embedding, mean) <= (MODULE if dtype == jnp.float32 else 0.02)
    assert out.embedding.dtype == out.sizes.dtype == jnp.float32
    assert np.array_equal(out.source, np.tile(np.arange(30), (2, 1)))
    assert np.array_equal(out.sizes, np.ones((2, 30)))


def test_a_single_frame() -> None:
    config = dataclasses.replace(V2_1, num_layers=1, levels=(0,))
    encoder = Encoder(config)
    params = random_params(encoder)
    image, plan = random_video(1, 1, 64, 48), (Merge(layer=0, remove=6),)
    out = encode(encoder, params, image, plan)
    patches = encoder.apply({"params": params}, image, method="embed_patches")
    tokens, _ = reductions.encode(config, params, patches[0], (1, 4, 3), plan)
    reductions.check_equal(out, [tokens])


def test_bfloat16_under_a_plan_is_close_to_float32() -> None:
    encoder, params = tiny_model()
    video = random_video(1, 8, 48, 80)
    plan = (MergeStatic(columns=8, segment=4),)
    half = encode(Encoder(encoder.config, dtype=jnp.bfloat16), params, video, plan)
    full = encode(encoder, params, video, plan)
    assert half.tokens.dtype == jnp.bfloat16
    assert np.array_equal(half.source, full.source)
    assert relative_error(half.tokens, full.tokens) <= 0.05  # 8 bits of mantissa


def test_clips_of_a_batch_do_not_meet_and_layers_may_be_unrolled() -> None:
    encoder, params = tiny_model(num_layers=1)
    video = random_video(3, 4, 48, 80)
    plan = (DropPredictable(layer=0, remove=9), Merge(layer=0, remove=5))
    together = encode(encoder, params, video, plan)
    unrolled = Encoder(encoder.config, scan=False)
    alone = encode(unrolled, unstack_layers(params), video[1:2], plan)
    for leaf, one in zip(together, alone, strict=True):
        assert relative_error(leaf[1:2], one) <= MODULE
    assert np.array_equal(together.source[1:2], alone.source)


def test_quantized_weights_reduce_too() -> None:
    encoder, params = tiny_model(num_layers=2)
    small = quantize({"encoder": params}, "int8")["encoder"]
    video = random_video(1, 4, 48, 80)
    found, expected = encode(encoder, small, video, ()), compiled(encoder, small, video)
    assert relative_error(found.tokens, expected) <= MODULE
    assert relative_error(found.tokens, encode(encoder, params, video, ()).tokens) > 1e-4


def test_the_classifier_takes_the_full_grid_again() -> None:
    encoder, params = tiny_model(num_layers=1)
    heads = ClassifierConfig(labels=tuple("abcde"), num_layers=1, num_heads=2, layer_norm_eps=1e-5)
    classifier = Classifier(heads, encoder.config)
    video, plan = random_video(2, 4, 48, 80), (Merge(layer=0, remove=12),)
    full = compiled(encoder, params, video)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(classifier.init, jax.random.key(0), full)
    variables = jax.tree.map(lambda x: 0.1 * rng.normal(size=x.shape).astype(np.float32), shapes)
    apply = jax.jit(classifier.apply)
    out = encode(encoder, params, video, plan)
    grid = np.stack([np.asarray(out.tokens)[i][np.asarray(out.source)[i]] for i in range(2)])
    assert grid.shape == full.shape
    logits = apply(variables, unmerge(out.tokens, out.source))
    assert logits.shape == (2, 5)
    assert relative_error(logits, apply(variables, grid)) <= MODULE
    assert relative_error(logits, apply(variables, full)) > 1e-4


def test_gradients_reach_every_layer() -> None:
    encoder, params = tiny_model(num_layers=2)
    video = random_video(1, 4, 32, 48)
    plan = (Merge(layer=0, remove=3),)

    def loss(params: dict) -> Array:
        return jnp.sum(jnp.square(encode(encoder, params, video, plan).embedding))

    gradients = jax.jit(jax.grad(loss))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(leaf).all(), path
        largest = np.abs(leaf).reshape(len(leaf), -1).max(1)
        assert (largest > 0).all(), path


def test_the_second_call_compiles_nothing(compilations: Callable[[], int]) -> None:
    encoder, params = tiny_model(num_layers=1)
    video = jnp.asarray(random_video(1, 4, 32, 32))
    for call in range(3):
        encode(encoder, params, video + call, [Merge(layer=0, remove=3)])
        if call == 1:
            before = compilations()
    assert compilations() == before


# --- Plans --------------------------------------------------------------------------------------


def test_schedules_are_those_of_tome() -> None:
    def counts(*args: float) -> list[int]:
        return [step.remove for step in merge_schedule(args[0], range(5), *args[1:])]

    assert counts(8) == [8] * 5
    assert counts(8, -1.0) == [16, 12, 8, 4]  # and none in the last
    assert counts(8, 1.0) == [4, 8, 12, 16]
    assert counts(5, -0.5) == [7, 6, 5, 4, 3]  # from int(7.5) down to 10 - 7
    assert merge_schedule(3, [2, 7], -1.0) == (Merge(layer=2, remove=6),)
    assert merge_schedule(3, [4]) == (Merge(layer=4, remove=3),)
    assert merge_schedule(0, range(24)) == ()


def test_tokens_are_counted() -> None:
    assert count_tokens((), V2, GRID) == (60, 60, 60)
    assert count_tokens(MIXED, V2, GRID) == (46, 32, 25)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            [Merge(layer=0, remove=31)],
            "Merge.remove = 31; it must be at most 30 where there are 60",
        ),
        ([Merge(layer=3, remove=1)], "Merge.layer = 3; it must be below 3"),
        ([*merge_schedule(30, range(2))], "Merge.remove = 30; it must be at most 15 .* 30 tokens"),
        ([MergeStatic(columns=1, segment=3)], "segment = 3; it must be a divisor of the 4"),
        ([MergeStatic(columns=16, segment=4)], "columns = 16; it must be at most 15"),
        (
            [Merge(layer=0, remove=2), MergeStatic(layer=1, columns=1, segment=2)],
            "MergeStatic.layer = 1; it must be before the layers of all other steps",
        ),
        ([DropPredictable(layer=0, remove=60)], "remove = 60; it must be at most 59"),
        ([DropPredictable(layer=0, remove=1, neighbours=60)], "neighbours = 60; .* most 59"),
        ([Merge(layer=1, remove=2), Merge(layer=0, remove=2)], r"layers \[1, 0\]; .* order"),
        (
            [Merge(layer=1, remove=2)] * 2,
            r"layers \[1, 1\]; no layer can have a kind of step twice",
        ),
        (["tome:8"], "plan holds 'tome:8'"),
    ],
)
def test_impossible_plans_are_refused(plan: list, message: str) -> None:
    encoder, params = tiny_model()
    with pytest.raises(ConfigError, match=message):
        encode(encoder, params, random_video(1, 8, 48, 80), plan)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Merge(layer=-1, remove=1), "Merge.layer = -1"),
        (lambda: Merge(layer=0, remove=0), "Merge.remove = 0"),
        (lambda: Merge(layer=0, remove=2.0), "Merge.remove = 2.0"),
        (lambda: MergeStatic(columns=0, segment=2), "MergeStatic.columns = 0"),
        (lambda: MergeStatic(columns=1, segment=1), "MergeStatic.segment = 1"),
        (lambda: DropPredictable(layer=True, remove=1), "DropPredictable.layer = True"),
        (lambda: DropPredictable(layer=0, remove=1, neighbours=0), "neighbours = 0"),
        (lambda: merge_schedule(-1, range(3)), "remove = -1"),
        (lambda: merge_schedule(2, range(3), 1.5), "trend = 1.5"),
    ],
)
def test_impossible_values_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_what_a_plan_cannot_run_with_is_refused() -> None:
    encoder, params = tiny_model()
    video, plan = random_video(1, 4, 32, 32), (Merge(layer=0, remove=1),)
    areas = Encoder(dataclasses.replace(encoder.config, area_layers=(0, 2)))
    with pytest.raises(ConfigError, match=r"area_layers = \(0, 2\)"):
        encode(areas, params, video, plan)
    with pytest.raises(ConfigError, match="remat = 'block'"):
        encode(Encoder(encoder.config, remat="block"), params, video, plan)
    with pytest.raises(InputError, match="params have no 'blocks_0'"):
        encode(Encoder(encoder.config, scan=False), params, video, plan)
    with pytest.raises(InputError, match="channels-first"):
        encode(encoder, params, random_video(1, 3, 4, 32)[..., :2], plan)
