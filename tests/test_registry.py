import math

import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict

from jvjepa import Encoder, registry
from jvjepa.errors import InputError
from jvjepa.weights import parameter_shapes


def test_there_are_all_eight() -> None:
    assert len(registry.RELEASES) == 8


@pytest.mark.parametrize("name", registry.RELEASES)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    release = registry.get(name)
    shapes = parameter_shapes(release.config)
    assert sum(math.prod(shape) for shape in shapes.values()) == release.num_params


@pytest.mark.parametrize("name", registry.RELEASES)
def test_shapes(name: str) -> None:
    config = registry.get(f"facebook/{name}").config
    encoder = Encoder(config.encoder)
    side, frames = config.encoder.crop_size, config.encoder.frames_per_clip
    clip = jax.ShapeDtypeStruct((1, frames, side, side, 3), jnp.float32)
    variables = jax.eval_shape(encoder.init, jax.random.key(0), clip)
    found = {f"encoder/{k}": v.shape for k, v in flatten_dict(variables["params"], sep="/").items()}
    listed = parameter_shapes(config)
    assert found == {name: shape for name, shape in listed.items() if name.startswith("encoder/")}
    tokens = jax.eval_shape(encoder.apply, variables, clip)
    assert tokens.shape == (1, frames // 2 * (side // 16) ** 2, config.encoder.hidden_size)


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"'vjepa2-vitx'; there are vjepa2-vitl-fpc64-256, "):
        registry.get("vjepa2-vitx")
