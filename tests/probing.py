"""Small probes, and their training without the loop."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jvjepa.train.probe_heads import ProbeConfig
from jvjepa.train.task import Task
from jvjepa.typing import Params

ATTENTIVE = ProbeConfig(
    num_layers=1,
    num_heads=3,
    learning_rates=(3e-3, 1e-3),
    weight_decays=(0.01, 0.8),
    epochs=2,
    batch_size=4,
)
PAIR = dataclasses.replace(ATTENTIVE, learning_rates=(3e-3,))
LINEAR = dataclasses.replace(ATTENTIVE, kind="linear", learning_rates=(0.1, 0.01))


def run(task: Task, steps: int, change: Any = None) -> tuple[Params, list[dict[str, Any]]]:
    """Trains without the loop: the parameters, and what each step reported."""

    @jax.jit
    def step(trained: Params, state: Any, batch: Any, number: Any) -> Any:
        def loss(trained: Params) -> Any:
            return task.loss(trained, {}, task.frozen, batch, number, jax.random.key(0))

        (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(trained)
        updates, state = task.optimizer.transform.update(gradients, state, trained)
        return optax.apply_updates(trained, updates), state, {"loss": value, **metrics}

    trained = task.trained if change is None else change(task.trained)
    state, reports = task.optimizer.transform.init(trained), []
    with task.feed(0, 0, 1) as batches:
        for number, batch in zip(range(steps), batches, strict=False):
            trained, state, metrics = step(trained, state, batch, jnp.asarray(number))
            reports.append(jax.device_get(metrics))
    return trained, reports


def head(params: Params, i: int) -> Params:
    return jax.tree.map(lambda leaf: leaf[i : i + 1], params)
