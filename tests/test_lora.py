import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import Wearing, random_lora
from flax.traverse_util import flatten_dict, unflatten_dict
from models import compiled, random_params, random_video, relative_error, tiny_config

from jvjepa import (
    ActionPredictorConfig,
    AnticipatorConfig,
    ClassifierConfig,
    Encoder,
    ModelConfig,
    PredictorConfig,
    gating,
    streaming,
)
from jvjepa.action import ActionPredictor
from jvjepa.anticipation import Anticipator
from jvjepa.area import AreaOptions
from jvjepa.config import EncoderConfig
from jvjepa.dense import Dense
from jvjepa.errors import ConfigError, InputError
from jvjepa.heads import Classifier
from jvjepa.layers import make_blocks
from jvjepa.lora import LoraConfig, init_lora, join, merge_lora, split, variables
from jvjepa.parameters import parameter_shapes, stack_layers, unstack_layers
from jvjepa.predictor import Predictor
from jvjepa.typing import Array, Params

TOLERANCE = 1e-5
SMALL = tiny_config(num_layers=3)
V2_1 = dataclasses.replace(
    SMALL, rope="interleaved", interpolate=True, image_tokenizer=True, levels=(0, 2)
)
AREAS = AreaOptions(layers=(0, 2), temporal_splits=1).of(SMALL)
EVERYWHERE = LoraConfig(rank=4, alpha=4.0, targets=(".*",))
CHOSEN = LoraConfig(rank=4, layers=(0, 2))


def model(config: EncoderConfig = SMALL, **how: Any) -> tuple[Encoder, Params]:
    full = dataclasses.replace(config, area_layers=(0, 0))  # areas have no parameters
    return Encoder(config, **how), random_params(Encoder(full, **how))


def apply(encoder: Encoder, variables: Params, *args: Any, **static: Any) -> Array:
    return jax.jit(functools.partial(encoder.apply, **static))(variables, *args)


# --- Adapters that change nothing yet ------------------------------------------------------------


@pytest.mark.parametrize("scan", [True, False])
def test_new_adapters_change_no_bit(scan: bool) -> None:
    encoder, params = model(scan=scan)
    lora = init_lora({"encoder": params}, EVERYWHERE, jax.random.key(0))["encoder"]
    video = random_video(2, 4, 32, 48)
    expected = apply(encoder, {"params": params}, video)
    found = apply(encoder, variables(params, lora), video)
    assert np.array_equal(found, expected)

    tubelets = random_video(3, 1, 2, 32, 48)
    outputs = []
    for worn in (encoder, Wearing(encoder, lora)):
        state = streaming.init_state(worn, 1, 2, height=32, width=48)
        outputs.append(streaming.scan(worn, params, state, tubelets)[1])
    chex.assert_trees_all_equal(*outputs)


def test_the_draw_is_that_of_peft() -> None:
    """kaiming_uniform(a=sqrt(5)) of [r, in] is U(-1, 1) / sqrt(in)."""
    _, params = model()
    config = LoraConfig(rank=8, alpha=12.0, layers=(0, 2), dropout=0.25)
    lora = init_lora({"encoder": params}, config, jax.random.key(1))["encoder"]
    assert sorted(lora["blocks"]["attention"]) == ["key", "proj", "query", "value"]
    assert list(lora["blocks"]) == ["attention"]
    names = {"a": (3, 48, 8), "b": (3, 8, 48), "scale": (3,), "dropout": (3,)}
    for adapter in lora["blocks"]["attention"].values():
        assert {name: leaf.shape for name, leaf in adapter.items()} == names
        assert all(leaf.dtype == jnp.float32 for leaf in adapter.values())
        assert not adapter["b"].any()
        assert not adapter["a"][1].any()
        assert np.array_equal(adapter["scale"], [1.5, 0.0, 1.5])
        a = np.asarray(adapter["a"])[[0, 2]] * 48**0.5
        assert 0.99 < np.abs(a).max() <= 1
        assert abs(a.std() - 3**-0.5) < 0.02
        assert not np.array_equal(a[0], a[1])
    first = [adapter["a"] for adapter in lora["blocks"]["attention"].values()]
    assert len({np.asarray(a).tobytes() for a in first}) == 4
    other = init_lora({"encoder": params}, config, jax.random.key(2))["encoder"]
    assert not np.array_equal(other["blocks"]["attention"]["key"]["a"], first[0])


def test_stacked_and_unrolled_adapters_are_the_same() -> None:
    _, params = model()
    make = functools.partial(init_lora, config=EVERYWHERE, key=jax.random.key(0))
    stacked = make({"encoder": params})
    unrolled = make({"encoder": unstack_layers(params)})
    assert {"blocks_0", "blocks_2", "patch_embed"} <= set(unrolled["encoder"])
    chex.assert_trees_all_equal(stack_layers(unrolled), stacked)
    traced = jax.jit(make)({"encoder": params})
    chex.assert_trees_all_close(traced, stacked, rtol=1e-6)


# --- Merged and unmerged -------------------------------------------------------------------------


def both(encoder: Encoder, params: Params, lora: Params, *args: Any, **static: Any) -> list[Array]:
    """Outputs of the base, with adapters, and with merged weights."""
    merged = merge_lora(params, lora)
    run = jax.jit(functools.partial(encoder.apply, **static))
    every = ({"params": params}, variables(params, lora), {"params": merged})
    return [run(each, *args) for each in every]


def assert_same(outputs: list[Array], tolerance: float = TOLERANCE) -> None:
    base, adapted, merged = (np.asarray(output, np.float32) for output in outputs)
    assert relative_error(merged, adapted) <= tolerance
    assert relative_error(adapted, base) > 30 * tolerance


@pytest.mark.parametrize(
    ("config", "how", "shape", "call"),
    [
        (SMALL, {}, (2, 4, 32, 48), {}),
        (SMALL, {"scan": False}, (2, 4, 32, 48), {}),
        (SMALL, {}, (1, 6, 48, 32), {"window": 2}),
        (AREAS, {}, (1, 4, 64, 32), {}),
        (AREAS, {"scan": False}, (1, 4, 64, 32), {}),
        (V2_1, {}, (1, 4, 32, 48), {"method": "levels"}),
        (V2_1, {}, (2, 1, 32, 48), {}),  # pictures
    ],
)
def test_merged_equals_unmerged(
    config: EncoderConfig, how: dict[str, bool], shape: tuple[int, ...], call: dict[str, Any]
) -> None:
    encoder, params = model(config, **how)
    lora = random_lora({"encoder": params}, EVERYWHERE)["encoder"]
    assert_same(both(encoder, params, lora, random_video(*shape), **call))


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_bfloat16(param_dtype: str) -> None:
    encoder, params = model(dtype=jnp.bfloat16, param_dtype=jnp.dtype(param_dtype))
    lora = random_lora({"encoder": params}, EVERYWHERE)["encoder"]
    outputs = both(encoder, params, lora, random_video(1, 4, 32, 48))
    assert {output.dtype for output in outputs} == {jnp.dtype("bfloat16")}
    # Weights, adapters and activations are rounded in other places, by up to 2^-9 each.
    assert relative_error(outputs[2], outputs[1]) < 0.05
    assert relative_error(outputs[1], outputs[0]) > 0.2
    merged = merge_lora(params, lora)
    chex.assert_trees_all_equal_dtypes(merged, dict(params))


def test_merged_weights_stream_what_training_saw() -> None:
    """Training runs the whole clip under the causal mask with adapters; streaming is merged."""
    encoder, params = model()
    lora = random_lora({"encoder": params}, CHOSEN)["encoder"]
    merged = merge_lora(params, lora)
    tubelets = random_video(5, 2, 2, 32, 48)
    clip = tubelets.swapaxes(0, 1).reshape(2, 10, 32, 48, 3)
    full = apply(encoder, variables(params, lora), clip, window=2)
    full = full.reshape(2, 5, 6, 48).swapaxes(0, 1)
    state = streaming.init_state(encoder, 2, 2, height=32, width=48)
    steps = []
    for tubelet in tubelets:
        state, out = streaming.step(encoder, merged, state, tubelet, positions="absolute")
        steps.append(out.tokens)
    assert relative_error(np.stack(steps), full) <= TOLERANCE
    base = compiled(encoder, params, clip, window=2).reshape(2, 5, 6, 48).swapaxes(0, 1)
    assert relative_error(base, full) > 0.1


def test_steps_with_adapters_equal_merged_steps() -> None:
    for config in (AREAS, V2_1):
        encoder, params = model(config)
        lora = random_lora({"encoder": params}, EVERYWHERE)["encoder"]
        tubelets = random_video(4, 1, 2, 64, 32)
        gate = gating.Gate(tau=0.0)
        outputs = []
        for worn, weights in (
            (Wearing(encoder, lora), params),
            (encoder, merge_lora(params, lora)),
        ):
            state = gating.init_state(worn, 1, 2, height=64, width=32)
            outputs.append(gating.scan(worn, weights, state, tubelets, gate)[1])
        assert relative_error(outputs[1].tokens, outputs[0].tokens) <= TOLERANCE
        assert relative_error(outputs[1].embedding, outputs[0].embedding) <= TOLERANCE


def test_every_part_of_a_model_can_be_adapted() -> None:
    labels = ("walk", "run", "sit")
    config = ModelConfig(
        encoder=tiny_config(num_layers=1),
        predictor=PredictorConfig(hidden_size=24, num_layers=1, num_heads=2, mlp_dim=48),
        classifier=ClassifierConfig(labels=labels, num_layers=1, num_heads=4),
        anticipator=AnticipatorConfig(
            actions=labels, verbs=labels, nouns=labels, num_layers=1, num_heads=4
        ),
        action_predictor=ActionPredictorConfig(
            hidden_size=24, num_layers=1, num_heads=2, mlp_dim=48
        ),
    )
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(config)
    sizes = {name: shape[-2] ** -0.5 if "kernel" in name else 0.3 for name, shape in shapes.items()}
    flat = {
        name: jnp.asarray(sizes[name] * rng.normal(size=shape), jnp.float32)
        for name, shape in shapes.items()
    }
    params = unflatten_dict(flat, sep="/")
    lora = random_lora(params, EVERYWHERE)
    kernels = [name for name in shapes if name.endswith("/kernel")]
    trained = flatten_dict(split(lora)[0], sep="/")
    assert {name.replace("/kernel", "/a") for name in kernels} < set(trained)
    assert len(trained) == 2 * len(kernels)

    tokens = jnp.asarray(rng.normal(size=(1, 8, 48)), jnp.float32)
    ids = np.arange(8)[None]
    moves = jnp.asarray(rng.normal(size=(1, 2, 7)), jnp.float32)
    grid = {"grid": (2, 2, 2)}
    parts = {
        "predictor": (Predictor, config.predictor, (tokens[:, :4], ids[:, :4], ids[:, 4:]), grid),
        "classifier": (Classifier, config.classifier, (tokens,), {}),
        "anticipator": (Anticipator, config.anticipator, (tokens,), {}),
        "action_predictor": (
            *(ActionPredictor, config.action_predictor),
            *((tokens, moves, moves), {"grid": (2, 2)}),
        ),
    }
    for name, (module, part, args, static) in parts.items():
        outputs = both(module(part, config.encoder), params[name], lora[name], *args, **static)
        leaves = [jax.tree.leaves(output) for output in outputs]
        for leaf in zip(*leaves, strict=True):
            assert_same(list(leaf))


def test_merging_leaves_the_base_and_what_is_not_adapted_alone() -> None:
    _, params = model()
    before = jax.tree.map(np.array, dict(params))
    lora = random_lora({"encoder": params}, CHOSEN)["encoder"]
    merged = merge_lora(params, lora)
    chex.assert_trees_all_equal(dict(params), before)
    old, new = flatten_dict(params, sep="/"), flatten_dict(merged, sep="/")
    adapted = {f"blocks/attention/{name}/kernel" for name in ("query", "key", "value", "proj")}
    for name, leaf in old.items():
        assert (new[name] is leaf) == (name not in adapted)
    for name in adapted:
        assert np.array_equal(new[name][1], old[name][1])
        assert all(not np.array_equal(new[name][i], old[name][i]) for i in (0, 2))


# --- Training ------------------------------------------------------------------------------------


def gradient(
    encoder: Encoder, params: Params, lora: Params, video: Array, key: Array | None
) -> Any:
    rngs = None if key is None else {"dropout": key}

    def loss(lora: Params) -> Array:
        tokens = encoder.apply(variables(params, lora), video, rngs=rngs, window=2)
        return jnp.mean(jnp.square(tokens - 1))

    return jax.jit(jax.grad(loss))(lora)


def test_gradients_reach_the_chosen_layers_alone() -> None:
    encoder, params = model()
    video = random_video(1, 6, 32, 32)
    start = init_lora({"encoder": params}, CHOSEN, jax.random.key(0))["encoder"]
    for lora in (start, random_lora({"encoder": params}, CHOSEN)["encoder"]):
        for adapter in gradient(encoder, params, lora, video, None)["blocks"]["attention"].values():
            norms = {name: np.abs(leaf).reshape(3, -1).max(1) for name, leaf in adapter.items()}
            assert not norms["scale"].any()
            assert norms["a"][1] == norms["b"][1] == 0
            assert all(norms["b"][[0, 2]] > 0)
            assert all((norms["a"][[0, 2]] > 0) == (lora is not start))


def test_split_gives_training_the_factors_alone() -> None:
    _, params = model()
    config = dataclasses.replace(CHOSEN, dropout=0.1)
    lora = random_lora({"encoder": params}, config)
    trained, fixed = split(lora)
    kinds = [{path[-1] for path in flatten_dict(tree)} for tree in (trained, fixed)]
    assert kinds == [{"a", "b"}, {"scale", "dropout"}]
    chex.assert_trees_all_equal(join(trained, fixed), lora)


@pytest.mark.parametrize("scan", [True, False])
def test_remat_gives_the_same_gradients_with_dropout(scan: bool) -> None:
    encoder, params = model(tiny_config(num_layers=2 if scan else 1), scan=scan)
    lora = random_lora({"encoder": params}, LoraConfig(rank=4, dropout=0.5))["encoder"]
    args = (params, lora, random_video(1, 4, 32, 32), jax.random.key(3))
    expected = gradient(encoder, *args)
    found = gradient(encoder.clone(remat="block"), *args)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert relative_error(a + 1e-6, b + 1e-6) <= 1e-4  # constants have no gradient


def test_dropout_is_for_those_who_give_a_key() -> None:
    encoder, params = model(tiny_config(num_layers=2))
    video = random_video(1, 4, 32, 32)
    lora, without = (
        random_lora({"encoder": params}, dataclasses.replace(EVERYWHERE, dropout=rate))["encoder"]
        for rate in (0.5, 0.0)
    )
    run = jax.jit(lambda lora, key: encoder.apply(
        variables(params, lora), video, rngs=None if key is None else {"dropout": key}
    ))  # fmt: skip
    plain = run(without, None)
    assert np.array_equal(run(lora, None), plain)
    assert np.array_equal(run(without, jax.random.key(0)), plain)
    first, again, other = (run(lora, jax.random.key(i)) for i in (0, 0, 1))
    assert np.array_equal(first, again)
    assert relative_error(first, plain) > 0.1
    assert relative_error(other, first) > 0.1


def test_dropout_drops_inputs_of_the_adapter_alone() -> None:
    """Through a kernel of zeros and factors of identity the layer shows what dropout left."""
    identity = jnp.eye(16)
    adapter = {"a": identity, "b": identity, "scale": jnp.float32(1), "dropout": jnp.float32(0.25)}
    params = {"kernel": jnp.zeros((16, 16)), "bias": jnp.full((16,), 5.0)}
    x = jnp.ones((4, 500, 16))
    rngs = {"dropout": jax.random.key(0)}
    found = Dense(16).apply({"params": params, "lora": adapter}, x, rngs=rngs) - 5
    values, counts = np.unique(np.asarray(found).round(4), return_counts=True)
    assert np.allclose(values, [0, 1 / 0.75], atol=1e-4)
    assert abs(counts[0] / counts.sum() - 0.25) < 0.01


def test_every_layer_of_a_scan_drops_others() -> None:
    """In a layer that only copies its input, two layers that dropped the same would show it."""
    config = tiny_config(head_width=24, num_heads=2).block
    blocks = make_blocks(config, 2, (jnp.float32, jnp.float32), "xla", scan=True)
    x = jnp.ones((1, 64, 48))
    zeros = jax.tree.map(
        jnp.zeros_like, blocks.init(jax.random.key(0), x, None, None, None, None)["params"]
    )
    # norm2 gives its bias, 1; fc1 its adapter's input, doubled or dropped; fc2 adds gelu of it.
    zeros["norm2"]["bias"] = jnp.ones((2, 48))
    zeros["mlp"]["fc2"]["kernel"] = jnp.stack([jnp.eye(144, 48), 10 * jnp.eye(144, 48)])
    eye = jnp.broadcast_to(jnp.eye(48, 144), (2, 48, 144))
    adapter = {"a": jnp.broadcast_to(jnp.eye(48), (2, 48, 48)), "b": eye}
    adapter |= {"scale": jnp.ones((2,)), "dropout": jnp.full((2,), 0.5)}
    found, _ = blocks.apply(
        {"params": zeros, "lora": {"mlp": {"fc1": adapter}}},
        *(x, None, None, None, None),
        rngs={"dropout": jax.random.key(0)},
    )
    levels = ((np.asarray(found) - 1) / jax.nn.gelu(2.0, approximate=False)).round()
    assert set(np.unique(levels)) == {0, 1, 10, 11}
    first, second = levels % 10 == 1, levels >= 10
    assert 0.4 < first.mean() < 0.6
    assert 0.4 < second.mean() < 0.6
    assert 0.4 < (first == second).mean() < 0.6


def test_new_values_of_adapters_compile_nothing(compilations: Callable[[], int]) -> None:
    encoder, params = model()
    video = random_video(1, 2, 32, 32)
    run = jax.jit(lambda lora: encoder.apply(variables(params, lora), video))
    every = [
        random_lora({"encoder": params}, config, seed)["encoder"]
        for seed, config in enumerate((CHOSEN, CHOSEN, LoraConfig(rank=4, alpha=1.0)))
    ]
    first = run(every[0])
    before = compilations()
    others = [run(lora) for lora in every[1:]]
    assert compilations() == before
    assert all(not np.array_equal(other, first) for other in others)


# --- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rank": 0}, "LoraConfig.rank = 0; it must be a whole number above 0"),
        ({"rank": 4.0}, "LoraConfig.rank = 4.0"),
        ({"rank": True}, "LoraConfig.rank = True"),
        ({"alpha": 0}, "LoraConfig.alpha = 0; it must be a number above 0"),
        ({"alpha": float("nan")}, "LoraConfig.alpha = nan"),
        ({"dropout": 1.0}, "LoraConfig.dropout = 1.0; it must be a number from 0 to below 1"),
        ({"dropout": -0.1}, "LoraConfig.dropout = -0.1"),
        ({"targets": ()}, "LoraConfig.targets = .*; it must be a tuple of one or more"),
        ({"targets": "encoder.*"}, "LoraConfig.targets = 'encoder"),
        ({"targets": ("(",)}, r"LoraConfig.targets: '\(' is wrong: missing \)"),
        ({"layers": ()}, "LoraConfig.layers = .*; it must be None or a tuple of ascending layers"),
        ({"layers": (1, 1)}, "LoraConfig.layers = .1, 1"),
        ({"layers": (-1,)}, "LoraConfig.layers = .-1,"),
        ({"layers": [0]}, r"LoraConfig.layers = \[0\]"),
    ],
)
def test_configs_that_cannot_be_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**values)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            LoraConfig(targets=("encoder/blocks/attn/.*",)),
            "'encoder/blocks/attn/.*' matches none of the dense layers: .*blocks/attention/query",
        ),
        (LoraConfig(targets=(".*", "classifier/.*")), "'classifier/.*' matches none"),
        (LoraConfig(targets=("blocks/attention/query",)), "matches none"),
        (LoraConfig(layers=(0, 3)), r"layers = \(0, 3\); encoder/.* has the layers 0 to 2"),
        (
            LoraConfig(targets=("encoder/patch_embed",), layers=(0,)),
            r"layers = \(0,\), but no target is in blocks",
        ),
    ],
)
def test_targets_that_are_not_there_are_refused(config: LoraConfig, message: str) -> None:
    _, params = model()
    with pytest.raises(ConfigError, match=message):
        init_lora({"encoder": params}, config, jax.random.key(0))


def test_adapters_that_do_not_fit_are_refused() -> None:
    _, params = model()
    lora = init_lora({"encoder": params}, CHOSEN, jax.random.key(0))["encoder"]
    query = lora["blocks"]["attention"]["query"]
    for use in (variables, merge_lora):
        with pytest.raises(
            InputError, match=r"lora has encoder/blocks/attention/.*, which is no d"
        ):
            use(params, {"encoder": lora})
        with pytest.raises(InputError, match=r"lora has blocks/attention/.*, which is no d"):
            use(unstack_layers(params), lora)
        for odd in (
            {**query, "a": query["a"][..., :3]},
            {**query, "b": query["b"][:2]},
            {name: leaf for name, leaf in query.items() if name != "scale"},
            {name: leaf for name, leaf in query.items() if name != "a"},
            {**query, "c": query["a"]},
        ):
            other = {"blocks": {"attention": {"query": odd}}}
            with pytest.raises(InputError, match="lora blocks/attention/query has the shapes"):
                use(params, other)
