"""What all kinds of training have on the command line."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from jvjepa.train.distributed import Processes, whole
from jvjepa.train.loop import LoopConfig, best_state, train
from jvjepa.train.task import State, Task

Positional = tyro.conf.Positional
Flat = tyro.conf.arg(name="")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The options of a run; what inherits from it has OUT, the folder of the run."""

    validation: Path | None = None
    """A manifest to measure on at every checkpoint; what is kept at the end is the best then."""
    resume: bool = False
    """Go on from the newest checkpoint of OUT."""
    loop: Annotated[LoopConfig, Flat] = dataclasses.field(
        default_factory=lambda: LoopConfig(steps=10_000)
    )
    processes: Annotated[Processes, Flat] = dataclasses.field(default_factory=Processes)

    def train(self, task: Task, folder: Path, console: Console) -> State:
        """Trains in a folder; gives the best state, on the host."""
        state = train(task, self.loop, folder, resume=self.resume, console=console)
        if task.best is None:
            return whole(state)
        step, state = best_state(task, self.loop, folder)
        if step is None:
            console.print(f"no checkpoint has a finite {task.best.metric}: the last one is taken")
        else:
            console.print(f"the best by {task.best.metric} is step {step}")
        return whole(state)
