"""The command line: `jvjepa COMMAND`.

Exit codes: 0 done; 1 parity not met, or a video was left out; 2 bad input.
"""

import dataclasses
import importlib
import logging
import signal
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from jvjepa.classification import Combine, classify_command
from jvjepa.errors import InputError
from jvjepa.export.command import Export, export_command
from jvjepa.gate import Reference
from jvjepa.long import Long
from jvjepa.options import DType, Reading, Running, Streaming
from jvjepa.quality_command import Mos, mos_command
from jvjepa.quantize import Quantize, quantize_command

_Positional = tyro.conf.Positional
_SMALLER = "fewer frames, tokens or streams at a time, or a smaller window, take less"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert:
    """Turn a checkpoint into a jvjepa folder: SOURCE OUT.

    With --probe and --encoder, attach one of Meta's attentive probes to a converted encoder: OUT.
    With --text, turn one of QualiVision's checkpoints into a video-quality model. A BERT sentence
    encoder, such as BAAI/bge-large-en-v1.5, becomes a text encoder for such models.
    """

    source: _Positional[str]
    """A name like vjepa2-vitl-fpc64-256, a hub id, a Hugging Face folder, or a .pt file of Meta's;
    with --probe the folder to make."""
    out: _Positional[Path | None] = None
    """The folder to make."""
    dtype: DType | None = None
    """Dtype of the weights; by default the source's."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    key: Literal["target_encoder", "ema_encoder", "encoder"] | None = None
    """Which encoder of a .pt file to take; by default the one that Meta's hub loads."""
    heads: int | None = None
    """Attention heads of a .pt file's encoder, where no released model has its width."""
    predictor_heads: int | None = None
    """The same of its predictor."""
    crop_size: int | None = None
    """Pixels of a side of its input, where released models of its sizes differ or there is none."""
    probe: Path | None = None
    """A probe's .pt file to attach."""
    encoder: Path | None = None
    """The converted folder to attach it to."""
    labels: Path | None = None
    """Names of the probe's classes: .json (a list, or Hugging Face's id2label), or a line each. Of
    an EK100 probe: EPIC_100_train.csv, or .json with verbs, nouns, and actions as pairs of places.
    """
    probe_index: int | None = None
    """Which classifier of the probe's file, where there are several."""
    probe_heads: int | None = None
    """Attention heads of the probe; by default Meta's 16."""
    probe_layers: tuple[int, ...] | None = None
    """The encoder's layers that the probe sees; by default the last, or those of the released
    probe of that file name."""
    probe_frames: int | None = None
    """Frames of the clips that the probe was trained on; by default those of the released probe of
    that file name, or the encoder's."""
    text: str | None = None
    """The text encoder that a checkpoint of QualiVision was trained with, a Hugging Face folder or
    a hub id: its tokenizer, and its weights where the checkpoint has none."""
    area: str | None = None
    """Store area attention with the model, SPATIALxTEMPORAL splits as 2x2."""
    area_layers: str | None = None
    """START:END of the layers that have it, as 0:18; by default the first three quarters."""
    force: bool = False
    """Replace OUT, if it is empty or a folder of the kind that is written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportHf:
    """Turn a jvjepa folder back into a Hugging Face checkpoint."""

    model: _Positional[Path]
    """A converted folder."""
    out: _Positional[Path]
    """The folder to make."""
    force: bool = False
    """Replace OUT, if it is empty or a folder of the kind that is written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify:
    """Run converted weights and the PyTorch original side by side; exit code 1 if they differ."""

    model: _Positional[Path]
    """The converted folder."""
    source: _Positional[str]
    """What it was converted from."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    probe: Path | None = None
    """The probe that was attached, if one was."""
    frames: int = 4
    """Frames of the random clips, a multiple of 2."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Embed(Reading):
    """Embed one clip of a video, a picture, or with --max-tokens every frame of a long video."""

    model: _Positional[Path]
    """A converted folder."""
    video: _Positional[str]
    """A file or a URL of one; for V-JEPA 2.1 also a picture."""
    out: Path
    """The .npz to write: embedding [D], times, and tokens [N, D] if asked for. With --max-tokens
    times are [n, 2], the first and last of each clip, beside embeddings [n, D], num_tokens [n]."""
    num_frames: int | None = None
    """Frames of the clip; by default as many as the model was trained with."""
    max_tokens: int | None = None
    """Take every frame, and encode at most so many tokens in one forward pass."""
    frame_step: int | None = None
    """With --max-tokens, take every so-manyth frame."""
    long: Long | None = None
    """With --max-tokens, encode clips one by one (the default), or stream tubelets, of which each
    sees those before it that fit."""
    overlap: int | None = None
    """Frames that a clip shares with the one before, by default 0."""
    tokens: bool = False
    """Write all tokens too."""
    repeat_frame: bool = False
    """Take a picture as a still clip, for models that were trained on video alone."""
    force: bool = False
    """Replace OUT, if it is empty or a folder of the kind that is written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Features(Reading):
    """Look at the features of every patch: their main components as colours, or the raw grid."""

    model: _Positional[Path]
    """A converted folder."""
    source: _Positional[str]
    """A video or a picture."""
    pca: Path | None = None
    """A .png or .mp4 to draw the three main components into."""
    npz: Path | None = None
    """A .npz for the raw grid: features [t, h, w, D], times."""
    foreground: bool = True
    """Colour what the first component separates from the background, and nothing else."""
    num_frames: int | None = None
    """Frames of the clip; by default as many as the model was trained with."""
    repeat_frame: bool = False
    """Take a picture as a still clip, for models that were trained on video alone."""
    force: bool = False
    """Replace the files."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classify(Running):
    """Say what happens in a video, with a checkpoint that has a classifier."""

    model: _Positional[Path]
    """A converted folder."""
    video: _Positional[str]
    """A file; for V-JEPA 2.1 also a picture."""
    top: int = 5
    """Classes to show."""
    clips: int = 1
    """Clips, spread over the video."""
    views: int = 1
    """Crops of each clip: 1, the middle; 3, along the long side."""
    num_frames: int | None = None
    """Frames of a clip; by default as many as the classifier was trained with."""
    frame_step: int | None = None
    """Take every so-manyth frame; by default 4 for 16 frames, and 2 for 32 or more."""
    combine: Combine = "tokens"
    """Let the classifier see the tokens of all clips together, as Meta's evaluation does, or
    average the probabilities of clips."""
    repeat_frame: bool = False
    """Take a picture as a still clip, for models that were trained on video alone."""
    json: Path | None = None
    """A .json to write the result into."""
    force: bool = False
    """Replace the file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Anticipate(Running):
    """Say what will happen after a moment of a video, with a checkpoint that has an anticipator."""

    model: _Positional[Path]
    """A converted folder."""
    video: _Positional[str]
    """A file."""
    at: float | None = None
    """Seconds from the start at which the clip ends that the model sees; by default the end."""
    ahead: float = 1.0
    """Seconds from there to what is anticipated."""
    top: int = 5
    """Classes to show of each kind."""
    json: Path | None = None
    """A .json to write the result into."""
    force: bool = False
    """Replace the file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Doctor:
    """Say what a file or folder is, whether it is whole, and what to type next; exit code 1 if not.

    Nothing in the file is run.
    """

    path: _Positional[Path]
    """A converted folder, a Hugging Face folder, a .pt file, or what may be one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream(Streaming):
    """Keep a live embedding of a video; encode only what is new."""

    model: _Positional[Path]
    """A converted folder; with another runtime than jax, what `jvjepa export --what step gate`
    made of it."""
    video: _Positional[str]
    """A file, a URL, or camera:0."""
    out: Path
    """The .npz to write: embeddings [n, D], is_new [n], surprise [n], times [n]."""
    runtime: Literal["jax", "onnx", "tensorrt"] = "jax"
    """What runs the model. An export has its window, positions and adapters in it."""
    provider: str | None = None
    """Of ONNX Runtime; by default CPUExecutionProvider."""
    tau: float = 0.015
    """Encode where the surprise is at least this; 0 encodes everything. See calibrate."""
    reference: Reference = "encoded"
    """What the gate compares with."""
    plot: Path | None = None
    """A .png to draw the timeline into."""
    force: bool = False
    """Replace OUT and the plot."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibrate(Streaming):
    """Find the gate's threshold for a camera from a typical video."""

    model: _Positional[Path]
    """A converted folder."""
    video: _Positional[str]
    """A file, a URL, or camera:0; `--end` says how much of it."""
    end: float | None = 60.0
    """Seconds at which to stop."""
    target_fidelity: float = 0.99
    """Cosine to the ungated stream that must be kept."""
    criterion: Literal["worst", "mean"] = "worst"
    """Which cosine must reach the target: that of the worst tubelet, or the mean."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train:
    """Train adapters, probes, or models; `jvjepa train --help` lists the kinds."""

    arguments: tyro.conf.Suppress[tuple[str, ...]] = ()
    module: tyro.conf.Suppress[str] = "commands"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Look after training data. check: read every file once and report; exit code 1 if one is bad.

    Labels and times are looked at too.
    """

    action: _Positional[Literal["check"]]
    """What to do."""
    manifest: _Positional[Path]
    """A folder of videos; a .jsonl; or a text with lines of path,start,end,label or path label."""
    workers: int | None = None
    """Files that are read at a time; by default one for each core."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo:
    """Convert, verify and stream a tiny checkpoint and a made video, without network."""

    out: Path = Path("demo")
    """The folder to work in; made anew."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Info:
    """Show what a converted folder, or a released checkpoint, holds."""

    model: _Positional[str]
    """A converted folder, or a name like vjepa2-vitl-fpc64-256."""
    shapes: bool = False
    """List every parameter."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraMerge:
    """Add LoRA adapters to the weights that they were trained on: MODEL ADAPTER OUT."""

    model: _Positional[Path]
    """A converted folder."""
    adapter: _Positional[Path]
    """The adapters' folder."""
    out: _Positional[Path]
    """The converted folder to make."""
    force: bool = False
    """Replace OUT, if it is empty or a folder of the kind that is written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraExportPeft:
    """Turn LoRA adapters into those of Hugging Face's peft library: MODEL ADAPTER OUT."""

    model: _Positional[Path]
    """The converted folder that they were trained on."""
    adapter: _Positional[Path]
    """The adapters' folder."""
    out: _Positional[Path]
    """The folder to make."""
    force: bool = False
    """Replace OUT, if it is empty or a folder of the kind that is written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraInfo:
    """Show what LoRA adapters there are, and for which weights."""

    adapter: _Positional[Path]
    """The adapters' folder."""


_Lora = (
    Annotated[LoraMerge, tyro.conf.subcommand("merge")]
    | Annotated[LoraExportPeft, tyro.conf.subcommand("export-peft")]
    | Annotated[LoraInfo, tyro.conf.subcommand("info")]
)

_Command = (
    Annotated[Convert, tyro.conf.subcommand("convert")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[ExportHf, tyro.conf.subcommand("export-hf")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
    | Annotated[Embed, tyro.conf.subcommand("embed")]
    | Annotated[Features, tyro.conf.subcommand("features")]
    | Annotated[Classify, tyro.conf.subcommand("classify")]
    | Annotated[Anticipate, tyro.conf.subcommand("anticipate")]
    | Annotated[Mos, tyro.conf.subcommand("mos")]
    | Annotated[Stream, tyro.conf.subcommand("stream")]
    | Annotated[Calibrate, tyro.conf.subcommand("calibrate")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Data, tyro.conf.subcommand("data")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Info, tyro.conf.subcommand("info")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Quantize, tyro.conf.subcommand("quantize")]
    | Annotated[
        _Lora, tyro.conf.subcommand("lora", description="LoRA adapters: merge, export, show.")
    ]
)

# Commands by their first words: the module of `jvjepa.train` whose `main` takes the other words.
# `jvjepa mos MODEL VIDEO`, which needs no training, is not one of them.
_OF_TRAINING = {("train",): "commands", ("mos", "evaluate"): "mos_commands"}


def run(command: object, console: Console) -> int:
    """Carries out a parsed command; returns the exit code.

    Args:
        command: one of this module's dataclasses.
        console: where to print.

    Returns:
        0, or 1 where parity is not met.

    Raises:
        InputError: bad input.
        OSError: a file cannot be read or written.
    """
    from jvjepa import adapters, commands  # here, because they import this module
    from jvjepa.conversion_command import convert_command
    from jvjepa.features import features_command
    from jvjepa.forecasting import anticipate_command
    from jvjepa.train.manifest import check_command

    name = type(command).__name__
    action = {
        "Convert": convert_command,
        "Verify": commands.verify,
        "ExportHf": commands.export_hf,
        "Doctor": commands.doctor,
        "Embed": commands.embed,
        "Features": features_command,
        "Classify": classify_command,
        "Anticipate": anticipate_command,
        "Mos": mos_command,
        "Stream": commands.stream,
        "Calibrate": commands.calibrate,
        "Train": _train,
        "Data": check_command,
        "Demo": commands.demo,
        "Info": commands.info,
        "Export": export_command,
        "Quantize": quantize_command,
        "LoraMerge": adapters.merge_command,
        "LoraExportPeft": adapters.export_peft_command,
        "LoraInfo": adapters.info_command,
    }[name]
    return action(command, console)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and runs it.

    Args:
        arguments: without the program's name; None takes the process's.

    Returns:
        The exit code: 0 done; 1 parity not met, or a video was left out; 2 bad input, or more than
        fits into memory; 130 interrupted before there was anything to keep.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    command = _handed_on(arguments) or tyro.cli(_Command, prog="jvjepa", args=arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    before = signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        return run(command, console)
    except (InputError, OSError) as error:
        print(f"error: {' '.join(_describe(error, command).split())}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        line = str(error).strip().partition("\n")[0]
        if not (isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in line):  # as XLA says it
            raise
        print(f"error: not enough memory: {line}; {_SMALLER}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"interrupted{f': {error}' if error.args else ''}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _describe(error: InputError | OSError, command: object) -> str:
    if not isinstance(error, OSError):
        return str(error)
    where = error.filename or getattr(command, "out", "writing")  # a full disk's names no file
    return f"{where}: {error.strerror or error}"


def _handed_on(arguments: Sequence[str]) -> Train | None:
    """A command whose options are those of a package that need not be installed; None if other."""
    for words, module in _OF_TRAINING.items():
        if tuple(arguments[: len(words)]) == words:
            return Train(arguments=tuple(arguments[len(words) :]), module=module)
    return None


def _train(options: Train, console: Console) -> int:
    try:
        module = importlib.import_module(f"jvjepa.train.{options.module}")
    except ModuleNotFoundError as error:
        raise InputError(f"training needs {error.name}: pip install 'jvjepa[train]'") from error
    return module.main(options.arguments, console)


def _as_interrupt(number: int, frame: types.FrameType | None) -> None:
    """A service manager's SIGTERM ends a stream as cleanly as Ctrl-C does."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
