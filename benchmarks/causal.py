"""Shows what causal LoRA repairs: from made videos to a stream, on a CPU.

    python benchmarks/causal.py               # three seeds, half an hour on two idle cores
    python benchmarks/causal.py --quick       # minutes, and numbers that mean nothing

What is in OUT already, videos and the trained encoder of a seed, is used again.

For every seed: videos of a shape that moves in one of eight directions (H.264 files, other ones to
learn from than to measure on); a tiny encoder and a classifier learn the directions from whole
clips; then the encoder runs causally, as a stream does, which costs accuracy and fidelity; and
adapters are trained, without labels, that bring them back. The classifier stays as it is. Writes a
table, the numbers, and the course of each run.
"""

import argparse
import dataclasses
import functools
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from machine import describe
from numpy.typing import NDArray
from rich.console import Console

from jvjepa.config import EncoderConfig, ModelConfig
from jvjepa.encoder import Encoder
from jvjepa.lora import LoraConfig, join, variables
from jvjepa.train.causal_lora import CausalLoraConfig, causal_lora_task
from jvjepa.train.data import Batch, ClipConfig, normalise
from jvjepa.train.feeding import DataConfig
from jvjepa.train.finetune import FinetuneConfig, finetune_task, finetuned, with_classifier
from jvjepa.train.initialisation import init_params
from jvjepa.train.loop import LoopConfig, train
from jvjepa.train.manifest import Manifest, read_manifest
from jvjepa.train.optimizer import OptimizerConfig
from jvjepa.train.regression import RegressionConfig, Weighting, fidelity
from jvjepa.train.synthetic import DIRECTIONS, MANIFEST_FILE, SyntheticConfig, write_videos
from jvjepa.train.task import Feed
from jvjepa.typing import Params
from jvjepa.weights import Model

VIDEOS = SyntheticConfig(num_frames=16, fps=8, height=64, width=64)
CLIP = ClipConfig(
    num_frames=16, fps=8.0, crop_size=32, temporal="uniform", spatial="centre", flip=0.0
)
TUBELETS = 8
ENCODER = EncoderConfig(
    hidden_size=96,
    num_layers=4,
    num_heads=3,
    mlp_dim=384,
    crop_size=32,
    frames_per_clip=16,
    patch_size=8,
)
# Meta's deviation of 0.02 is for widths of 1,000 and more: here attention would hardly do a thing.
WIDER = 3.2
BATCH = 32
LAYERS = "encoder/blocks/(attention/(query|key|value|proj)|mlp/(fc1|fc2))"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything."""

    training: int = 2048
    validation: int = 512
    teacher_steps: int = 960
    lora_steps: int = 480


QUICK = Sizes(training=64, validation=32, teacher_steps=4, lora_steps=4)


def main() -> None:
    """Runs all seeds, and writes what came out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--weighting", choices=get_args(Weighting), default="uniform")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/causal"))
    options = parser.parse_args()
    sizes = QUICK if options.quick else Sizes()
    options.out.mkdir(parents=True, exist_ok=True)
    console, results = Console(), []
    for seed in range(options.seeds):
        results.append(
            run_seed(seed, sizes, options.weighting, options.out / f"seed{seed}", console)
        )
        record = {
            "sizes": dataclasses.asdict(sizes),
            "weighting": options.weighting,
            "seeds": results,
            "machine": describe(),
        }
        (options.out / "causal.json").write_text(json.dumps(record, indent=2) + "\n")
    table = make_table(results)
    (options.out / "causal.md").write_text(table)
    draw(results, options.out / "causal.png")
    print(table)
    print(describe())


def run_seed(
    seed: int, sizes: Sizes, weighting: Weighting, folder: Path, console: Console
) -> dict[str, Any]:
    """All that is measured with one seed; seconds of each part are among it."""
    watch = Stopwatch()
    folder.mkdir(exist_ok=True)
    made = (("training", sizes.training, 2 * seed), ("validation", sizes.validation, 2 * seed + 1))
    sets = {}
    for name, count, source in made:
        if not (folder / name).exists():
            write_videos(folder / name, count, VIDEOS, seed=source)
        sets[name] = read_manifest(folder / name / MANIFEST_FILE)
    pixels = {name: decode(manifest) for name, manifest in sets.items()}
    clips = feed(pixels["training"], sets["training"].labels, seed)
    watch.lap("videos")

    steps = sizes.teacher_steps
    options = FinetuneConfig(
        optimizer=OptimizerConfig(
            learning_rate=1e-3, warmup_steps=steps // 10, weight_decay=0.05, max_norm=1.0
        ),
        data=DataConfig(clip=CLIP, batch_size=BATCH, seed=seed),
        num_layers=1,
        num_heads=3,
    )
    model = with_classifier(_random_model(seed), options, sets["training"], seed)
    task = dataclasses.replace(
        finetune_task(model, options, sets["training"], steps=steps), feed=clips
    )
    loop = LoopConfig(steps=steps, seed=seed, log_every=20)
    state = train(task, loop, folder / "teacher", resume=True, console=console)
    model = finetuned(model, task, jax.device_get(state))
    watch.lap("teacher")

    steps = sizes.lora_steps
    options = CausalLoraConfig(
        lora=LoraConfig(rank=16, alpha=32.0, targets=(LAYERS,)),
        optimizer=OptimizerConfig(
            learning_rate=3e-3, warmup_steps=steps // 10, weight_decay=0.0, max_norm=1.0
        ),
        data=DataConfig(clip=CLIP, batch_size=BATCH, seed=seed),
        window=TUBELETS,
        loss=RegressionConfig(weighting=weighting),
    )
    task = causal_lora_task(model, options, sets["training"], steps=steps, seed=seed)
    measured = Measure(model, pixels["validation"], sets["validation"].labels)
    curve: list[dict[str, float]] = []

    def evaluate(trained: Params, carried: Params, frozen: Params) -> dict[str, float]:
        curve.append(measured(join(trained, frozen["constants"])["encoder"], TUBELETS))
        return curve[-1]

    evaluate(task.trained, {}, task.frozen)  # adapters change nothing yet
    task = dataclasses.replace(task, feed=clips, evaluate=evaluate)
    loop = LoopConfig(steps=steps, seed=seed, log_every=20, save_every=max(1, steps // 10))
    shutil.rmtree(folder / "lora", ignore_errors=True)  # its curve is measured on the way
    train(task, loop, folder / "lora", console=console)
    watch.lap("adapters")

    nothing = jax.tree.map(jnp.zeros_like, join(task.trained, task.frozen["constants"])["encoder"])
    whole, causal, adapted = measured(nothing, None), curve[0], curve[-1]
    lost = {name: whole[name] - causal[name] for name in whole}
    recovered = {
        name: (adapted[name] - causal[name]) / loss if loss else math.nan
        for name, loss in lost.items()
    }
    found = {"whole": whole, "causal": causal, "adapted": adapted, "recovered": recovered}
    return {**found, "curve": curve, "every": loop.save_every, "seconds": watch.laps, "seed": seed}


def _random_model(seed: int) -> Model:
    config = ModelConfig(encoder=ENCODER)
    params = random_params(config, seed, WIDER)
    return Model(config=config, encoder=Encoder(ENCODER), params=params, source=None)


def random_params(config: ModelConfig, seed: int, wider: float) -> Params:
    """Parameters to begin with, whose kernels are so many times as large as Meta's."""

    def widen(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return leaf * wider if path[-1].key == "kernel" else leaf

    return jax.tree_util.tree_map_with_path(widen, init_params(config, jax.random.key(seed)))


def decode(manifest: Manifest, clip: ClipConfig = CLIP) -> NDArray[np.uint8]:
    """Reads all clips once, so that what is measured is training and not the reading of files."""
    data = DataConfig(clip=clip, batch_size=BATCH)
    with data.evaluate(manifest) as batches:
        return np.concatenate([batch.video for batch in batches])[: len(manifest)]


def feed(pixels: NDArray[np.uint8], labels: NDArray[np.int32], seed: int) -> Feed:
    """Batches of clips that are in memory; every epoch has an order of its own."""

    @contextmanager
    def start(step: int, index: int, count: int) -> Iterator[Iterator[Batch]]:
        def batches() -> Iterator[Batch]:
            number, per_epoch = step, len(pixels) // BATCH
            while True:
                epoch, place = divmod(number, per_epoch)
                order = np.random.default_rng((seed, epoch)).permutation(len(pixels))
                rows = order[place * BATCH : (place + 1) * BATCH]
                yield Batch(pixels[rows], labels[rows], rows.astype(np.int32))
                number += 1

        yield batches()

    return start


class Measure:
    """The accuracy of the classifier, and how near tokens are to those of whole clips."""

    def __init__(self, model: Model, pixels: NDArray[np.uint8], labels: NDArray[np.int32]) -> None:
        """Takes what is measured on."""
        self._pixels, self._labels = pixels, labels
        params = model.params

        @functools.partial(jax.jit, static_argnums=2)
        def of(video: jax.Array, lora: Params, window: int | None) -> tuple[Any, dict[str, Any]]:
            clip = normalise(video)
            given = variables(params["encoder"], lora)
            tokens = model.encoder.apply(given, clip, window=window)
            whole = model.encoder.apply({"params": params["encoder"]}, clip)
            logits = model.classifier.apply({"params": params["classifier"]}, tokens)
            near = fidelity(tokens, whole, TUBELETS)
            for i in range(TUBELETS):  # the last one has seen all that the teacher sees
                parts = (jnp.split(x, TUBELETS, axis=1)[i] for x in (tokens, whole))
                near[f"tubelet_{i}"] = fidelity(*parts, 1)["pooled_cosine"]
            return jnp.argmax(logits, axis=-1), near

        self._of = of

    def __call__(self, lora: Params, window: int | None) -> dict[str, float]:
        """Measures the encoder with adapters, causal with a window, else over whole clips."""
        total: dict[str, list[float]] = {"accuracy": []}
        for start in range(0, len(self._pixels), BATCH):
            some = slice(start, start + BATCH)
            found, near = jax.device_get(self._of(self._pixels[some], lora, window))
            total["accuracy"] += list(found == self._labels[some])
            for name, values in near.items():
                total.setdefault(name, []).extend(values)
        return {name: float(np.mean(values)) for name, values in total.items()}


class Stopwatch:
    """Seconds of each part."""

    def __init__(self) -> None:
        """Begins now."""
        self.laps: dict[str, float] = {}
        self._since = time.monotonic()

    def lap(self, name: str) -> None:
        """Ends a part."""
        now = time.monotonic()
        self.laps[name], self._since = round(now - self._since, 1), now


def make_table(results: list[dict[str, Any]]) -> str:
    """Means over seeds, with the smallest and largest."""

    def cell(*path: str) -> str:
        values = []
        for result in results:
            value: Any = result
            for key in path:
                value = value[key]
            values.append(100 * value)
        return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"

    lines = [
        f"Percent, means of {len(results)} seeds, smallest and largest in brackets; "
        f"chance is {100 / len(DIRECTIONS):.1f}.",
        "",
        "| encoder | accuracy | cosine of tokens | of tubelets' means | of the last one's |",
        "|---|---|---|---|---|",
    ]
    names = ("accuracy", "token_cosine", "pooled_cosine", f"tubelet_{TUBELETS - 1}")
    rows = {"whole": "whole clip", "causal": "causal", "adapted": "causal, with adapters"}
    for key, text in {**rows, "recovered": "share of the loss recovered"}.items():
        lines.append(f"| {text} | {' | '.join(cell(key, name) for name in names)} |")
    return "\n".join(lines) + "\n"


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draws the course of the training, and how near each tubelet is before and after it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    steps = np.arange(len(results[0]["curve"])) * results[0]["every"]
    shown = {
        "pooled_cosine": "all tubelets",
        f"tubelet_{TUBELETS - 1}": "the last tubelet",
    }
    for name, text in shown.items():
        values = np.array([[point[name] for point in result["curve"]] for result in results])
        line = left.plot(steps, values.mean(0), label=text)[0]
        left.fill_between(steps, values.min(0), values.max(0), alpha=0.2, color=line.get_color())
    left.set(xlabel="updates of the adapters", ylabel="cosine to the whole clip's embedding")
    left.legend()
    for which, text in (("causal", "causal"), ("adapted", "causal, with adapters")):
        values = [[result[which][f"tubelet_{i}"] for i in range(TUBELETS)] for result in results]
        right.plot(range(TUBELETS), np.mean(values, 0), marker="o", label=text)
    right.set(xlabel="tubelet", ylabel="the same, tubelet by tubelet")
    right.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
