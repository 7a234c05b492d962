"""Poses of a robot's hand, and the actions between them.

A state is [x, y, z, roll, pitch, yaw, closedness]: the position in metres, extrinsic "xyz" Euler
angles in radians (`R = Rz(yaw) Ry(pitch) Rx(roll)`, SciPy's lower-case "xyz"), and how far the
gripper is closed, 0 to 1. An action is what changes: Δposition, the Euler angles of the rotation
that is applied after the old one, and Δclosedness.

Reference: `poses_to_diffs` of Meta's V-JEPA 2 (`app/vjepa_droid/droid.py`) and `compute_new_pose`
(`notebooks/utils/mpc_utils.py`).
"""

import jax
import jax.numpy as jnp

from jvjepa.errors import InputError
from jvjepa.typing import Array

WIDTH = 7
_LOCK = 1e-6  # the cosine of the pitch below which roll and yaw turn about one axis


@jax.jit
def rotation_matrix(euler: Array) -> Array:
    """Turns Euler angles into rotation matrices.

    Args:
        euler: float [.., 3], roll, pitch and yaw in radians.

    Returns:
        float32 [.., 3, 3].

    Raises:
        InputError: the shape or dtype is wrong.
    """
    euler = _checked("euler", euler, (3,))
    cos_x, cos_y, cos_z = jnp.moveaxis(jnp.cos(euler), -1, 0)
    sin_x, sin_y, sin_z = jnp.moveaxis(jnp.sin(euler), -1, 0)
    rows = (
        (
            cos_y * cos_z,
            sin_x * sin_y * cos_z - cos_x * sin_z,
            cos_x * sin_y * cos_z + sin_x * sin_z,
        ),
        (
            cos_y * sin_z,
            sin_x * sin_y * sin_z + cos_x * cos_z,
            cos_x * sin_y * sin_z - sin_x * cos_z,
        ),
        (-sin_y, sin_x * cos_y, cos_x * cos_y),
    )
    return jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)


@jax.jit
def euler_angles(matrix: Array) -> Array:
    """Turns rotation matrices into Euler angles.

    At gimbal lock (pitch ±π/2) only roll ∓ yaw is defined: the yaw is 0 there, as in SciPy, and has
    no gradient. The angles always give the matrix back.

    Args:
        matrix: float [.., 3, 3], rotations.

    Returns:
        float32 [.., 3], roll and yaw in [-π, π], pitch in [-π/2, π/2].

    Raises:
        InputError: the shape or dtype is wrong.
    """
    matrix = _checked("matrix", matrix, (3, 3))
    locked = jnp.hypot(matrix[..., 0, 0], matrix[..., 1, 0]) < _LOCK
    x = jnp.where(locked, 1.0, matrix[..., 0, 0])
    y = jnp.where(locked, 0.0, matrix[..., 1, 0])
    length = jnp.sqrt(x * x + y * y)
    cos_z, sin_z = x / length, y / length
    # With the yaw undone the middle row is (0, cos(roll), -sin(roll)): also near gimbal lock, where
    # the last row, the usual source of the roll, is all rounding error.
    sin_x = sin_z * matrix[..., 0, 2] - cos_z * matrix[..., 1, 2]
    cos_x = cos_z * matrix[..., 1, 1] - sin_z * matrix[..., 0, 1]
    cos_y = cos_z * matrix[..., 0, 0] + sin_z * matrix[..., 1, 0]
    roll, pitch = jnp.arctan2(sin_x, cos_x), jnp.arctan2(-matrix[..., 2, 0], cos_y)
    return jnp.stack([roll, pitch, jnp.arctan2(y, x)], axis=-1)


@jax.jit
def actions(states: Array) -> Array:
    """The actions that lead from each state to the next.

    Args:
        states: float [.., T, 7], T at least 2.

    Returns:
        float32 [.., T-1, 7]: Δposition, the Euler angles of `R_{t+1} R_tᵀ`, Δclosedness.

    Raises:
        InputError: the shape or dtype is wrong.
    """
    states = _checked("states", states, (WIDTH,))
    if states.ndim < 2 or states.shape[-2] < 2:
        raise InputError(f"states has shape {states.shape}; it must be [.., T, 7], T at least 2")
    rotations = rotation_matrix(states[..., 3:6])
    turned = _product(rotations[..., 1:, :, :], jnp.swapaxes(rotations[..., :-1, :, :], -1, -2))
    change = states[..., 1:, :] - states[..., :-1, :]
    return jnp.concatenate([change[..., :3], euler_angles(turned), change[..., 6:]], axis=-1)


@jax.jit
def apply_action(state: Array, action: Array) -> Array:
    """The state that an action leads to; the inverse of `actions`.

    Args:
        state: float [.., 7].
        action: float, shaped as the state.

    Returns:
        float32 [.., 7], the closedness clipped to 0..1.

    Raises:
        InputError: a shape or dtype is wrong.
    """
    state, action = _checked("state", state, (WIDTH,)), _checked("action", action, (WIDTH,))
    if state.shape != action.shape:
        raise InputError(f"action has shape {action.shape}; it must be {state.shape}, the state's")
    turned = _product(rotation_matrix(action[..., 3:6]), rotation_matrix(state[..., 3:6]))
    moved = state + action
    closedness = jnp.clip(moved[..., 6:], 0.0, 1.0)
    return jnp.concatenate([moved[..., :3], euler_angles(turned), closedness], axis=-1)


def _product(a: Array, b: Array) -> Array:
    """Products of 3×3 matrices as sums: a matmul in TF32 would turn a hand by a milliradian."""
    return jnp.sum(a[..., :, :, None] * b[..., None, :, :], axis=-2)


def _checked(name: str, value: Array, last: tuple[int, ...]) -> Array:
    """The value as float32, if it is float and ends in the axes `last`."""
    value = jnp.asarray(value)
    if value.shape[-len(last) :] != last or not jnp.issubdtype(value.dtype, jnp.floating):
        right = ", ".join(map(str, last))
        raise InputError(f"{name} is {value.dtype} {value.shape}; it must be float [.., {right}]")
    return value.astype(jnp.float32)
