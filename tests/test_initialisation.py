import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from jvjepa import (
    ActionPredictorConfig,
    AnticipatorConfig,
    ClassifierConfig,
    ModelConfig,
    PredictorConfig,
)
from jvjepa.config import EncoderConfig
from jvjepa.encoder import Encoder
from jvjepa.parameters import parameter_shapes
from jvjepa.train.initialisation import init_params

LABELS = tuple(f"LABEL_{i}" for i in range(50))
ENCODER = EncoderConfig(
    hidden_size=48,
    num_layers=3,
    num_heads=2,
    mlp_dim=160,
    patch_size=8,
    crop_size=64,
    rope="interleaved",
    image_tokenizer=True,
    levels=(0, 2),
)
PREDICTOR = PredictorConfig(
    hidden_size=24,
    num_layers=2,
    num_heads=2,
    mlp_dim=96,
    rope="interleaved",
    num_levels=2,
    context_projection=True,
    modality_embeddings=True,
)
WHOLE = ModelConfig(
    encoder=ENCODER,
    predictor=PREDICTOR,
    classifier=ClassifierConfig(labels=LABELS, num_layers=2, num_heads=4),
    anticipator=AnticipatorConfig(
        actions=LABELS, verbs=LABELS, nouns=LABELS, num_layers=2, num_heads=4
    ),
)
ACTION = ModelConfig(
    encoder=EncoderConfig(hidden_size=48, num_layers=2, num_heads=2, mlp_dim=96),
    action_predictor=ActionPredictorConfig(hidden_size=24, num_layers=2, num_heads=2, mlp_dim=48),
)


@pytest.mark.parametrize("config", [WHOLE, ACTION])
def test_names_and_shapes_are_those_of_a_checkpoint(config: ModelConfig) -> None:
    flat = flatten_dict(init_params(config, jax.random.key(0)), sep="/")
    assert {name: leaf.shape for name, leaf in flat.items()} == parameter_shapes(config)
    assert {leaf.dtype for leaf in flat.values()} == {jnp.dtype("float32")}


def spread(values: np.ndarray) -> tuple[float, float]:
    """Deviation, and by how many standard errors an estimate of so many numbers may be wrong."""
    return float(values.std()), 4 * float(values.std()) / (2 * values.size) ** 0.5


def test_every_array_is_drawn_as_metas() -> None:
    flat = flatten_dict(init_params(WHOLE, jax.random.key(1)), sep="/")
    for name, leaf in flat.items():
        values = np.asarray(leaf, np.float64)
        if name.startswith(("classifier/linear", "anticipator/actions", "anticipator/verbs")):
            bound = 48**-0.5
            assert 0.9 * bound < np.abs(values).max() <= bound, name
            deviation, error = spread(values)
            assert abs(deviation - bound / 3**0.5) <= 2 * error, name
        elif name.endswith(("bias", "mask_tokens")) and "anticipator/nouns" not in name:
            assert not values.any(), name
        elif name.endswith("scale"):
            assert (values == 1).all(), name
        elif name.endswith(("image_embed", "video_embed")):
            deviation, error = spread(values)
            assert abs(deviation - 1e-6) <= 2 * error, name
        elif name.endswith(("kernel", "query_tokens")) and "anticipator/nouns" not in name:
            stacked = "/blocks/" in name
            for i, layer in enumerate(values if stacked else [values]):
                expected = 0.02
                if name.endswith(("attention/proj/kernel", "mlp/fc2/kernel")):
                    # a pooler's cross-attention has the number of the last block before it
                    pooler = name.replace("cross_attention/mlp", "blocks/mlp")
                    number = i + 1 if stacked else len(flat[pooler])
                    expected /= (2 * number) ** 0.5
                deviation, error = spread(layer)
                assert abs(deviation - expected) <= error, (name, i)
                assert abs(layer.mean()) <= 4 * deviation / layer.size**0.5, (name, i)
        else:
            assert "anticipator/nouns" in name, name


def test_there_is_no_cut() -> None:
    """Flax's `truncated_normal` would end at 2.27 deviations."""
    kernel = np.asarray(init_params(WHOLE, jax.random.key(2))["encoder"]["patch_embed"]["kernel"])
    assert kernel.shape == (2 * 8 * 8 * 3, 48)
    assert 3.5 < np.abs(kernel).max() / 0.02 < 6
    assert abs((np.abs(kernel) > 2 * 0.02).mean() - 0.0455) < 0.01


def test_layers_and_parts_are_drawn_apart() -> None:
    first = init_params(WHOLE, jax.random.key(0))
    layers = np.asarray(first["encoder"]["blocks"]["attention"]["query"]["kernel"])
    assert len({layer.tobytes() for layer in layers}) == 3
    kernels = [
        np.asarray(first[part]["blocks"]["attention"][name]["kernel"]).tobytes()
        for part in ("encoder", "predictor")
        for name in ("query", "key", "value")
    ]
    assert len(set(kernels)) == 6
    again = init_params(ModelConfig(encoder=ENCODER), jax.random.key(0))
    chex.assert_trees_all_equal(again["encoder"], first["encoder"])
    other = init_params(ModelConfig(encoder=ENCODER), jax.random.key(1))
    assert not np.array_equal(
        other["encoder"]["patch_embed"]["kernel"], first["encoder"]["patch_embed"]["kernel"]
    )


def test_the_encoder_runs_on_them() -> None:
    params = init_params(ModelConfig(encoder=ENCODER), jax.random.key(0))["encoder"]
    video = jax.random.normal(jax.random.key(1), (1, 2, 16, 24, 3))
    tokens = jax.jit(Encoder(ENCODER).apply)({"params": params}, video)
    assert np.isfinite(tokens).all()
    assert np.allclose(np.asarray(tokens).std(-1), 1, atol=0.05)
