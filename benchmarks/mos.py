"""Shows that video quality can be learned: made videos of known quality, on a CPU.

    python benchmarks/mos.py                  # about a quarter of an hour on two idle cores
    python benchmarks/mos.py --quick          # a minute, and numbers that mean nothing

What is in OUT already, videos, features, and steps of each training, is used again.

Videos are those of `jvjepa.train.degradations`: a moving shape, degraded by blur, noise,
compression, fading, repeated and dropped frames, with prompts that may name another shade or
direction; how strongly says what the scores are. No released encoder is small enough for a CPU, so
a tiny one is used: its patch embedding has fixed cosines, its blocks begin with random weights. The
text encoder is a tiny BERT with random weights and a vocabulary of the words that the prompts have.
Compared, on videos that nobody has learned from, are

- pixels: ridge regression on statistics of pixels and the words of the prompt;
- the head alone, on the random encoder;
- that head and the upper half of the blocks, trained on; or the head and all blocks.

The last state of each training counts, so that none is chosen by what it is measured on.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from machine import describe
from numpy.typing import NDArray
from rich.console import Console
from scipy import ndimage

from jvjepa import video
from jvjepa.config import EncoderConfig, ModelConfig
from jvjepa.encoder import Encoder
from jvjepa.quality import SCORES, HeadConfig, QualityModel, new_quality
from jvjepa.text import TextEncoder
from jvjepa.text_config import TextConfig
from jvjepa.text_weights import TextModel, read_tokenizer, text_shapes
from jvjepa.train.degradations import RATINGS_FILE, prompt, write_rated_videos
from jvjepa.train.initialisation import init_params
from jvjepa.train.loop import LoopConfig, train
from jvjepa.train.mos import MosConfig, mos_task, scorer, trained_quality
from jvjepa.train.mos_data import Ratings, read_ratings
from jvjepa.train.mos_features import Store, make_examples
from jvjepa.train.mos_metrics import FINAL, intervals, measure
from jvjepa.train.optimizer import OptimizerConfig
from jvjepa.train.synthetic import DIRECTIONS, SyntheticConfig
from jvjepa.weights import Model

VIDEOS = SyntheticConfig(num_frames=16, fps=8, height=36, width=36, occluded=0.0)
ENCODER = EncoderConfig(
    hidden_size=96,
    num_layers=4,
    num_heads=3,
    mlp_dim=384,
    crop_size=32,  # of frames of 36 pixels, which are not resized then
    frames_per_clip=16,
    patch_size=8,
)
TEXT = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "mlp_dim": 64, "max_positions": 16}
HEAD = HeadConfig(hidden=(128, 64))
# Meta's deviation of 0.02 is for widths of 1,000 and more: here attention would hardly do a thing.
WIDER = 3.2
PROMPTS = tuple(prompt(i, bright=shade) for i in range(len(DIRECTIONS)) for shade in (True, False))
BATCH = 32
FOLDS = 5
RESAMPLES = 500
PENALTIES = tuple(10.0**power for power in range(-2, 5))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything."""

    training: int = 1024
    test: int = 400
    head_steps: int = 1500
    blocks_steps: int = 400


QUICK = Sizes(training=48, test=24, head_steps=3, blocks_steps=2)
ALONE = None  # the head; else the share of the blocks that is frozen
ENTRIES = {
    "random encoder, head alone": ALONE,
    "then head and upper half of the blocks": 0.5,
    "or head and all blocks": 0.0,
}


def main() -> None:
    """Runs everybody, and writes what came out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/mos"))
    options = parser.parse_args()
    sizes, out, seed = QUICK if options.quick else Sizes(), options.out, options.seed
    out.mkdir(parents=True, exist_ok=True)
    sets = [
        rated(out / name, count, 2 * seed + i)
        for i, (name, count) in enumerate((("training", sizes.training), ("test", sizes.test)))
    ]
    rows: dict[str, Any] = {}
    report = {"sizes": dataclasses.asdict(sizes), "seed": seed, "rows": rows}
    report["machine"] = describe().splitlines()
    rows["pixels, ridge regression"] = measured(pixel_scores(*sets), sets[1])
    model = random_model(out / "text", seed)
    for name, freeze in ENTRIES.items():
        predictions, trained = learned(out, freeze, model, sets, sizes, seed)
        rows[name] = measured(predictions, sets[1])
        if freeze is ALONE:
            alone, model = predictions, trained  # blocks are trained with a head that fits
        else:
            rows[name]["gain"] = gain(predictions, alone, sets[1].scores)
        write(out, report)
    print(markdown(report))


def rated(folder: Path, count: int, seed: int) -> Ratings:
    """Makes rated videos, or finds them."""
    if not folder.exists():
        write_rated_videos(folder, count, VIDEOS, seed=seed)
    return read_ratings(folder / RATINGS_FILE)


def measured(predictions: NDArray[Any], test: Ratings) -> dict[str, Any]:
    """Metrics, and their intervals."""
    return {
        "metrics": measure(predictions, test.scores),
        "intervals": intervals(predictions, test.scores),
    }


def gain(
    predictions: NDArray[Any], others: NDArray[Any], scores: NDArray[Any]
) -> tuple[float, float, float]:
    """How much better the final score is than that of others: itself, and its 95 % interval.

    The bootstrap draws the same videos for both.
    """
    rows = np.random.default_rng(0).integers(len(scores), size=(RESAMPLES, len(scores)))

    def difference(some: NDArray[Any]) -> float:
        both = (measure(x[some], scores[some])[FINAL] for x in (predictions, others))
        return next(both) - next(both)

    low, high = np.quantile([difference(some) for some in rows], (0.025, 0.975))
    return difference(np.arange(len(scores))), float(low), float(high)


# Models


def random_model(folder: Path, seed: int) -> QualityModel:
    """A model of random parts; `folder` is for its tokenizer."""
    config = ModelConfig(encoder=ENCODER)

    def wider(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return leaf * WIDER if path[-1].key == "kernel" else leaf

    params = jax.tree_util.tree_map_with_path(wider, init_params(config, jax.random.key(seed)))
    params["encoder"]["patch_embed"]["kernel"] = jax.numpy.asarray(cosines(), jax.numpy.float32)
    model = Model(config=config, encoder=Encoder(ENCODER), params=params, source=None)
    options = {"feature": "mean", "head": HEAD, "num_frames": VIDEOS.num_frames, "seed": seed}
    return new_quality(model, text_model(folder, seed), **options)


def learned(
    out: Path,
    freeze: float | None,
    model: QualityModel,
    sets: list[Ratings],
    sizes: Sizes,
    seed: int,
) -> tuple[NDArray[np.float32], QualityModel]:
    """Trains on the first set, and predicts the scores of the second, float32 [n, 5]."""
    alone, console = freeze is ALONE, Console()
    steps = sizes.head_steps if alone else sizes.blocks_steps
    config = MosConfig(
        optimizer=OptimizerConfig(
            learning_rate=1e-3, warmup_steps=steps // 20, weight_decay=0.01, max_norm=1.0
        ),
        freeze=0.0 if alone else freeze,
        video_rate=0.0 if alone else 0.5,
        batch_size=BATCH,
    )
    part = scorer(model, config)
    store = Store(out / "features")
    training, test = (
        make_examples(part.model, some, store, part.kept, batch_size=8, console=console)
        for some in sets
    )
    task = mos_task(part, config, training, steps=steps, seed=seed)
    loop = LoopConfig(steps=steps, seed=seed, save_every=max(1, steps // 4), keep=1)
    folder = out / ("head" if alone else f"freeze-{freeze}")
    state = train(task, loop, folder, resume=True, console=console)
    found = part.predict({**state.trained, **task.frozen}, test, BATCH)
    return found, trained_quality(part, state)


def cosines() -> NDArray[np.float64]:
    """A patch embedding that nobody has to learn: [2·8·8·3, 96], cosines of sums and differences.

    Of each patch low frequencies (block DCT) of the brightness of both frames together and of what
    changes between them, and of two colour differences. High frequencies count more, as they are
    rarer.
    """
    side = ENCODER.patch_size
    wave = np.cos(np.pi * np.arange(side)[:, None] * (np.arange(side) + 0.5) / side)
    wave /= np.linalg.norm(wave, axis=1, keepdims=True)
    both, change = np.array([1.0, 1.0]) / np.sqrt(2), np.array([1.0, -1.0]) / np.sqrt(2)
    grey, red, blue = np.array([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [-0.5, -0.5, 1.0]]) / np.sqrt(3)
    kinds = (
        (both, grey, 6, 6, 1.0),
        (change, grey, 6, 6, 4.0),  # most of a patch stands still
        (both, red, 3, 4, 1.0),
        (both, blue, 3, 4, 1.0),
    )
    columns = [
        gain * (1 + i + j) / 8 * np.einsum("t,y,x,c->tyxc", time, wave[i], wave[j], colour).ravel()
        for time, colour, rows, width, gain in kinds
        for i in range(rows)
        for j in range(width)
    ]
    return np.stack(columns, axis=1)


def text_model(folder: Path, seed: int) -> TextModel:
    """A BERT with random weights that knows the words of the prompts."""
    words = sorted({word for text in PROMPTS for word in text.split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in vocabulary))
    config = TextConfig(vocab_size=len(vocabulary), pooling="mean", **TEXT)
    draw = np.random.default_rng(seed)

    # Words count most: with what all prompts share as large, all prompts would be alike.
    sizes = {"word_embed": 1.0, "position_embed": 0.3, "segment_embed": 0.1, "bias": 0.0}

    def random(name: str, shape: tuple[int, ...]) -> jax.Array:
        if name == "scale":
            return jax.numpy.ones(shape)
        size = sizes.get(name, 0.3 * shape[-2] ** -0.5 if len(shape) > 1 else 0.0)
        return jax.numpy.asarray(draw.normal(size=shape) * size, jax.numpy.float32)

    shapes = {tuple(name.split("/")): shape for name, shape in text_shapes(config).items()}
    params = unflatten_dict({path: random(path[-1], shape) for path, shape in shapes.items()})
    return TextModel(
        config=config,
        encoder=TextEncoder(config),
        params=params["text"],
        tokenizer=read_tokenizer(folder, config),
        source=None,
    )


# Pixels


def pixel_scores(training: Ratings, test: Ratings) -> NDArray[np.float64]:
    """Ridge regression; its penalty is chosen by cross-validation on the training set."""
    x, others = (np.stack([*map(statistics, r.paths, r.prompts)]) for r in (training, test))
    mean, std = x.mean(axis=0), x.std(axis=0)
    std = np.where(std > 0, std, 1.0)
    x, others = ((some - mean) / std for some in (x, others))
    fold = np.arange(len(x)) % FOLDS

    def error(penalty: float) -> float:
        parts = [(fold != i, fold == i) for i in range(FOLDS)]
        left = [
            ridge(x[a], training.scores[a], x[b], penalty) - training.scores[b] for a, b in parts
        ]
        return float(np.mean(np.concatenate(left) ** 2))

    return ridge(x, training.scores, others, min(PENALTIES, key=error))


def ridge(
    x: NDArray[Any], y: NDArray[Any], others: NDArray[Any], penalty: float
) -> NDArray[np.float64]:
    """Fits y [n, 5] to x [n, m] and predicts for others."""
    mean = y.mean(axis=0, dtype=np.float64)
    weights = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ (y - mean))
    return others @ weights + mean


def statistics(path: Path, text: str) -> NDArray[np.float64]:
    """What is simple to measure: sharpness, noise, blocks, colours, changes; and the prompt."""
    frames = video.read(path)[0].astype(np.float64)
    grey = frames.mean(axis=-1)
    laplacian = np.stack([ndimage.laplace(frame) for frame in grey])
    edges = np.abs(np.diff(grey, axis=2)).mean(axis=(0, 1))
    blocks = [edges[7::size].mean() - edges.mean() for size in (8, 16)]
    change = np.abs(np.diff(grey, axis=0)).mean(axis=(1, 2))
    saturation = np.ptp(frames, axis=-1)
    values = [
        *np.log1p([laplacian.var(), np.median(np.abs(laplacian)), grey.var(), edges.mean()]),
        *blocks,
        *np.log1p([change.mean(), change.std(), change.max(), change.min()]),
        np.mean(change < 0.2 * np.median(change)),
        len(frames),
        *frames.mean(axis=(0, 1, 2)),
        *frames.std(axis=(0, 1, 2)),
        saturation.mean(),
        saturation.std(),
        *np.percentile(grey, (5, 50, 95)),
    ]
    squares = np.square(values)
    prompted = [float(text == one) for one in PROMPTS]
    return np.array([*values, *squares, *prompted])


# Results


def write(folder: Path, report: dict[str, Any]) -> None:
    """Writes `mos.json` and `mos.md`, each whole or not at all."""
    contents = {"mos.json": json.dumps(report, indent=1) + "\n", "mos.md": markdown(report)}
    for name, text in contents.items():
        part = folder / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(folder / name)


def markdown(report: dict[str, Any]) -> str:
    """Writes the table and the machine."""
    sizes = Sizes(**report["sizes"])
    head = ["", *SCORES, "final score", "gain"]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for name, row in report["rows"].items():
        keys = [*(f"{score}/srocc" for score in SCORES), FINAL]
        better = _interval(*row["gain"]) if "gain" in row else ""
        lines.append([name, *(_cell(row, key) for key in keys), better])
    about = (
        f"SROCC of each score on {sizes.test} held-out videos, {sizes.training} to learn from; the "
        "final score is the mean of all SROCC and PLCC, and the gain that over the head alone, on "
        "the same videos. In brackets: 95 % intervals, bootstrap "
        f"over held-out videos. Seed {report['seed']}."
    )
    parts = ["# Video quality", about, "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    parts.append("\n".join(f"- {line}" for line in report["machine"]))
    return "\n\n".join(parts) + "\n"


def _cell(row: dict[str, Any], key: str) -> str:
    return _interval(row["metrics"][key], *row["intervals"][key])


def _interval(value: float, low: float, high: float) -> str:
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    sys.exit(main())
