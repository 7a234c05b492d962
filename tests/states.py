"""States of training as checkpoints hold them."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import SingleDeviceSharding

from jvjepa.train.checkpoint import Checkpoints
from jvjepa.train.task import State

RECORD = {"task": "probe", "rate": 1e-3, "name": "ü", "sizes": [1, 2], "none": None}


def make_state(step: int, seed: int = 0) -> State:
    """Nested parameters with adamw's state after an update, and half-precision averages."""
    keys = jax.random.split(jax.random.key(seed), 4)
    trained = {
        "encoder": {
            "blocks": {"query": {"kernel": jax.random.normal(keys[0], (2, 5, 7))}},
            "norm": {"scale": jax.random.normal(keys[1], (5,)), "bias": jnp.zeros((5,))},
        },
        "head": {"kernel": jax.random.normal(keys[2], (7, 3))},
    }
    transform = optax.adamw(optax.linear_schedule(1e-3, 0.0, 10))
    with jax.numpy_dtype_promotion("standard"):  # optax is not strict
        _, optimizer = transform.update(trained, transform.init(trained), trained)
    carried = {"teacher": jax.random.normal(keys[3], (33, 9)).astype(jnp.bfloat16)}
    return State(step=jnp.int32(step), trained=trained, carried=carried, optimizer=optimizer)


def abstract_of(state: State) -> State:
    one = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), state)


def assert_same_bits(a: State, b: State) -> None:
    chex.assert_trees_all_equal_structs(a, b)
    chex.assert_trees_all_equal_shapes_and_dtypes(a, b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def two_steps(folder: Path) -> Path:
    """A folder with the steps 3 and 5, and metrics."""
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(3, make_state(3), RECORD, {"accuracy": 0.5})
        checkpoints.save(5, make_state(5, seed=1), RECORD)
    return folder
