"""Tiny models to export, and exports of them."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
from models import random_params, random_video, tiny_config

import jvjepa
from jvjepa.config import ClassifierConfig, ModelConfig
from jvjepa.export.artefact import Artefact, artefact, weights_of
from jvjepa.export.manifest import Arrays
from jvjepa.export.network import Numerics
from jvjepa.export.options import Options
from jvjepa.export.parity import Run
from jvjepa.heads import Classifier
from jvjepa.typing import Array
from jvjepa.weights import Source

WINDOW = 3
NEW = {  # V-JEPA 2.1's ways, with areas over rows
    "rope": "interleaved",
    "interpolate": True,
    "image_tokenizer": True,
    "levels": (0, 2),
    "area_layers": (0, 2),
    "area_temporal_splits": 1,
    "area_spatial_splits": 2,
    "area_residual_scale": 0.5,
}


def tiny(*, layers: tuple[int, ...] = (), **fields: object) -> jvjepa.Model:
    """Width 48, 3 layers, 64 pixels, 4 frames, with a classifier; in memory only."""
    config = dataclasses.replace(tiny_config(), frames_per_clip=4, **fields)
    encoder = jvjepa.Encoder(config)
    whole = jvjepa.Encoder(dataclasses.replace(config, area_layers=(0, 0)))  # areas have no weights
    classifier_config = ClassifierConfig(
        labels=("left", "right", "up"), num_heads=4, num_layers=2, layers=layers
    )
    classifier = Classifier(classifier_config, config)
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(classifier.init, jax.random.key(0), np.zeros((1, 4, 48), np.float32))
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) * 0.2, shapes["params"]
    )
    return jvjepa.Model(
        config=ModelConfig(encoder=config, classifier=classifier_config),
        encoder=encoder,
        classifier=classifier,
        params={"encoder": random_params(whole), "classifier": params},
        source=Source(name="nowhere", revision="", sha256="0" * 64, converter="0"),
    )


def in_jax(one: Artefact, model: jvjepa.Model) -> Run:
    """The function of an artefact, run by JAX itself."""
    weights = weights_of(model, one.parts, None).arrays
    function = jax.jit(one.flat(model.config.encoder, Numerics(), tuple(weights)))

    def run(feed: Arrays) -> Arrays:
        outputs = function(*(feed[port.name] for port in one.inputs), *weights.values())
        return {p.name: np.asarray(x) for p, x in zip(one.outputs, outputs, strict=True)}

    return run


def planned(what: str, model: jvjepa.Model, **options: object) -> tuple[Artefact, Options]:
    """An artefact of a model, and its options."""
    chosen = Options(what=(what,), window=WINDOW, **options)
    return artefact(what, model.config, chosen), chosen


def saved(folder: Path, model: jvjepa.Model) -> Path:
    """Writes a model as a converted checkpoint."""
    jvjepa.save(folder, model)
    return folder


def tubelets(count: int, side: int = 64) -> np.ndarray:
    """Float32 [count, 2, side, side, 3]."""
    return random_video(count, 2, side, side)


def tokens_of(model: jvjepa.Model, video: np.ndarray) -> Array:
    """The library's own tokens."""
    return jax.jit(model.encoder.apply)({"params": model.params["encoder"]}, video)
