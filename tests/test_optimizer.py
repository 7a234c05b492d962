import dataclasses
import math
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from models import relative_error

from jvjepa.config import EncoderConfig, ModelConfig, PredictorConfig
from jvjepa.errors import ConfigError
from jvjepa.parameters import parameter_shapes, stack_layers, unstack_layers
from jvjepa.train.optimizer import (
    OptimizerConfig,
    ParameterGroup,
    divide,
    freeze_first,
    layer_decay,
    make_optimizer,
)
from jvjepa.typing import Params

REST = ParameterGroup(pattern=".*")
CONFIG = ModelConfig(
    encoder=EncoderConfig(
        hidden_size=12,
        num_layers=3,
        num_heads=2,
        mlp_dim=20,
        crop_size=32,
        patch_size=2,
        rope="interleaved",
        image_tokenizer=True,
        levels=(0, 2),
    ),
    predictor=PredictorConfig(
        hidden_size=12,
        num_layers=2,
        num_heads=2,
        mlp_dim=16,
        num_mask_tokens=2,
        rope="interleaved",
        num_levels=2,
        context_projection=True,
        modality_embeddings=True,
    ),
)


def random_tree(seed: int, scale: float = 1.0) -> Params:
    rng = np.random.default_rng(seed)
    flat = {
        name: jnp.asarray(scale * rng.normal(size=shape), jnp.float32)
        for name, shape in parameter_shapes(CONFIG).items()
    }
    return unflatten_dict(flat, sep="/")


def flat(tree: Params) -> dict[str, np.ndarray]:
    return {name: np.array(leaf) for name, leaf in flatten_dict(tree, sep="/").items()}


def run(config: OptimizerConfig, params: Params, gradients: list[Params]) -> Params:
    transform = make_optimizer(config, params, steps=len(gradients)).transform
    state = transform.init(params)

    @jax.jit
    def step(params: Params, state: optax.OptState, gradient: Params) -> Any:
        updates, state = transform.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for gradient in gradients:
        params, state = step(params, state, gradient)
    return params


# --- Schedules -----------------------------------------------------------------------------------


def trace(config: OptimizerConfig, name: str, steps: int, count: int) -> np.ndarray:
    schedule = make_optimizer(config, {"x": jnp.ones((2, 2))}, steps=steps).schedules[name]
    values = jax.jit(jax.vmap(schedule))(jnp.arange(count))
    assert values.dtype == jnp.float32
    return np.asarray(values, np.float64)


def test_warm_up_and_cosine_are_those_of_meta() -> None:
    """Their scheduler counts its calls, of which the first comes before the first update."""
    warmup, total, start, peak, final = 40, 300, 1e-4, 5.25e-4, 1e-6
    length = int(1.25 * total) - warmup
    expected = []
    for call in range(1, total + 1):
        if call < warmup:
            expected.append(start + call / warmup * (peak - start))
        else:
            cosine = 0.5 * (1 + math.cos(math.pi * (call - warmup) / length))
            expected.append(max(final, final + (peak - final) * cosine))
    config = OptimizerConfig(
        learning_rate=peak,
        start_learning_rate=start,
        final_learning_rate=final,
        warmup_steps=warmup,
        stretch=1.25,
    )
    found = trace(config, "learning_rate", total, total)
    assert relative_error(found, expected) <= 1e-6
    assert np.max(np.abs(found / expected - 1)) <= 1e-5
    assert np.argmax(found) == warmup - 1
    assert found[-1] > 10 * final  # ends early


def test_the_released_2_1_keep_their_learning_rate_after_the_warm_up() -> None:
    config = OptimizerConfig(
        learning_rate=6e-4, start_learning_rate=1e-4, final_learning_rate=6e-4, warmup_steps=40
    )
    found = trace(config, "learning_rate", 100, 130)
    assert np.array_equal(found[39:], np.full(91, np.float32(6e-4), np.float64))
    constant = dataclasses.replace(config, schedule="constant", final_learning_rate=0.0)
    assert np.array_equal(trace(constant, "learning_rate", 100, 130), found)


def test_the_cooldown_is_linear_and_ends_where_metas_does() -> None:
    config = OptimizerConfig(
        learning_rate=6e-4, final_learning_rate=1e-6, schedule="linear", stretch=1.25
    )
    steps = 40 * 300
    calls = np.arange(1, steps + 1)
    expected = 6e-4 + calls / int(1.25 * steps) * (1e-6 - 6e-4)
    found = trace(config, "learning_rate", steps, steps)
    assert np.max(np.abs(found / expected - 1)) <= 1e-5
    assert found[-1] == pytest.approx(1.208e-4, rel=1e-4)


def test_schedules_stay_at_their_ends() -> None:
    for schedule in ("cosine", "linear"):
        config = OptimizerConfig(learning_rate=1.0, final_learning_rate=0.25, schedule=schedule)
        found = trace(config, "learning_rate", 10, 25)
        assert np.all(np.diff(found[:10]) < 0)
        assert np.array_equal(found[9:], np.full(16, 0.25))


@pytest.mark.parametrize(("first", "last"), [(0.04, 0.4), (0.4, 0.04), (0.04, None), (0.1, 0.0)])
def test_weight_decay_is_metas_cosine(first: float, last: float | None) -> None:
    steps, end = 200, first if last is None else last
    bound = max if end <= first else min
    calls = range(1, steps + 1)
    expected = [
        bound(end, end + (first - end) * 0.5 * (1 + math.cos(math.pi * call / int(1.25 * steps))))
        for call in calls
    ]
    config = OptimizerConfig(
        learning_rate=1.0, weight_decay=first, final_weight_decay=last, stretch=1.25
    )
    assert relative_error(trace(config, "weight_decay", steps, steps), expected) <= 1e-6


# --- Updates against torch -----------------------------------------------------------------------


def meta_decays(name: str, array: np.ndarray) -> bool:
    """Their rule, applied to what the array of a layer is called and shaped like there."""
    shape = array.shape
    if name.endswith(("image_embed", "video_embed")):
        shape = (1, 1, *shape)
    if "/norms/" in name:
        shape = shape[1:]  # one norm for each level
    return len(shape) != 1 and "bias" not in name


def torch_run(
    config: OptimizerConfig,
    params: Params,
    gradients: list[Params],
    factors: dict[str, tuple[float, float]],
    rates: list[float],
    decays: list[float],
) -> dict[str, np.ndarray]:
    """AdamW in float64 with a group for each array of each layer; frozen ones are not given."""
    arrays = flat(unstack_layers(params))
    weights = {
        name: torch.nn.Parameter(torch.tensor(array, dtype=torch.float64))
        for name, array in arrays.items()
    }

    def factor(name: str) -> tuple[float, float]:
        return next(pair for pattern, pair in factors.items() if re.fullmatch(pattern, name))

    trained = [name for name in weights if factor(name)[0] > 0]
    groups = [{"params": [weights[name]]} for name in trained]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=config.betas, eps=config.epsilon)
    for gradient, rate, decay in zip(gradients, rates, decays, strict=True):
        every = flat(unstack_layers(gradient))
        for name in trained:
            weights[name].grad = torch.tensor(every[name], dtype=torch.float64)
        if config.max_norm is not None:
            torch.nn.utils.clip_grad_norm_([weights[name] for name in trained], config.max_norm)
        for name, group in zip(trained, optimizer.param_groups, strict=True):
            decays_at_all = meta_decays(name, arrays[name])
            group["lr"] = rate * factor(name)[0]
            group["weight_decay"] = decay * factor(name)[1] * decays_at_all
        optimizer.step()
    return {name: weight.detach().numpy() for name, weight in weights.items()}


FACTORS = {
    r"encoder/blocks_1/.*": (0.0, 1.0),
    r"encoder/patch_embed/.*": (0.0, 1.0),
    r"encoder/blocks_2/mlp/.*": (0.25, 2.0),
    r"predictor/.*": (2.0, 0.0),
    r".*": (1.0, 1.0),
}


@pytest.mark.parametrize("factors", [{".*": (1.0, 1.0)}, FACTORS])
@pytest.mark.parametrize("max_norm", [None, 3.0])
def test_updates_are_those_of_adamw(
    factors: dict[str, tuple[float, float]], max_norm: float | None
) -> None:
    steps, params = 6, random_tree(0)
    # Of these norms, about 30 and 0.3, the limit cuts some and others not.
    gradients = [random_tree(i + 1, scale=(1.0, 0.01)[i % 2]) for i in range(steps)]
    config = OptimizerConfig(
        learning_rate=3e-2,
        final_learning_rate=1e-2,
        schedule="linear",
        weight_decay=0.1,
        final_weight_decay=0.5,
        betas=(0.9, 0.95),
        max_norm=max_norm,
        groups=tuple(ParameterGroup(pattern=p, learning_rate=a, weight_decay=b)
                     for p, (a, b) in factors.items()),
    )  # fmt: skip
    rates = [3e-2 + i / steps * (1e-2 - 3e-2) for i in range(1, steps + 1)]
    decays = [0.5 - 0.4 * 0.5 * (1 + math.cos(math.pi * i / steps)) for i in range(1, steps + 1)]
    expected = torch_run(config, params, gradients, factors, rates, decays)
    found = flat(unstack_layers(run(config, params, gradients)))
    before = flat(unstack_layers(params))
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == np.float32
        assert relative_error(array, expected[name]) <= 1e-6, name
        if np.array_equal(expected[name], before[name]):
            assert factors is FACTORS
            assert np.array_equal(array, before[name])
        else:
            assert relative_error(array, before[name]) > 1e-3
            change = array - before[name].astype(np.float64)
            # the sum of parameter and update is rounded
            assert relative_error(change, expected[name] - before[name]) <= 3e-5, name


def test_a_stretch_of_factors_hits_the_right_layers() -> None:
    """Gradients of one make the first update of Adam one, whatever the layer."""
    params = jax.tree.map(jnp.zeros_like, random_tree(0))
    ones = jax.tree.map(jnp.ones_like, params)
    config = OptimizerConfig(
        learning_rate=1.0, schedule="constant", groups=(*layer_decay(0.5, 3), REST)
    )
    found = flat(unstack_layers(run(config, params, [ones])))
    for name, array in found.items():
        depth = {"encoder/blocks_0": 3, "encoder/blocks_1": 2, "encoder/blocks_2": 1}
        power = next((n for prefix, n in depth.items() if name.startswith(prefix)), 0)
        embeds = ("encoder/patch_embed", "encoder/image_embed", "encoder/video_embed")
        power = 4 if name.startswith(embeds) else power
        assert np.allclose(array, -(0.5**power), rtol=1e-4, atol=0), name


def test_stacked_and_unrolled_parameters_change_alike() -> None:
    params, gradients = random_tree(0), [random_tree(i) for i in (1, 2, 3)]
    config = OptimizerConfig(
        learning_rate=1e-2,
        max_norm=1.0,
        groups=(freeze_first(0.3, 3), *layer_decay(0.7, 3)[2:], REST),
    )
    stacked = run(config, params, gradients)
    unrolled = run(config, unstack_layers(params), [unstack_layers(each) for each in gradients])
    chex.assert_trees_all_close(stack_layers(unrolled), stacked, rtol=1e-6, atol=1e-7)
    assert "blocks_0" in unrolled["encoder"]


# --- Frozen parameters ---------------------------------------------------------------------------


def sizes(state: optax.OptState) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(state))


def test_frozen_parameters_keep_every_bit_and_have_no_averages() -> None:
    params, gradients = random_tree(0), [random_tree(i) for i in (1, 2, 3)]
    params["encoder"]["blocks"]["norm1"]["bias"] *= -0.0
    params["encoder"]["patch_embed"]["bias"] *= -0.0
    group = freeze_first(0.67, 3)
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.5, groups=(group, REST))
    before, after = (
        flat(unstack_layers(tree)) for tree in (params, run(config, params, gradients))
    )
    frozen = {name for name in before if before[name].tobytes() == after[name].tobytes()}
    prefixes = ("patch_embed/", "patch_embed_image/", "image_embed", "video_embed")
    prefixes = (*prefixes, "blocks_0/", "blocks_1/")
    wanted = tuple(f"encoder/{prefix}" for prefix in prefixes)
    assert frozen == {name for name in before if name.startswith(wanted)}

    state = make_optimizer(config, params, steps=3).transform.init(params)
    whole = sum(flat(params)[name].size for name in flat(params) if name in frozen)
    every = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert whole > 0
    assert sizes(state) == 2 * (every - whole) + 2  # and two counts


def test_frozen_gradients_do_not_count_in_the_norm() -> None:
    params, gradient = random_tree(0), random_tree(1)
    huge = flat(gradient)
    huge["encoder/patch_embed/kernel"] *= 1e6
    huge["encoder/blocks/mlp/fc1/kernel"][0] = np.nan
    huge = unflatten_dict({name: jnp.asarray(leaf) for name, leaf in huge.items()}, sep="/")
    # With this epsilon, as large as gradients are, updates show how long these are.
    config = OptimizerConfig(
        learning_rate=1.0,
        schedule="constant",
        epsilon=1.0,
        max_norm=0.5,
        groups=(freeze_first(0.34, 3), REST),
    )
    found, expected = (run(config, params, [each]) for each in (huge, gradient))
    chex.assert_trees_all_equal(found, expected)
    mine = found["predictor"]["mask_tokens"]
    assert relative_error(mine, params["predictor"]["mask_tokens"]) > 1e-3


def test_the_state_has_the_names_of_the_parameters() -> None:
    """Arrays are spread over devices by their names."""
    params = random_tree(0)
    config = OptimizerConfig(learning_rate=1.0, max_norm=1.0, groups=(freeze_first(0.5, 3), REST))
    state = make_optimizer(config, params, steps=1).transform.init(params)
    paths = jax.tree_util.tree_flatten_with_path(state)[0]
    found = [
        ("/".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey)), leaf.shape)
        for path, leaf in paths
        if leaf.ndim
    ]
    shapes = parameter_shapes(CONFIG)
    for name, shape in found:
        assert shapes[name.partition("/")[2]] == shape  # behind the name of the part, "trained"
    kept = [name for name in shapes if not re.match("encoder/(patch|image|video)", name)]
    assert len(found) == 2 * len(kept)


def test_no_share_freezes_the_embedding_alone() -> None:
    names = ("encoder/patch_embed/kernel", "encoder/blocks_0/norm1/scale", "encoder/norm/scale")
    assert [bool(re.fullmatch(freeze_first(0.0, 4).pattern, name)) for name in names] == [1, 0, 0]
    assert [bool(re.fullmatch(freeze_first(1.0, 4).pattern, name)) for name in names] == [1, 1, 0]
    eleven = freeze_first(0.5, 4).pattern
    blocks = [bool(re.fullmatch(eleven, f"encoder/blocks_{i}/x")) for i in (0, 1, 2, 3, 10, 11)]
    assert blocks == [1, 1, 0, 0, 0, 0]


# --- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": 0.0}, "OptimizerConfig.learning_rate = 0.0; it must be a number above"),
        ({"learning_rate": float("nan")}, "learning_rate = nan"),
        ({"start_learning_rate": -1.0}, "start_learning_rate = -1.0; it must be a number, 0 or"),
        ({"final_learning_rate": "0"}, "final_learning_rate = '0'"),
        ({"warmup_steps": -1}, "warmup_steps = -1; it must be a whole number, 0 or more"),
        ({"warmup_steps": 1.5}, "warmup_steps = 1.5"),
        ({"schedule": "step"}, r"schedule = 'step'; it must be one of \('cosine', 'linear', 'con"),
        ({"stretch": 0.5}, "stretch = 0.5; it must be a number, 1 or more"),
        ({"weight_decay": -0.1}, "weight_decay = -0.1"),
        ({"final_weight_decay": float("inf")}, "final_weight_decay = inf"),
        ({"betas": (0.9, 1.0)}, r"betas = \(0.9, 1.0\); it must be a tuple of two numbers"),
        ({"betas": (0.9,)}, "betas = "),
        ({"epsilon": 0}, "epsilon = 0; it must be a number above 0"),
        ({"max_norm": 0.0}, "max_norm = 0.0; it must be None or a number above 0"),
        ({"groups": [REST]}, "groups = .*; it must be a tuple of ParameterGroup"),
    ],
)
def test_configs_that_cannot_be_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimizerConfig(**{"learning_rate": 1.0, **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pattern": "("}, r"ParameterGroup.pattern = '\('; it is wrong: missing \)"),
        ({"pattern": None}, "ParameterGroup.pattern = None; it must be a regular expression"),
        ({"learning_rate": -1.0}, "ParameterGroup.learning_rate = -1.0"),
        ({"weight_decay": True}, "ParameterGroup.weight_decay = True"),
    ],
)
def test_groups_that_cannot_be_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ParameterGroup(**{"pattern": ".*", **values})


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            (ParameterGroup(pattern="encoder/blocks_0/attn/query/kernel"), REST),
            "'encoder/blocks_0/attn/query/kernel' matches no parameter; near are "
            "encoder/blocks_0/attention/query/kernel",
        ),
        ((REST, ParameterGroup(pattern="encoder/.*")), "'encoder/.*' matches only what groups bef"),
        (
            (ParameterGroup(pattern="encoder/.*"),),
            r"no pattern matches predictor/.* and [0-9]+ more; end with ParameterGroup",
        ),
        ((freeze_first(1.0, 4), ParameterGroup(pattern="encoder/blocks_3/.*"), REST), "blocks_3"),
    ],
)
def test_groups_that_do_not_fit_are_refused(
    groups: tuple[ParameterGroup, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_optimizer(OptimizerConfig(learning_rate=1.0, groups=groups), random_tree(0), steps=1)


def test_numbers_that_do_not_fit_are_refused() -> None:
    params = {"x": jnp.ones((2,))}
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=11)
    with pytest.raises(ConfigError, match=r"warmup_steps = 11; it must be at most the steps .* 10"):
        make_optimizer(config, params, steps=10)
    with pytest.raises(ConfigError, match="steps = 0; it must be a whole number above 0"):
        make_optimizer(config, params, steps=0)
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="share = "):
            freeze_first(bad, 4)
        with pytest.raises(ConfigError, match="rate = "):
            layer_decay(bad, 4)


def test_division_into_trained_and_frozen_arrays() -> None:
    params = {
        "encoder": {
            "blocks": {"fc1": {"kernel": jnp.ones((2, 3, 3))}},
            "norm": {"scale": jnp.ones(3)},
        },
        "classifier": {"linear": {"kernel": jnp.ones((3, 2))}},
    }
    first = ParameterGroup(pattern="encoder/blocks_0/.*", learning_rate=0.0)
    norm = ParameterGroup(pattern=".*scale|encoder/blocks_0.*", learning_rate=0.0)
    rest = ParameterGroup(pattern=".*", learning_rate=0.5)
    config = OptimizerConfig(learning_rate=0.1, groups=(first, norm, rest))
    trained, frozen, left = divide(config, params)
    assert set(flatten_dict(trained, sep="/")) == {
        "encoder/blocks/fc1/kernel",
        "classifier/linear/kernel",
    }
    assert set(flatten_dict(frozen, sep="/")) == {"encoder/norm/scale"}
    assert left.groups == (first, rest)  # what only frozen arrays are in is gone
    make_optimizer(left, trained, steps=2)
    whole, none, same = divide(OptimizerConfig(learning_rate=0.1), params)
    assert (whole, none, same.groups) == (params, {}, ())
