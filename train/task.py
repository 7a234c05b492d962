"""What is trained: pure functions, and the arrays that they begin with."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from jvjepa.typing import Array, DType, Params

Loss = Callable[[Params, Params, Params, Any, Array, Array], tuple[Array, dict[str, Array]]]
Follow = Callable[[Params, Params, Array], Params]
Adapt = Callable[[Params, dict[str, Array]], Params]
Evaluate = Callable[[Params, Params, Params], dict[str, float]]
Feed = Callable[[int, int, int], AbstractContextManager[Iterator[Any]]]


class Optimizer(NamedTuple):
    """How parameters change.

    Args:
        transform: from gradients to updates; its schedules count the updates it has made.
        schedules: what to log beside the loss: value by name, from the step.
    """

    transform: optax.GradientTransformation
    schedules: Mapping[str, Callable[[Array], Array]]


class Best(NamedTuple):
    """Which checkpoint is the best.

    Args:
        metric: a name of those that `Task.evaluate` gives.
        mode: "max" where more is better, "min" where less is.
    """

    metric: str
    mode: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Something to train; `jvjepa.train.loop.train` does it.

    Args:
        name: of the kind of training, as its command is called.
        record: all that tells this run from others, as JSON knows it: architecture, options, the
            data, the digest of frozen weights. A run goes on only where the record is the same.
        trained: what the optimizer changes, float32; nested dictionaries of arrays.
        carried: what is neither trained nor constant, as the average that a teacher is; {} if none.
        frozen: what the loss reads and nobody changes; {} if nothing.
        loss: (trained, carried, frozen, batch, step, key) to the loss, float32 [], and metrics,
            each float32 []: means over the batch. It is differentiated with respect to `trained`,
            and compiled; `key` is another one at each step and part of an accumulated batch.
        follow: (carried, trained, step) to the new `carried`, after each update; None keeps it.
        adapt: (carried, metrics) to the new `carried`, after that, from what the loss gave; None
            keeps it.
        optimizer: how `trained` changes.
        feed: (step, process_index, process_count) to a context manager of the batches from that
            step on, without end; those of this process. A batch is a pytree of numpy arrays, all of
            whose first axes are the clips of this process.
        evaluate: (trained, carried, frozen) to metrics, outside of compiled code; None for none.
        best: how to tell the best checkpoint by them; None for none.
        flops: floating-point operations of the matrix products of one clip of a batch, forward and
            backward, for the share of the machine's rate; 0 where nobody has counted.
        dtype: of the computation, for the same.
    """

    name: str
    record: Mapping[str, Any]
    trained: Params
    carried: Params
    frozen: Params
    loss: Loss
    follow: Follow | None = None
    adapt: Adapt | None = None
    optimizer: Optimizer
    feed: Feed
    evaluate: Evaluate | None = None
    best: Best | None = None
    flops: float = 0.0
    dtype: DType = jnp.float32


class State(NamedTuple):
    """What a checkpoint holds.

    Args:
        step: int32 [], updates made.
        trained: see `Task`.
        carried: see `Task`.
        optimizer: of `Task.optimizer`.
    """

    step: Array
    trained: Params
    carried: Params
    optimizer: optax.OptState
