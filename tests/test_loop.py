import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tasks import Batch, numbers, toy_task

from jvjepa.errors import ConfigError, InputError, TrainingError
from jvjepa.train import watch
from jvjepa.train.loop import LoopConfig, begin, best_state, make_step, train
from jvjepa.train.metrics import read
from jvjepa.train.task import Best


def config(steps: int = 12, **changes: Any) -> LoopConfig:
    return LoopConfig(**{"steps": steps, "save_every": 4, "log_every": 1, **changes})


def rows(folder: Path) -> list[dict[str, float]]:
    return read(folder / "metrics.jsonl")


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder)]


def assert_equal(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


class Stop(Exception):
    """What a test stops a run with."""


def stop_at(number: int) -> Callable[[int, Batch], Batch]:
    def at_step(step: int, values: Batch) -> Batch:
        if step == number:
            raise Stop
        return values

    return at_step


def test_a_run_leaves_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    state = train(toy_task(), config(), folder)
    assert int(state.step) == 12
    table = rows(folder)
    assert [row["step"] for row in table] == list(range(1, 13))
    assert table[-1]["loss"] < 0.5 * table[0]["loss"]
    assert {"loss", "gradient_norm", "learning_rate", "weight_decay", "behind"} <= table[0].keys()
    assert table[0]["learning_rate"] == pytest.approx(0.05)
    assert table[5]["clips_per_second"] > 0
    record = json.loads((folder / "run.json").read_text())
    assert record == {"task": "toy", "steps": 12, "seed": 0, "width": 8}
    assert sorted(x.name for x in (folder / "checkpoints").iterdir()) == ["12", "4", "8"]


def test_the_step_is_what_its_parts_say(tmp_path: Path) -> None:
    task = toy_task()
    state, metrics = jax.jit(make_step(task))(
        begin(task), task.frozen, numbers(0), jax.random.key(3)
    )
    key = jax.random.fold_in(jax.random.key(3), 0)

    def loss(trained: Any) -> Any:
        return task.loss(trained, task.carried, task.frozen, numbers(0), jnp.int32(0), key)[0]

    value, gradients = jax.value_and_grad(loss)(task.trained)
    updates, _ = task.optimizer.transform.update(
        gradients, task.optimizer.transform.init(task.trained), task.trained
    )
    trained = jax.tree.map(jnp.add, task.trained, updates)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state.trained, trained)
    followed = jax.tree.map(lambda x: x / 2, state.trained)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state.carried, followed)
    norm = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(gradients)))
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-5)


def test_a_run_that_was_stopped_gives_what_it_would_have_given(tmp_path: Path) -> None:
    whole = train(toy_task(), config(), tmp_path / "whole")
    with pytest.raises(Stop):
        train(toy_task(at_step=stop_at(10)), config(), tmp_path / "parts")
    assert len(rows(tmp_path / "parts")) == 9  # the tenth was under way
    state = train(toy_task(), config(), tmp_path / "parts", resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert_equal(state, whole)


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    state = train(toy_task(), config(), tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert_equal(train(toy_task(), config(), tmp_path / "run", resume=True), state)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_resuming_without_a_checkpoint_begins(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        train(toy_task(at_step=stop_at(2)), config(), tmp_path / "run")
    train(toy_task(), config(), tmp_path / "run", resume=True)
    train(toy_task(), config(), tmp_path / "new", resume=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "new")


def test_the_result_depends_on_the_seed(tmp_path: Path) -> None:
    for seed in (0, 1):
        train(toy_task(), config(seed=seed), tmp_path / str(seed))
    assert losses(tmp_path / "0") != losses(tmp_path / "1")


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(parts: int) -> None:
    def loss(trained: Any, carried: Any, frozen: Any, batch: Batch, step: Any, key: Any) -> Any:
        y = batch["x"] @ trained["query"]["kernel"] + trained["query"]["bias"][None]
        return jnp.mean(jnp.square(y - batch["y"])), {"mean": jnp.mean(batch["y"])}

    task = toy_task(loss=loss)
    key = jax.random.key(0)
    whole, one = jax.jit(make_step(task))(begin(task), task.frozen, numbers(3), key)
    divided, other = jax.jit(make_step(task, parts))(begin(task), task.frozen, numbers(3), key)
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole.trained, divided.trained
    )


def test_parts_of_a_batch_have_keys_of_their_own() -> None:
    def loss(trained: Any, carried: Any, frozen: Any, batch: Batch, step: Any, key: Any) -> Any:
        draw = jax.random.uniform(key)
        return jnp.sum(trained["query"]["kernel"]) * 0, {"draw": draw, "square": draw**2}

    task = toy_task(loss=loss)
    run = jax.jit(make_step(task, 4))
    state, first = run(begin(task), task.frozen, numbers(0), jax.random.key(0))
    assert first["square"] > first["draw"] ** 2 + 1e-4  # else all four were the same
    assert run(state, task.frozen, numbers(0), jax.random.key(0))[1]["draw"] != first["draw"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stops_the_run(tmp_path: Path, value: float) -> None:
    def spoil(step: int, values: Batch) -> Batch:
        return {**values, "y": values["y"] + np.float32(value if step == 6 else 0)}

    message = rf"step 7: .*loss = {value}.*checkpoints: the newest is of step 4"
    with pytest.raises(TrainingError, match=message):
        train(toy_task(at_step=spoil), config(), tmp_path / "run")
    assert all(np.isfinite(losses(tmp_path / "run")))
    state = train(toy_task(), config(), tmp_path / "run", resume=True)  # with the true batch
    assert_equal(state, train(toy_task(), config(), tmp_path / "whole"))


def test_an_update_that_is_not_finite_changes_nothing() -> None:
    task = toy_task()
    state = begin(task)
    bad = {**numbers(0), "y": np.full((8, 4), np.nan, np.float32)}
    new, metrics = jax.jit(make_step(task))(state, task.frozen, bad, jax.random.key(0))
    assert np.isnan(metrics["loss"])
    assert_equal(new, state)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_a_checkpoint(tmp_path: Path, number: int) -> None:
    def kill(step: int, values: Batch) -> Batch:
        if step == 5:
            os.kill(os.getpid(), number)
        return values

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match="checkpoint of step 6"):
        train(toy_task(at_step=kill), config(), tmp_path / "run")
    assert signal.getsignal(number) is before
    state = train(toy_task(), config(), tmp_path / "run", resume=True)
    assert_equal(state, train(toy_task(), config(), tmp_path / "whole"))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_signal_at_a_save_step_leaves_its_measurement(tmp_path: Path) -> None:
    def kill(step: int, values: Batch) -> Batch:
        if step == 7:  # of update 8, after which a checkpoint is due
            os.kill(os.getpid(), signal.SIGTERM)
        return values

    task = {"evaluate": lambda *_: {"score": 0.5}, "best": Best("score", "max")}
    with pytest.raises(KeyboardInterrupt, match="checkpoint of step 8"):
        train(toy_task(at_step=kill, **task), config(), tmp_path / "run")
    assert [row.get("score") for row in rows(tmp_path / "run")][3::4] == [0.5, 0.5]
    assert best_state(toy_task(**task), config(), tmp_path / "run")[0] == 8


@pytest.mark.parametrize("error", [InputError("two clips cannot be read"), KeyboardInterrupt()])
def test_a_failing_evaluation_loses_nothing(tmp_path: Path, error: BaseException) -> None:
    def fail(*_: Any) -> dict[str, float]:
        raise error

    best = Best("score", "max")
    with pytest.raises(type(error)):
        train(toy_task(evaluate=fail, best=best), config(), tmp_path / "run")
    step, state = best_state(toy_task(best=best), config(), tmp_path / "run")
    assert (step, int(state.step)) == (None, 4)  # nothing was measured, so that it is the newest
    task = toy_task(evaluate=lambda *_: {"score": 0.5}, best=best)
    state = train(task, config(), tmp_path / "run", resume=True)
    assert_equal(state, train(toy_task(), config(), tmp_path / "whole"))
    assert best_state(task, config(), tmp_path / "run")[0] == 12


def test_updates_compile_once(tmp_path: Path, compilations: Callable[[], int]) -> None:
    counts: list[int] = []

    def count(step: int, values: Batch) -> Batch:
        counts.append(compilations())
        return values

    train(toy_task(at_step=count), config(save_every=100), tmp_path / "run")
    assert counts[3] == counts[-1]


def test_the_best_state_can_be_read(tmp_path: Path) -> None:
    scores = iter([0.1, 0.9, 0.2])
    evaluated: list[Any] = []

    def evaluate(trained: Any, carried: Any, frozen: Any) -> dict[str, float]:
        evaluated.append(jax.device_get(trained))
        return {"score": next(scores)}

    task = toy_task(evaluate=evaluate, best=Best("score", "max"))
    train(task, config(keep=1), tmp_path / "run")
    step, state = best_state(task, config(), tmp_path / "run")
    assert step == 8
    assert_equal(state.trained, evaluated[1])
    assert [row.get("score") for row in rows(tmp_path / "run")][3::4] == [0.1, 0.9, 0.2]
    assert sorted(x.name for x in (tmp_path / "run" / "checkpoints").iterdir()) == ["12", "8"]


def test_the_task_survives_its_run(tmp_path: Path) -> None:
    task = toy_task()
    train(task, config(steps=1), tmp_path / "run")
    assert np.isfinite(np.asarray(task.trained["query"]["kernel"])).all()  # not donated


def test_what_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(InputError, match="8"):
        train(toy_task(), config(accumulate=3), folder)  # of 8 clips

    def narrow(step: int, values: Batch) -> Batch:
        return {**values, "x": values["x"][:, :5]}

    with pytest.raises(TypeError, match="dot_general"):  # seen when it is traced
        train(toy_task(at_step=narrow), config(), folder)
    assert not folder.exists()
    train(toy_task(), config(steps=1), folder)


def test_speed_is_that_of_updates_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock[0])

    def take_a_second(step: int, values: Batch) -> Batch:
        clock[0] += 1
        return values

    def evaluate(*_: Any) -> dict[str, float]:
        clock[0] += 1000
        return {}

    for every in (1, 3):
        clock[0] = 0.0
        task = toy_task(at_step=take_a_second, evaluate=evaluate)
        train(task, config(log_every=every), tmp_path / str(every))
        speeds = [row.get("clips_per_second") for row in rows(tmp_path / str(every))]
        assert len(speeds) == (12 if every == 1 else 6)
        assert set(speeds) <= {None, 8.0}  # clips of a batch, a second
        assert speeds[-1] == 8.0


def test_progress_is_shown(tmp_path: Path) -> None:
    with (tmp_path / "shown").open("w") as file:
        console = Console(file=file, width=200)
        train(toy_task(flops=1e6), config(), tmp_path / "run", console=console)
    shown = (tmp_path / "shown").read_text()
    assert "12" in shown
    assert 0 < rows(tmp_path / "run")[-1]["share_of_peak"]


def test_another_folder_is_refused(tmp_path: Path) -> None:
    train(toy_task(), config(steps=1), tmp_path / "run")
    with pytest.raises(InputError, match=r"run exists; resume it"):
        train(toy_task(), config(steps=1), tmp_path / "run")
    with pytest.raises(InputError, match=r"another run's: width = 8, now 9"):
        train(toy_task(record={"width": 9}), config(steps=1), tmp_path / "run", resume=True)
    with pytest.raises(InputError, match=r"steps = 1, now 2"):
        train(toy_task(), config(steps=2), tmp_path / "run", resume=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("x")
    with pytest.raises(InputError, match=r"no run's folder: it has no run.json"):
        train(toy_task(), config(), tmp_path / "home")
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run.json.*JSON"):
        train(toy_task(), config(steps=1), tmp_path / "run", resume=True)


def test_a_batch_that_cannot_be_divided(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"8 clips .* in 3 parts; it must be a multiple of 3"):
        train(toy_task(), config(accumulate=3), tmp_path / "run")


@pytest.mark.parametrize("field", ["steps", "accumulate", "save_every", "keep", "log_every"])
@pytest.mark.parametrize("value", [0, -1, 1.0, True])
def test_impossible_options(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"LoopConfig.{field} = {re.escape(repr(value))}"):
        LoopConfig(**{"steps": 1, field: value})


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5])
def test_impossible_seeds(seed: object) -> None:
    with pytest.raises(ConfigError, match=r"LoopConfig\.seed"):
        LoopConfig(steps=1, seed=seed)
