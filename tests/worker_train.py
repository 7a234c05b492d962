"""Trains in a process of its own, since JAX counts devices once: python worker_train.py JOBS.

JOBS is JSON: {"processes": fields of Processes, "runs": [fields of `run`]}. Errors end it as they
end `jvjepa train`.
"""

import contextlib
import dataclasses
import functools
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import conftest  # noqa: F401 - strict numerics, the CPU
import jax
import numpy as np
from models import random_params, tiny_config
from tasks import toy_task

from jvjepa import Encoder
from jvjepa.adapters import save_adapters
from jvjepa.config import EncoderConfig, ModelConfig, PredictorConfig
from jvjepa.lora import LoraConfig
from jvjepa.masks import MaskConfig
from jvjepa.train.causal_lora import CausalLoraConfig, causal_lora_task, trained_adapters
from jvjepa.train.checkpoint import flat
from jvjepa.train.data import ClipConfig
from jvjepa.train.distributed import Processes, whole
from jvjepa.train.feeding import DataConfig
from jvjepa.train.loop import LoopConfig, train
from jvjepa.train.manifest import read_manifest
from jvjepa.train.mesh import MeshConfig
from jvjepa.train.optimizer import OptimizerConfig
from jvjepa.train.pretrain import PretrainConfig, pretrain_task
from jvjepa.train.task import Feed, Task
from jvjepa.weights import Model

CLIP = ClipConfig(num_frames=4, fps=16.0, crop_size=32, flip=0.5)
DATA = DataConfig(clip=CLIP, batch_size=8)
LORA = CausalLoraConfig(
    lora=LoraConfig(rank=4, dropout=0.1),
    optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.0, max_norm=1.0),
    data=DATA,
    window=1,
)
SIZES = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "mlp_dim": 64}
V2_1 = ModelConfig(
    encoder=EncoderConfig(
        **SIZES, patch_size=8, crop_size=32, rope="interleaved", image_tokenizer=True, levels=(0, 1)
    ),
    predictor=PredictorConfig(
        **{**SIZES, "num_layers": 1},
        num_mask_tokens=2,
        rope="interleaved",
        num_levels=2,
        context_projection=True,
        modality_embeddings=True,
    ),
)
BLOCKS = MaskConfig(num_blocks=2, spatial_scale=(0.15, 0.3))
BLOCK = MaskConfig(num_blocks=1, spatial_scale=(0.4, 0.6))
PRETRAIN = PretrainConfig(
    optimizer=OptimizerConfig(learning_rate=2e-3, schedule="constant"),
    data=DATA,
    images=DataConfig(clip=ClipConfig(num_frames=1, fps=8, crop_size=32), batch_size=8),
    video_masks=(BLOCKS, BLOCK),
    image_masks=(BLOCKS,),
    context_ramp=None,
    momentum=0.9,
)


def lora_model() -> Model:
    config = tiny_config(head_width=16, num_layers=2, crop_size=32)
    encoder = Encoder(config)
    params = {"encoder": random_params(encoder)}
    return Model(config=ModelConfig(encoder=config), encoder=encoder, params=params, source=None)


def make_task(name: str, videos: Path, steps: int) -> Task:
    if name == "toy":
        return toy_task(steps=steps)
    manifest = read_manifest(videos)
    if name == "lora":
        return causal_lora_task(lora_model(), LORA, manifest, steps=steps)
    return pretrain_task(V2_1, PRETRAIN, manifest, manifest, steps=steps)


def run(
    *,
    task: str,
    folder: str,
    videos: str = "",
    steps: int = 4,
    save_every: int = 2,
    log_every: int = 1,
    mesh: dict[str, int] | None = None,
    resume: bool = False,
    signals: dict[str, list[int]] | None = None,
    full: list[int] | None = None,
) -> None:
    """Trains.

    Args:
        task: "toy", "lora" or "pretrain".
        folder: of the run.
        videos: manifest.
        steps: see `LoopConfig`.
        save_every: see `LoopConfig`.
        log_every: see `LoopConfig`.
        mesh: fields of `MeshConfig`.
        resume: see `train`.
        signals: what a process does to itself, [signal, before which step], by its number.
        full: [process, before which step its disk is full].
    """
    made = make_task(task, Path(videos), steps)
    index = jax.process_index()
    if signals and str(index) in signals:
        number, at = signals[str(index)]
        strike = functools.partial(os.kill, os.getpid(), number)
        made = dataclasses.replace(made, feed=_doing(made, at, strike))
    if full and full[0] == index:
        made = dataclasses.replace(made, feed=_doing(made, full[1], _fill))
    config = LoopConfig(
        steps=steps, save_every=save_every, log_every=log_every, mesh=MeshConfig(**(mesh or {}))
    )
    state = whole(train(made, config, folder, resume=resume))
    if index == 0:
        np.savez(Path(folder) / "trained.npz", **flat(state.trained))
        if task == "lora":
            adapters = trained_adapters(lora_model(), LORA, made, state)
            save_adapters(Path(folder) / "adapters", adapters)


def _doing(task: Task, at: int, act: Callable[[], None]) -> Feed:
    """The feed of the task, which does something before it gives a step's batch."""

    @contextlib.contextmanager
    def feed(step: int, index: int, count: int) -> Iterator[Iterator[Any]]:
        with task.feed(step, index, count) as batches:

            def acting() -> Iterator[Any]:
                for current, batch in enumerate(batches, start=step + 1):
                    if current == at:
                        act()
                    yield batch

            yield acting()

    return feed


def _fill() -> None:
    """No file of this process can grow any more, as if the disk were full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    with Processes(**asked.get("processes", {})).joined():
        for fields in asked["runs"]:
            run(**fields)
