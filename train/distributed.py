"""Several processes as one run: how they find each other, what they share, and how they end."""

import contextlib
import dataclasses
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jvjepa.errors import ConfigError, InputError, TrainingError

_SILENCE = 30  # seconds after which JAX takes a process for dead, and aborts the others
_LAST = 3.0  # seconds that process 0 ends after the others: JAX aborts them as soon as it is gone


@dataclasses.dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes of a run; each is started with the same command, but for `process`.

    Args:
        distributed: there are several. On a TPU pod slice, under Slurm, and under Open MPI they
            find each other on their own; elsewhere the other fields say it.
        coordinator: host:port where process 0 can be reached.
        processes: how many there are.
        process: which one this is, from 0.
        patience: seconds to wait until all are there, 1 or more.

    Raises:
        ConfigError: some are given and some are not, or a value is impossible.
    """

    distributed: bool = False
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    patience: int = 300

    def __post_init__(self) -> None:
        """Checks that all or none are given."""
        given = [x is not None for x in (self.coordinator, self.processes, self.process)]
        if any(given) and not all(given):
            raise ConfigError("give coordinator, processes and process, or none of them")
        if any(given) and not self.distributed:
            raise ConfigError("coordinator, processes and process go with distributed")
        if all(given):
            host, colon, port = self.coordinator.rpartition(":")
            if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
                raise ConfigError(f"coordinator = {self.coordinator!r}; it must be host:port")
            if type(self.processes) is not int or self.processes < 1:
                raise ConfigError(f"processes = {self.processes!r}; it must be 1 or more")
            if type(self.process) is not int or not 0 <= self.process < self.processes:
                right = f"0 to {self.processes - 1}"
                raise ConfigError(f"process = {self.process!r}; it must be {right}")
        if type(self.patience) is not int or self.patience < 1:
            raise ConfigError(f"patience = {self.patience!r}; it must be 1 s or more")

    def join(self) -> None:
        """Waits until all processes are there; does nothing for a single one.

        Raises:
            TrainingError: they do not find each other.
        """
        if not self.distributed:
            return
        failures: list[Exception] = []

        def wait() -> None:
            where = (self.coordinator, self.processes, self.process)
            try:
                # Its own timeout aborts the program, so that it gets one that is never reached.
                jax.distributed.initialize(
                    *where,
                    initialization_timeout=2 * self.patience + 60,
                    heartbeat_timeout_seconds=_SILENCE,
                )
                jax.devices()  # of all processes: they must be there for this, too
            except (ValueError, RuntimeError) as error:
                failures.append(error)

        waiting = threading.Thread(target=wait, daemon=True)
        waiting.start()
        waiting.join(self.patience)
        where = "" if self.coordinator is None else f" at {self.coordinator}"
        count = "all" if self.processes is None else f"all {self.processes}"
        if waiting.is_alive():
            reason = f"waited {self.patience} s for {count}{where}; have all been started?"
            raise TrainingError(f"the processes do not find each other: {reason}")
        if failures:
            reason = str(failures[0]).strip().partition("\n")[0]
            raise TrainingError(f"the processes do not find each other{where}: {reason}")

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """Joins, and sees to it that no process waits for others that will never come.

        With several processes, an error inside ends this one at once, after a line on stderr, with
        the exit codes of `jvjepa.cli.main`. Otherwise JAX would wait at the end of the program for
        the others, which may be dead, or wait for this one themselves.
        """
        if not self.distributed:
            yield
            return
        index = self.process or 0
        try:
            self.join()
            index = jax.process_index()
            yield
        except SystemExit:
            raise
        except BaseException as error:
            _leave(error, index)


def _leave(error: BaseException, index: int) -> NoReturn:
    """Ends the process without what Python and JAX do at the end of a program."""
    if isinstance(error, KeyboardInterrupt):
        text, code = f"interrupted{f': {error}' if error.args else ''}", 130
    elif isinstance(error, InputError | OSError):
        text, code = f"error: {' '.join(str(error).split())}", 2
    else:
        text, code = "".join(traceback.format_exception(error)), 1
    print(f"process {index}: {text}", file=sys.stderr)
    if index == 0:
        time.sleep(_LAST)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


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
