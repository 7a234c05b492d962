"""The original's published sizes, and the architecture that follows from its shapes."""

import functools
import re
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from quality import random_features

from jvjepa import registry
from jvjepa.convert import Hints
from jvjepa.convert.huggingface import hf_entries
from jvjepa.convert.qualivision import (
    DROPPED,
    TABLE,
    QualiVisionWeights,
    infer,
    qualivision_entries,
)
from jvjepa.convert.source import StoredTensor
from jvjepa.convert.tables import expected_shapes
from jvjepa.parameters import count_shapes
from jvjepa.quality import MOSHead, QualityConfig
from jvjepa.quality_weights import quality_shapes
from jvjepa.text_config import TextConfig


@functools.cache
def released_shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of Hugging Face's ViT-g, which the original's state dict has after "venc."."""
    config = registry.get("vjepa2-vitg-fpc64-384").config
    return dict(expected_shapes(hf_entries(config)))


def frozen_by_the_originals_rule(name: str, ratio: float = 0.85) -> bool:
    layers = [re.search(r"encoder\.layer\.(\d+)", other) for other in released_shapes()]
    cutoff = int((1 + max(int(layer[1]) for layer in layers if layer)) * ratio)
    layer = re.search(r"encoder\.layer\.(\d+)", name)
    if "embeddings" in name or "pooler" in name:
        return True
    return layer is not None and int(layer[1]) < cutoff


def test_the_released_encoder_has_the_originals_tensors() -> None:
    """549 and 294 tensors, and their elements, are what the original prints of its freezing."""
    shapes = released_shapes()
    frozen = [name for name in shapes if frozen_by_the_originals_rule(name)]
    trained = [name for name in shapes if name not in frozen]
    assert (len(frozen), len(trained)) == (549, 294)

    def count(names: list[str]) -> int:
        return sum(int(np.prod(shapes[name])) for name in names)

    assert count(frozen) == 861_214_976
    assert count(trained) == 173_340_288
    blocks = [name for name in trained if name.startswith("encoder.layer.")]
    assert count(blocks) == 151_501_056
    assert count(["encoder.layernorm.weight", "encoder.layernorm.bias"]) == 2_816
    assert count([name for name in trained if name.startswith("predictor.")]) == 21_836_416


def test_every_tensor_of_the_original_is_used_or_dropped() -> None:
    named = {re.sub(r"\.layer\.\d+\.", ".layer.{i}.", f"venc.{name}") for name in released_shapes()}
    used = {row.theirs for row in TABLE if row.theirs.startswith("venc.")}
    assert used | {name for name in DROPPED if name.startswith("venc.")} == named
    assert not used & DROPPED.keys()


def original_config() -> QualityConfig:
    encoder = registry.get("vjepa2-vitg-fpc64-384-ssv2").config.encoder
    return QualityConfig(encoder=encoder, text=TextConfig())


def test_the_originals_architecture_follows_from_its_shapes() -> None:
    config, path = original_config(), Path("vjepa_best.pt")
    wanted = expected_shapes(qualivision_entries(config))
    tensors = {
        name: StoredTensor(path=path, shape=shape, dtype="F32") for name, shape in wanted.items()
    }
    weights = QualiVisionWeights(
        tensors=tensors, dropped={}, key="", has_text=True, _places={}, _file=None
    )
    assert infer(path, weights, TextConfig(), Hints()) == config
    assert wanted["venc.encoder.embeddings.patch_embeddings.proj.weight"] == (1408, 3, 2, 16, 16)
    assert wanted["venc.encoder.layer.39.mlp.fc1.weight"] == (6144, 1408)
    assert wanted["head.net.1.weight"] == (512, 2432)


def test_effective_parameters_of_the_original() -> None:
    counts = count_shapes(quality_shapes(original_config()))
    assert 151_501_056 + 2_816 + counts["head"] == 152_887_045


def test_sizes_of_the_original() -> None:
    counts = count_shapes(quality_shapes(original_config()))
    predictor = 22_381_312  # of V-JEPA 2, which QualiVision's checkpoints hold too
    pooler = 1024 * 1024 + 1024  # of BERT, likewise
    assert counts["head"] == 1_383_173
    assert counts["encoder"] + predictor == 1_034_555_264
    assert counts["text"] + pooler == 335_141_888
    assert sum(counts.values()) + predictor + pooler == 1_371_080_325
    head = MOSHead().init
    shapes = jax.eval_shape(head, jax.random.key(0), *random_features(1, (1408, 1024)))["params"]
    assert {name: leaf.shape for name, leaf in flatten_dict(shapes, sep="/").items()} == {
        "norm/scale": (2432,),
        "norm/bias": (2432,),
        "fc1/kernel": (2432, 512),
        "fc1/bias": (512,),
        "fc2/kernel": (512, 256),
        "fc2/bias": (256,),
        "fc3/kernel": (256, 5),
        "fc3/bias": (5,),
    }
