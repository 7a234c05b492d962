"""Shows that training works: from made videos to a repaired stream, on a CPU.

    python benchmarks/causal.py               # three seeds, about an hour on two idle cores
    python benchmarks/causal.py --quick       # minutes, and numbers that mean nothing

For every seed: videos of a shape that moves in one of eight directions (H.264 files, other ones to
learn from than to measure on); a tiny V-JEPA 2.1 is pretrained on them without labels; probes on
its frozen features are compared with the same probes on a random encoder; then the encoder runs
causally, as a stream does, which costs accuracy and fidelity; and adapters are trained that bring
them back. Writes a table, the numbers, and the course of each run.
"""

import argparse
import dataclasses
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from machine import describe
from numpy.typing import NDArray
from rich.console import Console

from jvjepa.config import EncoderConfig, ModelConfig, PredictorConfig
from jvjepa.encoder import Encoder
from jvjepa.lora import LoraConfig, join, variables
from jvjepa.train.causal_lora import CausalLoraConfig, causal_lora_task
from jvjepa.train.data import Batch, ClipConfig, normalise
from jvjepa.train.feature_cache import make_features, open_features
from jvjepa.train.feeding import DataConfig
from jvjepa.train.frozen_features import FeatureConfig
from jvjepa.train.loop import LoopConfig, train
from jvjepa.train.manifest import Manifest, read_manifest
from jvjepa.train.neighbours import NeighbourConfig, neighbour_accuracy
from jvjepa.train.optimizer import OptimizerConfig
from jvjepa.train.pretrain import Clips, PretrainConfig, pretrain_task
from jvjepa.train.probe import ProbeConfig, ProbeResult, probe_result, probe_steps, probe_task
from jvjepa.train.probe_heads import probabilities
from jvjepa.train.regression import fidelity
from jvjepa.train.synthetic import DIRECTIONS, SyntheticConfig, write_videos
from jvjepa.train.task import Feed
from jvjepa.typing import Params
from jvjepa.weights import Model

VIDEOS = SyntheticConfig(num_frames=16, fps=8, height=64, width=64)
CLIP = ClipConfig(num_frames=16, fps=8.0, crop_size=32, temporal="uniform", spatial="centre")
TUBELETS = 8
ENCODER = EncoderConfig(
    hidden_size=96,
    num_layers=4,
    num_heads=3,
    mlp_dim=384,
    crop_size=32,
    frames_per_clip=16,
    patch_size=8,
    rope="interleaved",
    image_tokenizer=True,
    levels=(1, 3),
)
PREDICTOR = PredictorConfig(
    hidden_size=64,
    num_layers=2,
    num_heads=2,
    mlp_dim=256,
    num_levels=2,
    context_projection=True,
    modality_embeddings=True,
    rope="interleaved",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything."""

    training: int = 2048
    validation: int = 512
    pretrain_steps: int = 1500
    probe_epochs: int = 15
    lora_steps: int = 600


QUICK = Sizes(training=64, validation=32, pretrain_steps=6, probe_epochs=1, lora_steps=4)


def main() -> None:
    """Runs all seeds, and writes what came out."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/causal"))
    options = parser.parse_args()
    sizes = QUICK if options.quick else Sizes()
    options.out.mkdir(parents=True, exist_ok=True)
    console, results = Console(), []
    for seed in range(options.seeds):
        results.append(run_seed(seed, sizes, options.out / f"seed{seed}", console))
        record = {"sizes": dataclasses.asdict(sizes), "seeds": results, "machine": describe()}
        (options.out / "causal.json").write_text(json.dumps(record, indent=2) + "\n")
    table = make_table(results)
    (options.out / "causal.md").write_text(table)
    print(table)
    print(describe())


def run_seed(seed: int, sizes: Sizes, folder: Path, console: Console) -> dict[str, Any]:
    """All that is measured with one seed; seconds of each part are among it."""
    watch = _Stopwatch()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    made = (("training", sizes.training, 2 * seed), ("validation", sizes.validation, 2 * seed + 1))
    sets = {
        name: read_manifest(write_videos(folder / name, count, VIDEOS, seed=source))
        for name, count, source in made
    }
    pixels = {name: decode(manifest) for name, manifest in sets.items()}
    watch.lap("videos")

    model = ModelConfig(encoder=ENCODER, predictor=PREDICTOR)
    config = PretrainConfig(
        optimizer=OptimizerConfig(
            learning_rate=1e-3, final_learning_rate=1e-5, warmup_steps=sizes.pretrain_steps // 10
        ),
        data=DataConfig(clip=CLIP, batch_size=32, seed=seed),
        momentum=0.99,
        final_momentum=1.0,
        context_ramp=(sizes.pretrain_steps // 4, sizes.pretrain_steps // 2),
    )
    task = pretrain_task(model, config, sets["training"], steps=sizes.pretrain_steps, seed=seed)
    task = dataclasses.replace(task, feed=feed(pixels["training"], 32, seed, of_clips=True))
    loop = LoopConfig(steps=sizes.pretrain_steps, seed=seed, log_every=20)
    state = jax.device_get(train(task, loop, folder / "pretrain", console=console))
    watch.lap("pretraining")

    encoders = {"random": task.trained["encoder"], "pretrained": state.carried["encoder"]}
    result: dict[str, Any] = {}
    for name, params in encoders.items():
        result[name], probe = probe_all(name, params, sets, sizes, folder, seed, console)
        watch.lap(f"probes of the {name} encoder")

    teacher = _model(encoders["pretrained"])
    options = CausalLoraConfig(
        lora=LoraConfig(rank=16, alpha=32.0, targets=(LAYERS,)),
        optimizer=OptimizerConfig(
            learning_rate=2e-3, warmup_steps=sizes.lora_steps // 10, weight_decay=0.0, max_norm=1.0
        ),
        data=DataConfig(clip=CLIP, batch_size=32, seed=seed),
        window=TUBELETS,
    )
    task = causal_lora_task(teacher, options, sets["training"], steps=sizes.lora_steps, seed=seed)
    adapted = lambda trained: join(trained, task.frozen["constants"])["encoder"]  # noqa: E731
    curve: list[dict[str, float]] = []

    def evaluate(trained: Params, carried: Params, frozen: Params) -> dict[str, float]:
        found = measure(teacher, adapted(trained), probe, sets["validation"], pixels["validation"])
        curve.append(found)
        return found

    causal = evaluate(task.trained, {}, task.frozen)
    task = dataclasses.replace(
        task, feed=feed(pixels["training"], 32, seed, of_clips=False), evaluate=evaluate
    )
    every = max(1, sizes.lora_steps // 10)
    loop = LoopConfig(steps=sizes.lora_steps, seed=seed, log_every=20, save_every=every)
    train(task, loop, folder / "lora", console=console)
    watch.lap("adapters")
    whole = measure(teacher, None, probe, sets["validation"], pixels["validation"], causal=False)
    result |= {"whole": whole, "causal": causal, "adapted": curve[-1], "curve": curve}
    lost = {name: whole[name] - causal[name] for name in whole}
    result["recovered"] = {
        name: (curve[-1][name] - causal[name]) / loss if loss else math.nan
        for name, loss in lost.items()
    }
    return result | {"seconds": watch.laps, "seed": seed}


LAYERS = "encoder/blocks/(attention/(query|key|value|proj)|mlp/(fc1|fc2))"


def decode(manifest: Manifest) -> NDArray[np.uint8]:
    """Reads all clips once, so that what is measured is training and not the reading of files."""
    data = DataConfig(clip=CLIP, batch_size=32)
    with data.evaluate(manifest) as batches:
        return np.concatenate([batch.video for batch in batches])[: len(manifest)]


def feed(pixels: NDArray[np.uint8], batch_size: int, seed: int, *, of_clips: bool) -> Feed:
    """Batches of clips that are in memory; every epoch has an order of its own."""

    @contextmanager
    def start(step: int, index: int, count: int) -> Iterator[Iterator[Any]]:
        def batches() -> Iterator[Any]:
            number, per_epoch = step, len(pixels) // batch_size
            while True:
                epoch, place = divmod(number, per_epoch)
                order = np.random.default_rng((seed, epoch)).permutation(len(pixels))
                rows = np.sort(order[place * batch_size : (place + 1) * batch_size])
                video, unused = pixels[rows], np.full(batch_size, -1, np.int32)
                yield Clips(video) if of_clips else Batch(video, unused, rows.astype(np.int32))
                number += 1

        yield batches()

    return start


def _model(params: Params) -> Model:
    params = {"encoder": jax.tree.map(jnp.asarray, params)}
    config = ModelConfig(encoder=ENCODER)
    return Model(config=config, encoder=Encoder(ENCODER), params=params, source=None)


def probe_all(
    name: str,
    params: Params,
    sets: dict[str, Manifest],
    sizes: Sizes,
    folder: Path,
    seed: int,
    console: Console,
) -> tuple[dict[str, float], ProbeResult]:
    """Accuracies of the probes on one encoder's features; and the attentive probe."""
    config = FeatureConfig(views=(CLIP,))
    for split, manifest in sets.items():
        (folder / name).mkdir(exist_ok=True)
        make_features(folder / name / split, _model(params), manifest, config, batch_size=32)
    training, validation = (open_features(folder / name / split) for split in sets)
    found = {"neighbours": neighbour_accuracy(NeighbourConfig(), training, validation)}
    for kind in ("linear", "attentive"):
        rates = (1e-2, 3e-3, 1e-3) if kind == "linear" else (3e-3, 1e-3)
        probe = ProbeConfig(
            kind=kind,
            num_layers=1,
            num_heads=3,
            learning_rates=rates,
            weight_decays=(0.01,),
            epochs=sizes.probe_epochs,
            batch_size=32,
            seed=seed,
        )
        task = probe_task(probe, training, validation)
        steps = probe_steps(probe, training)
        loop = LoopConfig(steps=steps, save_every=steps)
        state = train(task, loop, folder / name / kind, console=console)
        result = probe_result(probe, training, task, state.trained)
        found[kind] = result.accuracy
    return found, result


def measure(
    model: Model,
    lora: Params | None,
    probe: ProbeResult,
    manifest: Manifest,
    pixels: NDArray[np.uint8],
    *,
    causal: bool = True,
) -> dict[str, float]:
    """The accuracy of a probe of whole clips, and how near tokens are to those of whole clips."""
    params = model.params["encoder"]
    given = {"params": params} if lora is None else variables(params, lora)
    window = TUBELETS if causal else None
    heads = jax.tree.map(lambda leaf: leaf[None], probe.params)

    @jax.jit
    def of(video: NDArray[np.uint8]) -> tuple[Any, dict[str, Any]]:
        clip = normalise(video)
        tokens = model.encoder.apply(given, clip, window=window)
        whole = model.encoder.apply({"params": params}, clip)
        shares = probabilities(probe.heads, heads, probe.statistics, tokens[:, None])
        return shares[0], fidelity(tokens, whole, TUBELETS)

    total = {"accuracy": [], "token_cosine": [], "pooled_cosine": []}
    for start in range(0, len(pixels), 32):
        shares, near = jax.device_get(of(pixels[start : start + 32]))
        total["accuracy"] += list(shares.argmax(-1) == manifest.labels[start : start + 32])
        for name, values in near.items():
            total[name] += list(values)
    return {name: float(np.mean(values)) for name, values in total.items()}


class _Stopwatch:
    """Seconds of each part."""

    def __init__(self) -> None:
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
        "| frozen features | neighbours | linear probe | attentive probe |",
        "|---|---|---|---|",
    ]
    for name in ("random", "pretrained"):
        cells = " | ".join(cell(name, kind) for kind in ("neighbours", "linear", "attentive"))
        lines.append(f"| {name} encoder | {cells} |")
    lines += [
        "",
        "| encoder | accuracy | cosine of tokens | of tubelets' means |",
        "|---|---|---|---|",
    ]
    names = ("accuracy", "token_cosine", "pooled_cosine")
    rows = {"whole": "whole clip", "causal": "causal", "adapted": "causal, with adapters"}
    for key, text in {**rows, "recovered": "share of the loss recovered"}.items():
        lines.append(f"| {text} | {' | '.join(cell(key, name) for name in names)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
