"""Tiny models that anticipate actions: golden encoders and predictors with a random probe."""

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import official
import torch

from jvjepa.anticipation import Anticipator
from jvjepa.config import AnticipatorConfig, ModelConfig
from jvjepa.convert.official import Official
from jvjepa.encoder import Encoder
from jvjepa.predictor import Predictor
from jvjepa.typing import Params

WIDTH = 32  # of the golden models
CLASSES = {"verbs": 3, "nouns": 4, "actions": 5}
LABELS = {kind: tuple(f"{kind} {i}" for i in range(n)) for kind, n in CLASSES.items()}
GOLDEN = {"vjepa2_tiny": official.V2, "vjepa2_1_tiny_teacher": official.TEACHER}
V2 = "vjepa2_tiny"


def probe_tensors(classes: dict[str, int] = CLASSES, seed: int = 0) -> official.Weights:
    """An anticipation probe with random weights, by Meta's names: one self block and one cross."""
    rng = np.random.default_rng(seed)

    def tensor(*shape: int) -> np.ndarray:
        scale = shape[-1] ** -0.5 if len(shape) == 2 else 0.3
        return (scale * rng.normal(size=shape)).astype(np.float32)

    def dense(name: str, outputs: int, inputs: int) -> official.Weights:
        return {f"{name}.weight": tensor(outputs, inputs), f"{name}.bias": tensor(outputs)}

    cross, block = "pooler.cross_attention_block", "pooler.blocks.0"
    tensors = {
        "pooler.query_tokens": tensor(1, len(classes), WIDTH),
        **dense(f"{block}.attn.qkv", 3 * WIDTH, WIDTH),
        **dense(f"{block}.attn.proj", WIDTH, WIDTH),
        **dense(f"{cross}.xattn.q", WIDTH, WIDTH),
        **dense(f"{cross}.xattn.kv", 2 * WIDTH, WIDTH),
    }
    for name in (block, cross):
        tensors |= dense(f"{name}.mlp.fc1", 4 * WIDTH, WIDTH)
        tensors |= dense(f"{name}.mlp.fc2", WIDTH, 4 * WIDTH)
        for norm in ("norm1", "norm2"):
            tensors[f"{name}.{norm}.weight"] = 1 + tensor(WIDTH)
            tensors[f"{name}.{norm}.bias"] = tensor(WIDTH)
    for kind, count in classes.items():
        tensors |= dense(f"{kind.removesuffix('s')}_classifier", count, WIDTH)
    return tensors


class Setup(NamedTuple):
    config: ModelConfig
    encoder: Encoder
    predictor: Predictor
    anticipator: Anticipator
    params: Params
    theirs: Official

    @property
    def parts(self) -> tuple[Encoder, Predictor, Anticipator, Params]:
        return self.encoder, self.predictor, self.anticipator, self.params


@functools.cache
def setup(name: str = V2, *, actions_only: bool = False, **fields: int) -> Setup:
    """A golden encoder and predictor with a random anticipator, ours and the port."""
    classes = {"actions": CLASSES["actions"]} if actions_only else CLASSES
    labels = {kind: LABELS[kind] for kind in classes}
    head = AnticipatorConfig(**labels, num_layers=1, num_heads=4, **fields)
    config = dataclasses.replace(
        GOLDEN[name], classifier=None, action_predictor=None, anticipator=head
    )
    weights = {
        "encoder": official.weights(f"{name}.pt", "target_encoder"),
        "predictor": official.weights(f"{name}.pt", "predictor"),
        "anticipator": probe_tensors(classes),
    }
    params = {part: getattr(official, part)(tensors) for part, tensors in weights.items()}
    tensors = {
        part: {name: torch.from_numpy(value) for name, value in values.items()}
        for part, values in weights.items()
    }
    return Setup(
        config,
        Encoder(config.encoder),
        Predictor(config.predictor, config.encoder),
        Anticipator(head, config.encoder),
        jax.tree.map(jnp.asarray, params),
        Official(config, tensors, rounding="float32"),
    )


EPIC_NAMES = {
    "EPIC_100_verb_classes.csv": "id,key,instances,category\n0,take,\"['get']\",a\n3,wash,[],b\n",
    "EPIC_100_noun_classes.csv": "id,key,instances\n1,pan,[]\n0,tap,[]\n12,oven:door,[]\n",
}


def write_epic(folder: Path, pairs: list[tuple[int, int]], *, names: bool = False) -> Path:
    """EPIC_100_train.csv with these verbs and nouns, and if asked for the names of classes."""
    folder.mkdir(exist_ok=True)
    rows = [f"P01_{i},{noun},x,{verb}" for i, (verb, noun) in enumerate(pairs)]
    path = folder / "EPIC_100_train.csv"
    path.write_text("\n".join(["narration_id,noun_class,narration,verb_class", *rows]) + "\n")
    for name, text in EPIC_NAMES.items() if names else ():
        (folder / name).write_text(text)
    return path
