"""Shows what pretraining learns without labels, on a CPU.

    python benchmarks/pretrain.py             # three seeds, a quarter of an hour on two busy cores
    python benchmarks/pretrain.py --quick     # minutes, and numbers that mean nothing

What is in OUT already, videos, encoders and features, is used again.

For every seed: videos of a noisy texture that drifts in one of eight directions (H.264 files: a set
to learn from, one to choose by, one to measure on); a tiny V-JEPA 2.1 is pretrained without labels;
linear probes, with many labels and with few, and neighbours read the direction from its frozen mean
tokens, and from those of random encoders: of the one that it began as, and of the best one of
several whose weights are larger, which alone makes a random encoder tell more. Writes a table, the
numbers, and the course of each run.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from causal import BATCH, Stopwatch, decode, feed, percent, random_params
from machine import describe
from numpy.typing import NDArray
from rich.console import Console

from jvjepa.config import EncoderConfig, ModelConfig, PredictorConfig
from jvjepa.masks import MaskConfig
from jvjepa.train.data import ClipConfig
from jvjepa.train.feature_cache import Features, open_or_make
from jvjepa.train.feeding import DataConfig
from jvjepa.train.frozen_features import FeatureConfig
from jvjepa.train.loop import LoopConfig, train
from jvjepa.train.manifest import Manifest, read_manifest
from jvjepa.train.neighbours import NeighbourConfig, mean_features, neighbour_accuracy
from jvjepa.train.optimizer import OptimizerConfig
from jvjepa.train.pretrain import Clips, PretrainConfig, pretrain_task, pretrained
from jvjepa.train.probe import fold_linear, probe_result, probe_steps, probe_task
from jvjepa.train.probe_heads import ProbeConfig
from jvjepa.train.synthetic import DIRECTIONS, MANIFEST_FILE, TextureConfig, write_videos
from jvjepa.train.task import Feed
from jvjepa.weights import Model

VIDEOS = TextureConfig(num_frames=8, fps=8, height=32, width=32, speed=(3.0, 5.0), noise=2.5)
CLIP = ClipConfig(
    num_frames=8, fps=8.0, crop_size=32, temporal="uniform", spatial="centre", flip=0.0
)
MODEL = ModelConfig(
    encoder=EncoderConfig(
        hidden_size=64,
        num_layers=2,
        num_heads=2,
        mlp_dim=256,
        crop_size=32,
        frames_per_clip=8,
        patch_size=8,
        rope="interleaved",
        image_tokenizer=True,
        levels=(0, 1),
    ),
    predictor=PredictorConfig(
        hidden_size=48,
        num_layers=2,
        num_heads=2,
        mlp_dim=192,
        rope="interleaved",
        num_levels=2,
        context_projection=True,
        modality_embeddings=True,
    ),
)
WIDER = 4.0  # Meta's deviation of 0.02 is for a width of 1,024: with its root it is 0.08 at 64
OTHERS = (8.0, 12.0)  # of random encoders to compare with
MASKS = (MaskConfig(num_blocks=4, spatial_scale=(0.125, 0.2)),)
FEATURES = FeatureConfig(views=(CLIP,), pool="clip")
SETS = ("training", "validation", "test")
FEW = 128  # labels of the probe that gets few
_Metrics = dict[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything."""

    training: int = 1024
    labelled: int = 1024  # of the training set, for the probes
    validation: int = 256
    test: int = 512
    steps: int = 120
    probe_epochs: int = 20


QUICK = Sizes(training=160, labelled=160, validation=32, test=32, steps=4, probe_epochs=1)


def main() -> None:
    """Runs all seeds, and writes what came out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/pretrain"))
    options = parser.parse_args()
    sizes = QUICK if options.quick else Sizes()
    options.out.mkdir(parents=True, exist_ok=True)
    console, results = Console(), []
    for seed in range(options.seeds):
        results.append(run_seed(seed, sizes, options.out / f"seed{seed}", console))
        record = {"sizes": dataclasses.asdict(sizes), "seeds": results, "machine": describe()}
        (options.out / "pretrain.json").write_text(json.dumps(record, indent=2) + "\n")
        (options.out / "pretrain.md").write_text(make_table(results))
        draw(results, options.out / "pretrain.png")
    print(make_table(results))
    print(describe())


def run_seed(seed: int, sizes: Sizes, folder: Path, console: Console) -> dict[str, Any]:
    """All that is measured with one seed; seconds of each part are among it."""
    watch = Stopwatch()
    folder.mkdir(exist_ok=True)
    sets = {}
    for i, name in enumerate(SETS):
        if not (folder / name).exists():
            write_videos(folder / name, getattr(sizes, name), VIDEOS, seed=len(SETS) * seed + i)
        sets[name] = read_manifest(folder / name / MANIFEST_FILE)
    pixels = decode(sets["training"], CLIP)
    watch.lap("videos")
    models, course = pretrain(seed, sizes, folder, sets["training"], pixels, console)
    watch.lap("pretraining")

    found = {}
    for name, model in models.items():
        features = {
            each: open_or_make(folder / f"{name}-{each}", model, sets[each], FEATURES)
            for each in SETS
        }
        found[name] = probes(features, sizes, folder / f"{name}-probes")
        watch.lap(f"probes of {name}")
    return {"seed": seed, "seconds": watch.laps, "pretraining": course, "encoders": found}


def pretrain(
    seed: int,
    sizes: Sizes,
    folder: Path,
    manifest: Manifest,
    pixels: NDArray[np.uint8],
    console: Console,
) -> tuple[dict[str, Model], list[_Metrics]]:
    """The pretrained model and the random ones, and the course of the training."""
    steps = sizes.steps
    options = PretrainConfig(
        optimizer=OptimizerConfig(
            learning_rate=8e-3,
            start_learning_rate=8e-4,
            final_learning_rate=8e-4,
            warmup_steps=steps // 10,
        ),
        data=DataConfig(clip=CLIP, batch_size=BATCH, seed=seed),
        video_masks=MASKS,
        context_weight=0.0,  # it asks for the pixels' noise; Meta's begins late, too
        context_ramp=None,
        momentum=0.98,
        final_momentum=0.99,
    )
    params = random_params(MODEL, seed, WIDER)
    task = pretrain_task(MODEL, options, manifest, steps=steps, params=params)
    task = dataclasses.replace(task, feed=_clips(feed(pixels, manifest.labels, seed)))
    loop = LoopConfig(steps=steps, seed=seed, log_every=20, save_every=200, keep=1)
    state = train(task, loop, folder / "pretraining", resume=True, console=console)
    lines = (folder / "pretraining" / "metrics.jsonl").read_text().splitlines()
    model = pretrained(MODEL, jax.device_get(state))
    models = {"pretrained": model, "random": dataclasses.replace(model, params=params)}
    for wider in OTHERS:
        larger = random_params(MODEL, seed, wider)
        models[f"random-{wider:g}"] = dataclasses.replace(model, params=larger)
    return models, [json.loads(line) for line in lines]


def _clips(of_batches: Feed) -> Feed:
    @contextmanager
    def start(step: int, index: int, count: int) -> Iterator[Iterator[Clips]]:
        with of_batches(step, index, count) as batches:
            yield (Clips(batch.video) for batch in batches)

    return start


def probes(features: dict[str, Features], sizes: Sizes, folder: Path) -> dict[str, _Metrics]:
    """Accuracies on the validation set, which chooses, and on the test set, which is reported."""
    labelled = _first(features["training"], sizes.labelled)
    few = _first(features["training"], min(FEW, sizes.labelled))
    config = ProbeConfig(
        kind="linear",
        learning_rates=(3e-2, 1e-2, 3e-3),
        weight_decays=(0.01, 1.0),
        epochs=sizes.probe_epochs,
        batch_size=64,
    )
    longer = dataclasses.replace(config, epochs=sizes.probe_epochs * len(labelled) // len(few))
    found: dict[str, _Metrics] = {}
    for name, how, training in (("linear", config, labelled), ("few", longer, few)):
        task = probe_task(how, training, features["validation"])
        loop = LoopConfig(steps=probe_steps(how, training))
        state = train(task, loop, folder / name, resume=True)
        result = probe_result(how, training, task, state.trained)
        kernel, bias = fold_linear(result)
        answers = mean_features(features["test"]) @ kernel + bias
        right = answers.argmax(axis=1) == features["test"].labels
        found[name] = {"validation": result.accuracy, "test": float(right.mean())}
    votes = NeighbourConfig()
    found["neighbours"] = {
        each: neighbour_accuracy(votes, labelled, features[each]) for each in SETS[1:]
    }
    return found


def _first(features: Features, count: int) -> Features:
    """The first videos; of eight in a row each has another label."""
    names = ("values", "labels", "ids")
    return dataclasses.replace(
        features, **{name: getattr(features, name)[:count] for name in names}
    )


def compared(encoders: dict[str, dict[str, _Metrics]]) -> dict[str, _Metrics]:
    """Accuracies on the test set; the best random encoder is that of the validation set.

    Args:
        encoders: of each the accuracies of `probes`.

    Returns:
        Of "pretrained", "random" and "best random" those by probe.
    """
    found = {
        name: {probe: each["test"] for probe, each in encoders[name].items()}
        for name in ("pretrained", "random")
    }
    random = [values for name, values in encoders.items() if name.startswith("random")]
    found["best random"] = {
        probe: max((each[probe] for each in random), key=lambda accuracy: accuracy["validation"])[
            "test"
        ]
        for probe in encoders["random"]
    }
    return found


def make_table(results: list[dict[str, Any]]) -> str:
    """Means over seeds, with the smallest and largest."""
    seeds = [compared(result["encoders"]) for result in results]

    def cell(name: str, probe: str) -> str:
        return percent([seed[name][probe] for seed in seeds])

    lines = [
        f"Percent of the test set, means of {len(results)} seeds, smallest and largest in "
        f"brackets; chance is {100 / len(DIRECTIONS):.1f}.",
        "",
        f"| encoder | linear probe | with {FEW} labels | neighbours |",
        "|---|---|---|---|",
    ]
    rows = {
        "random": "random, as it began",
        "best random": "the best random one",
        "pretrained": "pretrained",
    }
    for name, text in rows.items():
        cells = " | ".join(cell(name, probe) for probe in ("linear", "few", "neighbours"))
        lines.append(f"| {text} | {cells} |")
    return "\n".join(lines) + "\n"


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draws the course of the training, and the accuracies."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for result in results:
        rows = [row for row in result["pretraining"] if "prediction" in row]
        steps = [row["step"] for row in rows]
        left.plot(steps, [row["prediction"] / row["spread"] for row in rows])
    left.set(xlabel="updates", ylabel="prediction error / spread of the targets")
    seeds = [compared(result["encoders"]) for result in results]
    kinds = ("linear", "few", "neighbours")
    for i, name in enumerate(("random", "best random", "pretrained")):
        values = np.array([[seed[name][probe] for probe in kinds] for seed in seeds])
        places = np.arange(len(kinds)) + 0.25 * (i - 1)
        right.bar(places, values.mean(0), 0.22, label=name)
        right.plot(places, values.T, ".k", ms=4)
    right.axhline(1 / len(DIRECTIONS), color="grey", lw=1)
    right.set(ylabel="accuracy", xticks=range(len(kinds)))
    right.set_xticklabels(["linear probe", f"{FEW} labels", "neighbours"])
    right.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
