"""`jvjepa train KIND`: the command lines of training.

Every option of a kind can also come from a Python file that defines `config`, and `loop` if it
wants: `--preset FILE`, or the name of one that comes with jvjepa, of `jvjepa.train.presets`. What
is given on the command line counts more.
"""

import dataclasses
import runpy
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console

from jvjepa.adapters import save_adapters
from jvjepa.area import parse_areas
from jvjepa.attention import Backend
from jvjepa.errors import ConfigError, InputError
from jvjepa.train.causal_lora import CausalLoraConfig, causal_lora_task, trained_adapters
from jvjepa.train.distill import DistillConfig, distill_task, student
from jvjepa.train.distributed import Processes, whole
from jvjepa.train.finetune import FinetuneConfig, finetune_task, finetuned, with_classifier
from jvjepa.train.loop import LoopConfig, best_state, train
from jvjepa.train.manifest import Manifest, read_manifest
from jvjepa.train.optimizer import ParameterGroup, freeze_first
from jvjepa.train.task import State, Task
from jvjepa.weights import Model, load, save

_Positional = tyro.conf.Positional
_Flat = tyro.conf.arg(name="")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """What all kinds of training have."""

    out: _Positional[Path]
    """The folder of the run to make: run.json, metrics.jsonl, checkpoints, and what was trained."""
    validation: Path | None = None
    """A manifest to measure on at every checkpoint; what is kept at the end is the best then."""
    resume: bool = False
    """Go on from the newest checkpoint of OUT."""
    loop: Annotated[LoopConfig, _Flat] = dataclasses.field(
        default_factory=lambda: LoopConfig(steps=10_000)
    )
    processes: Annotated[Processes, _Flat] = dataclasses.field(default_factory=Processes)

    def train(self, task: Task, console: Console) -> State:
        """Trains; gives the best state, on the host."""
        state = train(task, self.loop, self.out, resume=self.resume, console=console)
        if task.best is None:
            return whole(state)
        step, state = best_state(task, self.loop, self.out)
        console.print(f"the best by {task.best.metric} is step {step}")
        return whole(state)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OfModel(_Run):
    """What trainings have that begin with a model."""

    model: _Positional[Path]
    """A converted folder."""
    manifest: _Positional[Path]
    """The clips: a folder of videos; a .jsonl; or lines of path,start,end,label or path label."""
    attention: Backend = "auto"
    """Attention backend."""
    area: str | None = None
    """Area attention, SPATIALxTEMPORAL splits as 2x2; by default what was stored at conversion."""
    area_layers: str | None = None
    """START:END of the layers that have it, as 0:18; by default the first three quarters."""

    def load(self, *, scan: bool = True) -> Model:
        """Loads the model, which must have float32 weights to train them."""
        areas = parse_areas(self.area, self.area_layers)
        return load(self.model, attention=self.attention, scan=scan, areas=areas)

    def manifests(self) -> tuple[Manifest, Manifest | None]:
        """Reads what there is to train and to validate on."""
        validation = None if self.validation is None else read_manifest(self.validation)
        return read_manifest(self.manifest), validation


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalLora(_OfModel):
    """Train adapters that make the encoder causal, for streaming: OUT/adapters."""

    config: Annotated[CausalLoraConfig, _Flat] = dataclasses.field(default_factory=CausalLoraConfig)

    def run(self, console: Console) -> int:
        """Trains and saves."""
        model, seed = self.load(), self.loop.seed
        manifests = self.manifests()
        task = causal_lora_task(model, self.config, *manifests, steps=self.loop.steps, seed=seed)
        state = self.train(task, console)
        if jax.process_index() == 0:
            adapters = trained_adapters(model, self.config, task, state)
            save_adapters(self.out / "adapters", adapters, force=True)
            console.print(f"adapters: {self.out / 'adapters'}; use them with --lora")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill(_OfModel):
    """Train a small encoder to give the features of a large one, MODEL: OUT/model."""

    config: Annotated[DistillConfig, _Flat] = dataclasses.field(default_factory=DistillConfig)

    def run(self, console: Console) -> int:
        """Trains and saves."""
        model, seed = self.load(), self.loop.seed
        task = distill_task(model, self.config, *self.manifests(), steps=self.loop.steps, seed=seed)
        state = self.train(task, console)
        if jax.process_index() == 0:
            save(self.out / "model", student(model, self.config, state), force=True)
            console.print(f"model: {self.out / 'model'}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finetune(_OfModel):
    """Train encoder and classifier on labelled clips, whole or in part: OUT/model."""

    freeze: float = 0.0
    """Share of the encoder's blocks, from the first, that is frozen, and the patch embedding."""
    config: Annotated[FinetuneConfig, _Flat] = dataclasses.field(default_factory=FinetuneConfig)

    def run(self, console: Console) -> int:
        """Trains and saves."""
        model, (manifest, validation) = self.load(scan=not self.freeze), self.manifests()
        config = self.config
        if self.freeze:
            config = _frozen_first(config, self.freeze, model.config.encoder.num_layers)
        if model.classifier is None or model.config.classifier.labels != manifest.classes:
            model = with_classifier(model, config, manifest, self.loop.seed)
        task = finetune_task(model, config, manifest, validation, steps=self.loop.steps)
        state = self.train(task, console)
        if jax.process_index() == 0:
            save(self.out / "model", finetuned(model, task, state), force=True)
            console.print(f"model: {self.out / 'model'}")
        return 0


def _frozen_first(config: FinetuneConfig, share: float, num_layers: int) -> FinetuneConfig:
    groups = config.optimizer.groups or (ParameterGroup(pattern=".*"),)
    groups = (freeze_first(share, num_layers), *groups)
    optimizer = dataclasses.replace(config.optimizer, groups=groups)
    return dataclasses.replace(config, optimizer=optimizer)


_KINDS = {"causal-lora": CausalLora, "distill": Distill, "finetune": Finetune}


def main(arguments: Sequence[str], console: Console) -> int:
    """Parses `KIND ..` and trains.

    Args:
        arguments: behind `jvjepa train`.
        console: where to print.

    Returns:
        The exit code.

    Raises:
        InputError: bad input.
        TrainingError: the run cannot go on.
    """
    kind = arguments[0] if arguments else "--help"
    if kind not in _KINDS:
        console.print("jvjepa train KIND --help: all options of one of the kinds")
        for name, command in _KINDS.items():
            console.print(f"  {name:12} {command.__doc__}")
        if kind in ("-h", "--help"):
            return 0
        raise InputError(f"train {kind}: there is no such kind; there are {', '.join(_KINDS)}")
    preset, rest = _take_preset(list(arguments[1:]))
    default = None if preset is None else _preset(_KINDS[kind], preset)
    command = tyro.cli(_KINDS[kind], prog=f"jvjepa train {kind}", args=rest, default=default)
    command.processes.join()
    return command.run(console)


def _take_preset(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The value of --preset, and the other arguments."""
    if "--preset" not in arguments:
        return None, arguments
    i = arguments.index("--preset")
    if i + 1 == len(arguments):
        raise InputError("--preset: a name or a file has to follow")
    return arguments[i + 1], arguments[:i] + arguments[i + 2 :]


def _preset(kind: type[Any], name: str) -> Any:
    """The options of a kind, as a preset has them; what it cannot have is left to be given."""
    path = Path(name)
    if path.suffix != ".py":
        known = resources.files("jvjepa.train.presets")
        path = Path(str(known / f"{name}.py"))
        if not path.is_file():
            names = sorted(p.name[:-3] for p in known.iterdir() if p.name[:1].islower())
            raise InputError(f"--preset {name}: there is none; there are {', '.join(names)}")
    if not path.is_file():
        raise InputError(f"--preset {path}: there is no such file")
    given = runpy.run_path(str(path))
    fields = {field.name: field for field in dataclasses.fields(kind)}
    right = type(fields["config"].default_factory())
    if not isinstance(given.get("config"), right):
        raise ConfigError(f"--preset {path}: it must define config, a {right.__name__}")
    values = {name: given[name] for name in ("config", "loop") if name in given}
    for name, field in fields.items():
        if field.default is field.default_factory is dataclasses.MISSING:
            values[name] = tyro.MISSING
    return kind(**values)
