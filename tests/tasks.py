"""A task small enough to be trained in a test: linear regression on clips made of numbers."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jvjepa.train.optimizer import OptimizerConfig, make_optimizer
from jvjepa.train.task import Task
from jvjepa.typing import Array, Params

Batch = dict[str, np.ndarray]


def numbers(step: int, batch: int = 8, width: int = 8) -> Batch:
    """The batch of a step, the same whoever asks."""
    rng = np.random.default_rng((7, step))
    x = rng.normal(size=(batch, width)).astype(np.float32)
    return {"x": x, "y": (x[:, :4] * 2 - 1).astype(np.float32)}


def toy_task(
    *,
    steps: int = 12,
    batch: int = 8,
    at_step: Callable[[int, Batch], Batch] = lambda step, values: values,
    **changes: Any,
) -> Task:
    """y = x @ kernel + bias, noise on top of x; what follows is half the way behind.

    Args:
        steps: of the run.
        batch: clips of a batch.
        at_step: what to make of the batch of a step, from 0.
        **changes: other fields of the task.
    """
    rng = np.random.default_rng(0)
    trained = {
        "query": {
            "kernel": jnp.asarray(rng.normal(size=(8, 4)).astype(np.float32)),
            "bias": jnp.zeros((4,)),
        }
    }

    def loss(
        trained: Params, carried: Params, frozen: Params, batch: Batch, step: Array, key: Array
    ) -> tuple[Array, dict[str, Array]]:
        x = batch["x"] + 0.01 * jax.random.normal(key, batch["x"].shape)
        y = x @ trained["query"]["kernel"] * frozen["scale"] + trained["query"]["bias"][None]
        behind = optax.tree.norm(optax.tree.sub(trained, carried))
        return jnp.mean(jnp.square(y - batch["y"])), {"behind": behind}

    def follow(carried: Params, trained: Params, step: Array) -> Params:
        return jax.tree.map(lambda a, b: (a + b) / 2, carried, trained)

    @contextlib.contextmanager
    def feed(step: int, index: int, count: int) -> Iterator[Iterator[Batch]]:
        def batches() -> Iterator[Batch]:
            number = step
            while True:
                values = at_step(number, numbers(number, batch))
                share = batch // count
                yield {k: v[index * share : (index + 1) * share] for k, v in values.items()}
                number += 1

        yield batches()

    optimizer = OptimizerConfig(learning_rate=0.1, warmup_steps=2, weight_decay=0.01, max_norm=1.0)
    task = {
        "name": "toy",
        "record": {"width": 8},
        "trained": trained,
        "carried": jax.tree.map(jnp.zeros_like, trained),
        "frozen": {"scale": jnp.asarray(1.5)},
        "loss": loss,
        "follow": follow,
        "optimizer": make_optimizer(optimizer, trained, steps=steps),
        "feed": feed,
    }
    return Task(**{**task, **changes})
