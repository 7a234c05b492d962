"""The pooler and the classifier are Meta's and Hugging Face's, each with its own settings."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import hfcheckpoints
import jax
import jax.numpy as jnp
import numpy as np
import official
import pytest
import torch
from flax.traverse_util import flatten_dict
from models import random_video, relative_error

from jvjepa import registry
from jvjepa.config import ClassifierConfig, EncoderConfig, ModelConfig
from jvjepa.encoder import Encoder
from jvjepa.errors import ConfigError, InputError
from jvjepa.heads import Classifier
from jvjepa.parameters import parameter_shapes, stack_layers, unstack_layers
from jvjepa.typing import Array, Params

MODULE = 1e-5
LABELS = 5


def dense(theirs: torch.nn.Linear) -> Params:
    return {"kernel": jnp.asarray(theirs.weight.detach().T), "bias": from_torch(theirs.bias)}


def norm(theirs: torch.nn.LayerNorm) -> Params:
    return {"scale": from_torch(theirs.weight), "bias": from_torch(theirs.bias)}


def from_torch(tensor: torch.Tensor) -> Array:
    return jnp.asarray(tensor.detach().numpy())


def mlp(theirs: torch.nn.Module) -> Params:
    return {name: dense(getattr(theirs, name)) for name in ("fc1", "fc2")}


def pooler_block(theirs: torch.nn.Module, attention: torch.nn.Module) -> dict[str, Any]:
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "proj": "out_proj"}
    return {
        "norm1": norm(theirs.layer_norm1),
        "attention": {
            ours: dense(getattr(attention, name))
            for ours, name in names.items()
            if hasattr(attention, name)
        },
        "norm2": norm(theirs.layer_norm2),
        "mlp": mlp(theirs.mlp),
    }


def classifier_params(theirs: hfcheckpoints.HFModel) -> Params:
    cross = theirs.pooler.cross_attention_layer
    pooler: dict[str, Any] = {"query_tokens": from_torch(theirs.pooler.query_tokens)[0]}
    for i, layer in enumerate(theirs.pooler.self_attention_layers):
        pooler[f"blocks_{i}"] = pooler_block(layer, layer.self_attn)
    pooler["cross_attention"] = pooler_block(cross, cross.cross_attn)
    return stack_layers({"pooler": pooler, "linear": dense(theirs.classifier)})


def encoder_params(theirs: torch.nn.Module) -> Params:
    patches = theirs.embeddings.patch_embeddings.proj
    kernel = from_torch(patches.weight).transpose(2, 3, 4, 1, 0)
    params: dict[str, Any] = {
        "patch_embed": {
            "kernel": kernel.reshape(-1, kernel.shape[-1]),
            "bias": from_torch(patches.bias),
        },
        "norm": norm(theirs.layernorm),
    }
    for i, layer in enumerate(theirs.layer):
        names = ("query", "key", "value", "proj")
        params[f"blocks_{i}"] = {
            "norm1": norm(layer.norm1),
            "attention": {name: dense(getattr(layer.attention, name)) for name in names},
            "norm2": norm(layer.norm2),
            "mlp": mlp(layer.mlp),
        }
    return stack_layers(params)


@functools.cache
def theirs_of(head_width: int, heads: int, eps: float = 1e-6) -> hfcheckpoints.HFModel:
    config = hfcheckpoints.tiny_config(head_width=head_width, heads=heads, labels=LABELS)
    config.layer_norm_eps = eps
    return hfcheckpoints.random_model(config)


def ours_of(theirs: hfcheckpoints.HFModel, *, encoder_heads: int = 2, **changes: Any) -> Classifier:
    hf = theirs.config
    config = ClassifierConfig(
        labels=tuple(hf.id2label.values()),
        num_heads=hf.num_attention_heads,
        layer_norm_eps=hf.layer_norm_eps,
    )
    encoder = EncoderConfig(
        hidden_size=hf.hidden_size,
        num_layers=hf.num_hidden_layers,
        num_heads=encoder_heads,
        mlp_dim=int(hf.hidden_size * hf.mlp_ratio),
        crop_size=hf.crop_size,
    )
    return Classifier(dataclasses.replace(config, **changes), encoder)


def random_tokens(*shape: int, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


def apply(module: Classifier | Encoder, params: Params, x: Array, method: Any = None) -> Any:
    return _jitted(module, method)({"params": params}, x)


@functools.cache
def _jitted(module: Classifier | Encoder, method: Any) -> Callable[..., Any]:
    return jax.jit(functools.partial(module.apply, method=method))


def pool_and_classify(classifier: Classifier, tokens: Array) -> tuple[Array, Array]:
    return classifier.pool(tokens), classifier(tokens)


def torch_logits(theirs: hfcheckpoints.HFModel, tokens: np.ndarray) -> tuple[Any, Any]:
    with torch.inference_mode():
        pooled = theirs.pooler(torch.from_numpy(tokens))
        return pooled, theirs.classifier(pooled)


# (head width, heads) of the pooler; the encoder's own have to be even.
@pytest.mark.parametrize(("width", "heads"), [(32, 2), (9, 4), (3, 16), (48, 1)])
def test_parity_with_transformers(width: int, heads: int) -> None:
    theirs = theirs_of(width, heads)
    ours, params = ours_of(theirs), classifier_params(theirs)
    tokens = random_tokens(2, 37, width * heads)

    pooled, logits = apply(ours, params, tokens, pool_and_classify)

    expected = torch_logits(theirs, tokens)
    assert relative_error(pooled, expected[0]) <= MODULE
    assert relative_error(logits, expected[1]) <= MODULE


def test_parity_on_more_tokens_than_a_block_of_queries() -> None:
    theirs = theirs_of(24, 2)
    x = random_tokens(3, 600, 48)
    logits = apply(ours_of(theirs), classifier_params(theirs), x)
    assert relative_error(logits, torch_logits(theirs, x)[1]) <= MODULE


def test_parity_of_the_whole_model() -> None:
    theirs = theirs_of(32, 2)
    ours, video = ours_of(theirs), random_video(2, 4, 64, 64)

    encoder = Encoder(ours.encoder)
    tokens = apply(encoder, encoder_params(theirs.vjepa2.encoder), video)
    logits = apply(ours, classifier_params(theirs), tokens)

    with torch.inference_mode():
        expected = theirs(torch.from_numpy(video).movedim(-1, 2)).logits
    assert relative_error(logits, expected) <= MODULE


@functools.cache
def golden() -> tuple[Classifier, Params, np.ndarray, np.ndarray]:
    """Meta's probe, its input and its output."""
    data = official.data("vjepa2_tiny")
    params = official.classifier(official.weights("vjepa2_tiny_probe.pt", "classifiers", 0))
    classifier = Classifier(official.V2.classifier, official.V2.encoder)
    return classifier, params, data["out.video"], data["out.logits"]


def test_parity_with_meta() -> None:
    classifier, params, tokens, expected = golden()
    assert relative_error(apply(classifier, params, tokens), expected) <= MODULE


def test_another_number_of_heads_loads_but_fails_parity() -> None:
    classifier, params, tokens, expected = golden()
    config = dataclasses.replace(classifier.config, num_heads=16)
    other = dataclasses.replace(classifier, config=config)
    assert relative_error(apply(other, params, tokens), expected) > 100 * MODULE


def test_epsilon_is_the_configs() -> None:
    theirs = theirs_of(24, 2, 1e-5)
    params, tokens = classifier_params(theirs), random_tokens(2, 9, 48, scale=1e-3)
    expected = torch_logits(theirs, tokens)[1]
    assert relative_error(apply(ours_of(theirs), params, tokens), expected) <= MODULE
    other = ours_of(theirs, layer_norm_eps=1e-6)
    assert relative_error(apply(other, params, tokens), expected) > 100 * MODULE


def test_the_mlp_is_four_times_the_width_whatever_the_encoders_is() -> None:
    classifier = ours_of(theirs_of(32, 2))
    assert classifier.encoder.mlp_dim != 4 * classifier.encoder.hidden_size
    params = classifier_params(theirs_of(32, 2))
    assert params["pooler"]["blocks"]["mlp"]["fc1"]["kernel"].shape == (3, 64, 256)
    assert shapes_of(classifier) == expected_shapes(classifier)


def shapes_of(classifier: Classifier) -> dict[str, tuple[int, ...]]:
    tokens = jax.ShapeDtypeStruct((1, 4, classifier.encoder.hidden_size), jnp.float32)
    made = jax.eval_shape(classifier.init, jax.random.key(0), tokens)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(made)} == {jnp.dtype(classifier.param_dtype)}
    return {name: leaf.shape for name, leaf in flatten_dict(made, sep="/").items()}


def expected_shapes(classifier: Classifier) -> dict[str, tuple[int, ...]]:
    config = ModelConfig(encoder=classifier.encoder, classifier=classifier.config)
    return {
        name.removeprefix("classifier/"): shape
        for name, shape in parameter_shapes(config).items()
        if name.startswith("classifier/")
    }


RELEASED = [name for name, release in registry.RELEASES.items() if release.config.classifier]


@pytest.mark.parametrize("name", RELEASED)
def test_has_the_released_parameters(name: str) -> None:
    config = registry.get(name).config
    classifier = Classifier(config.classifier, config.encoder, param_dtype=jnp.bfloat16)
    assert shapes_of(classifier) == expected_shapes(classifier)


def test_there_are_released_classifiers_to_test() -> None:
    assert len(RELEASED) >= 4


def test_scanned_and_unrolled_layers_agree() -> None:
    classifier, params, tokens, _ = golden()
    unrolled = dataclasses.replace(classifier, scan=False)
    scanned = apply(classifier, params, tokens)
    assert relative_error(apply(unrolled, unstack_layers(params), tokens), scanned) <= 1e-6


def test_backends_agree() -> None:
    classifier, params, tokens, _ = golden()
    other = dataclasses.replace(classifier, attention="xla")
    expected = apply(classifier, params, tokens)  # chunked, on a CPU
    assert relative_error(apply(other, params, tokens), expected) <= 1e-6


def test_the_order_of_tokens_and_repeating_them_all_change_nothing() -> None:
    classifier, params, tokens, _ = golden()
    expected = apply(classifier, params, tokens)
    order = np.random.default_rng(0).permutation(tokens.shape[1])
    for same in (tokens[:, order], np.concatenate([tokens, tokens], axis=1)):
        assert relative_error(apply(classifier, params, same), expected) <= 3e-6
    other = np.concatenate(
        [tokens[:, :1], tokens[:, :-1]], axis=1
    )  # one of them instead of another
    assert relative_error(apply(classifier, params, other), expected) > 100 * MODULE


def test_rows_of_a_batch_do_not_affect_each_other() -> None:
    classifier, params, tokens, _ = golden()
    together = apply(classifier, params, tokens)
    for row in range(len(tokens)):
        alone = apply(classifier, params, tokens[row : row + 1])
        assert relative_error(together[row : row + 1], alone) <= 1e-6


@pytest.mark.parametrize(
    ("param_dtype", "attention"), [(jnp.float32, "xla"), (jnp.bfloat16, "chunked")]
)
def test_bfloat16(param_dtype: jnp.dtype, attention: str) -> None:
    classifier, params, tokens, expected = golden()
    dtypes = {"dtype": jnp.bfloat16, "param_dtype": param_dtype}
    low = dataclasses.replace(classifier, **dtypes, attention=attention)
    params = jax.tree.map(lambda x: jnp.asarray(x, param_dtype), params)
    logits = apply(low, params, jnp.asarray(tokens, param_dtype))
    assert logits.dtype == jnp.bfloat16
    assert 0 < relative_error(logits, expected) <= 0.03


def test_every_parameter_matters() -> None:
    classifier, params, tokens, _ = golden()
    classifier = dataclasses.replace(classifier, attention="xla")
    weights = jnp.asarray(random_tokens(2, 7))
    loss = jax.jit(jax.grad(lambda p: jnp.sum(weights * apply(classifier, p, tokens))))
    gradients = flatten_dict(loss(jax.tree.map(jnp.asarray, params)), sep="/")
    for name, gradient in gradients.items():
        size = float(jnp.max(jnp.abs(gradient)))
        # The softmax does not see what is added to all keys.
        assert size < 1e-5 if name.endswith("attention/key/bias") else size > 1e-4, name


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros((4, 32), np.float32), r"shape \(4, 32\); they must be \[B, N, D = 32\]"),
        (np.zeros((2, 4, 31), np.float32), r"shape \(2, 4, 31\); they must be"),
        (np.zeros((2, 0, 32), np.float32), r"shape \(2, 0, 32\); they must be"),
        (np.zeros((2, 4, 32), np.int32), "tokens are int32; they must be float"),
    ],
)
def test_says_what_is_wrong_with_tokens(tokens: np.ndarray, message: str) -> None:
    classifier, params, _, _ = golden()
    with pytest.raises(InputError, match=message):
        apply(classifier, params, tokens)


def test_says_what_is_wrong_with_the_configuration() -> None:
    classifier, params, tokens, _ = golden()
    for changes, message in (
        ({"num_heads": 3}, "num_heads = 3; it must be a divisor of the encoder's width 32"),
        ({"layers": (1, 4)}, "layers = .*among the encoder's normed layers"),
    ):
        config = dataclasses.replace(classifier.config, **changes)
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(classifier, config=config).apply({"params": params}, tokens)
    with pytest.raises(ConfigError, match="attention = 'flash'; it must be one of"):
        dataclasses.replace(classifier, attention="flash").apply({"params": params}, tokens)
