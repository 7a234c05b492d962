"""Checkpoints of a training run: saved in the background, hashed, whole or not there.

    with Checkpoints(folder, keep=3, best=Best("probe/accuracy", "max")) as checkpoints:
        checkpoints.save(step, state, record, metrics)  # training goes on while this is written
        ...
        state = checkpoints.restore(abstract)  # on any number of devices

Each step is a folder of its name, which orbax writes under a temporary one. All processes of a run
call the same methods in the same order; `folder` is one that they share.
"""

import contextlib
import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import lax
from orbax.checkpoint.checkpoint_managers import (
    AnyPreservationPolicy,
    BestN,
    LatestN,
    PreservationPolicy,
)

from jvjepa.errors import CheckpointError, ConfigError, InputError
from jvjepa.train.task import Best
from jvjepa.typing import Array
from jvjepa.weights import check_names

_log = logging.getLogger(__name__)

PyTree = Any

_STATE, _CONTENTS = "state", "contents"  # what is stored of a step
_REMOVED = ".removed"  # where old steps go in one move, to be deleted there
_LOOK = 0.1  # seconds after which a process of several looks whether its save has failed
_SEEDS = (0x9E3779B9, 0xC2B2AE3D)
_NOT_WRITTEN = (OSError, ValueError, jax.errors.JaxRuntimeError)  # tensorstore has ValueErrors
_UNREADABLE = (OSError, ValueError, KeyError, AttributeError)
_KINDS = "bool uint4 int8 uint8 int16 uint16 float16 bfloat16 int32 uint32 float32".split()


def content_hash(x: Array) -> tuple[Array, Array]:
    """Hashes an array where it lies, so that the result does not depend on how it is distributed.

    The hash is the sum modulo 2^32 of mix(bits ^ place) over the elements. Whole numbers add up to
    the same in any order. For a given place the term is a bijection of the element's bits, as `mix`
    is one (murmur3's finaliser): a change of one element always changes its term, no other, and
    thus the sum. Other changes are missed with a probability of about 2^-64, since there are two
    sums that mix places differently. Places are mixed axis by axis: one number for an element
    could pass 2^32.

    Args:
        x: any shape with axes below 2^32; bool, uint4, or elements of 8, 16 or 32 bits.

    Returns:
        uint32 [] twice.

    Raises:
        InputError: `x` has another dtype or a longer axis.
    """
    if x.dtype.name not in _KINDS:
        raise InputError(f"an array of {x.dtype.name} has no hash; it must be {', '.join(_KINDS)}")
    if max(x.shape, default=0) >= 2**32:
        raise InputError(f"an array {list(x.shape)} has no hash; an axis must be below 2^32")
    unsigned = f"uint{8 * x.dtype.itemsize}"
    whole = x.dtype.name in ("bool", "uint4")  # these two have no words of their own
    words = x if whole else lax.bitcast_convert_type(x, jnp.dtype(unsigned))
    bits = words.astype(jnp.uint32)

    def total(seed: int) -> Array:
        place = jnp.full(bits.shape, seed, jnp.uint32)
        for axis in range(bits.ndim):
            place = _mix(place ^ lax.broadcasted_iota(jnp.uint32, bits.shape, axis))
        return jnp.sum(_mix(bits ^ place), dtype=jnp.uint32)

    return total(_SEEDS[0]), total(_SEEDS[1])


def _mix(x: Array) -> Array:
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


_content_hash = jax.jit(content_hash)


def hashes(arrays: Mapping[str, Array]) -> dict[str, str]:
    """Hashes arrays on their devices: 16 hexadecimal digits by name, see `content_hash`."""
    pairs = {}
    for name, x in arrays.items():
        try:
            pairs[name] = _content_hash(x)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
    return {name: f"{a:08x}{b:08x}" for name, (a, b) in jax.device_get(pairs).items()}


def flat(tree: PyTree) -> dict[str, Any]:
    """Leaves by name: "trained/encoder/norm/scale", "optimizer/0/count"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) < len(leaves):
        raise InputError(f"{len(leaves)} leaves have {len(named)} names; each must have its own")
    return named


class Checkpoints:
    """The checkpoints of one run, in one folder.

    Args:
        folder: of all steps; made if it is not there.
        keep: how many of the latest are kept, 1 or more.
        best: the best by this metric is kept beside them; None keeps none.
        read_only: change nothing in the folder, which must exist. Otherwise what an unfinished save
            has left is removed, so that no other run may be saving there.

    Raises:
        ConfigError: `keep` or `best` is impossible.
        CheckpointError: the folder cannot be read.
    """

    def __init__(
        self, folder: Path, *, keep: int = 1, best: Best | None = None, read_only: bool = False
    ) -> None:
        """Looks at what is there."""
        if type(keep) is not int or keep < 1:
            raise ConfigError(f"keep = {keep!r}; it must be a whole number above 0")
        if best is not None and best.mode not in ("max", "min"):
            raise ConfigError(f"Best.mode = {best.mode!r}; it must be max or min")
        self.folder = Path(folder).absolute()
        if not self.folder.is_dir() and (read_only or self.folder.exists()):
            raise CheckpointError(f"{self.folder} is no folder of checkpoints")
        self._keep, self._best, self._read_only = keep, best, read_only
        self._saving: int | None = None
        logging.getLogger("absl").addFilter(_failures)  # stays: threads may fail later still
        self._manager: ocp.CheckpointManager | None = self._open()

    def _open(self) -> ocp.CheckpointManager:
        if not self._read_only:
            self._sweep()
        for step in self.steps:  # orbax, which reads these, would not say which one is damaged
            path = self.folder / str(step) / "metrics" / "metrics"
            if self._json(step, path) != self._read(step)["metrics"]:
                raise self._damage(step, f"{path} is not what was saved")
        kept: list[PreservationPolicy] = [LatestN(self._keep)]
        if self._best is not None:
            kept.append(BestN(get_metric_fn=self._score, n=1))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy(kept),
            best_fn=self._score,
            todelete_subdir=_REMOVED,
            cleanup_tmp_directories=not self._read_only,
            create=not self._read_only,
        )
        return ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and jax.process_count() > 1:
            return  # a save ends when all processes have; the others may be dead
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            _log.error("%s", failure)  # it must not hide the error that ends the run

    @property
    def steps(self) -> list[int]:
        """The steps that are whole on the disk, ascending."""
        found = ocp.path.step.standard_name_format().find_all(self.folder)
        return sorted(step.step for step in found)

    @property
    def latest(self) -> int | None:
        """The last step that is whole on the disk, or None."""
        return max(self.steps, default=None)

    @property
    def best_step(self) -> int | None:
        """The best step that is whole on the disk, the last of equal ones; None if none has one."""
        scores = {step: self._score(self._read(step)["metrics"]) for step in self.steps}
        rated = [step for step, score in scores.items() if score > -math.inf]
        return max(rated, key=lambda step: (scores[step], step), default=None)

    def save(
        self,
        step: int,
        state: PyTree,
        record: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Begins to save a step; waits for the one before, and until `state` may be donated.

        Args:
            step: updates made; more than at the last save.
            state: a tree of arrays.
            record: what else belongs to the step, as JSON knows it.
            metrics: by which the best step is told; None if nothing was measured.

        Raises:
            CheckpointError: this step, or the one before, could not be written.
            InputError: an argument cannot be saved.
        """
        if self._read_only:
            raise InputError(f"{self.folder} was opened to be read only; step {step} is not saved")
        self.wait()
        latest = self.latest
        if latest is not None and step <= latest:
            raise InputError(f"step = {step}; {self.folder} has {latest}, and steps must ascend")
        measured = {name: float(value) for name, value in (metrics or {}).items()}
        measured = {name: x if math.isfinite(x) else None for name, x in measured.items()}
        if self._best is not None and measured and self._best.metric not in measured:
            right = ", ".join(measured)
            raise InputError(f"Best.metric = {self._best.metric!r}; the metrics are {right}")
        arrays = flat(state)
        contents = _contents(arrays, record, measured)
        if self._manager is None:
            self._manager = self._open()
        _failures.last = None
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{
                        _STATE: ocp.args.StandardSave(arrays),
                        _CONTENTS: ocp.args.JsonSave(contents),
                    }
                ),
                metrics=measured,
                force=True,
            )
        except _NOT_WRITTEN as error:
            raise self._failure(step, error) from error
        self._saving = step

    def wait(self) -> None:
        """Waits until the last save is whole on the disk.

        Raises:
            CheckpointError: it could not be written.
        """
        if self._saving is None:
            return
        try:
            self._wait_for_orbax()
        except _NOT_WRITTEN as error:
            raise self._failure(self._saving, error) from error
        self._saving = None
        self._sweep()

    def _wait_for_orbax(self) -> None:
        # Where one of several processes cannot write, orbax waits there for the others, and in the
        # others for that one. It has logged the reason before.
        while jax.process_count() > 1 and self._manager.is_saving_in_progress():
            if _failures.last is not None:
                raise _failures.last
            time.sleep(_LOOK)
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends the threads that save.

        Raises:
            CheckpointError: the last save could not be written.
        """
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def _failure(self, step: int, error: Exception) -> CheckpointError:
        """What to raise where a step was not saved; another save begins with a manager anew."""
        manager, self._manager, self._saving = self._manager, None, None
        if jax.process_count() == 1:  # it would wait for the others
            with contextlib.suppress(*_NOT_WRITTEN):  # it says the same again
                manager.close()
        last = self.latest
        whole = "no step is whole" if last is None else f"the last whole one is step {last}"
        return CheckpointError(f"{self.folder}: step {step} was not saved, {whole}: {_line(error)}")

    def _sweep(self) -> None:
        """Deletes the steps that are no longer kept."""
        if jax.process_index() == 0 and (self.folder / _REMOVED).exists():
            shutil.rmtree(self.folder / _REMOVED)

    def record(self, step: int | None = None) -> dict[str, Any]:
        """Reads the record that was saved with a step.

        Args:
            step: which; None takes the latest.

        Raises:
            CheckpointError: there is no such step, or it is damaged.
        """
        return self._read(self._existing(step))["record"]

    def restore(self, abstract: PyTree, step: int | None = None) -> PyTree:
        """Reads a state back, onto whatever devices; it is bit by bit what was saved.

        Args:
            abstract: a tree of jax.ShapeDtypeStruct with shardings.
            step: which; None takes the latest.

        Returns:
            A tree of arrays like `abstract`.

        Raises:
            CheckpointError: there is no such step, it is damaged, or has other names, shapes or
                dtypes than `abstract`.
        """
        self.wait()
        step = self._existing(step)
        wanted = flat(abstract)
        for name, x in wanted.items():
            if x.sharding is None:
                raise InputError(f"abstract {name} has no sharding; one would be right")
        stored = self._read(step)["arrays"]
        check_names(
            str(self.folder / str(step)),
            {f"{name} {x['dtype']}": tuple(x["shape"]) for name, x in stored.items()},
            {f"{name} {x.dtype.name}": x.shape for name, x in wanted.items()},
        )
        if self._manager is None:
            self._manager = self._open()
        args = ocp.args.Composite(**{_STATE: ocp.args.StandardRestore(wanted)})
        try:
            arrays = self._manager.restore(step, args=args)[_STATE]
        except Exception as error:  # orbax raises bare ones for what it cannot read
            if not isinstance(error, _UNREADABLE) and type(error) is not Exception:
                raise
            raise self._damage(step, _line(error)) from error
        found = hashes(arrays)
        changed = [name for name, x in stored.items() if found[name] != x["hash"]]
        if changed:
            raise self._damage(step, f"not what was saved: {', '.join(changed)}")
        return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[x] for x in wanted])

    def _existing(self, step: int | None) -> int:
        steps = self.steps
        if not steps:
            raise CheckpointError(f"{self.folder} has no checkpoint")
        if step is not None and step not in steps:
            right = ", ".join(map(str, steps))
            raise CheckpointError(f"{self.folder} has no step {step}; it has {right}")
        return steps[-1] if step is None else step

    def _read(self, step: int) -> dict[str, Any]:
        """What is stored beside the arrays of a step."""
        path = self.folder / str(step) / _CONTENTS / "metadata"
        contents = self._json(step, path)
        if contents.pop("sha256", None) != _sha256(contents):
            raise self._damage(step, f"{path} is not what was saved")
        return contents

    def _score(self, metrics: Mapping[str, float | None]) -> float:
        """More is better; what was not measured, or was not finite, is the worst."""
        value = None if self._best is None else metrics.get(self._best.metric)
        if value is None:
            return -math.inf
        return value if self._best.mode == "max" else -value

    def _json(self, step: int, path: Path) -> dict[str, Any]:
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self._damage(step, f"{path} cannot be read: {error}") from error
        if not isinstance(value, dict):
            raise self._damage(step, f"{path} is not what was saved")
        return value

    def _damage(self, step: int, what: str) -> CheckpointError:
        others = ", ".join(str(x) for x in self.steps if x != step)
        rest = f"the steps {others} are there too" if others else "no other step is there"
        return CheckpointError(f"{self.folder / str(step)} is damaged, remove it; {rest}: {what}")


class _Failures(logging.Filter):
    """Lets no traceback of a save through, which orbax logs several times before it raises it.

    Attributes:
        last: of them, or None.
    """

    last: BaseException | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is to be logged."""
        failed = record.exc_info is not None or "raised an exception" in record.getMessage()
        if not (failed and record.levelno >= logging.ERROR and "orbax" in record.pathname):
            return True
        if record.exc_info is not None:
            self.last = record.exc_info[1]
        return False


_failures = _Failures()  # one: of several filters the first would keep what it saw from the others


def _contents(
    arrays: Mapping[str, Array], record: Mapping[str, Any], metrics: Mapping[str, float | None]
) -> dict[str, Any]:
    """What is stored beside the arrays; the sum says whether it is still the same."""
    for name, x in arrays.items():
        if not isinstance(x, jax.Array) or x.size == 0:
            raise InputError(f"state {name} is {x!r}; it must be an array of one or more elements")
    found = hashes(arrays)
    table = {
        name: {"shape": list(x.shape), "dtype": x.dtype.name, "hash": found[name]}
        for name, x in arrays.items()
    }
    contents = {"record": record, "metrics": metrics, "arrays": table}
    try:
        contents = json.loads(json.dumps(contents, allow_nan=False))  # a copy: written later
    except (TypeError, ValueError) as error:
        raise InputError(f"record is not JSON: {error}") from None
    return {**contents, "sha256": _sha256(contents)}


def _sha256(contents: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()


def _line(error: Exception) -> str:
    """One line of an error of orbax, without tensorstore's specifications."""
    error = error.__cause__ if type(error) is Exception and error.__cause__ else error
    text = str(error).split(" [tensorstore_spec")[0].splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
