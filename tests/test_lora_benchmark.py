"""The two sides of `benchmarks/lora.py` train the same."""

import dataclasses
import importlib
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from models import relative_error

from jvjepa.parameters import stack_layers
from jvjepa.train.data import Batch

FOLDER = Path(__file__).parent.parent / "benchmarks"
sys.path[:0] = [str(FOLDER), str(FOLDER / "peers")]
lora, speed, worker = map(importlib.import_module, ("lora", "speed", "lora_worker"))
protocol = importlib.import_module("peers.protocol")
Work = importlib.import_module("work").Work

# peft and transformers call each other by old names.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

TINY = Work(kind="train", layers=2, frames=6, resolution=48, batch=2, hidden=64, heads=4, window=2)


def batch(work: Any) -> Batch:
    numbers = np.zeros(work.batch, np.int32)
    return Batch(worker.clip(work), numbers, numbers)


def loss_of_jvjepa(work: Any, *, causal: bool, remat: str) -> tuple[Any, Any]:
    """The loss as a function of what is trained and of what is not, and these."""
    task = worker.jvjepa_task(work, causal=causal, remat=remat)

    def loss(trained: Any, frozen: Any) -> Any:
        step, key = jnp.zeros((), jnp.int32), jax.random.key(0)
        return task.loss(trained, {}, frozen, batch(work), step, key)[0]

    return loss, (task.trained, task.frozen)


def of_jvjepa(work: Any, *, remat: str) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients, stacked, by names as "encoder/blocks/attention/query/a"."""
    loss, inputs = loss_of_jvjepa(work, causal=False, remat=remat)
    value, gradients = jax.jit(jax.value_and_grad(loss))(*inputs)
    stacked = stack_layers(gradients) if work.unrolled else gradients
    return float(value), {k: np.asarray(x) for k, x in flatten_dict(stacked, sep="/").items()}


def of_peft(work: Any, *, remat: str) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients, by peft's names."""
    student = worker.peft_student(work, remat=remat)
    loss = worker.peft_loss(student, torch.from_numpy(worker.clip(work)), work)
    loss.backward()
    return loss.item(), {k: x.grad.numpy() for k, x in worker.adapters(student).items()}


@pytest.mark.parametrize(("remat", "unrolled"), [("none", False), ("block", True)])
def test_losses_and_gradients_are_the_same(remat: str, unrolled: bool) -> None:
    work = dataclasses.replace(TINY, unrolled=unrolled)
    loss, ours = of_jvjepa(work, remat=remat)
    right, theirs = of_peft(work, remat=remat)
    assert loss > 0.05  # the adapters change something
    assert loss == pytest.approx(right, rel=1e-5)
    assert len(ours) == 8
    assert len(theirs) == 8 * work.layers
    for name, gradient in ours.items():
        layer, _, factor = name.removeprefix("encoder/blocks/").rpartition("/")
        path = f"{layer.replace('/', '.')}.lora_{factor.upper()}.weight"
        right = np.stack([theirs[f"encoder.layer.{i}.{path}"].T for i in range(work.layers)])
        assert np.max(np.abs(right)) > 1e-4
        assert relative_error(gradient, right) <= 1e-5


def test_a_causal_student_has_more_to_learn() -> None:
    """A student that sees the past is farther from its teacher than one that sees all."""
    losses = {}
    for causal in (True, False):
        loss, inputs = loss_of_jvjepa(TINY, causal=causal, remat="none")
        losses[causal] = float(jax.jit(loss)(*inputs))
    assert losses[True] > 1.01 * losses[False]


def test_updates_are_the_same() -> None:
    """Clipping and AdamW too: the loss after an update, and after another one."""
    steps = []
    for side in ("jvjepa", "peft"):
        training = worker.SIDES[side](TINY, causal=False, remat="none")
        steps.append([training.step() for _ in range(3)])
    for ours, theirs in zip(*steps, strict=True):
        assert ours == pytest.approx(theirs, rel=lora.TOLERANCE)
    losses = [loss for loss, _ in steps[0]]
    assert steps[0][0][1] > worker.MAX_NORM  # so that there is something to clip
    assert losses[0] / losses[1] > 1.01  # and to learn
    assert losses[1] / losses[2] > 1.01


def test_transformers_has_no_causal_student() -> None:
    with pytest.raises(RuntimeError, match="transformers has no causal V-JEPA 2"):
        worker.peft_training(TINY, causal=True, remat="none")


def fact(*seconds: float, loss: float = 0.5, peak: int | None = 3_000_000_000) -> dict[str, Any]:
    start = {"loss": loss, "gradient norm": 2.0, "loss of the next step": 0.4}
    memory = {"base_bytes": 500_000_000, "peak_bytes": peak}
    about = {"versions": {"peft": "0.21"}, "compile_seconds": 2.5, "call_seconds": 1.0}
    return {**about, **memory, "start": start, "seconds": list(seconds)}


def result(**competitors: dict[str, Any]) -> dict[str, Any]:
    return {"competitors": competitors, "left_out": {}}


def test_sides_that_differ_are_refused() -> None:
    near = result(jvjepa=fact(1.0, loss=0.5), peft=fact(1.0, loss=0.50002))
    assert lora.difference(near) == pytest.approx(4e-5, rel=0.01)
    for loss in (0.5001, float("nan")):
        far = result(jvjepa=fact(1.0, loss=loss), peft=fact(1.0, loss=0.5))
        with pytest.raises(SystemExit, match=f"^loss: {loss} in jvjepa and 0.5 in peft differ"):
            lora.difference(far)
    failed = result(jvjepa=fact(1.0)) | {"left_out": {"peft": "ended"}}
    with pytest.raises(SystemExit, match=r"^peft failed: ended$"):
        lora.difference(failed)


def test_table() -> None:
    row = result(jvjepa=fact(0.5, 0.4, 0.6), peft=fact(0.75, 1.5, 0.7, peak=None))
    row |= {"difference": 2e-6, "left_out": {"jvjepa, causal": "why"}}
    ours = ["block", "jvjepa", "500 (400 to 600)", "4", "1.50 x", "2.50", "2.5", "0.50000"]
    assert lora.cells("block", "jvjepa", row, 2) == ours
    assert lora.cells("block", "peft", row, 2)[3:6] == ["2.67", "1.00 x", "–"]
    report = {"machine": ["CPU: one"], "work": dataclasses.asdict(TINY), "rows": {"block": row}}
    text = lora.markdown(report)
    assert f"| {' | '.join(ours)} |\n" in text
    assert "6 frames of 48 pixels, batch 2; 2 layers of width 64, float32; a loop" in text
    assert (
        "remat block: losses and gradient norms of jvjepa and peft differ by at most 2.0e-06"
        in text
    )
    assert "- left out: jvjepa, causal, remat block: why\n" in text
    assert text.endswith("\n- CPU: one\n- peft: 0.21\n")


SCRIPT = """
import os, sys
sys.path.insert(0, {peers!r})
from protocol import serve

def setup(message):
    assert message["remat"] == "block" and message["work"]["layers"] == 2
    if message["causal"]:
        raise ValueError("no")
    loss = 0.5 if message["work"]["dtype"] == "float32" else 0.25
    assert loss == 0.25 or "highest" == os.environ["JAX_DEFAULT_MATMUL_PRECISION"]
    start = {{"loss": loss if message["side"] == "peft" else 0.5}}
    return {{"call_seconds": 0.3, "start": start}}

def time_it(message):
    return {{"seconds": [float(i) for i in range(message["repeats"])]}}

serve({{"setup": setup, "time": time_it}})
"""


def test_a_gpu_is_measured_in_bfloat16_after_the_sides_have_agreed_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lora_worker.py").write_text(SCRIPT.format(peers=str(FOLDER / "peers")))
    monkeypatch.setattr(speed, "PEERS", tmp_path)
    pythons = {"lora": Path(sys.executable)}
    there = speed.Setting(platform="gpu", device="none", memory=1, pythons=pythons, environment={})
    work = dataclasses.replace(TINY, platform="gpu", dtype="bfloat16")
    measured = lora.compare(there, work, "block", 3)
    assert measured["difference"] == 0
    assert list(measured["competitors"]) == ["jvjepa", "peft"]
    for fact in measured["competitors"].values():
        assert fact["seconds"] == [1.0, 2.0] * 3  # after one to warm up
    why = "lora_worker ended with exit code 1: ValueError: no"
    assert measured["left_out"] == {"jvjepa, causal": why}
    # In bfloat16 the script's sides differ, which would not do in float32.
    starts = [fact["start"]["loss"] for fact in measured["competitors"].values()]
    assert starts == [0.5, 0.25]


@pytest.mark.slow
def test_end_to_end(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "lora.py"), "--out", str(tmp_path)]
    sizes = ["--layers", "1", "--frames", "4", "--size", "32", "--repeats", "2"]
    done = subprocess.run([*command, *sizes], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "lora.json").read_text())
    assert list(report["rows"]) == ["none", "block"]
    for row in report["rows"].values():
        assert row["left_out"] == {}
        assert row["difference"] <= lora.TOLERANCE
        for fact in row["competitors"].values():
            assert len(fact["seconds"]) >= 2
            assert statistics.median(fact["seconds"]) > 0
            assert fact["peak_bytes"] > fact["base_bytes"] > 0
    assert "| block | jvjepa, causal | " in (tmp_path / "lora.md").read_text()
