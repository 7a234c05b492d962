"""`jvjepa train KIND`: the command lines of training.

Every option of a kind can also come from a Python file that defines `config`, and `loop` if it
wants: `--preset FILE`, or the name of one that comes with jvjepa, of `jvjepa.train.presets`. What
is given on the command line counts more.
"""

import dataclasses
import functools
import runpy
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console

from jvjepa import registry
from jvjepa.adapters import save_adapters
from jvjepa.area import parse_areas
from jvjepa.attention import Backend
from jvjepa.config import ModelConfig
from jvjepa.errors import ConfigError, InputError
from jvjepa.recording import save_json
from jvjepa.train.causal_lora import CausalLoraConfig, causal_lora_task, trained_adapters
from jvjepa.train.data import ClipConfig
from jvjepa.train.distill import DistillConfig, distill_task, student
from jvjepa.train.feature_cache import Features, open_or_make
from jvjepa.train.finetune import FinetuneConfig, finetune_task, finetuned, with_classifier
from jvjepa.train.frozen_features import FeatureConfig, FeaturePool, Stored, StreamConfig
from jvjepa.train.loop import best_state, latest_state, train
from jvjepa.train.manifest import Manifest, read_manifest
from jvjepa.train.mos_commands import Mos
from jvjepa.train.neighbours import NeighbourConfig, neighbour_accuracy
from jvjepa.train.optimizer import ParameterGroup, freeze_first
from jvjepa.train.pretrain import PretrainConfig, pretrain_task, pretrained
from jvjepa.train.probe import (
    ProbeConfig,
    accuracy_over_time,
    attach_probe,
    probe_result,
    probe_steps,
    probe_task,
)
from jvjepa.train.running import Flat, Positional, Run
from jvjepa.typing import Params
from jvjepa.weights import Model, load, read_record, save


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OfModel(Run):
    """What trainings have that begin with a model."""

    model: Positional[Path]
    """A converted folder."""
    manifest: Positional[Path]
    """The clips: a folder of videos; a .jsonl; or lines of path,start,end,label or path label."""
    out: Positional[Path]
    """The folder of the run to make: run.json, metrics.jsonl, checkpoints, and what was trained."""
    attention: Backend = "auto"
    """Attention backend."""
    area: str | None = None
    """Area attention, SPATIALxTEMPORAL splits as 2x2; by default what was stored at conversion."""
    area_layers: str | None = None
    """START:END of the layers that have it, as 0:18; by default the first three quarters."""

    def load(self, *, scan: bool = True, lora: Path | None = None) -> Model:
        """Loads the model, which must have float32 weights to train them."""
        areas = parse_areas(self.area, self.area_layers)
        return load(self.model, attention=self.attention, scan=scan, areas=areas, lora=lora)

    def manifests(self) -> tuple[Manifest, Manifest | None]:
        """Reads what there is to train and to validate on."""
        validation = None if self.validation is None else read_manifest(self.validation)
        return read_manifest(self.manifest), validation


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalLora(_OfModel):
    """Train adapters that make the encoder causal, for streaming: OUT/adapters."""

    config: Annotated[CausalLoraConfig, Flat] = dataclasses.field(default_factory=CausalLoraConfig)

    def run(self, console: Console) -> int:
        """Trains and saves."""
        model, seed = self.load(), self.loop.seed
        manifests = self.manifests()
        task = causal_lora_task(model, self.config, *manifests, steps=self.loop.steps, seed=seed)
        state = self.train(task, self.out, console)
        if jax.process_index() == 0:
            adapters = trained_adapters(model, self.config, task, state)
            save_adapters(self.out / "adapters", adapters, force=True)
            console.print(f"adapters: {self.out / 'adapters'}; use them with --lora")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distill(_OfModel):
    """Train a small encoder to give the features of a large one, MODEL: OUT/model."""

    config: Annotated[DistillConfig, Flat] = dataclasses.field(default_factory=DistillConfig)

    def run(self, console: Console) -> int:
        """Trains and saves."""
        model, seed = self.load(), self.loop.seed
        task = distill_task(model, self.config, *self.manifests(), steps=self.loop.steps, seed=seed)
        state = self.train(task, self.out, console)
        if jax.process_index() == 0:
            save(self.out / "model", student(model, self.config, state), force=True)
            console.print(f"model: {self.out / 'model'}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finetune(_OfModel):
    """Train encoder and classifier on labelled clips, whole or in part: OUT/model."""

    freeze: float = 0.0
    """Share of the encoder's blocks, from the first, that is frozen, and the patch embedding."""
    config: Annotated[FinetuneConfig, Flat] = dataclasses.field(default_factory=FinetuneConfig)

    def run(self, console: Console) -> int:
        """Trains and saves."""
        model, (manifest, validation) = self.load(scan=not self.freeze), self.manifests()
        config = self.config
        if self.freeze:
            config = _frozen_first(config, self.freeze, model.config.encoder.num_layers)
        if model.classifier is None or model.config.classifier.labels != manifest.classes:
            model = with_classifier(model, config, manifest, self.loop.seed)
        task = finetune_task(model, config, manifest, validation, steps=self.loop.steps)
        state = self.train(task, self.out, console)
        if jax.process_index() == 0:
            save(self.out / "model", finetuned(model, task, state), force=True)
            console.print(f"model: {self.out / 'model'}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe(_OfModel):
    """Train a grid of classifiers on frozen features: OUT/model, OUT/probe.json; --validation."""

    lora: Path | None = None
    """Adapters to merge into the weights first."""
    clip: ClipConfig = dataclasses.field(
        default_factory=lambda: ClipConfig(temporal="uniform", spatial="centre")
    )
    """How clips are taken out of videos; for validation always the middle in time."""
    views: int = 1
    """Crops of each video of the validation, along its long side; probabilities are averaged."""
    window: int | None = None
    """Encode tubelet by tubelet, as a stream with so many in its window."""
    pool: FeaturePool = "none"
    """Which means of the tokens are kept; heads see these."""
    layers: tuple[int, ...] = ()
    """Layers whose tokens are seen one after the other; by default the last."""
    stored: Stored = "float32"
    """Dtype of the features on disk, OUT/features."""
    workers: int = 0
    """Processes that read ahead."""
    config: Annotated[ProbeConfig, tyro.conf.arg(name="probe")] = dataclasses.field(
        default_factory=ProbeConfig
    )

    def run(self, console: Console) -> int:
        """Encodes, trains and saves."""
        manifest, validation = self.manifests()
        if validation is None:
            raise InputError("--validation: the heads are compared on it; it must be given")
        model = self.load(lora=self.lora)
        middle = dataclasses.replace(self.clip, temporal="uniform", spatial="centre")
        views = tuple(
            dataclasses.replace(middle, view=i, views=self.views) for i in range(self.views)
        )
        training, testing = (
            self._features(name, model, some, which, console)
            for name, some, which in (
                ("training", manifest, (self.clip,)),
                ("validation", validation, views),
            )
        )
        steps = probe_steps(self.config, training)
        per_epoch = steps // self.config.epochs
        loop = dataclasses.replace(
            self.loop, steps=steps, seed=self.config.seed, save_every=per_epoch
        )
        task = probe_task(self.config, training, testing)
        train(task, loop, self.out / "run", resume=self.resume, console=console)
        step, state = best_state(task, loop, self.out / "run")
        result = probe_result(self.config, training, task, state.trained)
        record = {
            "accuracy": result.accuracy,
            "step": step,
            "learning_rate": result.learning_rate,
            "weight_decay": result.weight_decay,
            "neighbours": neighbour_accuracy(NeighbourConfig(), training, testing),
        }
        if self.window is not None and self.pool != "clip":
            record["accuracy_over_time"] = accuracy_over_time(result, testing).tolist()
        save_json(self.out / "probe.json", record)
        for name, value in record.items():
            console.print(f"{name}: {value}")
        whole_clips = self.window is None and self.pool == "none" and self.config.sees != "tubelet"
        if self.config.kind == "attentive" and whole_clips:
            labels = manifest.classes or tuple(map(str, range(result.heads.classes)))
            save(self.out / "model", attach_probe(model, result, labels), force=True)
            console.print(f"model: {self.out / 'model'}, for jvjepa classify")
        return 0

    def _features(
        self,
        name: str,
        model: Model,
        manifest: Manifest,
        views: tuple[ClipConfig, ...],
        console: Console,
    ) -> Features:
        config = FeatureConfig(
            views=views,
            stream=None if self.window is None else StreamConfig(window=self.window),
            pool=self.pool,
            layers=self.layers,
            dtype=self.stored,
        )
        folder = self.out / "features" / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        how = {"batch_size": 8, "workers": self.workers, "console": console}
        return open_or_make(folder, model, manifest, config, **how)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrain(Run):
    """Pretrain V-JEPA 2 or 2.1 on videos without labels: OUT/model has teacher and predictor."""

    model: Positional[str]
    """The architecture: the name of a release; a config.json; or a converted folder, to begin with
    its weights."""
    manifest: Positional[Path]
    """The clips: a folder of videos; a .jsonl; or lines of path,start,end,label or path label."""
    out: Positional[Path]
    """The folder of the run to make: run.json, metrics.jsonl, checkpoints, and what was trained."""
    pictures: Path | None = None
    """A manifest of videos that single frames are taken of, as pictures (V-JEPA 2.1)."""
    pictures_batch: int = 8
    """Pictures of a batch, over all processes."""
    cooldown: Path | None = None
    """The folder of a run of the same architecture, whose newest student and teacher to begin with.
    """
    area: str | None = None
    """Area attention, SPATIALxTEMPORAL splits as 2x2."""
    area_layers: str | None = None
    """START:END of the layers that have it, as 0:18; by default the first three quarters."""
    config: Annotated[PretrainConfig, Flat, tyro.conf.AvoidSubcommands] = dataclasses.field(
        default_factory=PretrainConfig
    )

    def run(self, console: Console) -> int:
        """Trains and saves."""
        if self.validation is not None:
            raise InputError("--validation: there is none in pretraining; train a probe afterwards")
        config, given = self._architecture()
        steps, seed, options = self.loop.steps, self.loop.seed, self.config
        pictures = None
        if self.pictures is not None:
            pictures = read_manifest(self.pictures)
            clip = dataclasses.replace(options.data.clip, num_frames=1)
            images = dataclasses.replace(options.data, clip=clip, batch_size=self.pictures_batch)
            options = dataclasses.replace(options, images=images)
        make = functools.partial(
            pretrain_task, config, options, read_manifest(self.manifest), pictures
        )
        task = make(steps=steps, seed=seed, **given)
        if self.cooldown is not None:
            state = latest_state(task, self.loop, self.cooldown)
            teacher = state.carried["encoder"]
            task = make(steps=steps, seed=seed, params=state.trained, teacher=teacher)
        state = self.train(task, self.out, console)
        if jax.process_index() == 0:
            save(self.out / "model", pretrained(config, state), force=True)
            console.print(f"model: {self.out / 'model'}")
        return 0

    def _architecture(self) -> tuple[ModelConfig, dict[str, Params]]:
        """The model to train, and the weights to begin with, if there are some."""
        given: dict[str, Params] = {}
        path = Path(self.model)
        if path.is_dir():
            model = load(path)
            config, given = model.config, {"params": model.params}
        elif path.suffix == ".json":
            config, _ = read_record(path.parent)
        else:
            config = registry.get(self.model).config
        areas = parse_areas(self.area, self.area_layers)
        clip = self.config.data.clip
        sizes = {"crop_size": clip.crop_size, "frames_per_clip": clip.num_frames}
        encoder = dataclasses.replace(config.encoder, **sizes)
        encoder = encoder if areas is None else areas.of(encoder)
        return ModelConfig(encoder=encoder, predictor=config.predictor), given


def _frozen_first(config: FinetuneConfig, share: float, num_layers: int) -> FinetuneConfig:
    groups = config.optimizer.groups or (ParameterGroup(pattern=".*"),)
    groups = (freeze_first(share, num_layers), *groups)
    optimizer = dataclasses.replace(config.optimizer, groups=groups)
    return dataclasses.replace(config, optimizer=optimizer)


_KINDS = {
    "causal-lora": CausalLora,
    "distill": Distill,
    "finetune": Finetune,
    "mos": Mos,
    "pretrain": Pretrain,
    "probe": Probe,
}


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
    with command.processes.joined():
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
