from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from models import relative_error
from scipy.spatial.transform import Rotation

from jvjepa.errors import ConfigError, InputError
from jvjepa.layers import normalize
from jvjepa.planning import CEMConfig, Plan, plan, rollout

TOLERANCE = 1e-5
TOKENS, CHANNELS = 3, 5  # of one frame; a token is [x, -x, 1, -1], x of `CHANNELS`
PLANNED = np.asarray([0, 1, 2, 6])
STATE = np.asarray([0.1, -0.2, 0.3, 3.0, 0.4, -2.0, 0.2], np.float32)
FAST = {"samples": 64, "topk": 8, "steps": 5}


def _weights(seed: int = 0) -> np.ndarray:
    """How a change of a state shows in each token: [7, S, C]."""
    return np.random.default_rng(seed).normal(size=(7, TOKENS, CHANNELS)).astype(np.float32)


def _as_tokens(x: jax.Array) -> jax.Array:
    """[.., C] as tokens [.., 2C+2] of mean 0, whose scale the last two channels tell."""
    one = jnp.ones_like(x[..., :1])
    return jnp.concatenate([x, -x, one, -one], axis=-1)


def _frame(position: np.ndarray, weights: np.ndarray) -> jax.Array:
    """The normalised tokens [S, D] of what differs by `position` [7] from the origin."""
    x = jnp.einsum("i,isc->sc", np.asarray(position, np.float32), weights)
    return normalize(_as_tokens(x), 1e-5)


def _linear(
    weights: jax.Array, tokens: jax.Array, actions: jax.Array, states: jax.Array
) -> jax.Array:
    """A world in which an action adds to its frame, whatever the state."""
    frames = tokens.reshape(*actions.shape[:2], TOKENS, 2 * CHANNELS + 2)
    x = frames[..., :CHANNELS] / frames[..., -2:-1]  # undoes the normalisation
    x = x + jnp.einsum("nti,isc->ntsc", actions.astype(x.dtype), weights.astype(x.dtype))
    return _as_tokens(x).reshape(tokens.shape)


def _world(seed: int = 0) -> Partial:
    return Partial(_linear, jnp.asarray(_weights(seed)))


def _task(optimum: list[float], seed: int = 0) -> tuple[jax.Array, np.ndarray, jax.Array]:
    """Tokens, state and goal such that actions with the sum `optimum` [4] reach the goal."""
    change = np.zeros(7)
    change[PLANNED] = optimum
    start = np.asarray([0.3, 0.1, -0.2, 0, 0, 0, 0.1])
    weights = _weights(seed)
    return _frame(start, weights), STATE, _frame(start + change, weights)


def _entangled(
    weights: jax.Array, tokens: jax.Array, actions: jax.Array, states: jax.Array
) -> jax.Array:
    """A world in which all frames before, the action and the whole state matter.

    Its tokens are so small that the epsilon of their normalisation matters as well.
    """
    frames = tokens.reshape(*actions.shape[:2], TOKENS, -1)
    causes = jnp.concatenate([actions, states], axis=-1)
    out = jnp.cumsum(frames, axis=1) + jnp.sin(jnp.einsum("nti,isd->ntsd", causes, weights))
    return 0.05 * out.reshape(tokens.shape)


def _entangled_task(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights [14, S, D], and tokens and goal [S, D]."""
    rng = np.random.default_rng(seed)
    shapes = ((14, TOKENS, 6), (TOKENS, 6), (TOKENS, 6))
    weights, tokens, goal = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return weights, tokens, goal


def _reference_rollout(
    weights: np.ndarray, tokens: np.ndarray, state: np.ndarray, actions: np.ndarray
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The entangled world in float64 NumPy and SciPy, for one sequence [h, 7]."""
    frames, states = [tokens.astype(np.float64)], [state.astype(np.float64)]
    for action in actions.astype(np.float64):
        causes = np.concatenate([action, states[-1]])
        x = 0.05 * (sum(frames) + np.sin(np.einsum("i,isd->sd", causes, weights)))
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        frames.append((x - mean) / np.sqrt(variance + 1e-5))
        turned = [Rotation.from_euler("xyz", x[3:6]) for x in (action, states[-1])]
        states.append(
            np.concatenate(
                [
                    states[-1][:3] + action[:3],
                    (turned[0] * turned[1]).as_euler("xyz"),
                    np.clip(states[-1][6:] + action[6:], 0, 1),
                ]
            )
        )
    return frames[1:], states[1:]


def _reference_plan(config: CEMConfig, key: jax.Array, task: tuple[np.ndarray, ...]) -> Plan:
    """The cross-entropy method in float64 NumPy, sequence by sequence, with the same noise."""
    weights, tokens, goal = task
    limit = np.asarray([config.maxnorm] * 3 + [0.75])
    mean = np.zeros((config.rollout, 4))
    std = np.tile([config.maxnorm] * 3 + [1.0], (config.rollout, 1))
    keep_mean = np.asarray([config.momentum_mean] * 3 + [config.momentum_mean_gripper])
    keep_std = np.asarray([config.momentum_std] * 3 + [config.momentum_std_gripper])
    forced = config.rollout if config.close_gripper is None else config.close_gripper
    objective = []
    for step_key in jax.random.split(key, config.steps):
        noise = np.asarray(jax.random.normal(step_key, (config.samples, config.rollout, 4)))
        drawn = np.clip(mean + noise * std, -limit, limit)
        drawn[:, forced:, 3] = 1.0
        distances = []
        for actions in drawn:
            wide = np.zeros((config.rollout, 7))
            wide[:, PLANNED] = actions
            frames, _ = _reference_rollout(weights, tokens, STATE, wide)
            distances.append(np.abs(frames[-1] - goal).mean())
        order = np.argsort(distances)
        ranked = np.asarray(distances)[order]
        assert ranked[config.topk] - ranked[config.topk - 1] > 1e-6  # no tie that rounding decides
        best = drawn[order[: config.topk]]
        objective.append(ranked[: config.topk].mean())
        mean = best.mean(0) * (1 - keep_mean) + mean * keep_mean
        spread = np.sqrt(((best - best.mean(0)) ** 2).sum(0) / (config.topk - 1))
        std = spread * (1 - keep_std) + std * keep_std
    mean[np.abs(mean[:, 3]) < 0.25, 3] = 0.0
    mean[forced:, 3] = 1.0
    actions = np.zeros((config.rollout, 7))
    actions[:, PLANNED] = mean
    return Plan(actions, np.asarray(objective), std)


@pytest.mark.parametrize("seed", range(4))
def test_one_action_is_found(seed: int) -> None:
    optimum = [0.03, -0.02, 0.045, 0.5]
    found = plan(_world(seed), CEMConfig(rollout=1), jax.random.key(seed), *_task(optimum, seed))
    assert found.actions.shape == (1, 7)
    assert found.actions.dtype == jnp.float32
    assert np.abs(found.actions[0, PLANNED] - np.float32(optimum)).max() < 1e-4
    assert found.std.max() < 1e-3


@pytest.mark.parametrize("seed", range(4))
def test_two_actions_are_found(seed: int) -> None:
    optimum = [0.06, -0.03, 0.08, 1.2]  # beyond what one action may do
    found = plan(_world(seed), CEMConfig(), jax.random.key(seed), *_task(optimum, seed))
    assert found.actions.shape == (2, 7)
    assert np.array_equal(found.actions[:, 3:6], np.zeros((2, 3)))
    error = np.abs(jnp.sum(found.actions, axis=0)[PLANNED] - np.float32(optimum))
    assert error[:3].max() < 0.002  # 2 mm, of 10 cm that two actions can do
    assert error[3] < 0.01
    assert found.objective[-1] < found.objective[0] / 10


def test_it_beats_random_shooting_with_the_same_budget() -> None:
    config, task = CEMConfig(), _task([0.06, -0.03, 0.08, 1.2])
    tokens, state, goal = task
    budget = config.samples * config.steps
    rng = np.random.default_rng(0)
    drawn = np.zeros((budget, 2, 7), np.float32)
    drawn[..., :3] = rng.uniform(-config.maxnorm, config.maxnorm, (budget, 2, 3))
    drawn[..., 6] = rng.uniform(-0.75, 0.75, (budget, 2))

    def distances(actions: np.ndarray) -> jax.Array:
        n = len(actions)
        start = (np.tile(x, (n,) + (1,) * x.ndim) for x in (np.asarray(tokens), state))
        last = rollout(_world(), *start, actions).tokens[:, -TOKENS:]
        return jnp.mean(jnp.abs(last - goal[None]), axis=(1, 2))

    for seed in range(3):
        found = plan(_world(), config, jax.random.key(seed), *task)
        assert distances(found.actions[None])[0] < distances(drawn).min() / 5


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rollout": 1, "topk": 2, "momentum_mean_gripper": 0.6, "maxnorm": 0.5},
        {"rollout": 3, "momentum_mean": 0.5, "momentum_std": 0.75, "close_gripper": 2, "chunk": 8},
    ],
    ids=str,
)
def test_every_step_is_that_of_the_reference(options: dict) -> None:
    config = CEMConfig(**{"samples": 32, "topk": 6, "steps": 4, **options})
    weights, tokens, goal = task = _entangled_task()
    key = jax.random.key(3)
    found = plan(Partial(_entangled, jnp.asarray(weights)), config, key, tokens, STATE, goal)
    expected = _reference_plan(config, key, task)
    for value, reference in zip(found, expected, strict=True):
        assert relative_error(value, reference) <= TOLERANCE
    assert relative_error(found.actions[:, :3], expected.actions[:, :3]) <= TOLERANCE
    assert relative_error(found.std[:, :3], expected.std[:, :3]) <= TOLERANCE


def test_the_same_key_gives_the_same_plan() -> None:
    config, task = CEMConfig(**FAST), _task([0.03, -0.02, 0.04, 0.5])
    plans = [plan(_world(), config, jax.random.key(seed), *task) for seed in (0, 0, 1)]
    for first, same, other in zip(*plans, strict=True):
        assert np.array_equal(first, same)
        assert not np.array_equal(first, other)


def test_chunks_give_the_same_plan_in_less_memory() -> None:
    task = _task([0.03, -0.02, 0.04, 0.5])
    plans, memory = [], []
    for chunk in (None, 8):
        how = CEMConfig(**{**FAST, "steps": 2, "chunk": chunk})
        compiled = jax.jit(plan, static_argnums=1).lower(_world(), how, jax.random.key(0), *task)
        compiled = compiled.compile()
        memory.append(compiled.memory_analysis().temp_size_in_bytes)
        plans.append(compiled(_world(), jax.random.key(0), *task))
    assert memory[1] < memory[0] / 2
    for whole, chunked in zip(*plans, strict=True):
        assert relative_error(chunked, whole) <= TOLERANCE


def test_the_predictor_sees_only_allowed_actions() -> None:
    seen = []

    def watch(actions: np.ndarray, states: np.ndarray) -> None:
        seen.append((np.asarray(actions), np.asarray(states)))

    def predict(tokens: jax.Array, actions: jax.Array, states: jax.Array) -> jax.Array:
        jax.debug.callback(watch, actions, states)
        return _linear(jnp.asarray(_weights()), tokens, actions, states)

    config = CEMConfig(samples=64, topk=8, steps=3, close_gripper=1)
    plan(predict, config, jax.random.key(0), *_task([0.2, -0.2, 0.2, -2.0]))
    jax.effects_barrier()
    assert sorted(actions.shape[1] for actions, _ in seen) == [1] * 3 + [2] * 3
    for actions, states in seen:
        assert actions.shape == states.shape == (64, actions.shape[1], 7)
        assert np.abs(actions[..., :3]).max() == np.float32(config.maxnorm)  # reached, not passed
        assert np.array_equal(actions[..., 3:6], np.zeros_like(actions[..., 3:6]))
        assert np.abs(actions[:, 0, 6]).max() == 0.75
        assert np.array_equal(states[:, 0], np.tile(STATE, (64, 1)))
    for actions, states in seen:
        if actions.shape[1] == 2:
            assert (actions[:, 1, 6] == 1.0).all()
            moved = states[:, 0, PLANNED] + actions[:, 0, PLANNED]
            moved[:, 3] = moved[:, 3].clip(0, 1)
            assert np.allclose(states[:, 1, PLANNED], moved, atol=1e-6)


def test_what_is_out_of_reach_is_approached_at_the_limits() -> None:
    weights = np.zeros((7, TOKENS, CHANNELS), np.float32)
    weights[PLANNED, :, np.arange(4)] = 1.0  # each coordinate has a channel, so none stands in
    goal = _frame(np.asarray([0.2, -0.2, 0.2, 0, 0, 0, 2.0]), weights)
    task = _frame(np.zeros(7), weights), STATE, goal
    world = Partial(_linear, jnp.asarray(weights))
    found = plan(world, CEMConfig(), jax.random.key(0), *task).actions[:, PLANNED]
    limits = np.tile(np.float32([0.05, -0.05, 0.05, 0.75]), (2, 1))
    assert np.abs(found - limits).max() < 1e-4
    assert (np.abs(found) <= np.abs(limits)).all()


@pytest.mark.parametrize(("change", "moves"), [(0.2, False), (-0.2, False), (0.3, True)])
def test_small_moves_of_the_gripper_are_dropped(change: float, moves: bool) -> None:
    task = _task([0.01, 0, 0, change])
    gripper = plan(_world(), CEMConfig(rollout=1), jax.random.key(0), *task).actions[0, 6]
    if moves:
        assert abs(gripper - np.float32(change)) < 1e-4
    else:
        assert gripper == 0.0


def test_the_gripper_closes_when_told() -> None:
    task, key = _task([0.03, -0.02, 0.04, -0.5]), jax.random.key(0)

    def gripper(close_gripper: int | None, steps: int = 5) -> list[float]:
        config = CEMConfig(**{**FAST, "steps": steps, "close_gripper": close_gripper})
        return plan(_world(), config, key, *task).actions[:, 6].tolist()

    assert gripper(0, steps=1) == [1.0, 1.0]  # whatever the momentum
    first, second = gripper(1)
    assert first < 0.0
    assert second == 1.0
    assert gripper(2) == gripper(None)  # after the horizon


def test_only_the_first_call_compiles(compilations: Callable[[], int]) -> None:
    config = CEMConfig(**FAST)
    tasks = [_task([0.01 * i, 0, 0, 0.5], seed=i) for i in range(3)]
    keys = [jax.random.key(i) for i in range(3)]
    worlds = [_world(i) for i in range(3)]
    objectives = []
    for i in range(3):  # another world, key, state and goal
        found = plan(worlds[i], config, keys[i], tasks[i][0], tasks[i][1] + i / 8, tasks[i][2])
        objectives.append(np.asarray(found.objective)[-1])
        if i == 0:
            compiled = compilations()
    assert compilations() == compiled
    assert len(set(objectives)) == 3


def test_a_plain_function_is_compiled_once(compilations: Callable[[], int]) -> None:
    weights = jnp.asarray(_weights())

    def predict(tokens: jax.Array, actions: jax.Array, states: jax.Array) -> jax.Array:
        return _linear(weights, tokens, actions, states)

    config, key, task = CEMConfig(**FAST), jax.random.key(0), _task([0.03, 0, 0, 0.5])
    found = plan(predict, config, key, *task)
    compiled = compilations()
    again = plan(predict, config, key, *task)
    assert compilations() == compiled
    assert np.array_equal(found.actions, again.actions)
    assert relative_error(found.actions, plan(_world(), config, key, *task).actions) <= TOLERANCE


def test_a_batch_is_planned_by_vmap() -> None:
    config, world = CEMConfig(**FAST), _world()
    keys = jax.random.split(jax.random.key(5), 3)
    tasks = [_task([0.01 * i, -0.02, 0.03, 0.4 * i]) for i in range(3)]
    tokens, states, goals = (np.stack(parts) for parts in zip(*tasks, strict=True))
    states = states + np.arange(3, dtype=np.float32)[:, None] / 8
    batch = jax.vmap(lambda *one: plan(world, config, *one))(keys, tokens, states, goals)
    assert batch.actions.shape == (3, 2, 7)
    for i in range(3):
        one = plan(world, config, keys[i], tokens[i], states[i], goals[i])
        for value, reference in zip(batch, one, strict=True):
            assert relative_error(value[i], reference) <= TOLERANCE


def test_it_works_under_jit_with_traced_parameters() -> None:
    config, key, task = CEMConfig(**FAST), jax.random.key(0), _task([0.03, -0.02, 0.04, 0.5])

    @jax.jit
    def traced(weights: jax.Array, tokens: jax.Array, state: jax.Array, goal: jax.Array) -> Plan:
        def predict(*seen: jax.Array) -> jax.Array:
            return _linear(weights, *seen)

        return plan(predict, config, key, tokens, state, goal)

    for seed in range(2):
        found = traced(_weights(seed), *task)
        expected = plan(_world(seed), config, key, *task)
        assert relative_error(found.actions, expected.actions) <= TOLERANCE


def test_predictions_that_are_not_finite_are_never_chosen() -> None:
    def predict(tokens: jax.Array, actions: jax.Array, states: jax.Array) -> jax.Array:
        out = _linear(jnp.asarray(_weights()), tokens, actions, states)
        return jnp.where(actions[:, -1:, :1] > 0.01, jnp.nan, out)

    task, key = _task([0.03, -0.02, 0.04, 0.5]), jax.random.key(0)
    found = plan(predict, CEMConfig(rollout=1), key, *task)
    assert np.isfinite(found.actions).all()
    assert np.isfinite(found.objective).all()
    assert 0.005 < found.actions[0, 0] <= 0.01


@pytest.mark.parametrize("bad", ["world", "state", "tokens", "goal"])
def test_a_plan_without_finite_predictions_is_nan(bad: str) -> None:
    tokens, state, goal = _task([0.03, -0.02, 0.04, 0.5])
    weights, tokens, goal = _weights(), np.array(tokens), np.array(goal)
    if bad == "state":  # seen by this world only
        weights, tokens, goal = _entangled_task()
    state = np.array(state)
    {"world": weights, "state": state, "tokens": tokens, "goal": goal}[bad][0] = np.nan
    world = Partial(_entangled if bad == "state" else _linear, jnp.asarray(weights))
    found = plan(world, CEMConfig(**FAST), jax.random.key(0), tokens, state, goal)
    assert np.isnan(found.actions[:, [0, 1, 2, 6]]).all()
    assert np.isinf(found.objective).all()


def test_bfloat16_tokens() -> None:
    seen = []

    def predict(tokens: jax.Array, actions: jax.Array, states: jax.Array) -> jax.Array:
        seen.append((tokens.dtype, actions.dtype, states.dtype))
        return _linear(jnp.asarray(_weights()), tokens, actions, states)

    tokens, state, goal = _task([0.06, -0.03, 0.08, 1.2])
    tokens, goal = (x.astype(jnp.bfloat16) for x in (tokens, goal))
    found = plan(predict, CEMConfig(), jax.random.key(0), tokens, state, goal)
    assert set(seen) == {(jnp.bfloat16.dtype, jnp.float32.dtype, jnp.float32.dtype)}
    assert found.actions.dtype == found.objective.dtype == jnp.float32
    total = jnp.sum(found.actions, axis=0)[PLANNED]
    assert np.abs(total - np.float32([0.06, -0.03, 0.08, 1.2])).max() < 0.03  # 8 bits of mantissa


def test_rollout_is_that_of_the_reference() -> None:
    weights, tokens, _ = _entangled_task()
    rng = np.random.default_rng(1)
    tokens = np.stack([tokens, -tokens])
    states = np.stack([STATE, rng.uniform(-1, 1, 7).astype(np.float32)])
    actions = rng.uniform(-1, 1, (2, 4, 7)).astype(np.float32)
    out = rollout(Partial(_entangled, jnp.asarray(weights)), tokens, states, actions)
    assert out.tokens.shape == (2, 4 * TOKENS, 6)
    assert out.states.shape == (2, 4, 7)
    for n in range(2):
        frames, reached = _reference_rollout(weights, tokens[n], states[n], actions[n])
        assert relative_error(out.tokens[n], np.concatenate(frames)) <= TOLERANCE
        assert relative_error(out.states[n], np.stack(reached)) <= TOLERANCE


def test_rollout_has_gradients_that_lead_to_the_goal() -> None:
    tokens, state, goal = _task([0.03, -0.02, 0.04, 0.5])

    def distance(actions: jax.Array) -> jax.Array:
        last = rollout(_world(), tokens[None], state[None], actions[None]).tokens[0, -TOKENS:]
        return jnp.sum(jnp.square(last - goal))

    actions, slope = jnp.zeros((2, 7)), jax.jit(jax.grad(distance))
    start = distance(actions)
    for _ in range(50):
        actions = actions - 1e-3 * slope(actions)
    assert distance(actions) < start / 10


def test_defaults_are_metas() -> None:
    assert vars(CEMConfig()) == {
        "rollout": 2,
        "samples": 400,
        "topk": 10,
        "steps": 10,
        "momentum_mean": 0.15,
        "momentum_std": 0.15,
        "momentum_mean_gripper": 0.15,
        "momentum_std_gripper": 0.15,
        "maxnorm": 0.05,
        "close_gripper": None,
        "chunk": None,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollout": 0}, "rollout = 0; it must be a whole number above 0"),
        ({"samples": 2.5}, "samples = 2.5; it must be a whole number above 0"),
        ({"steps": True}, "steps = True; it must be a whole number above 0"),
        ({"topk": 401}, "topk = 401; it must be a whole number from 2 to samples = 400"),
        ({"topk": 1}, "topk = 1; it must be a whole number from 2 to samples = 400"),
        ({"momentum_mean": 1.0}, "momentum_mean = 1.0; it must be at least 0 and below 1"),
        ({"momentum_std_gripper": -0.1}, "momentum_std_gripper = -0.1; it must be at least 0"),
        ({"momentum_std": float("nan")}, "momentum_std = nan; it must be at least 0"),
        ({"maxnorm": 0.0}, "maxnorm = 0.0; it must be above 0"),
        ({"maxnorm": float("inf")}, "maxnorm = inf; it must be above 0"),
        ({"close_gripper": -1}, "close_gripper = -1; it must be None, or a whole number from 0"),
        ({"chunk": 7}, "chunk = 7; it must be None, or a divisor of samples = 400"),
        ({"chunk": 0}, "chunk = 0; it must be None, or a divisor of samples = 400"),
    ],
)
def test_impossible_configs_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CEMConfig(**options)


def test_wrong_arguments_of_plan_are_refused() -> None:
    key, config = jax.random.key(0), CEMConfig(**FAST)
    tokens, state, goal = _task([0.03, 0, 0, 0])
    for wrong, message in [
        ((key, tokens[None], state, goal), r"tokens is float32 \(1, 3, 12\); .* \[S, D\]"),
        ((key, tokens, state[:6], goal), r"state is float32 \(6,\); it must be float \[7\]"),
        ((key, tokens, np.zeros(7, int), goal), r"state is int\d+ \(7,\)"),
        ((key, tokens, state, goal[:2]), r"goal is float32 \(2, 12\); it must be float \[3, 12\]"),
        ((jax.random.PRNGKey(0), tokens, state, goal), r"key is uint32 \(2,\)"),
        ((jax.random.split(key), tokens, state, goal), r"key is key<fry> \(2,\)"),
    ]:
        with pytest.raises(InputError, match=message):
            plan(_world(), config, *wrong)


def test_wrong_arguments_of_rollout_are_refused() -> None:
    tokens, state, _ = _task([0.03, 0, 0, 0])
    tokens, state = tokens[None], state[None]
    for actions, message in [
        (np.zeros((1, 2, 6), np.float32), r"actions is float32 \(1, 2, 6\); .* \[1, h, 7\]"),
        (np.zeros((2, 7), np.float32), r"actions is float32 \(2, 7\); .* \[1, h, 7\]"),
        (np.zeros((1, 0, 7), np.float32), r"actions is float32 \(1, 0, 7\); .* \[1, h, 7\]"),
        (np.zeros((3, 2, 7), np.float32), r"actions is float32 \(3, 2, 7\); .* \[1, h, 7\]"),
    ]:
        with pytest.raises(InputError, match=message):
            rollout(_world(), tokens, state, actions)


def test_a_predictor_of_another_shape_is_refused() -> None:
    def last_frame_only(tokens: jax.Array, actions: jax.Array, states: jax.Array) -> jax.Array:
        return tokens[:, -TOKENS:]

    config, task = CEMConfig(**FAST), _task([0.03, 0, 0, 0])
    with pytest.raises(InputError, match=r"returned \(64, 3, 12\); it must return \(64, 6, 12\)"):
        plan(last_frame_only, config, jax.random.key(0), *task)
