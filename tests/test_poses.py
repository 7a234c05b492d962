import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy.spatial.transform import Rotation

from jvjepa import poses
from jvjepa.errors import InputError

TOLERANCE = 1e-5
GIMBAL = "ignore:Gimbal lock detected:UserWarning"


def _states(*shape: int, seed: int = 0) -> np.ndarray:
    """Float32 [*shape, 7]; pitch a little away from gimbal lock, where angles are unique."""
    rng = np.random.default_rng(seed)
    angles = rng.uniform(-1, 1, (*shape, 3)) * [np.pi, 1.5, np.pi]
    parts = (rng.normal(size=(*shape, 3)), angles, rng.uniform(size=(*shape, 1)))
    return np.concatenate(parts, axis=-1).astype(np.float32)


def _angle_between(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference of angles, around the circle."""
    return float(np.abs((np.asarray(a, np.float64) - b + np.pi) % (2 * np.pi) - np.pi).max())


def _rotations(euler: np.ndarray) -> Rotation:
    return Rotation.from_euler("xyz", np.asarray(euler, np.float64).reshape(-1, 3))


def test_matrices_and_angles_are_scipys() -> None:
    euler = _states(500)[:, 3:6]
    matrix = poses.rotation_matrix(euler)
    assert matrix.dtype == jnp.float32
    assert np.abs(matrix - _rotations(euler).as_matrix()).max() <= TOLERANCE
    back = poses.euler_angles(_rotations(euler).as_matrix())
    assert back.dtype == jnp.float32
    assert _angle_between(back, _rotations(euler).as_euler("xyz")) <= TOLERANCE
    assert _angle_between(back, euler) <= TOLERANCE


def test_angles_are_extrinsic() -> None:
    # the hand turns about the fixed x axis first: z goes to -y, and a turn about the fixed z to x
    matrix = poses.rotation_matrix(np.asarray([np.pi / 2, 0, np.pi / 2], np.float32))
    assert np.allclose(matrix @ jnp.asarray([0.0, 0.0, 1.0]), [1, 0, 0], atol=1e-6)


@pytest.mark.parametrize("pitch", [0.3, 2.0, 4.0, -3.0])
def test_angles_outside_their_range_come_back_inside_as_the_same_rotation(pitch: float) -> None:
    euler = np.asarray([5.0, pitch, -7.0], np.float32)
    back = np.asarray(poses.euler_angles(poses.rotation_matrix(euler)))
    assert np.abs(back[[0, 2]]).max() <= np.float32(np.pi)
    assert abs(back[1]) <= np.float32(np.pi / 2)
    assert _angle_between(back, _rotations(euler).as_euler("xyz")[0]) <= TOLERANCE


@pytest.mark.filterwarnings(GIMBAL)
@pytest.mark.parametrize("sign", [1, -1])
def test_at_gimbal_lock_the_yaw_is_zero(sign: int) -> None:
    euler = _states(200)[:, 3:6]
    euler[:, 1] = sign * np.pi / 2
    angles = poses.euler_angles(poses.rotation_matrix(euler))
    assert np.array_equal(angles[:, 2], np.zeros(200))
    assert _angle_between(angles, _rotations(euler).as_euler("xyz")) <= TOLERANCE
    assert _angle_between(angles[:, 0], euler[:, 0] - sign * euler[:, 2]) <= TOLERANCE


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 3e-6, 1e-6, 3e-7, 1e-7, 0.0])
def test_angles_give_the_matrix_back_however_near_gimbal_lock_is(distance: float) -> None:
    euler = _states(200)[:, 3:6].astype(np.float64)
    euler[:, 1] = np.pi / 2 - distance
    matrix = _rotations(euler).as_matrix()
    back = poses.rotation_matrix(poses.euler_angles(matrix))
    assert np.abs(back - matrix).max() <= 2e-6


def test_actions_are_what_scipy_says() -> None:
    states = _states(3, 2, 6)
    actions = poses.actions(states)
    assert actions.shape == (3, 2, 5, 7)
    assert actions.dtype == jnp.float32
    before, after = states[..., :-1, :], states[..., 1:, :]
    turned = _rotations(after[..., 3:6]) * _rotations(before[..., 3:6]).inv()
    assert np.array_equal(actions[..., [0, 1, 2, 6]], (after - before)[..., [0, 1, 2, 6]])
    back = _rotations(actions[..., 3:6])  # as rotations: a pair of states may be near gimbal lock
    assert (back * turned.inv()).magnitude().max() <= TOLERANCE


def test_applied_actions_lead_along_the_states() -> None:
    states = _states(2, 50)
    actions = poses.actions(states)
    for t in range(49):
        after = poses.apply_action(states[:, t], actions[:, t])
        assert after.dtype == jnp.float32
        assert np.allclose(after[:, [0, 1, 2, 6]], states[:, t + 1, [0, 1, 2, 6]], atol=1e-6)
        # an angle is worse than its rotation by 1 / cos(pitch), here up to 14
        assert _angle_between(after[:, 3:6], states[:, t + 1, 3:6]) <= TOLERANCE


def test_a_trajectory_of_actions_does_not_drift() -> None:
    states = _states(100)
    actions = poses.actions(states)
    state = jnp.asarray(states[0])
    for action in actions:
        state = poses.apply_action(state, action)
    last = _rotations(state[3:6]) * _rotations(states[-1, 3:6]).inv()
    assert last.magnitude().max() <= TOLERANCE
    assert np.allclose(state[:3], states[-1, :3], atol=TOLERANCE)


def test_the_rotation_of_an_action_comes_after_the_old_one() -> None:
    state, action = _states(100), _states(100, seed=1)
    after = poses.apply_action(state, action)
    expected = _rotations(action[:, 3:6]) * _rotations(state[:, 3:6])
    assert (_rotations(after[:, 3:6]) * expected.inv()).magnitude().max() <= TOLERANCE
    other = _rotations(state[:, 3:6]) * _rotations(action[:, 3:6])
    assert (_rotations(after[:, 3:6]) * other.inv()).magnitude().max() > 0.1


@pytest.mark.parametrize(("change", "expected"), [(0.9, 1.0), (-0.9, 0.0), (0.25, 0.75)])
def test_closedness_stays_within_its_range(change: float, expected: float) -> None:
    state = jnp.zeros(7).at[6].set(0.5)
    assert poses.apply_action(state, jnp.zeros(7).at[6].set(change))[6] == expected


def test_jit_and_vmap_change_nothing() -> None:
    states = _states(4, 5)
    actions = poses.actions(states)
    assert np.array_equal(jax.vmap(poses.actions)(states), actions)
    applied = jax.jit(jax.vmap(jax.vmap(poses.apply_action)))(states[:, :-1], actions)
    assert np.array_equal(applied, poses.apply_action(states[:, :-1], actions))


def test_gradients_are_those_of_the_functions() -> None:
    states = jnp.asarray(_states(3) * 0.5)
    # against differences of float32 values, which are as coarse as that
    check_grads(poses.actions, (states,), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)
    moves = (states, states[::-1] * 0.3)
    check_grads(poses.apply_action, moves, order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("pitch", [np.pi / 2, -np.pi / 2])
def test_gradients_are_finite_at_gimbal_lock(pitch: float) -> None:
    state = jnp.asarray([0, 0, 0, 0.4, pitch, -0.2, 0], jnp.float32)

    def loss(state: jax.Array) -> jax.Array:
        return jnp.sum(poses.apply_action(state, jnp.zeros(7)))

    assert np.isfinite(jax.grad(loss)(state)).all()


def test_float64_and_bfloat16_states_are_computed_in_float32() -> None:
    states = _states(4)
    assert np.array_equal(poses.actions(states.astype(np.float64)), poses.actions(states))
    assert poses.actions(jnp.asarray(states, jnp.bfloat16)).dtype == jnp.float32


def test_wrong_shapes_and_dtypes_are_refused() -> None:
    with pytest.raises(InputError, match=r"states is float32 \(4, 6\); it must be float \[.., 7\]"):
        poses.actions(jnp.zeros((4, 6)))
    with pytest.raises(InputError, match=r"states has shape \(1, 7\); .* T at least 2"):
        poses.actions(jnp.zeros((1, 7)))
    with pytest.raises(InputError, match=r"states has shape \(7,\); .* T at least 2"):
        poses.actions(jnp.zeros(7))
    with pytest.raises(InputError, match=r"action is float32 \(8,\); it must be float \[.., 7\]"):
        poses.apply_action(jnp.zeros(7), jnp.zeros(8))
    with pytest.raises(InputError, match=r"action has shape \(7,\); it must be \(2, 7\)"):
        poses.apply_action(jnp.zeros((2, 7)), jnp.zeros(7))
    with pytest.raises(InputError, match=r"euler is int32 \(3,\)"):
        poses.rotation_matrix(jnp.zeros(3, jnp.int32))
    with pytest.raises(
        InputError, match=r"matrix is float32 \(3,\); it must be float \[.., 3, 3\]"
    ):
        poses.euler_angles(jnp.zeros(3))
