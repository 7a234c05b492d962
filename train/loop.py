"""The training loop: one for every task, on one device or many.

    state = train(task, LoopConfig(steps=10_000), "runs/doors")

A run is a folder: `run.json` says what it is, `metrics.jsonl` and `tensorboard/` hold its course,
`checkpoints/` its states. Everything random follows from the seed and the number of the step, and
so do the clips: a run that was stopped and goes on gives what it would have given.
"""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.console import Console

from jvjepa.errors import ConfigError, InputError, TrainingError
from jvjepa.storage import new_file
from jvjepa.train.checkpoint import Checkpoints, flat, hashes
from jvjepa.train.interruption import Interruption
from jvjepa.train.mesh import MeshConfig, make_mesh, put, put_batch, replicated, shardings
from jvjepa.train.task import State, Task
from jvjepa.train.watch import Watch
from jvjepa.typing import Array, Params

RUN_FILE = "run.json"
CHECKPOINTS = "checkpoints"

Step = Callable[[State, Params, Any, Array], tuple[State, dict[str, Array]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How a task is run.

    Args:
        steps: updates of the whole run.
        accumulate: parts that a batch is divided into, one after the other on each device; the
            gradient is their mean. Memory is that of a part.
        seed: of all that is random but the clips, 0 to 2^32 - 1.
        save_every: updates from one evaluation and checkpoint to the next; the last one is at the
            end.
        keep: the newest checkpoints that stay, 1 or more; the best one stays beside them.
        log_every: updates from one row of metrics to the next.
        mesh: how many devices are used for what.

    Raises:
        ConfigError: a value is impossible.
    """

    steps: int
    accumulate: int = 1
    seed: int = 0
    save_every: int = 1000
    keep: int = 3
    log_every: int = 10
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    def __post_init__(self) -> None:
        """Checks every field."""
        for name in ("steps", "accumulate", "save_every", "keep", "log_every"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"LoopConfig.{name} = {value!r}; it must be 1 or more")
        if type(self.seed) is not int or not 0 <= self.seed < 2**32:
            raise ConfigError(f"LoopConfig.seed = {self.seed!r}; it must be 0 to 2^32 - 1")


def train(
    task: Task,
    config: LoopConfig,
    folder: str | Path,
    *,
    resume: bool = False,
    console: Console | None = None,
) -> State:
    """Trains, and leaves the run's folder behind.

    SIGINT and SIGTERM end it after the update that is under way, with a checkpoint.

    Args:
        task: what to train.
        config: how.
        folder: of the run; it must not exist, unless the run is to be resumed.
        resume: go on from the newest checkpoint of `folder`; without one the run begins.
        console: where to show progress; None shows nothing.

    Returns:
        The last state; its arrays lie on the devices.

    Raises:
        InputError: the folder is of another run, or a batch cannot be divided.
        CheckpointError: a checkpoint is damaged.
        TrainingError: the loss is not finite, or another process has died.
        KeyboardInterrupt: the run was interrupted, and can be resumed.
    """
    folder, mesh = Path(folder), make_mesh(config.mesh)
    record = _record(task, config)
    first = _look_at(folder, record, resume=resume)
    with ExitStack() as stack:
        batches = _feed(task, config, mesh, first, stack)
        key = jax.jit(lambda: jax.random.key(config.seed), out_shardings=replicated(mesh))()
        abstract = _abstract(task, mesh)
        places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        update = make_step(task, config.accumulate)
        step = jax.jit(update, donate_argnums=0, out_shardings=(places, replicated(mesh)))
        if first < config.steps:  # what does not fit fails here, before anything is written
            batch = next(batches)
            batches = itertools.chain([batch], batches)
            with jax.set_mesh(mesh):
                jax.eval_shape(step, abstract, task.frozen, batch, key)
        _open_run(folder, record)
        checkpoints = stack.enter_context(
            Checkpoints(folder / CHECKPOINTS, keep=config.keep, best=task.best)
        )
        state, frozen = _place(task, mesh, checkpoints)
        before = hashes(flat(frozen))
        watch = stack.enter_context(
            Watch(task, folder, checkpoints, first, config.steps, config.log_every, console)
        )
        interruption = stack.enter_context(Interruption())

        for number in range(first + 1, config.steps + 1):
            batch = next(batches)
            clips = len(jax.tree.leaves(batch)[0])
            with jax.transfer_guard("disallow"), jax.set_mesh(mesh):  # for layers.by_clips
                state, metrics = step(state, frozen, batch, key)
            watch.started(number, metrics, clips)
            alone = jax.process_count() == 1
            stop = (alone or number % config.log_every == 0) and interruption.wanted()
            due = number == config.steps or number % config.save_every == 0
            if stop or due:
                watch.finish()  # before a state is kept, it is known to be finite
                values: dict[str, float] = {}
                if due and task.evaluate is not None:
                    try:
                        values = task.evaluate(state.trained, state.carried, frozen)
                    except BaseException:  # what was learned is kept, whatever ends the run
                        if alone:  # a save needs all processes
                            checkpoints.save(number, state, record)
                        raise
                watch.write(values)
                checkpoints.save(number, state, record, values)
            if stop:
                checkpoints.wait()
                raise KeyboardInterrupt(f"{folder} has a checkpoint of step {number}")
        if hashes(flat(frozen)) != before:
            raise TrainingError(f"{task.name}: frozen weights have changed, which is a bug")
    return state


def best_state(task: Task, config: LoopConfig, folder: str | Path) -> tuple[int | None, State]:
    """Reads the best state of a run; where none has a finite measurement, the newest.

    Args:
        task: of the run; it says what the best is.
        config: of the run.
        folder: of the run.

    Returns:
        Its step, None where none has a finite measurement, and the state on the devices.

    Raises:
        CheckpointError: a checkpoint is damaged.
    """
    with Checkpoints(Path(folder) / CHECKPOINTS, best=task.best, read_only=True) as checkpoints:
        step = checkpoints.best_step
        return step, checkpoints.restore(_abstract(task, make_mesh(config.mesh)), step)


def latest_state(task: Task, config: LoopConfig, folder: str | Path) -> State:
    """Reads the newest state of a run.

    Args:
        task: of the run, or one whose state has the same arrays.
        config: how it is run now.
        folder: of the run.

    Returns:
        The state on the devices.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged, or its arrays are others.
    """
    with Checkpoints(Path(folder) / CHECKPOINTS, read_only=True) as checkpoints:
        return checkpoints.restore(_abstract(task, make_mesh(config.mesh)))


def begin(task: Task) -> State:
    """The state before the first update; the arrays are those of the task."""
    zero = jnp.zeros((), jnp.int32)
    return State(zero, task.trained, task.carried, task.optimizer.transform.init(task.trained))


def make_step(task: Task, accumulate: int = 1) -> Step:
    """Builds the update.

    Args:
        task: what is trained.
        accumulate: parts that a batch is divided into.

    Returns:
        A function of (state, frozen, batch, key), to be compiled, to the new state and metrics,
        each float32 []. An update whose loss or gradient is not finite changes nothing.
    """

    def step(
        state: State, frozen: Params, batch: Any, key: Array
    ) -> tuple[State, dict[str, Array]]:
        key = jax.random.fold_in(key, state.step)
        gradients, metrics = _accumulated(task, accumulate, state, frozen, batch, key)
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        metrics |= {name: at(state.step) for name, at in task.optimizer.schedules.items()}
        change = task.optimizer.transform.update
        updates, optimizer = change(gradients, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        carried = state.carried
        if task.follow is not None:
            carried = task.follow(carried, trained, state.step)
        if task.adapt is not None:
            carried = task.adapt(carried, metrics)
        new = State(state.step + 1, trained, carried, optimizer)
        fine = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
        return jax.tree.map(lambda a, b: jnp.where(fine, a, b), new, state), metrics

    return step


def _accumulated(
    task: Task, parts: int, state: State, frozen: Params, batch: Any, key: Array
) -> tuple[Params, dict[str, Array]]:
    """Gradients and metrics, with the loss among them: means over the parts of a batch."""

    def of(part: Any, key: Array) -> tuple[Params, dict[str, Array]]:
        def loss(trained: Params) -> tuple[Array, dict[str, Array]]:
            return task.loss(trained, state.carried, frozen, part, state.step, key)

        (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state.trained)
        return gradients, {"loss": value, **metrics}

    if parts == 1:
        return of(batch, key)
    # The parts of a clip's device are taken from its own clips, so that none has to move.
    divided = jax.tree.map(lambda x: rearrange(x, "(b a) ... -> a b ...", a=parts), batch)
    keys = jax.random.split(key, parts)
    first = jax.tree.map(lambda x: x[0], divided)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of, first, keys[0]))

    def add(total: Any, part: tuple[Any, Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, of(*part)), None

    total, _ = jax.lax.scan(add, zeros, (divided, keys))
    return jax.tree.map(lambda x: x / parts, total)


def _record(task: Task, config: LoopConfig) -> dict[str, Any]:
    """What a run is: with another record it would give something else."""
    record = {"task": task.name, "steps": config.steps, "seed": config.seed, **task.record}
    return json.loads(json.dumps(record))  # as it will be read again: tuples become lists


def _look_at(folder: Path, record: dict[str, Any], *, resume: bool) -> int:
    """Sees that the folder is free, or that of the run that goes on; gives the updates it has."""
    path = folder / RUN_FILE
    if not path.exists():
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder} exists and is no run's folder: it has no {RUN_FILE}")
        return 0
    if not resume:
        raise InputError(f"{folder} exists; resume it, or choose another folder")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    keys = [key for key in {**found, **record} if found.get(key) != record.get(key)]
    if keys:
        different = [f"{key} = {found.get(key)}, now {record.get(key)}" for key in keys]
        raise InputError(f"{folder} is another run's: {'; '.join(different)}")
    if not (folder / CHECKPOINTS).is_dir():
        return 0
    with Checkpoints(folder / CHECKPOINTS, read_only=True) as checkpoints:
        return checkpoints.latest or 0


def _feed(
    task: Task, config: LoopConfig, mesh: Mesh, first: int, stack: ExitStack
) -> Iterator[Any]:
    """The batches behind `first` updates, divided over the devices, until `stack` is closed."""
    batches = stack.enter_context(task.feed(first, jax.process_index(), jax.process_count()))
    return (put_batch(batch, mesh, parts=config.accumulate) for batch in batches)


def _open_run(folder: Path, record: dict[str, Any]) -> None:
    """Makes the folder of a run, if it is not there."""
    _wait_for_all("looked")
    if jax.process_index() == 0 and not (folder / RUN_FILE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with new_file(folder / RUN_FILE) as work:
            work.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    _wait_for_all("opened")


def _wait_for_all(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _abstract(task: Task, mesh: Mesh) -> State:
    """The state's shapes and dtypes, and where each array lies."""
    state = jax.eval_shape(lambda: begin(task))
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        *(state, shardings(state, mesh)),
    )


def _place(task: Task, mesh: Mesh, checkpoints: Checkpoints) -> tuple[State, Params]:
    """The state to go on with, and the frozen weights, on the devices of the mesh."""
    frozen = put(task.frozen, shardings(task.frozen, mesh))
    wanted = _abstract(task, mesh)
    if checkpoints.latest is not None:
        return checkpoints.restore(wanted), frozen
    step, *given, optimizer = jax.tree.map(lambda leaf: leaf.sharding, wanted)
    trained, carried = put((task.trained, task.carried), tuple(given), copy=True)
    init = jax.jit(task.optimizer.transform.init, out_shardings=optimizer)
    return State(put(np.zeros((), np.int32), step), trained, carried, init(trained)), frozen
