"""Means of metrics over all clips of a manifest, on however many devices."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jvjepa.train.data import Batch
from jvjepa.train.feeding import DataConfig
from jvjepa.train.manifest import Manifest
from jvjepa.train.mesh import put_batch
from jvjepa.train.task import Evaluate
from jvjepa.typing import Array, Params

Metrics = Callable[[Params, Params, Batch], dict[str, Array]]


def mean_over(metrics: Metrics, data: DataConfig, manifest: Manifest) -> Evaluate:
    """Builds `Task.evaluate`: goes through all clips of a manifest; compiled once.

    Args:
        metrics: (trained, frozen, batch) to values, each float32 [B].
        data: how clips are taken out of the manifest; of each the middle.
        manifest: the clips; what cannot be read is not counted.

    Returns:
        A function of (trained, carried, frozen) to the means over the clips of all processes.
    """

    @jax.jit
    def sums(trained: Params, frozen: Params, batch: Batch) -> tuple[dict[str, Array], Array]:
        counted = batch.ids >= 0
        values = metrics(trained, frozen, batch)
        kept = {name: jnp.sum(jnp.where(counted, x, 0.0)) for name, x in values.items()}
        return kept, jnp.sum(counted, dtype=jnp.int32)

    def evaluate(trained: Params, carried: Params, frozen: Params) -> dict[str, float]:
        mesh = jax.tree.leaves(trained)[0].sharding.mesh
        total: dict[str, float] = {}
        clips = 0
        with data.evaluate(manifest) as batches:
            for batch in batches:
                part, count = jax.device_get(sums(trained, frozen, put_batch(batch, mesh)))
                clips += int(count)
                total = {name: total.get(name, 0.0) + float(x) for name, x in part.items()}
        return {name: value / clips for name, value in total.items()}

    return evaluate
