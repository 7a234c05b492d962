"""`jvjepa train KIND`: the command lines of training.

Every option of a kind can also come from a Python file that defines `config`, and `loop` if it
wants: `--preset FILE`, or the name of one that comes with jvjepa, of `jvjepa.train.presets`. What
is given on the command line counts more.
"""

import dataclasses
import functools
import re
import runpy
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from flax.traverse_util import flatten_dict
from rich.console import Console

from jvjepa import registry
from jvjepa.adapters import save_adapters
from jvjepa.area import parse_areas
from jvjepa.attention import Backend
from jvjepa.config import ModelConfig
from jvjepa.errors import ConfigError, InputError
from jvjepa.recording import save_json
from jvjepa.records import CONFIG_FILE
from jvjepa.storage import check_apart, check_replaceable
from jvjepa.train.causal_lora import CausalLoraConfig, causal_lora_task, trained_adapters
from jvjepa.train.data import ClipConfig
from jvjepa.train.distill import DistillConfig, distill_task, student
from jvjepa.train.feature_cache import Features, open_or_make
from jvjepa.train.finetune import (
    FinetuneConfig,
    finetune_task,
    finetuned,
    misfit,
    with_classifier,
)
from jvjepa.train.frozen_features import FeatureConfig, FeaturePool, Stored, StreamConfig
from jvjepa.train.loop import LoopConfig, best_state, latest_state, train
from jvjepa.train.manifest import Manifest, read_manifest
from jvjepa.train.mos_commands import Mos
from jvjepa.train.neighbours import NeighbourConfig, neighbour_accuracy
from jvjepa.train.optimizer import ParameterGroup, freeze_first
from jvjepa.train.pretrain import PretrainConfig, pretrain_task, pretrained
from jvjepa.train.probe import (
    ProbeConfig,
    ProbeLoop,
    ProbeResult,
    accuracy_over_time,
    attach_probe,
    probe_result,
    probe_task,
    with_crop_size,
)
from jvjepa.train.probe_files import save_probe
from jvjepa.train.running import Flat, Positional, Run
from jvjepa.typing import Params
from jvjepa.weights import WEIGHTS_FILE, Model, load, read_record, save


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
        """Loads the model; its weights are as they are stored, float32 or bfloat16."""
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
    freeze_regex: tuple[str, ...] = ()
    """Regular expressions. Parameters are frozen, too, whose whole name one of them matches, as
    encoder/blocks_0/mlp/fc1/kernel, encoder/norm/scale or classifier/linear/bias."""
    new_classifier: bool = False
    """Begin with a new classifier, even where that of the model fits the labels."""
    config: Annotated[FinetuneConfig, Flat] = dataclasses.field(default_factory=FinetuneConfig)

    def run(self, console: Console) -> int:
        """Trains and saves."""
        scan = not (self.freeze or self.freeze_regex)
        model, (manifest, validation) = self.load(scan=scan), self.manifests()
        config = self.config
        own = model.config.classifier
        why = "--new-classifier" if self.new_classifier else misfit(model, manifest)
        if why is not None:
            model = with_classifier(model, config, manifest, self.loop.seed)
        if own is not None:
            console.print(
                f"the model's own classifier of {len(own.labels)} classes goes on"
                if why is None
                else f"a new classifier in place of the model's own: {why}"
            )
        config = _frozen(config, self.freeze, self.freeze_regex, model)
        task = finetune_task(model, config, manifest, validation, steps=self.loop.steps)
        state = self.train(task, self.out, console)
        if jax.process_index() == 0:
            save(self.out / "model", finetuned(model, task, state), force=True)
            console.print(f"model: {self.out / 'model'}")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe(_OfModel):
    """Train classifiers on frozen features: OUT/model or OUT/head, OUT/probe.json; --validation."""

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
    max_bad: float = 0.01
    """Share of the clips of either set that may be unreadable; they are left out."""
    config: Annotated[ProbeConfig, tyro.conf.arg(name="probe")] = dataclasses.field(
        default_factory=ProbeConfig
    )
    # Its steps and its seed are those of config: there is no option for them.
    loop: Annotated[ProbeLoop, Flat] = dataclasses.field(default_factory=ProbeLoop)

    def run(self, console: Console) -> int:
        """Encodes, trains and saves."""
        manifest, validation = self.manifests()
        if validation is None:
            raise InputError("--validation: the heads are compared on it; it must be given")
        for made in ("model", "head"):
            check_apart(self.out / made, self.model, self.lora)
            check_replaceable(self.out / made, WEIGHTS_FILE)
        model = self.load(lora=self.lora)
        if self._of_whole_clips:  # before: with rope_grid = "config" the features depend on it
            model = with_crop_size(model, self.clip.crop_size)
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
        loop = self.loop.of(self.config, training)
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
        if jax.process_index() == 0:
            self._save(model, result, record, console)
        return 0

    @property
    def _of_whole_clips(self) -> bool:
        """Whether the head sees what the classifier of a model does, and can be one."""
        whole = self.window is None and self.pool == "none" and self.config.sees != "tubelet"
        return whole and self.config.kind == "attentive"

    def _save(
        self, model: Model, result: ProbeResult, record: dict[str, Any], console: Console
    ) -> None:
        save_json(self.out / "probe.json", record)
        for name, value in record.items():
            console.print(f"{name}: {value}")
        if self._of_whole_clips:
            save(self.out / "model", attach_probe(model, result, result.labels), force=True)
            console.print(f"model: {self.out / 'model'}, for jvjepa classify")
        else:
            save_probe(self.out / "head", result, force=True)
            console.print(f"head: {self.out / 'head'}, for jvjepa.train.probe_files.load_probe")

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
        how = {"batch_size": 8, "workers": self.workers, "max_bad": self.max_bad}
        features = open_or_make(folder, model, manifest, config, **how, console=console)
        if features.bad and jax.process_index() == 0:
            count = len(manifest) - len(features)
            console.print(f"{features.source}: {count} clips cannot be read and are left out")
        return features


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrain(Run):
    """Pretrain V-JEPA 2 or 2.1 on videos without labels: OUT/model has teacher and predictor."""

    model: Positional[str]
    """The architecture: the name of a release; a file config.json; or a converted folder, to begin
    with its weights."""
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
    attention: Backend = "auto"
    """Attention backend."""
    area: str | None = None
    """Area attention, SPATIALxTEMPORAL splits as 2x2."""
    area_layers: str | None = None
    """START:END of the layers that have it, as 0:18; by default the first three quarters."""
    loop: Annotated[LoopConfig, Flat] = dataclasses.field(
        default_factory=lambda: LoopConfig(steps=300_000)  # Meta's, as the schedules of the config
    )
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
        parts = (config, options, read_manifest(self.manifest), pictures)
        how = {"steps": steps, "seed": seed, "attention": self.attention}
        make = functools.partial(pretrain_task, *parts, **how)
        task = make(**given)
        if self.cooldown is not None:
            state = latest_state(task, self.loop, self.cooldown)
            teacher = state.carried["encoder"]
            task = make(params=state.trained, teacher=teacher)
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
            if path.name != CONFIG_FILE:
                raise InputError(f"{path}: an architecture is read of a file named {CONFIG_FILE}")
            config, _ = read_record(path.parent)
        else:
            config = registry.get(self.model).config
        areas = parse_areas(self.area, self.area_layers)
        clip = self.config.data.clip
        sizes = {"crop_size": clip.crop_size, "frames_per_clip": clip.num_frames}
        encoder = dataclasses.replace(config.encoder, **sizes)
        encoder = encoder if areas is None else areas.of(encoder)
        return ModelConfig(encoder=encoder, predictor=config.predictor), given


def _frozen(
    config: FinetuneConfig, share: float, patterns: Sequence[str], model: Model
) -> FinetuneConfig:
    """Freezes the first blocks, and what patterns match, before what the groups say of the rest."""
    still = [ParameterGroup(pattern=pattern, learning_rate=0.0) for pattern in patterns]
    if share:
        still.append(freeze_first(share, model.config.encoder.num_layers))
    if not still:
        return config
    names = flatten_dict(model.params, sep="/")
    groups, left = [], set(names)
    for group in (*still, *(config.optimizer.groups or (ParameterGroup(pattern=".*"),))):
        matched = {name for name in names if re.fullmatch(group.pattern, name)}
        if matched and matched.isdisjoint(left):
            continue  # all of it is frozen already; a group of which nothing is left is an error
        groups.append(group)
        if group in still:
            left -= matched
    optimizer = dataclasses.replace(config.optimizer, groups=tuple(groups))
    return dataclasses.replace(config, optimizer=optimizer)


_PRESETS = (
    "--preset NAME begins with the options of a known run: {}. --preset FILE.py takes them from a "
    "Python file that defines config, and loop if it wants. Options that are given count more."
)
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
    preset, rest = _take_preset(arguments[1:])
    default = None if preset is None else _preset(_KINDS[kind], preset)
    command = tyro.cli(
        _KINDS[kind],
        prog=f"jvjepa train {kind}",
        description=f"{_KINDS[kind].__doc__}\n{_PRESETS.format(', '.join(_preset_names()))}",
        args=rest,
        default=default,
    )
    with command.processes.joined():
        return command.run(console)


def _take_preset(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of --preset, the last if there are several, and the other arguments."""
    preset, others, left = None, [], iter(arguments)
    for argument in left:
        name, equals, value = argument.partition("=")
        if name != "--preset":
            others.append(argument)
            continue
        preset = value if equals else next(left, "")
        if not preset:
            raise InputError("--preset: a name or a file has to follow")
    return preset, others


def _preset_names() -> list[str]:
    """The presets that come with jvjepa."""
    known = resources.files("jvjepa.train.presets")
    return sorted(p.name[:-3] for p in known.iterdir() if p.name[:1].islower())


def _preset(kind: type[Any], name: str) -> Any:
    """The options of a kind, as a preset has them; what it cannot have is left to be given."""
    path = Path(name)
    if path.suffix != ".py":
        path = Path(str(resources.files("jvjepa.train.presets") / f"{name}.py"))
        if not path.is_file():
            names = ", ".join(_preset_names())
            raise InputError(f"--preset {name}: there is none; there are {names}")
    if not path.is_file():
        raise InputError(f"--preset {path}: there is no such file")
    try:
        given = runpy.run_path(str(path))
    except Exception as error:  # whatever the code of a user may raise
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"--preset {path}: it raises {problem}") from error
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values = {name: given[name] for name in ("config", "loop") if name in given}
    for name, value in {"config": None, **values}.items():
        right = type(fields[name].default_factory())
        if not isinstance(value, right):
            what = f"it must define {name}, a {right.__name__}"
            raise ConfigError(f"--preset {path}: {what}, not {value!r:.80}")
    for name, field in fields.items():
        if field.default is field.default_factory is dataclasses.MISSING:
            values[name] = tyro.MISSING
    return kind(**values)
