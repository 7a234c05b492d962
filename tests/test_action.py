import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import official
import pytest
import torch
from flax.traverse_util import flatten_dict
from jax.tree_util import Partial
from models import random_video, relative_error, tiny_model
from torch.nn import functional

from jvjepa import registry
from jvjepa.action import ActionPredictor, encode_frames
from jvjepa.config import ModelConfig
from jvjepa.errors import ConfigError, InputError
from jvjepa.layers import normalize
from jvjepa.parameters import parameter_shapes, unstack_layers
from jvjepa.planning import CEMConfig, plan, rollout
from jvjepa.typing import Array, Params

TOLERANCE = 1e-5
GRID = (4, 4)

# Nearly all of the time of these tests goes into compiling.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.partial(compiled, static_argnames=("predictor", "grid"))
def predict(
    predictor: ActionPredictor,
    params: Params,
    tokens: Array,
    actions: Array,
    states: Array,
    grid: tuple[int, int] = GRID,
) -> Array:
    """A call as one program."""
    return predictor.apply({"params": params}, tokens, actions, states, grid)


@functools.cache
def golden() -> tuple[ActionPredictor, Params, list[np.ndarray], np.ndarray]:
    """The predictor, its parameters, (tokens, actions, states) and what comes of them."""
    params = official.action_predictor(official.weights("vjepa2_ac_tiny.pt", "predictor"))
    params = jax.tree.map(np.asarray, params)
    data = official.data("vjepa2_tiny")
    inputs = [data[f"ac.in.{name}"] for name in ("tokens", "actions", "states")]
    return (
        ActionPredictor(official.V2.action_predictor, official.V2.encoder),
        params,
        inputs,
        data["ac.out"],
    )


@pytest.mark.parametrize(
    "config", [official.V2, registry.get("vjepa2_ac_vit_giant").config], ids=["tiny", "released"]
)
def test_parameters_are_the_listed_ones(config: ModelConfig) -> None:
    predictor = ActionPredictor(config.action_predictor, config.encoder)
    shapes = [(1, 32, config.encoder.hidden_size), (1, 2, 7), (1, 2, 7)]
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    init = functools.partial(predictor.init, grid=GRID)
    variables = jax.eval_shape(init, jax.random.key(0), *inputs)
    found = flatten_dict({"action_predictor": variables["params"]}, sep="/")
    listed = parameter_shapes(config)
    assert {name: leaf.shape for name, leaf in found.items()} == {
        name: shape for name, shape in listed.items() if name.startswith("action_predictor/")
    }


def test_parity_with_meta() -> None:
    predictor, params, inputs, expected = golden()
    assert relative_error(predict(predictor, params, *inputs), expected) <= TOLERANCE


@pytest.mark.parametrize("changed", [{"rope": "interleaved"}, {"crop_size": 128}])
def test_another_rope_or_grid_fails_parity(changed: dict[str, str | int]) -> None:
    predictor, params, inputs, expected = golden()
    encoder = dataclasses.replace(predictor.encoder, **changed)
    out = predict(ActionPredictor(predictor.config, encoder), params, *inputs)
    assert relative_error(out, expected) > 1e-3


# Meta's predictor written down once more, in torch and float64: frame by frame, without a mask.


class Reference:
    def __init__(self, predictor: ActionPredictor, params: Params) -> None:
        self.config, self.encoder = predictor.config, predictor.encoder
        self.params = jax.tree.map(
            lambda x: torch.from_numpy(np.array(x, np.float64)), unstack_layers(params)
        )

    def __call__(self, inputs: list[Array], grid: tuple[int, int]) -> torch.Tensor:
        """Takes one clip, [t·S, D], [t, 7] and [t, 7], to [t·S, D]."""
        p = self.params
        tokens, actions, states = (torch.from_numpy(np.array(x, np.float64)) for x in inputs)
        seen: list[list[list[torch.Tensor]]] = [[] for _ in range(self.config.num_layers)]
        outputs = []
        for t, patches in enumerate(tokens.split(grid[0] * grid[1])):
            conditions = [
                _dense(actions[t : t + 1], p["action"]),
                _dense(states[t : t + 1], p["state"]),
            ]
            x = torch.cat([*conditions, _dense(patches, p["embed"])])
            for layer, kept in enumerate(seen):
                x = self._block(x, p[f"blocks_{layer}"], t, grid, kept)
            outputs.append(_dense(self._norm(x[2:], p["norm"]), p["proj"]))
        return torch.cat(outputs)

    def _block(
        self, x: torch.Tensor, p: Params, t: int, grid: tuple[int, int], kept: list
    ) -> torch.Tensor:
        y = self._norm(x, p["norm1"])
        q, k, v = (
            self._heads(_dense(y, p["attention"][name])) for name in ("query", "key", "value")
        )
        kept.append([self._rotate(k, t, grid), v])
        keys, values = (torch.cat(part, dim=1) for part in zip(*kept, strict=True))
        out = functional.scaled_dot_product_attention(self._rotate(q, t, grid), keys, values)
        x = x + _dense(out.transpose(0, 1).flatten(1), p["attention"]["proj"])
        y = functional.gelu(_dense(self._norm(x, p["norm2"]), p["mlp"]["fc1"]))
        return x + _dense(y, p["mlp"]["fc2"])

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.config.num_heads, -1)).transpose(0, 1)  # [H, 2+S, K]

    def _norm(self, x: torch.Tensor, p: Params) -> torch.Tensor:
        eps = self.config.layer_norm_eps
        return functional.layer_norm(x, x.shape[-1:], p["scale"], p["bias"], eps)

    def _rotate(self, x: torch.Tensor, t: int, grid: tuple[int, int]) -> torch.Tensor:
        side = self.encoder.crop_size / self.encoder.patch_size
        places = [(t, 0.0, 0.0)] * 2 + [
            (t, row * side / grid[0], column * side / grid[1])
            for row in range(grid[0])
            for column in range(grid[1])
        ]
        axis = 2 * (x.shape[-1] // 3 // 2)
        out = x.clone()
        for token, place in enumerate(places):
            for channel in range(3 * axis):
                i = channel % axis
                k = i % (axis // 2) if self.encoder.rope == "tiled" else i // 2
                angle = place[channel // axis] * 10000.0 ** (-k / (axis / 2))
                here = x[:, token, channel]
                partner = -x[:, token, channel + 1] if i % 2 == 0 else x[:, token, channel - 1]
                out[:, token, channel] = here * math.cos(angle) + partner * math.sin(angle)
        return out


def _dense(x: torch.Tensor, p: Params) -> torch.Tensor:
    return x @ p["kernel"] + p["bias"]


def random_inputs(frames: int, tokens_per_frame: int) -> list[np.ndarray]:
    """Tokens, actions and states of 2 clips."""
    rng = np.random.default_rng(0)
    shapes = [(2, frames * tokens_per_frame, 32), (2, frames, 7), (2, frames, 7)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize(
    ("frames", "grid", "rope"),
    [(4, (3, 5), "tiled"), (2, (7, 1), "interleaved"), (1, (1, 6), "tiled")],
)
def test_parity_with_the_reference_on_other_grids(
    frames: int, grid: tuple[int, int], rope: str
) -> None:
    predictor, params, *_ = golden()
    encoder = dataclasses.replace(predictor.encoder, rope=rope)
    predictor = ActionPredictor(predictor.config, encoder)
    inputs = random_inputs(frames, grid[0] * grid[1])
    out = predict(predictor, params, *inputs, grid)
    reference = Reference(predictor, params)
    expected = torch.stack([reference([x[clip] for x in inputs], grid) for clip in range(2)])
    assert relative_error(out, expected) <= TOLERANCE


def test_the_reference_agrees_with_meta() -> None:
    predictor, params, inputs, expected = golden()
    reference = Reference(predictor, params)
    out = torch.stack([reference([x[clip] for x in inputs], GRID) for clip in range(2)])
    assert relative_error(out, expected) <= TOLERANCE


@pytest.mark.parametrize("attention", ["xla", "chunked"])
def test_the_future_does_not_change_the_past(attention: str) -> None:
    predictor, params, *_ = golden()
    predictor = ActionPredictor(predictor.config, predictor.encoder, attention=attention)
    inputs = random_inputs(4, 16)
    out = predict(predictor, params, *inputs)
    for which, unit in enumerate((16, 1, 1)):
        for t in range(4):
            changed = [x.copy() for x in inputs]
            changed[which][1, t * unit] += 10.0
            other = predict(predictor, params, *changed)
            same = (np.asarray(other) == np.asarray(out)).reshape(2, 64, 32)
            assert same[0].all()  # the other clip
            assert same[1, : 16 * t].all()
            assert not same[1, 16 * t :].all(axis=-1).any()  # every token of every later frame


def test_a_clip_that_goes_on_keeps_its_predictions() -> None:
    predictor, params, *_ = golden()
    tokens, actions, states = random_inputs(4, 16)
    out = predict(predictor, params, tokens, actions, states)
    begun = predict(predictor, params, tokens[:, :32], actions[:, :2], states[:, :2])
    assert relative_error(begun, out[:, :32]) <= TOLERANCE


def test_scanned_and_unrolled_layers_agree() -> None:
    predictor, params, inputs, expected = golden()
    unrolled = ActionPredictor(predictor.config, predictor.encoder, scan=False)
    out = predict(unrolled, unstack_layers(params), *inputs)
    assert relative_error(out, expected) <= TOLERANCE


def test_bfloat16_is_close_to_float32_and_stays_bfloat16() -> None:
    predictor, params, inputs, expected = golden()
    half = ActionPredictor(predictor.config, predictor.encoder, dtype=jnp.bfloat16)
    out = predict(half, params, *inputs)
    assert out.dtype == jnp.bfloat16
    assert relative_error(out, expected) <= 0.05  # 8 bits of mantissa


def test_the_second_call_compiles_nothing(compilations: Callable[[], int]) -> None:
    predictor, params, *_ = golden()
    first, second = random_inputs(4, 16), [x + 1.0 for x in random_inputs(4, 16)]
    a = predict(predictor, params, *first)
    before = compilations()
    b = predict(predictor, params, *second)
    assert compilations() == before
    assert relative_error(a, b) > 1e-3


def test_a_long_clip_puts_no_mask_into_the_program() -> None:
    predictor, params, *_ = golden()
    encoder = dataclasses.replace(predictor.encoder, crop_size=256)
    predictor = ActionPredictor(predictor.config, encoder)
    shapes = [(1, 32 * 256, 32), (1, 32, 7), (1, 32, 7)]
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    traced = predict.trace(predictor, params, *inputs, grid=(16, 16))
    assert len(traced.lower().as_text()) < 1e6  # as a constant it would be 68 MB


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"actions": np.zeros((2, 3, 6))}, r"actions is \[2, 3, 6\]; .* \[2, 3, 7\]: 7 numbers"),
        ({"states": np.zeros((2, 3, 8))}, r"states is \[2, 3, 8\]; .* \[2, 3, 7\]: 7 numbers"),
        ({"actions": np.zeros((2, 4, 7))}, r"actions is \[2, 4, 7\]; it must be \[2, 3, 7\]"),
        ({"states": np.zeros((1, 3, 7))}, r"states is \[1, 3, 7\]; it must be \[2, 3, 7\]"),
        ({"actions": np.zeros((2, 7))}, r"actions is float64 \[2, 7\]; .* float \[B, t, 7\]"),
        ({"states": np.zeros((2, 3, 7), int)}, r"states is int64 .* float \[B, t, 7\]"),
        ({"tokens": np.zeros((48, 32))}, r"tokens is float64 \[48, 32\]; .* \[B, t·S, D\]"),
        ({"tokens": np.zeros((2, 48, 64))}, "tokens has 64 channels; .* takes 32, .*mixed parts"),
        (
            {"tokens": np.zeros((2, 50, 32))},
            "tokens has 50 tokens a clip; .* multiple of 16, what a frame of 4 by 4 has",
        ),
        ({"tokens": np.zeros((2, 0, 32))}, "tokens has 0 tokens a clip; .* multiple of 16"),
        ({"grid": (4, 0)}, r"grid = \(4, 0\); it must be \(rows, columns\)"),
        ({"grid": (4, 4.0)}, r"grid = \(4, 4.0\); it must be \(rows, columns\)"),
        ({"grid": (3, 4, 4)}, r"grid = \(3, 4, 4\); it must be \(rows, columns\)"),
    ],
)
def test_wrong_arguments_are_refused(changed: dict, message: str) -> None:
    predictor, params, inputs, _ = golden()
    right = dict(zip(("tokens", "actions", "states"), inputs, strict=True))
    with pytest.raises(InputError, match=message):
        predictor.apply({"params": params}, **{**right, "grid": GRID, **changed})


def test_an_unknown_backend_is_refused() -> None:
    predictor, params, inputs, _ = golden()
    other = ActionPredictor(predictor.config, predictor.encoder, attention="flash")
    with pytest.raises(ConfigError, match="attention = 'flash'"):
        other.apply({"params": params}, *inputs, GRID)


def test_frames_are_encoded_each_on_its_own() -> None:
    encoder, params = tiny_model(num_layers=2)
    frames = random_video(2, 3, 32, 48)
    encode = compiled(functools.partial(encode_frames, encoder))
    tokens = encode(params, frames)
    assert tokens.shape == (2, 3 * 6, 48)
    assert tokens.dtype == jnp.float32
    by_hand = compiled(lambda clip: encoder.apply({"params": params}, clip))
    for t in range(3):
        twice = np.repeat(frames[:, t : t + 1], 2, axis=1)
        expected = functional.layer_norm(torch.from_numpy(np.array(by_hand(twice))), (48,))
        assert relative_error(np.asarray(tokens)[:, 6 * t : 6 * t + 6], expected) <= TOLERANCE


def test_frames_that_cannot_be_encoded_are_refused() -> None:
    encoder, params = tiny_model(num_layers=1)
    for shape, message in (
        ((3, 32, 32, 3), r"frames has shape \[3, 32, 32, 3\]; it must be \[B, t, H, W, 3\]"),
        ((1, 3, 3, 32, 32), "channels-first"),
        ((1, 3, 30, 32, 3), "H = 30; take a multiple of 16: 16 or 32"),
    ):
        with pytest.raises(InputError, match=message):
            encode_frames(encoder, params, np.zeros(shape, np.float32))


def test_planning_finds_the_action_that_was_hidden() -> None:
    """The predictor as a world model: what it imagines of an action, planning gives back."""
    predictor, params, _, _ = golden()
    predict = Partial(functools.partial(predictor.apply, grid=GRID), {"params": params})
    rng = np.random.default_rng(0)
    tokens = normalize(jnp.asarray(rng.normal(size=(16, 32)), jnp.float32), 1e-5)
    state = jnp.asarray([0.4, 0.0, 0.3, 3.0, 0.1, -1.0, 0.5], jnp.float32)
    hidden = np.zeros((1, 1, 7), np.float32)
    hidden[..., [0, 1, 2, 6]] = 0.03, -0.04, 0.02, 0.6
    goal = rollout(predict, tokens[None], state[None], hidden).tokens[0]
    config = CEMConfig(rollout=1, samples=100, steps=8)
    found = plan(predict, config, jax.random.key(0), tokens, state, goal)
    # 100 samples narrowed 8 times: near, and not equal
    np.testing.assert_allclose(found.actions, hidden[0], atol=5e-3)
    assert found.objective[-1] < found.objective[0] / 10
