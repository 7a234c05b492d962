"""Checkpoints: whole or not there, and the same bits on any devices."""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import DTYPES, random_array
from states import RECORD, abstract_of, assert_same_bits, make_state, two_steps

from jvjepa.errors import CheckpointError, ConfigError, InputError
from jvjepa.train.checkpoint import Checkpoints
from jvjepa.train.task import Best
from jvjepa.typing import Array


def run_python(script: str, *arguments: object, devices: int = 1) -> subprocess.Popen[str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output(process: subprocess.Popen[str]) -> list[str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert err == ""
    return out.splitlines()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return two_steps(tmp_path / "run")


# --- There and back ------------------------------------------------------------------------------


def test_round_trip(saved: Path) -> None:
    with Checkpoints(saved, keep=2) as checkpoints:
        assert (checkpoints.steps, checkpoints.latest) == ([3, 5], 5)
        assert checkpoints.record() == checkpoints.record(3) == RECORD
        assert_same_bits(checkpoints.restore(abstract_of(make_state(0))), make_state(5, seed=1))
        assert_same_bits(checkpoints.restore(abstract_of(make_state(0)), 3), make_state(3))


def test_every_dtype_and_odd_values(tmp_path: Path) -> None:
    state = {name: jnp.asarray(random_array(name, (3, 1, 5))) for name in DTYPES}
    state["odd"] = jnp.asarray(np.array([0x7FC01234, 0xFFC00001, 0x80000000, 1], np.uint32)).view(
        jnp.float32
    )  # two NaNs with payloads, -0.0, and a subnormal number
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
        assert_same_bits(checkpoints.restore(abstract_of(state)), state)


def test_state_may_be_donated_while_it_is_being_saved(tmp_path: Path) -> None:
    move = jax.jit(
        lambda x: jax.tree.map(lambda leaf: leaf + leaf.dtype.type(1), x), donate_argnums=0
    )
    state = make_state(0)
    with Checkpoints(tmp_path, keep=5) as checkpoints:
        for step in range(1, 5):
            state = move(state)
            checkpoints.save(step, state, {})
        again = make_state(0)
        for step in range(1, 5):
            again = move(again)
            assert_same_bits(checkpoints.restore(abstract_of(again), step), again)


def test_record_is_that_of_the_time_of_saving(tmp_path: Path) -> None:
    record = {"losses": [1.0]}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, make_state(1), record)
        record["losses"].append(2.0)
        checkpoints.wait()
        assert checkpoints.record() == {"losses": [1.0]}


SHARDED = """
import sys, jax, numpy as np, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from pathlib import Path
from jvjepa.train.checkpoint import Checkpoints, flat, hashes
task, folder, rows, columns = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
mesh = Mesh(np.array(jax.devices()).reshape(rows, columns), ("data", "model"))
values = {"a": np.arange(64 * 16, dtype=np.float32).reshape(64, 16) ** 1.5,
          "b": {"c": np.arange(32, dtype=np.int32)}, "d": np.float32(7)}
specs = {"a": P("data", "model"), "b": {"c": P(("model", "data"))}, "d": P()}
shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), specs)
state = jax.tree.map(jax.device_put, values, shardings)
state["e"] = state["a"].astype(jnp.bfloat16)
shardings["e"] = NamedSharding(mesh, P(None, "data"))
state["e"] = jax.device_put(state["e"], shardings["e"])
with Checkpoints(folder, keep=1) as checkpoints:
    if task == "save":
        checkpoints.save(1, state, {})
    else:
        abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
        restored = checkpoints.restore(abstract)
        for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(state)):
            assert x.sharding == y.sharding, (x.sharding, y.sharding)
            assert np.array_equal(x, y)
print(hashes(flat(state)))
"""


def test_restores_onto_other_numbers_of_devices(tmp_path: Path) -> None:
    first = output(run_python(SHARDED, "save", tmp_path / "8", 4, 2, devices=8))
    others = [(2, 1, 2), (1, 1, 1)]
    processes = [
        run_python(SHARDED, "restore", tmp_path / "8", rows, columns, devices=devices)
        for devices, rows, columns in others
    ]
    assert [output(process) for process in processes] == [first] * len(others)


# --- What is kept --------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "sign"), [("max", 1), ("min", -1)])
def test_keeps_the_latest_and_the_best(tmp_path: Path, mode: str, sign: int) -> None:
    scores = [0.1, 0.9, float("nan"), 0.9, 0.2, None, 0.3, float("inf")]
    best = Best("probe/accuracy", mode)
    seen = []
    for i, score in enumerate(scores):
        with Checkpoints(tmp_path, keep=2, best=best) as checkpoints:  # opened anew each time
            metrics = None if score is None else {"probe/accuracy": sign * score, "other": 1.0}
            checkpoints.save(10 * i, make_state(i), {}, metrics)
            checkpoints.wait()
            seen.append((checkpoints.steps, checkpoints.best_step))
            assert checkpoints.latest == 10 * i
            restored = checkpoints.restore(abstract_of(make_state(0)), checkpoints.best_step)
            assert int(restored.step) == checkpoints.best_step // 10
    assert seen == [
        ([0], 0),
        ([0, 10], 10),
        ([10, 20], 10),
        ([20, 30], 30),
        ([30, 40], 30),
        ([30, 40, 50], 30),
        ([30, 50, 60], 30),
        ([30, 60, 70], 30),
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["30", "60", "70"]


def test_best_is_none_where_nothing_was_measured(saved: Path) -> None:
    with Checkpoints(saved, keep=2) as checkpoints:
        assert checkpoints.best_step is None
    with Checkpoints(saved, keep=2, best=Best("loss", "min")) as checkpoints:
        assert checkpoints.best_step is None
    with Checkpoints(saved, keep=2, best=Best("accuracy", "max")) as checkpoints:
        assert checkpoints.best_step == 3


def test_half_written_steps_are_none(saved: Path) -> None:
    shutil.copytree(saved / "5", saved / "9.orbax-checkpoint-tmp")
    shutil.copytree(saved / "3", saved / ".removed" / "1")
    (saved / "notes.txt").write_text("mine")
    with Checkpoints(saved, keep=2, read_only=True) as checkpoints:
        assert checkpoints.steps == [3, 5]
    assert (saved / "9.orbax-checkpoint-tmp").exists()
    with Checkpoints(saved, keep=2) as checkpoints:
        assert checkpoints.latest == 5
        checkpoints.save(9, make_state(9), RECORD)
        assert_same_bits(checkpoints.restore(abstract_of(make_state(0))), make_state(9))
    assert sorted(path.name for path in saved.iterdir()) == ["5", "9", "notes.txt"]


def test_a_reader_changes_nothing(saved: Path) -> None:
    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in saved.rglob("*")}

    before = state()
    with Checkpoints(saved, keep=1, read_only=True) as checkpoints:
        assert_same_bits(checkpoints.restore(abstract_of(make_state(0)), 3), make_state(3))
        with pytest.raises(InputError, match="read only; step 6 is not saved"):
            checkpoints.save(6, make_state(6), RECORD)
    assert state() == before


# --- Bad input -----------------------------------------------------------------------------------


def test_nothing_there(tmp_path: Path, saved: Path) -> None:
    with Checkpoints(tmp_path / "new", keep=1) as checkpoints:
        assert (checkpoints.steps, checkpoints.latest, checkpoints.best_step) == ([], None, None)
        for read in (checkpoints.record, lambda: checkpoints.restore(abstract_of(make_state(0)))):
            with pytest.raises(CheckpointError, match=r"new has no checkpoint$"):
                read()
    with Checkpoints(saved, keep=2) as checkpoints:
        for read in (
            checkpoints.record,
            lambda x: checkpoints.restore(abstract_of(make_state(0)), x),
        ):
            with pytest.raises(CheckpointError, match=r"run has no step 4; it has 3, 5$"):
                read(4)
    (tmp_path / "file").touch()
    for path, read_only in ((tmp_path / "file", False), (tmp_path / "none", True)):
        with pytest.raises(CheckpointError, match=f"{path.name} is no folder of checkpoints"):
            Checkpoints(path, keep=1, read_only=read_only)
    assert not (tmp_path / "none").exists()


def test_another_architecture(saved: Path) -> None:
    state = make_state(0)
    encoder = dict(state.trained["encoder"])
    del encoder["norm"]
    trained = {
        "encoder": {**encoder, "new": jnp.zeros((2,))},
        "head": {"kernel": jnp.zeros((7, 4))},
    }
    carried = {"teacher": jnp.zeros((33, 9))}
    wrong = abstract_of(state._replace(trained=trained, carried=carried))
    with Checkpoints(saved, keep=2) as checkpoints:
        with pytest.raises(CheckpointError) as raised:
            checkpoints.restore(wrong, 3)
        message = str(raised.value)
        assert message.startswith(f"{saved / '3'}: 6 tensors do not fit: ")
        assert "\n" not in message
        for part in (
            "missing trained/encoder/new float32 [2]",
            "missing carried/teacher float32 [33, 9]",
            "unexpected carried/teacher bfloat16 [33, 9]",
            "unexpected trained/encoder/norm/bias float32 [5]",
            "unexpected trained/encoder/norm/scale float32 [5]",
            "trained/head/kernel float32 has shape [7, 3], [7, 4] would be right",
        ):
            assert part in message
        none = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        with pytest.raises(InputError, match="abstract step has no sharding"):
            checkpoints.restore(none)


def test_what_cannot_be_saved(saved: Path) -> None:
    state = make_state(6)
    with Checkpoints(saved, keep=2, best=Best("accuracy", "max")) as checkpoints:
        for step in (4, 5):
            with pytest.raises(InputError, match=f"step = {step}; .*run has 5, and steps must asc"):
                checkpoints.save(step, state, RECORD)
        with pytest.raises(InputError, match=r"Best.metric = 'accuracy'; the metrics are loss$"):
            checkpoints.save(6, state, RECORD, {"loss": 1.0})
        for record in ({"path": Path("x")}, {"rate": float("nan")}):
            with pytest.raises(InputError, match="record is not JSON"):
                checkpoints.save(6, state, record)
        for leaf in (np.ones(3, np.float32), jnp.zeros((0, 2)), 3):
            with pytest.raises(InputError, match=r"state a is .* must be an array of one or more"):
                checkpoints.save(6, {"a": leaf}, RECORD)
        with pytest.raises(InputError, match=r"^a: an array of complex64 has no hash"):
            checkpoints.save(6, {"a": jnp.ones(3, jnp.complex64)}, RECORD)
        with pytest.raises(InputError, match="2 leaves have 1 names"):
            checkpoints.save(6, {"a": {"b": state.step}, "a/b": state.step}, RECORD)
    assert sorted(path.name for path in saved.iterdir()) == ["3", "5"]


@pytest.mark.parametrize("keep", [0, -1, 1.5, True])
def test_impossible_options(tmp_path: Path, keep: float) -> None:
    with pytest.raises(ConfigError, match=r"keep = .*; it must be a whole number above 0"):
        Checkpoints(tmp_path / "new", keep=keep)
    with pytest.raises(ConfigError, match=r"Best.mode = 'most'; it must be max or min"):
        Checkpoints(tmp_path / "new", keep=1, best=Best("accuracy", "most"))
    assert not (tmp_path / "new").exists()


# --- A full disk ---------------------------------------------------------------------------------


FULL = """
import resource, signal, sys, jax, jax.numpy as jnp
from pathlib import Path
from jvjepa.errors import CheckpointError
from jvjepa.train.checkpoint import Checkpoints
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
state = {"x": jax.random.normal(jax.random.key(0), (300, 300)), "y": jnp.int32(1)}
def allow(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
def attempt(act):
    try:
        act()
        print("ok", flush=True)
    except CheckpointError as error:
        print(error, flush=True)
def ended():
    with Checkpoints(folder, keep=1) as checkpoints:
        allow(limit)
        checkpoints.save(9, state, {})
        raise KeyError("the run")
checkpoints = Checkpoints(folder, keep=1)
checkpoints.save(1, state, {})
checkpoints.wait()
allow(limit)
attempt(lambda: checkpoints.save(2, state, {}))
attempt(checkpoints.wait)
attempt(lambda: checkpoints.save(3, state, {}))
attempt(lambda: checkpoints.save(4, state, {}))
attempt(lambda: checkpoints.save(5, state, {}))
attempt(checkpoints.close)
attempt(checkpoints.close)
allow(resource.RLIM_INFINITY)
print(checkpoints.steps)
checkpoints.save(6, state, {})
checkpoints.close()
print(checkpoints.steps)
try:
    ended()
except KeyError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [100_000, 60])
def test_full_disk(tmp_path: Path, limit: int) -> None:
    with run_python(FULL, tmp_path / "run", limit) as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    lines = out.splitlines()
    failed = [
        f"{tmp_path}/run: step {n} was not saved, the last whole one is step 1: " for n in range(6)
    ]
    begins = ["ok", failed[2], "ok", failed[3], "ok", failed[5], "ok", "[1]", "[6]", "'the run'"]
    assert len(lines) == len(begins), out
    assert all(line.startswith(begin) for line, begin in zip(lines, begins, strict=True)), out
    # What ended the run was something else. (Beside this line there may be the trace of a callback
    # that tensorstore sends to an event loop which orbax has closed by then.)
    text = f"{tmp_path}/run: step 9 was not saved, the last whole one is step 6: "
    assert err.count(text) == 1, err


# --- Killed at any moment ------------------------------------------------------------------------

LOOP = """
import itertools, sys, jax, jax.numpy as jnp
from pathlib import Path
from jax.sharding import SingleDeviceSharding
from jvjepa.train.checkpoint import Checkpoints
from test_checkpoint import killed_state, move
state = killed_state(0)
one = SingleDeviceSharding(jax.devices()[0])
abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), state)
with Checkpoints(Path(sys.argv[1]), keep=2) as checkpoints:
    if checkpoints.latest is not None:
        state = checkpoints.restore(abstract)
    print("begins", flush=True)
    for step in itertools.count(int(state["step"]) + 1):
        state = move(state)
        checkpoints.save(step, state, {"step": step})
"""


def killed_state(step: int) -> dict[str, Array]:
    """64 MiB that cannot be compressed; every element says which step it is of."""
    keys = jax.random.split(jax.random.key(0), 8)
    noise = {f"x{i}": jax.random.bits(keys[i], (2**21,), jnp.uint32) for i in range(8)}
    return {**{k: x ^ jnp.uint32(step) for k, x in noise.items()}, "step": jnp.uint32(step)}


@functools.partial(jax.jit, donate_argnums=0)
def move(state: dict[str, Array]) -> dict[str, Array]:
    """The state of the next step, in the place of this one."""
    old, new = state["step"], state["step"] + jnp.uint32(1)
    return {name: new if name == "step" else x ^ old ^ new for name, x in state.items()}


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    folder, choose = tmp_path / "run", random.Random(0)
    abstract = abstract_of(killed_state(0))
    leftovers, latest = [], []
    while len(latest) < 24:
        process = subprocess.Popen(
            [sys.executable, "-c", LOOP, folder],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == "begins\n"
        time.sleep(choose.uniform(0.0, 2.0))
        before = max(
            (int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit()), default=0
        )
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        leftovers.append(len(list(folder.glob("*tmp*"))) + len(list(folder.glob(".removed/*"))))
        with Checkpoints(folder, keep=2) as checkpoints:
            assert (checkpoints.latest or 0) >= before
            for step in checkpoints.steps:
                restored = checkpoints.restore(abstract, step)
                assert_same_bits(restored, killed_state(step))
                assert checkpoints.record(step) == {"step": step}
            latest.append(checkpoints.latest or 0)
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(latest[-1] + 1, killed_state(latest[-1] + 1), {})
    assert {int(path.name) for path in folder.iterdir()} == set(checkpoints.steps)
    assert latest == sorted(latest)
    assert latest[-1] > 24
    print(json.dumps({"kills": len(latest), "leftovers": leftovers, "latest": latest}))
