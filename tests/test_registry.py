import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict

from jvjepa import Encoder, registry
from jvjepa.errors import InputError
from jvjepa.parameters import count_parameters, parameter_shapes


def test_there_are_all() -> None:
    sources = [release.source for release in registry.RELEASES.values()]
    assert sum(source.startswith("facebook/") for source in sources) == 8
    assert sum(source.endswith(".pt") for source in sources) == 9
    assert len(set(sources)) == 17


@pytest.mark.parametrize("name", registry.RELEASES)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    release = registry.get(name)
    counts = count_parameters(release.config)
    counts["all"] = sum(counts.values())
    assert release.num_params
    assert release.num_params == {part: counts[part] for part in release.num_params}


@pytest.mark.parametrize("probe", registry.PROBES.values(), ids=registry.PROBES)
def test_probes_fit_their_encoders(probe: registry.Probe) -> None:
    config = registry.get(probe.encoder).config.encoder
    layers = probe.layers or (config.num_layers - 1,)
    assert layers[-1] == config.num_layers - 1


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
