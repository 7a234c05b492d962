"""Several processes as one run: how they find each other, and what they share."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jvjepa.errors import ConfigError, TrainingError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes of a run; each is started with the same command, but for `process`.

    Args:
        distributed: there are several. On a TPU pod slice, under Slurm, and under Open MPI they
            find each other on their own; elsewhere the other fields say it.
        coordinator: host:port where process 0 can be reached.
        processes: how many there are.
        process: which one this is, from 0.

    Raises:
        ConfigError: some are given and some are not.
    """

    distributed: bool = False
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None

    def __post_init__(self) -> None:
        """Checks that all or none are given."""
        given = [x is not None for x in (self.coordinator, self.processes, self.process)]
        if any(given) and not all(given):
            raise ConfigError("give coordinator, processes and process, or none of them")
        if any(given) and not self.distributed:
            raise ConfigError("coordinator, processes and process go with distributed")

    def join(self) -> None:
        """Waits until all processes are there; does nothing for a single one.

        Raises:
            TrainingError: they do not find each other.
        """
        if not self.distributed:
            return
        try:
            jax.distributed.initialize(self.coordinator, self.processes, self.process)
        except (ValueError, RuntimeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise TrainingError(f"the processes do not find each other: {reason}") from error


def whole(tree: Any) -> Any:
    """Brings arrays that may lie on devices of several processes to the host of each.

    Args:
        tree: of JAX arrays; every process has to call it.

    Returns:
        The tree with numpy arrays.
    """

    def gather(leaf: jax.Array) -> Any:
        if not leaf.is_fully_addressable and not leaf.is_fully_replicated:
            everywhere = NamedSharding(leaf.sharding.mesh, PartitionSpec())
            leaf = jax.jit(jnp.copy, out_shardings=everywhere)(leaf)
        return jax.device_get(leaf)

    return jax.tree.map(gather, tree)  # one by one: only one is whole on the devices
