"""The command lines `jvjepa train mos` and `jvjepa mos evaluate`."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from numpy.typing import NDArray
from rich.console import Console

from jvjepa.attention import Backend
from jvjepa.errors import InputError
from jvjepa.options import DType
from jvjepa.quality import HeadConfig, QualityModel, load_quality, new_quality, save_quality
from jvjepa.quality_config import Feature
from jvjepa.storage import check_apart, check_free, check_replaceable
from jvjepa.text_weights import load_text
from jvjepa.train.mos import MosConfig, mos_task, scorer, trained_quality
from jvjepa.train.mos_data import Ratings, read_ratings, split
from jvjepa.train.mos_features import Examples, Kept, Store, make_examples
from jvjepa.train.mos_metrics import intervals, measure
from jvjepa.train.mos_report import PAGE_FILE, markdown, require_plots, write_report
from jvjepa.train.mos_scorer import Scorer
from jvjepa.train.running import Flat, Positional, Run
from jvjepa.weights import WEIGHTS_FILE, load


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mos(Run):
    """Train the head of a video-quality model, and its upper blocks: OUT/model, OUT/report."""

    model: Positional[Path]
    """A video-quality model; or with --text a converted folder, whose encoder a new one takes."""
    ratings: Positional[Path]
    """A CSV with the columns video_name, Prompt, and Traditional_MOS, Alignment_MOS, Aesthetic_MOS,
    Temporal_MOS, Overall_MOS, 1 to 5. A video without all scores is left out."""
    out: Positional[Path]
    """The folder to make: run, with run.json, metrics.jsonl and checkpoints; features, model, and
    report."""
    videos: Path | None = None
    """The folder of the videos; by default that of the CSV."""
    validation: Path | None = None
    """Another CSV to measure on at every checkpoint; by default a part of the first."""
    validation_videos: Path | None = None
    """The folder of its videos; by default that of its CSV."""
    validation_share: float = 0.2
    """Share of the videos to measure on, where there is no other CSV."""
    split_seed: int = 0
    """Of which videos these are."""
    text: Path | None = None
    """A converted text encoder, for a new model; the three options below are for that too."""
    feature: Feature = "first_token"
    """What the new head sees of a video: as QualiVision its first token, the mean of all, or what
    the pooler of the model's classifier makes of them."""
    num_frames: int = 64
    """Frames that are taken of a video, spread over all of it."""
    head: HeadConfig = dataclasses.field(default_factory=HeadConfig)
    attention: Backend = "auto"
    """Attention backend."""
    features: Path | None = None
    """The folder of what frozen parts give, which runs can share; by default OUT/features."""
    encode_batch: int = 1
    """Videos that frozen blocks take at a time."""
    threads: int = 2
    """Threads that decode ahead."""
    plots: bool = True
    """Draw scatter plots for the report."""
    config: Annotated[MosConfig, Flat] = dataclasses.field(default_factory=MosConfig)

    def run(self, console: Console) -> int:
        """Computes features, trains, measures and saves."""
        if self.plots:
            require_plots()
        run = self.out / "run"
        if run.exists() and not self.resume:  # before features are computed
            raise InputError(f"{run} exists; resume it, or choose another folder")
        check_apart(self.out / "model", self.model, self.text)
        check_replaceable(self.out / "model", WEIGHTS_FILE)
        check_replaceable(self.out / "report", PAGE_FILE)
        sets = self._ratings()
        part = scorer(self._model(), self.config)
        store = Store(self.out / "features" if self.features is None else self.features)
        how = {"batch_size": self.encode_batch, "threads": self.threads, "console": console}
        training, validation = (
            make_examples(part.model, some, store, part.kept, **how) for some in sets
        )
        for some in (training, validation):
            _describe(some, console)
        steps, seed = self.loop.steps, self.loop.seed
        task = mos_task(part, self.config, training, validation, steps=steps, seed=seed)
        state = self.train(task, run, console)
        found = part.predict({**state.trained, **task.frozen}, validation, self.config.batch_size)
        if jax.process_index() == 0:
            title, how = f"Validation of {self.out}", {"plots": self.plots, "force": True}
            _report(self.out / "report", title, validation, found, console, **how)
            save_quality(self.out / "model", trained_quality(part, state), force=True)
            console.print(f"model: {self.out / 'model'}, for jvjepa mos")
        return 0

    def _model(self) -> QualityModel:
        if self.text is None:
            return load_quality(self.model, attention=self.attention)
        encoder = load(self.model, attention=self.attention)
        options = {"feature": self.feature, "head": self.head, "num_frames": self.num_frames}
        return new_quality(encoder, load_text(self.text), **options, seed=self.loop.seed)

    def _ratings(self) -> tuple[Ratings, Ratings]:
        """The videos to train on and to measure on."""
        ratings = read_ratings(self.ratings, self.videos)
        if self.validation is not None:
            return ratings, read_ratings(self.validation, self.validation_videos)
        if self.validation_videos is not None:
            raise InputError("--validation-videos: they are those of --validation; give it too")
        return split(ratings, self.validation_share, self.split_seed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Score rated videos, and say how well the scores agree with the ratings."""

    model: Positional[Path]
    """A converted folder of a video-quality model."""
    ratings: Positional[Path]
    """A CSV with the columns video_name, Prompt, and Traditional_MOS, Alignment_MOS, Aesthetic_MOS,
    Temporal_MOS, Overall_MOS, 1 to 5. A video without all scores is left out."""
    out: Path
    """The folder to make: predictions.csv, metrics.json, report.html, and scatter plots."""
    videos: Path | None = None
    """The folder of the videos; by default that of the CSV."""
    features: Path | None = None
    """A folder to keep features in, so that another evaluation need not compute them again."""
    encode_batch: int = 1
    """Videos that are encoded at a time."""
    threads: int = 2
    """Threads that decode ahead."""
    dtype: DType | None = None
    """Dtype of the computation; by default that of the weights."""
    attention: Backend = "auto"
    """Attention backend."""
    plots: bool = True
    """Draw scatter plots."""
    force: bool = False
    """Replace OUT, if it is empty or a folder of the kind that is written."""

    def run(self, console: Console) -> int:
        """Scores, measures and reports."""
        check_apart(self.out, self.model, self.ratings, self.videos, self.features)
        check_free(self.out, PAGE_FILE, force=self.force)
        if self.plots:
            require_plots()
        ratings = read_ratings(self.ratings, self.videos)
        model = load_quality(self.model, dtype=self.dtype, attention=self.attention)
        kept = Kept(None, "float32", jnp.dtype(model.encoder.dtype))
        part = Scorer(model=model, kept=kept)
        how = {"batch_size": self.encode_batch, "threads": self.threads, "console": console}
        with contextlib.ExitStack() as stack:
            folder = self.features
            if folder is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            examples = make_examples(model, ratings, Store(folder), kept, **how)
            _describe(examples, console)
            predictions = part.predict(part.divide()[0], examples, len(examples))
        title, how = f"{self.model} on {self.ratings}", {"plots": self.plots, "force": self.force}
        _report(self.out, title, examples, predictions, console, **how)
        return 0


def main(arguments: Sequence[str], console: Console) -> int:
    """Parses `MODEL RATINGS --out FOLDER ..` and evaluates.

    Args:
        arguments: behind `jvjepa mos evaluate`.
        console: where to print.

    Returns:
        The exit code.

    Raises:
        InputError: bad input.
    """
    return tyro.cli(Evaluate, prog="jvjepa mos evaluate", args=arguments).run(console)


def _describe(examples: Examples, console: Console) -> None:
    """Says how many videos there are, and which are left out and why."""
    ratings = examples.ratings
    left_out = [f"{name}: {why}" for name, why in examples.bad.items()]
    left_out += [f"{name}: a score is missing" for name in ratings.unrated]
    console.print(f"{ratings.source}: {len(examples)} videos, {len(left_out)} left out")
    for line in left_out:
        console.print(f"  {line}")


def _report(
    folder: Path,
    title: str,
    examples: Examples,
    predictions: NDArray[np.float32],
    console: Console,
    *,
    plots: bool,
    force: bool,
) -> None:
    """Measures, prints, and writes `jvjepa.train.mos_report`."""
    scores = examples.ratings.scores
    found, ends = measure(predictions, scores), intervals(predictions, scores)
    how = {"bad": examples.bad, "plots": plots, "force": force}
    write_report(folder, title, examples.ratings, predictions, found, ends, **how)
    console.print(markdown(found, ends))
    console.print(f"report: {folder / PAGE_FILE}")
