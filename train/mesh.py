"""One mesh of devices for every run, and what lies where on it.

The axes are "data", "fsdp" and "model". A batch is divided over the first two; parameters, and what
the optimizer keeps of each, over the last two, by their names:

- "model" divides the columns of query, key, value and fc1, and the rows of proj and fc2, so that a
  block needs one sum over its devices behind its attention and one behind its MLP;
- "fsdp" divides the other axis of these, and the last axis that it divides of everything else.

An axis whose length is not a multiple of the devices stays whole. Results do not depend on the
mesh, but for rounding.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jvjepa.errors import ConfigError, InputError

AXES = ("data", "fsdp", "model")
_COLUMNS = re.compile(r"(^|/)(query|key|value|fc1)/(kernel|b)($|/)")
_ROWS = re.compile(r"(^|/)(proj|fc2)/(kernel|a)($|/)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices each axis has.

    Args:
        data: devices that the batch alone is divided over; None takes all that are left.
        fsdp: devices that batch and parameters are divided over.
        model: devices that parameters and the work on a clip are divided over; best a divisor of
            the number of attention heads. They must be devices of one process.

    Raises:
        ConfigError: a number is below 1.
    """

    data: int | None = None
    fsdp: int = 1
    model: int = 1

    def __post_init__(self) -> None:
        """Checks every field."""
        for name in AXES:
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"MeshConfig.{name} = {value!r}; it must be 1 or more")


def make_mesh(config: MeshConfig) -> Mesh:
    """Arranges all devices of all processes.

    Args:
        config: the axes.

    Returns:
        The mesh; its axes are "data", "fsdp", "model".

    Raises:
        ConfigError: there are not as many devices.
    """
    count, rest = jax.device_count(), config.fsdp * config.model
    data = config.data or max(1, count // rest)
    if data * rest != count:
        sizes = f"data = {config.data}, fsdp = {config.fsdp}, model = {config.model}"
        raise ConfigError(f"{sizes}, but there are {count} devices; the product must be as many")
    if jax.local_device_count() % config.model:
        raise ConfigError(
            f"model = {config.model}; it must divide the {jax.local_device_count()} devices of a "
            "process, which read the same clips"
        )
    return jax.make_mesh((data, config.fsdp, config.model), AXES, axis_types=(AxisType.Auto,) * 3)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Where the clips of a batch lie: divided over the first axis."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def partition(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Says how an array is divided.

    Args:
        name: flat, ending as the parameter's does: "encoder/blocks/attention/query/kernel".
        shape: its shape; leading axes, as that of the layers, stay whole.
        mesh: the devices.

    Returns:
        An axis of the mesh, or None, for each axis.
    """
    axes: list[str | None] = [None] * len(shape)

    def divide(axis: int, over: str) -> bool:
        ways = mesh.shape[over]
        if ways == 1 or shape[axis] % ways or axes[axis] is not None:
            return False
        axes[axis] = over
        return True

    if len(shape) >= 2:
        if _COLUMNS.search(name):
            divide(-1, "model")
        elif _ROWS.search(name):
            divide(-2, "model")
        divide(-1, "fsdp") or divide(-2, "fsdp")
    return PartitionSpec(*axes)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The `NamedSharding` of every array of a tree, by its name; arrays may be abstract."""

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, partition(name, np.shape(leaf), mesh))

    return jax.tree_util.tree_map_with_path(place, tree)


def put(tree: Any, places: Any, *, copy: bool = False) -> Any:
    """Puts a tree of arrays, which every process has whole, where `shardings` says.

    Args:
        tree: of arrays of numpy or JAX.
        places: the sharding of each.
        copy: share no memory, with `tree` or within it, so that the result may be donated.

    Returns:
        The tree on the devices.
    """

    def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
        if jax.process_count() == 1:
            placed = jax.device_put(leaf, sharding)
        else:
            whole = np.asarray(leaf)
            placed = jax.make_array_from_callback(whole.shape, sharding, lambda i: whole[i])
        # device_put(may_alias=False) shares buffers where an array is divided over several devices.
        return jnp.copy(placed) if copy else placed

    return jax.tree.map(place, tree, places)


def put_batch(batch: Any, mesh: Mesh, *, parts: int = 1) -> Any:
    """Puts the clips that this process has read on its devices.

    Args:
        batch: a pytree of numpy arrays, the clips of this process first.
        mesh: the devices.
        parts: into how many parts each device's clips will be divided, to accumulate gradients.

    Returns:
        The whole batch, of all processes.

    Raises:
        InputError: the clips cannot be divided evenly.
    """
    local = math.prod(mesh.shape[axis] for axis in AXES[:2]) // jax.process_count()
    sharding = batch_sharding(mesh)
    for leaf in jax.tree.leaves(batch):
        if len(leaf) % (local * parts):
            times = f" in {parts} parts" if parts > 1 else ""
            raise InputError(
                f"{len(leaf)} clips of a batch on {local} devices{times}; it must be a multiple of "
                f"{local * parts} for each process"
            )
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), batch
    )
