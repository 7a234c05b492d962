"""Runs on several devices and in several processes give what they give on one device.

What is compared comes from processes of their own, of `worker_train.py`, with simulated devices.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import relative_error
from tasks import toy_task
from worker_train import LORA, lora_model

from jvjepa.adapters import load_adapters
from jvjepa.errors import ConfigError
from jvjepa.train.checkpoint import flat
from jvjepa.train.distributed import Processes
from jvjepa.train.loop import LoopConfig, train
from jvjepa.train.synthetic import SyntheticConfig, write_videos

TOLERANCE = 1e-5
MESHES = {
    "8x1x1": {},
    "2x4x1": {"fsdp": 4},
    "2x2x2": {"fsdp": 2, "model": 2},
    "1x1x8": {"model": 8},
}
QUICK = [("toy", mesh) for mesh in MESHES]
QUICK += [("lora", "2x2x2"), ("pretrain", "8x1x1")]
SLOW = [("lora", "8x1x1"), ("lora", "2x4x1"), ("lora", "1x1x8")]
SLOW += [("pretrain", "2x4x1"), ("pretrain", "2x2x2"), ("pretrain", "1x1x8")]
# Programs that are run four times are not worth many optimizations.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
WORKER = Path(__file__).parent / "worker_train.py"


def start(
    runs: list[dict[str, Any]], *, devices: int = 1, processes: dict[str, Any] | None = None
) -> subprocess.Popen[str]:
    asked = {"runs": runs, "processes": processes or {}}
    flags = f"{FLAGS} --xla_force_host_platform_device_count={devices}"
    env = {**os.environ, "XLA_FLAGS": flags}
    if devices == 8:  # collectives that wait for each other take all threads that XLA has else
        env |= {"JAX_CPU_ENABLE_ASYNC_DISPATCH": "false", "NPROC": "64"}
    return subprocess.Popen(
        [sys.executable, str(WORKER), json.dumps(asked)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(*workers: subprocess.Popen[str]) -> list[tuple[int, str]]:
    """The exit codes, and what stood on stderr."""
    try:
        errors = [worker.communicate(timeout=240)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    return [(worker.returncode, error) for worker, error in zip(workers, errors, strict=True)]


def pair(runs: list[dict[str, Any]], devices: int = 2) -> list[tuple[int, str]]:
    """Two processes with so many devices each."""
    where = f"localhost:{free_port()}"
    common = {"distributed": True, "coordinator": where, "processes": 2}
    workers = [start(runs, devices=devices, processes={**common, "process": i}) for i in range(2)]
    return ended(*workers)


def free_port() -> int:
    with socket.socket() as here:
        here.bind(("localhost", 0))
        return here.getsockname()[1]


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def assert_equal(folder: Path, reference: Path, steps: int = 4) -> None:
    """Losses and parameters are the same but for rounding."""
    found, right = losses(folder), losses(reference)
    assert len(found) == len(right) == steps
    np.testing.assert_allclose(found, right, rtol=TOLERANCE)
    with np.load(folder / "trained.npz") as one, np.load(reference / "trained.npz") as other:
        assert one.files == other.files
        whole = [np.concatenate([of[name].ravel() for name in of.files]) for of in (one, other)]
    assert relative_error(*whole) < TOLERANCE


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def videos(root: Path) -> Path:
    sizes = SyntheticConfig(num_frames=10, height=32, width=48)
    return write_videos(root / "videos", 16, sizes)


def run_of(task: str, folder: Path, videos: Path, **options: Any) -> dict[str, Any]:
    return {"task": task, "folder": str(folder), "videos": str(videos), **options}


@pytest.fixture(scope="module")
def one_device(root: Path, videos: Path) -> Path:
    """Runs of all tasks on one device, beside quick ones on eight."""
    tasks = ("toy", "lora", "pretrain")
    one = start([run_of(task, root / "one" / task, videos) for task in tasks])
    eight = start([meshed(root, videos, *case) for case in QUICK], devices=8)
    for code, error in ended(one, eight):
        assert code == 0, error[-3000:]  # XLA warns of what it moves
    return root / "one"


def meshed(root: Path, videos: Path, task: str, mesh: str) -> dict[str, Any]:
    return run_of(task, root / mesh / task, videos, mesh=MESHES[mesh])


@pytest.mark.parametrize(("task", "mesh"), QUICK)
def test_eight_devices_give_what_one_gives(
    root: Path, one_device: Path, task: str, mesh: str
) -> None:
    assert_equal(root / mesh / task, one_device / task)


@pytest.mark.slow
def test_other_meshes_give_it_too(root: Path, videos: Path, one_device: Path) -> None:
    [(code, error)] = ended(start([meshed(root, videos, *case) for case in SLOW], devices=8))
    assert code == 0, error[-3000:]
    for task, mesh in SLOW:
        assert_equal(root / mesh / task, one_device / task)


@pytest.fixture(scope="module")
def toy(root: Path) -> list[float]:
    """The losses of eight updates in one process on one device."""
    train(toy_task(steps=8), LoopConfig(steps=8, log_every=1), root / "toy")
    return losses(root / "toy")


@pytest.fixture(scope="module")
def pairs(root: Path, videos: Path, toy: list[float]) -> dict[str, list[tuple[int, str]]]:
    """What two pairs of processes have done, one after the other.

    Of the first, one process is killed. The second trains adapters, goes on with the run of the
    first, and with one that a single device has begun, and is then asked to stop by a signal to one
    of them.
    """
    options = {"steps": 8, "save_every": 2}
    begun = run_of("toy", root / "begun", videos, **options)
    alone = ended(start([{**begun, "signals": {"0": [signal.SIGTERM, 4]}}]))
    killed = run_of("toy", root / "killed", videos, **options)
    # Of two devices in one process, Gloo would tell only one that a third is gone.
    first = pair([{**killed, "signals": {"1": [signal.SIGKILL, 6]}}], devices=1)
    stopped = run_of("toy", root / "stopped", videos, **options)
    second = [
        run_of("lora", root / "pair" / "lora", videos, mesh={"fsdp": 4}),
        {**killed, "resume": True},
        {**begun, "resume": True},
        {**stopped, "signals": {"1": [signal.SIGTERM, 4]}},
    ]
    return {"alone": alone, "first": first, "second": pair(second)}


def test_two_processes_train_adapters_as_one_does(
    root: Path, pairs: dict[str, Any], one_device: Path
) -> None:
    folder = root / "pair" / "lora"
    assert_equal(folder, one_device / "lora")
    found, right = (load_adapters(of / "lora" / "adapters") for of in (root / "pair", one_device))
    assert found.config == right.config == LORA.lora
    for name, x in flat(right.lora).items():
        np.testing.assert_allclose(flat(found.lora)[name], x, rtol=1e-4, atol=1e-6)
    assert found.base == right.base
    assert lora_model().config == lora_model().config
    assert len(list((folder / "tensorboard").iterdir())) == 1  # of process 0 alone


def test_a_process_that_is_killed_ends_the_others_with_an_error(
    root: Path, pairs: dict[str, Any], toy: list[float]
) -> None:
    (code, error), (killed, _) = pairs["first"]
    assert killed == -signal.SIGKILL
    assert code == 2, error
    # It is met where the metrics of an update are waited for, or where signals are asked for.
    message = r"process 0: error: (step [456]: )?another process of the run has died \(.*\); "
    message += (
        r"(checkpoints in .*/killed/checkpoints: the newest is of step \d|start all again, .*)\n"
    )
    assert re.fullmatch(message, error), error
    assert losses(root / "killed") == pytest.approx(toy, rel=TOLERANCE)  # it went on


def test_a_signal_to_one_process_stops_all_with_one_checkpoint(
    root: Path, pairs: dict[str, Any], toy: list[float]
) -> None:
    for i, (code, error) in enumerate(pairs["second"]):
        assert code == 130, error
        assert error == f"process {i}: interrupted: {root / 'stopped'} has a checkpoint of step 4\n"
    assert losses(root / "stopped") == pytest.approx(toy[:4], rel=TOLERANCE)
    assert max(int(x.name) for x in (root / "stopped" / "checkpoints").iterdir()) == 4


def test_one_device_goes_on_where_four_were(
    root: Path, pairs: dict[str, Any], toy: list[float], tmp_path: Path
) -> None:
    assert len(pairs["second"]) == 2
    shutil.copytree(root / "stopped", tmp_path / "run")
    config = LoopConfig(steps=8, save_every=2, log_every=1)
    train(toy_task(steps=8), config, tmp_path / "run", resume=True)
    assert losses(tmp_path / "run") == pytest.approx(toy, rel=TOLERANCE)


def test_four_devices_go_on_where_one_was(
    root: Path, pairs: dict[str, Any], toy: list[float]
) -> None:
    assert len(pairs["second"]) == 2
    assert losses(root / "begun") == pytest.approx(toy, rel=TOLERANCE)


@pytest.mark.slow
def test_when_process_0_dies_the_others_end_too(root: Path, toy: list[float]) -> None:
    run = run_of("toy", root / "headless", root, steps=8, signals={"0": [signal.SIGKILL, 6]})
    (killed, _), (code, error) = pair([run])
    assert killed == -signal.SIGKILL
    # JAX aborts them as soon as its service, which is in process 0, is gone.
    assert code in (2, -signal.SIGABRT)
    assert "another task died" in error or "has died" in error
    assert [code for code, _ in pair([{**run, "signals": None, "resume": True}])] == [0, 0]
    assert losses(root / "headless") == pytest.approx(toy, rel=TOLERANCE)


@pytest.mark.slow
def test_a_full_disk_of_one_process_ends_all(root: Path, toy: list[float]) -> None:
    before = run_of("toy", root / "before", root, steps=4)  # its checkpoints must not be in the way
    run = run_of("toy", root / "full", root, steps=8, full=[1, 4])
    (other, _), (code, error) = pair([before, run], devices=1)
    assert code == 2, error
    # What it is told of depends on whether step 2 was still being written.
    message = r"process 1: error: .*: step [24] was not saved, .*File too large.*\n"
    assert re.fullmatch(message, error), error
    assert other in (2, -signal.SIGABRT)  # which of the two is a matter of what JAX meets first
    assert [code for code, _ in pair([{**run, "full": None, "resume": True}])] == [0, 0]
    assert losses(root / "full") == pytest.approx(toy, rel=TOLERANCE)


@pytest.mark.parametrize("process", [0, 1])
def test_processes_that_never_come(process: int) -> None:
    where = f"localhost:{free_port()}"
    fields = {"distributed": True, "coordinator": where, "processes": 2, "process": process}
    [(code, error)] = ended(start([], processes={**fields, "patience": 1}))
    assert code == 2, error
    message = f"process {process}: error: the processes do not find each other: waited 1 s for "
    assert error.startswith(f"{message}all 2 at {where}; have all been started?"), error


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"processes": 2}, "give coordinator, processes and process, or none of them"),
        ({"coordinator": "a:1", "processes": 2, "process": 0}, "go with distributed"),
        ({"coordinator": "host", "processes": 2, "process": 0}, "'host'; it must be host:port"),
        ({"coordinator": "a:99999", "processes": 2, "process": 0}, "it must be host:port"),
        ({"coordinator": "a:1", "processes": 0, "process": 0}, "processes = 0; it must be 1"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, "process = 2; it must be 0 to 1"),
        ({"patience": 0}, "patience = 0; it must be 1 s or more"),
    ],
)
def test_impossible_processes(fields: dict[str, Any], message: str) -> None:
    distributed = message != "go with distributed"
    with pytest.raises(ConfigError, match=re.escape(message)):
        Processes(distributed=distributed, **fields)


def test_a_single_process_joins_nobody() -> None:
    with pytest.raises(ZeroDivisionError), Processes().joined():
        raise ZeroDivisionError  # and does not end the program
