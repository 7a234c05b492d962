"""Planning with an action-conditioned predictor: the cross-entropy method over action sequences.

Sequences of actions are drawn from a normal distribution, the predictor imagines where each leads,
and the distribution moves to the ones that end nearest to the goal.

Reference: `cem` of Meta's V-JEPA 2-AC (`notebooks/utils/mpc_utils.py`) and its `WorldModel`
(`notebooks/utils/world_model_wrapper.py`); the paper is arXiv:2506.09985, section 4.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jvjepa.errors import ConfigError, InputError
from jvjepa.layers import normalize
from jvjepa.poses import WIDTH, apply_action
from jvjepa.typing import Array

Predict = Callable[[Array, Array, Array], Array]
"""predict(tokens [n, t·S, D], actions [n, t, 7], states [n, t, 7]): what comes after each of the t
frames, [n, t·S, D]; the last S tokens are the next frame."""

_EPSILON = 1e-5
_PLANNED = 4  # Δx, Δy, Δz, Δclosedness; the hand is not turned
_GRIPPER_LIMIT = 0.75
_GRIPPER_STEP = 0.25  # the least that a plan moves the gripper


@dataclasses.dataclass(frozen=True, kw_only=True)
class CEMConfig:
    """How to plan; the defaults are those of Meta's `WorldModel`.

    Args:
        rollout: actions to plan, the horizon h.
        samples: action sequences drawn in each step.
        topk: sequences that the distribution is fitted to, 2 to `samples`.
        steps: times that the distribution is fitted.
        momentum_mean: share of the old mean of Δposition in the new one, 0 to below 1.
        momentum_std: the same of its standard deviation.
        momentum_mean_gripper: the same of the mean of Δclosedness.
        momentum_std_gripper: the same of its standard deviation.
        maxnorm: the largest change of each coordinate in one action, in metres; also the standard
            deviation to begin with.
        close_gripper: the action, counted from 0, from which on Δclosedness is 1. None leaves the
            gripper to the plan.
        chunk: sequences that are predicted at once, a divisor of `samples`. The plan is the same
            and takes less memory. None means all.

    Raises:
        ConfigError: a value is impossible.
    """

    rollout: int = 2
    samples: int = 400
    topk: int = 10
    steps: int = 10
    momentum_mean: float = 0.15
    momentum_std: float = 0.15
    momentum_mean_gripper: float = 0.15
    momentum_std_gripper: float = 0.15
    maxnorm: float = 0.05
    close_gripper: int | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        """Checks every field."""
        for name in ("rollout", "samples", "steps"):
            self._check(name, _at_least(getattr(self, name), 1), "a whole number above 0")
        fits = _at_least(self.topk, 2) and self.topk <= self.samples
        self._check("topk", fits, f"a whole number from 2 to samples = {self.samples}")
        for name in ("mean", "std", "mean_gripper", "std_gripper"):
            share = getattr(self, f"momentum_{name}")
            self._check(f"momentum_{name}", 0.0 <= share < 1.0, "at least 0 and below 1")
        self._check("maxnorm", 0.0 < self.maxnorm < math.inf, "above 0, in metres")
        closes = self.close_gripper is None or _at_least(self.close_gripper, 0)
        self._check("close_gripper", closes, "None, or a whole number from 0")
        chunk = self.samples if self.chunk is None else self.chunk
        divides = _at_least(chunk, 1) and self.samples % chunk == 0
        self._check("chunk", divides, f"None, or a divisor of samples = {self.samples}")

    def _check(self, field: str, ok: bool, right: str) -> None:
        if not ok:
            raise ConfigError(f"{field} = {getattr(self, field)!r}; it must be {right}")


def _at_least(value: object, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


class Rollout(NamedTuple):
    """What a sequence of actions leads to.

    Args:
        tokens: [n, h·S, D], the predicted frames, normalised.
        states: float32 [n, h, 7], the state in each of them.
    """

    tokens: Array
    states: Array


class Plan(NamedTuple):
    """What planning found.

    Args:
        actions: float32 [h, 7]; do the first, look, and plan again. Δposition is NaN if some step
            had fewer than `topk` finite predictions.
        objective: float32 [steps], the mean distance to the goal of the `topk` best sequences of
            each step; for a plot. Infinite from a step on in which fewer than `topk` were finite.
        std: float32 [h, 4], the standard deviation of Δx, Δy, Δz, Δclosedness at the end.
    """

    actions: Array
    objective: Array
    std: Array


def rollout(predict: Predict, tokens: Array, state: Array, actions: Array) -> Rollout:
    """Predicts frame after frame, each from all before, and normalises each as the first.

    Args:
        predict: as in `plan`.
        tokens: [n, S, D], the frame to start from, of `jvjepa.action.encode_frames`.
        state: float [n, 7], the state in it; see `jvjepa.poses`.
        actions: float [n, h, 7].

    Returns:
        The predicted frames and their states.

    Raises:
        InputError: a shape or dtype is wrong, also that of what `predict` returns.
    """
    tokens, state, actions = jnp.asarray(tokens), jnp.asarray(state), jnp.asarray(actions)
    _check("tokens", tokens, ("n", "S", "D"))
    _check("state", state, (tokens.shape[0], WIDTH))
    _check("actions", actions, (tokens.shape[0], "h", WIDTH))
    return _rollout(_as_tree(predict), tokens, state, actions)


def plan(
    predict: Predict, config: CEMConfig, key: Array, tokens: Array, state: Array, goal: Array
) -> Plan:
    """Plans the actions that bring the last predicted frame nearest to a goal.

    Each of `steps` times, fresh noise makes `samples` sequences from a mean (at first 0) and a
    standard deviation (`maxnorm`, 1 of the gripper). They are clipped, Δposition to ±`maxnorm` and
    Δclosedness to ±0.75, and then rolled out, so that only what was clipped is ever chosen. The
    `topk` with the least mean L1 distance of the last frame to the goal give mean and unbiased
    standard deviation, which are mixed with the old ones by the momenta. The plan is the last mean;
    moves of the gripper below 0.25 become 0. It does not turn the hand.

    `jax.vmap` plans for a batch; it works under `jax.jit`.

    Args:
        predict: the world model, see `Predict`; it is traced. Pass parameters in
            `jax.tree_util.Partial(function, params)`: those that a plain function encloses become
            constants of the compiled program, and every new function compiles again.
        config: how to plan; every other config compiles again.
        key: a `jax.random.key`; the same key gives the same plan.
        tokens: [S, D], the frame now, of `jvjepa.action.encode_frames`.
        state: float [7], the state now; see `jvjepa.poses`.
        goal: [S, D], the frame to reach, likewise.

    Returns:
        The plan.

    Raises:
        InputError: a shape or dtype is wrong, also that of what `predict` returns.
    """
    tokens, state, goal = jnp.asarray(tokens), jnp.asarray(state), jnp.asarray(goal)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape != ():
        raise InputError(f"key is {key.dtype} {key.shape}; it must be one jax.random.key(seed)")
    _check("tokens", tokens, ("S", "D"))
    _check("state", state, (WIDTH,))
    _check("goal", goal, tokens.shape)
    return _plan(_as_tree(predict), config, key, tokens, state, goal)


@functools.partial(jax.jit, static_argnames=("config",))
def _plan(
    predict: Predict, config: CEMConfig, key: Array, tokens: Array, state: Array, goal: Array
) -> Plan:
    def distance(actions: Array) -> Array:
        """Of what [n, h, 4] lead to from the goal, [n]."""
        n = actions.shape[0]
        start = jnp.broadcast_to(tokens, (n, *tokens.shape)), jnp.broadcast_to(state, (n, WIDTH))
        last = _rollout(predict, *start, _widened(actions)).tokens[:, -tokens.shape[0] :]
        error = jnp.abs(last.astype(jnp.float32) - goal.astype(jnp.float32)[None])
        mean = jnp.mean(error, axis=(1, 2))
        return jnp.where(jnp.isnan(mean), jnp.inf, mean)

    def fit(carry: tuple[Array, Array], key: Array) -> tuple[tuple[Array, Array], Array]:
        mean, std = carry
        noise = jax.random.normal(key, (config.samples, *mean.shape), jnp.float32)
        actions = _limited(mean[None] + std[None] * noise, config)
        chunks = actions.reshape(-1, config.chunk or config.samples, *mean.shape)
        distances = jax.lax.map(distance, chunks).reshape(-1)
        least, best = jax.lax.top_k(-distances, config.topk)
        objective, chosen = -jnp.mean(least), actions[best]
        # A plan built on predictions that are not finite must not look like one.
        chosen = jnp.where(jnp.isfinite(objective), chosen, jnp.nan)
        mean = _mixed(jnp.mean(chosen, axis=0), mean, momentum_mean)
        std = _mixed(jnp.std(chosen, axis=0, ddof=1), std, momentum_std)
        return (mean, std), objective

    momentum_mean = _each(config.momentum_mean, config.momentum_mean_gripper)
    momentum_std = _each(config.momentum_std, config.momentum_std_gripper)
    first = jnp.zeros((config.rollout, _PLANNED), jnp.float32)
    carry = (first, first + _each(config.maxnorm, 1.0))
    (mean, std), objective = jax.lax.scan(fit, carry, jax.random.split(key, config.steps))
    mean = _limited(mean, config)  # a forced gripper closes fully, whatever the momentum
    gripper = jnp.where(jnp.abs(mean[:, 3:]) < _GRIPPER_STEP, 0.0, mean[:, 3:])
    return Plan(_widened(jnp.concatenate([mean[:, :3], gripper], axis=1)), objective, std)


@jax.jit
def _rollout(predict: Predict, tokens: Array, state: Array, actions: Array) -> Rollout:
    size = tokens.shape[1]
    state, actions = state.astype(jnp.float32), actions.astype(jnp.float32)
    frames, states = tokens, state[:, None]
    for t in range(actions.shape[1]):
        predicted = predict(frames, actions[:, : t + 1], states)
        if predicted.shape != frames.shape:
            raise InputError(f"predict returned {predicted.shape}; it must return {frames.shape}")
        new = normalize(predicted[:, -size:], _EPSILON).astype(tokens.dtype)
        frames = jnp.concatenate([frames, new], axis=1)
        state = apply_action(state, actions[:, t])
        states = jnp.concatenate([states, state[:, None]], axis=1)
    return Rollout(frames[:, size:], states[:, 1:])


def _limited(actions: Array, config: CEMConfig) -> Array:
    """Actions [.., h, 4] clipped, and with the gripper closed where the config says so."""
    limit = _each(config.maxnorm, _GRIPPER_LIMIT).reshape((1,) * (actions.ndim - 1) + (_PLANNED,))
    actions = jnp.clip(actions, -limit, limit)
    if config.close_gripper is None:
        return actions
    return actions.at[..., config.close_gripper :, 3].set(1.0)


def _widened(actions: Array) -> Array:
    """Actions [.., 4] as [.., 7], without rotation."""
    turn = jnp.zeros_like(actions[..., :3])
    return jnp.concatenate([actions[..., :3], turn, actions[..., 3:]], axis=-1)


def _mixed(new: Array, old: Array, momentum: np.ndarray) -> Array:
    return new * (1.0 - momentum) + old * momentum


def _each(position: float, gripper: float) -> np.ndarray:
    """One number for each coordinate and one for the gripper, [1, 4]."""
    return np.asarray([[position, position, position, gripper]], np.float32)


def _as_tree(predict: Predict) -> Predict:
    """As a pytree, whose arrays are arguments of the compiled program."""
    return predict if isinstance(predict, jax.tree_util.Partial) else jax.tree_util.Partial(predict)


def _check(name: str, value: Array, shape: tuple[int | str, ...]) -> None:
    """Raises InputError unless the value is float of this shape; letters are any size above 0."""
    fits = len(value.shape) == len(shape) and all(
        size > 0 if isinstance(right, str) else size == right
        for size, right in zip(value.shape, shape, strict=True)
    )
    if not fits or not jnp.issubdtype(value.dtype, jnp.floating):
        right = ", ".join(map(str, shape))
        raise InputError(f"{name} is {value.dtype} {value.shape}; it must be float [{right}]")
