"""Shows what running causally costs an encoder, and what adapters repair of it, on a CPU.

    python benchmarks/causal.py               # three seeds, one after the other
    python benchmarks/causal.py --quick       # minutes, and numbers that mean nothing

Videos, runs and results of a seed that are in OUT already are used again, so that it goes on where
it was stopped. A seed takes 18 minutes on two cores. Several can run at the same time, as processes
of their own, and `--seeds 0 1 2` at the end writes the table of all.

For every seed: videos of a shape that moves in one of eight directions (H.264 files, other ones to
learn from than to measure on), sampled at twice their rate, so that every tubelet holds one still
picture and motion shows between tubelets only. A tiny encoder and a classifier learn the directions
from the last two thirds of each, as whole clips. Then the encoder runs causally over the same two
thirds, from a cold start, and as a stream does that has seen what came before; both cost accuracy
and fidelity. Adapters are trained, without labels, to bring back what the running stream has lost.
Accuracy is that of the first classifier, which nobody tells that the encoder is another one, and
that of one that was trained on the features that it is measured with. Writes a table, the numbers,
and the course of each run.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
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
from jvjepa.train.optimizer import OptimizerConfig, make_optimizer
from jvjepa.train.regression import RegressionConfig, Weighting, fidelity
from jvjepa.train.synthetic import DIRECTIONS, MANIFEST_FILE, SyntheticConfig, write_videos
from jvjepa.train.task import Feed, State, Task
from jvjepa.typing import Array, Params
from jvjepa.weights import Model

PAST, TUBELETS = 4, 8  # of each video: what the stream alone has seen, and the clip
WINDOW = PAST + TUBELETS
VIDEOS = SyntheticConfig(num_frames=WINDOW, fps=8, height=32, width=32, crf=10)
CLIP = ClipConfig(
    num_frames=2 * WINDOW, fps=16.0, crop_size=32, temporal="uniform", spatial="centre", flip=0.0
)
ENCODER = EncoderConfig(
    hidden_size=96,
    num_layers=4,
    num_heads=3,
    mlp_dim=384,
    crop_size=32,
    frames_per_clip=16,
    patch_size=16,
)
# Meta's deviation of 0.02 is for widths of 1,000 and more: here attention would hardly do a thing.
WIDER = 3.2
BATCH = 32
LAYERS = "encoder/blocks/(attention/(query|key|value|proj)|mlp/(fc1|fc2))"
ROWS = {
    "whole": "whole clip",
    "cold": "causal, from a cold start",
    "causal": "causal, a stream that runs",
    "adapted": "the same, with adapters",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything."""

    training: int = 16384
    test: int = 2048
    teacher_steps: int = 6000
    causal_steps: int = 6000
    classifier_steps: int = 500


QUICK = Sizes(training=64, test=32, teacher_steps=4, causal_steps=4, classifier_steps=4)


def main() -> None:
    """Runs the seeds that have not run, and writes what came out of all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--weighting", choices=get_args(Weighting), default="relative")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/causal"))
    options = parser.parse_args()
    sizes = QUICK if options.quick else Sizes()
    how = {"sizes": dataclasses.asdict(sizes), "weighting": options.weighting}
    console, results = Console(), []
    for seed in options.seeds:
        folder = options.out / f"seed{seed}"
        record = folder / "result.json"
        if not record.exists():
            found = run_seed(seed, sizes, options.weighting, folder, console)
            record.write_text(json.dumps({**how, **found}, indent=2) + "\n")
        results.append(json.loads(record.read_text()))
        if any(results[-1][name] != value for name, value in how.items()):
            sys.exit(f"{record}: is of other options; choose another --out")
    report = {"seeds": results, "machine": describe()}
    (options.out / "causal.json").write_text(json.dumps(report, indent=2) + "\n")
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
    folder.mkdir(parents=True, exist_ok=True)
    sets = {}
    for name, count, source in (("training", sizes.training, 0), ("test", sizes.test, 1)):
        if not (folder / name).exists():
            write_videos(folder / name, count, VIDEOS, seed=100 + 2 * seed + source)
        sets[name] = read_manifest(folder / name / MANIFEST_FILE)
    pixels = {name: decode(manifest) for name, manifest in sets.items()}
    labels = {name: manifest.labels for name, manifest in sets.items()}
    videos = feed(pixels["training"], labels["training"], seed, mirrored)
    clips = feed(seen(pixels["training"]), labels["training"], seed, mirrored)
    watch.lap("videos")

    def run(task: Task, steps: int, name: str, **more: Any) -> State:
        loop = LoopConfig(steps=steps, seed=seed, log_every=50, save_every=tenth(steps))
        task = dataclasses.replace(task, **more)
        state = train(task, loop, folder / name, resume=True, console=console)
        watch.lap(name)
        return jax.device_get(state)

    options = FinetuneConfig(
        # The way along an axis is learned late, and all at once: until then the rate must stay up.
        optimizer=dataclasses.replace(schedule(1e-3, sizes.teacher_steps, 0.05), stretch=1.5),
        data=DataConfig(clip=CLIP, batch_size=BATCH, seed=seed),
        num_layers=1,
        num_heads=3,
    )
    model = with_classifier(random_model(seed), options, sets["training"], seed)
    untrained = model.params["classifier"]
    task = finetune_task(model, options, sets["training"], steps=sizes.teacher_steps)
    model = finetuned(model, task, run(task, sizes.teacher_steps, "teacher", feed=clips))

    steps = sizes.causal_steps
    options = CausalLoraConfig(
        lora=LoraConfig(rank=32, alpha=64.0, targets=(LAYERS,)),
        optimizer=schedule(2e-3, steps),
        data=DataConfig(clip=CLIP, batch_size=BATCH, seed=seed),
        window=WINDOW,
        past=PAST,
        loss=RegressionConfig(weighting=weighting),
    )
    measure = Measure(model, pixels["test"], labels["test"])
    params = model.params["encoder"]
    curve: list[dict[str, float]] = []

    def evaluate(trained: Params, carried: Params, frozen: Params) -> dict[str, float]:
        given = variables(params, join(trained, frozen["constants"])["encoder"])
        curve.append(measure(measure.tokens(pixels["test"], given, "adapted")))
        return curve[-1]

    task = causal_lora_task(model, options, sets["training"], steps=steps, seed=seed)
    evaluate(task.trained, {}, task.frozen)  # adapters change nothing yet
    state = run(task, steps, "adapted", feed=videos, evaluate=evaluate)
    adapted = variables(params, join(state.trained, task.frozen["constants"])["encoder"])

    found: dict[str, dict[str, float]] = {}
    for row in ROWS:
        encoder = adapted if row == "adapted" else {"params": params}
        tokens = {which: measure.tokens(pixels[which], encoder, row) for which in pixels}
        given = feed(tokens["training"], labels["training"], seed)
        digest = hashlib.sha256(tokens["training"]).hexdigest()
        task = classifier_task(model, untrained, given, digest, sizes.classifier_steps)
        head = run(task, sizes.classifier_steps, f"classifier-{row}").trained
        found[row] = measure(tokens["test"])
        found[row]["own_accuracy"] = measure.accuracy(tokens["test"], head)
    return {**found, "curve": curve, "every": tenth(steps), "seconds": watch.laps}


def tenth(steps: int) -> int:
    """A tenth of the steps, one at least."""
    return max(1, steps // 10)


def schedule(rate: float, steps: int, weight_decay: float = 0.0) -> OptimizerConfig:
    """A tenth of the steps to warm up, and a cosine."""
    return OptimizerConfig(
        learning_rate=rate, warmup_steps=steps // 10, weight_decay=weight_decay, max_norm=1.0
    )


def classifier_task(model: Model, untrained: Params, given: Feed, digest: str, steps: int) -> Task:
    """A classifier learns from tokens of a digest, which the batches hold in place of pixels."""

    def loss(
        trained: Params, carried: Params, frozen: Params, batch: Batch, step: Array, key: Array
    ) -> tuple[Array, dict[str, Array]]:
        logits = model.classifier.apply({"params": trained}, batch.video)
        errors = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return jnp.mean(errors), {}

    return Task(
        name="classifier",
        record={"tokens": digest},
        trained=untrained,
        carried={},
        frozen={},
        loss=loss,
        optimizer=make_optimizer(schedule(1e-3, steps, 0.05), untrained, steps=steps),
        feed=given,
    )


def random_model(seed: int) -> Model:
    """An encoder with random weights."""
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


def seen(pixels: Any) -> Any:
    """The clip of each video [n, T, ..]: what comes after its past."""
    return pixels[:, PAST * ENCODER.tubelet_size :]


def feed(
    inputs: NDArray[Any],
    labels: NDArray[np.int32],
    seed: int,
    change: Callable[..., tuple[NDArray[Any], int]] | None = None,
) -> Feed:
    """Batches of what is in memory; every epoch has an order of its own, and changes of its own."""

    @contextmanager
    def start(step: int, index: int, count: int) -> Iterator[Iterator[Batch]]:
        def batches() -> Iterator[Batch]:
            number, per_epoch = step, len(inputs) // BATCH
            while True:
                epoch, place = divmod(number, per_epoch)
                order = np.random.default_rng((seed, epoch)).permutation(len(inputs))
                rows = order[place * BATCH : (place + 1) * BATCH]
                given, right = inputs[rows], labels[rows]
                if change is not None:
                    draw = np.random.default_rng((seed, epoch, place))
                    pairs = [change(*pair, draw) for pair in zip(given, right, strict=True)]
                    given, right = (np.stack(some) for some in zip(*pairs, strict=True))
                yield Batch(given, right.astype(np.int32), rows.astype(np.int32))
                number += 1

        yield batches()

    return start


def mirrored(
    video: NDArray[np.uint8], label: int, draw: np.random.Generator
) -> tuple[NDArray[np.uint8], int]:
    """One of the 16 ways to mirror a video in space and time, and the direction that it has then.

    Args:
        video: [T, H, W, 3].
        label: a place in `DIRECTIONS`, which go round by the clock, from right.
        draw: what is random.
    """
    across, down, diagonal, back = draw.random(4) < 0.5
    if across:
        video, label = video[:, :, ::-1], 4 - label
    if down:
        video, label = video[:, ::-1], -label
    if diagonal:
        video, label = video.swapaxes(1, 2), 2 - label
    if back:
        video, label = video[::-1], label + 4
    return video, label % len(DIRECTIONS)


class Measure:
    """The accuracy of classifiers, and how near tokens are to those of whole clips."""

    def __init__(self, model: Model, pixels: NDArray[np.uint8], labels: NDArray[np.int32]) -> None:
        """Takes what is measured on."""
        self._head, self._labels = model.params["classifier"], labels

        @functools.partial(jax.jit, static_argnums=2)
        def encode(video: jax.Array, encoder: Params, row: str) -> jax.Array:
            video = normalise(video)
            if row == "whole":
                return model.encoder.apply(encoder, seen(video))
            if row == "cold":
                return model.encoder.apply(encoder, seen(video), window=WINDOW)
            tokens = model.encoder.apply(encoder, video, window=WINDOW)
            return tokens[:, tokens.shape[1] // WINDOW * PAST :]

        @jax.jit
        def right(tokens: jax.Array, labels: jax.Array, head: Params) -> jax.Array:
            logits = model.classifier.apply({"params": head}, tokens)
            return jnp.argmax(logits, axis=-1) == labels

        @jax.jit
        def near(tokens: jax.Array, whole: jax.Array) -> dict[str, jax.Array]:
            found = fidelity(tokens, whole, TUBELETS)
            for i in range(TUBELETS):  # the last one has seen all that the teacher sees
                parts = (jnp.split(x, TUBELETS, axis=1)[i] for x in (tokens, whole))
                found[f"tubelet_{i}"] = fidelity(*parts, 1)["pooled_cosine"]
            return found

        self._encode, self._right, self._near = encode, right, near
        self._whole = self.tokens(pixels, {"params": model.params["encoder"]}, "whole")

    def __call__(self, tokens: NDArray[np.float32]) -> dict[str, float]:
        """Measures the tokens of what is measured on."""
        near = [self._near(*pair) for pair in zip(_parts(tokens), _parts(self._whole), strict=True)]
        found = {
            name: float(np.mean(np.concatenate([jax.device_get(one[name]) for one in near])))
            for name in near[0]
        }
        return {"accuracy": self.accuracy(tokens, self._head), **found}

    def tokens(self, pixels: NDArray[np.uint8], encoder: Params, row: str) -> NDArray[np.float32]:
        """Encodes all clips with an encoder's variables, run as one of `ROWS`: [n, N, D]."""
        found = [self._encode(some, encoder, row) for some in _parts(pixels)]
        return np.concatenate(jax.device_get(found))

    def accuracy(self, tokens: NDArray[np.float32], head: Params) -> float:
        """The share of the clips about which a classifier is right."""
        pairs = zip(_parts(tokens), _parts(self._labels), strict=True)
        right = [self._right(some, labels, head) for some, labels in pairs]
        return float(np.mean(np.concatenate(jax.device_get(right))))


def _parts(of: NDArray[Any]) -> list[NDArray[Any]]:
    return np.split(of, range(BATCH, len(of), BATCH))


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

    def of(row: str, name: str) -> NDArray[np.float64]:
        if name == "late":  # the tubelets of the second half
            return np.mean([of(row, f"tubelet_{i}") for i in range(TUBELETS // 2, TUBELETS)], 0)
        return np.array([result[row][name] for result in results])

    def recovered(better: str, base: str, name: str) -> str:
        lost = of("whole", name) - of(base, name)
        if lost.min() <= 0:
            return "not with every seed is any lost"
        return percent((of(better, name) - of(base, name)) / lost)

    columns = {
        "accuracy": "the whole clip's classifier",
        "own_accuracy": "a classifier of its own",
        "token_cosine": "cosine of tokens",
        "pooled_cosine": "of tubelets' means",
        "late": "of the second half's",
        f"tubelet_{TUBELETS - 1}": "of the last one's",
    }
    shares = {
        ("causal", "cold"): "share of a cold start's loss that running recovers",
        ("adapted", "cold"): "share that running and adapters recover",
        ("adapted", "causal"): "share of the running stream's loss that adapters recover",
    }
    lines = [
        f"Percent, means of {len(results)} seeds, smallest and largest in brackets; "
        f"chance is {100 / len(DIRECTIONS):.1f}.",
        "",
        f"| encoder | {' | '.join(columns.values())} |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for row, text in ROWS.items():
        cells = [percent(of(row, name)) for name in columns]
        lines.append(f"| {text} | {' | '.join(cells)} |")
    for pair, text in shares.items():
        lines.append(f"| {text} | {' | '.join(recovered(*pair, name) for name in columns)} |")
    return "\n".join(lines) + "\n"


def percent(values: Sequence[float] | NDArray[np.float64]) -> str:
    """Writes the mean of what seeds gave, with the smallest and largest."""
    mean, least, most = (100 * x for x in (np.mean(values), np.min(values), np.max(values)))
    return f"{mean:.1f} ({least:.1f} to {most:.1f})"


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
    for row in ("cold", "causal", "adapted"):
        values = [[result[row][f"tubelet_{i}"] for i in range(TUBELETS)] for result in results]
        right.plot(range(TUBELETS), np.mean(values, 0), marker="o", label=ROWS[row])
    right.set(xlabel="tubelet", ylabel="the same, tubelet by tubelet")
    right.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
