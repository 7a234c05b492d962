"""The pooler and the classifier are Meta's and Hugging Face's, each with its own settings.

Compiling takes most of the time, so that tests share models and shapes where they can.
"""

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
from flax.traverse_util import flatten_dict, unflatten_dict
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
    return {"kernel": from_torch(theirs.weight).T, "bias": from_torch(theirs.bias)}


def norm(theirs: torch.nn.LayerNorm) -> Params:
    return {"scale": from_torch(theirs.weight), "bias": from_torch(theirs.bias)}


def from_torch(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy()


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
    return jax.jit(stack_layers)({"pooler": pooler, "linear": dense(theirs.classifier)})


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
    return jax.jit(stack_layers)(params)


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


SIXTEEN_HEADS = {"head_width": 3, "heads": 16, "eps": 1e-5}
ONE_HEAD = {"head_width": 48, "heads": 1}


def test_parity_with_transformers() -> None:
    theirs = theirs_of(**SIXTEEN_HEADS)
    tokens = random_tokens(3, 37, 48)
    pooled, logits = apply(ours_of(theirs), classifier_params(theirs), tokens, pool_and_classify)
    expected = torch_logits(theirs, tokens)
    assert relative_error(pooled, expected[0]) <= MODULE
    assert relative_error(logits, expected[1]) <= MODULE


def test_parity_of_the_whole_model_on_more_tokens_than_a_block_of_queries() -> None:
    theirs = theirs_of(**ONE_HEAD)
    ours, video = ours_of(theirs, encoder_heads=1), random_video(1, 66, 64, 64)

    encoder = Encoder(ours.encoder)
    tokens = apply(encoder, encoder_params(theirs.vjepa2.encoder), video)
    pooled, logits = apply(ours, classifier_params(theirs), tokens, pool_and_classify)

    with torch.inference_mode():
        expected = theirs(torch.from_numpy(video).movedim(-1, 2)).logits
    assert tokens.shape == (1, 528, 48)
    assert relative_error(logits, expected) <= MODULE
    assert relative_error(pooled, torch_logits(theirs, np.array(tokens))[0]) <= MODULE


def test_repeating_all_tokens_changes_nothing() -> None:
    theirs = theirs_of(**ONE_HEAD)
    ours, tokens = ours_of(theirs, encoder_heads=1), random_tokens(1, 264, 48)
    twice = np.concatenate([tokens, tokens], axis=1)
    logits = apply(ours, classifier_params(theirs), twice, pool_and_classify)[1]
    assert relative_error(logits, torch_logits(theirs, tokens)[1]) <= MODULE


def test_another_number_of_heads_loads_and_gives_other_logits() -> None:
    one, sixteen = theirs_of(**ONE_HEAD), theirs_of(**SIXTEEN_HEADS)
    for a, b in zip(one.parameters(), sixteen.parameters(), strict=True):
        assert torch.equal(a, b)
    tokens = random_tokens(3, 37, 48)
    expected = torch_logits(sixteen, tokens)[1]
    assert relative_error(torch_logits(one, tokens)[1], expected) > 100 * MODULE


def test_epsilon_is_the_configs() -> None:
    theirs, other = theirs_of(**SIXTEEN_HEADS), theirs_of(**{**SIXTEEN_HEADS, "eps": 1e-6})
    tokens = random_tokens(3, 37, 48, scale=1e-3)
    expected = torch_logits(theirs, tokens)[1]
    logits = apply(ours_of(theirs), classifier_params(theirs), tokens, pool_and_classify)[1]
    assert relative_error(logits, expected) <= MODULE
    assert relative_error(torch_logits(other, tokens)[1], expected) > 100 * MODULE


@functools.cache
def golden() -> tuple[Classifier, Params, np.ndarray, np.ndarray]:
    """Meta's probe, its input and its output."""
    data = official.data("vjepa2_tiny")
    params = official.classifier(official.weights("vjepa2_tiny_probe.pt", "classifiers", 0))
    params = jax.tree.map(np.asarray, params)
    classifier = Classifier(official.V2.classifier, official.V2.encoder)
    return classifier, params, data["out.video"], data["out.logits"]


def test_parity_with_meta() -> None:
    classifier, params, tokens, expected = golden()
    assert relative_error(apply(classifier, params, tokens), expected) <= MODULE


def test_the_mlp_is_four_times_the_width_whatever_the_encoders_is() -> None:
    classifier = ours_of(theirs_of(**SIXTEEN_HEADS))
    assert classifier.encoder.mlp_dim != 4 * classifier.encoder.hidden_size
    params = classifier_params(theirs_of(**SIXTEEN_HEADS))
    assert params["pooler"]["blocks"]["mlp"]["fc1"]["kernel"].shape == (3, 48, 192)
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


def test_unrolled_layers_and_another_backend_agree() -> None:
    classifier, params, tokens, _ = golden()
    expected = apply(classifier, params, tokens)  # scanned, and on a CPU chunked
    other = dataclasses.replace(classifier, scan=False, attention="xla")
    assert relative_error(apply(other, unstack_layers(params), tokens), expected) <= 1e-6


def test_the_order_of_tokens_changes_nothing() -> None:
    classifier, params, tokens, _ = golden()
    expected = apply(classifier, params, tokens)
    order = np.random.default_rng(0).permutation(tokens.shape[1])
    assert relative_error(apply(classifier, params, tokens[:, order]), expected) <= 3e-6
    other = tokens[:, np.r_[0, : tokens.shape[1] - 1]]  # the first twice, and not the last
    assert relative_error(apply(classifier, params, other), expected) > 100 * MODULE


def test_rows_of_a_batch_do_not_affect_each_other() -> None:
    classifier, params, tokens, _ = golden()
    together = apply(classifier, params, tokens)
    for row in range(len(tokens)):
        others = random_tokens(*tokens.shape, seed=row)
        others[row] = tokens[row]
        logits = apply(classifier, params, others)
        assert relative_error(logits[row], together[row]) <= 1e-6
        assert relative_error(logits, together) > 0.01


def test_bfloat16() -> None:
    classifier, params, tokens, expected = golden()
    low = dataclasses.replace(classifier, dtype=jnp.bfloat16)
    for attention in ("xla", "chunked"):
        of_float32 = dataclasses.replace(low, attention=attention)
        assert jax.eval_shape(of_float32.apply, {"params": params}, tokens).dtype == jnp.bfloat16
    low = dataclasses.replace(low, param_dtype=jnp.bfloat16)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    logits = apply(low, params, tokens.astype(jnp.bfloat16))
    assert logits.dtype == jnp.bfloat16
    assert 1e-5 < relative_error(logits, expected) <= 0.03


def test_every_parameter_of_every_layer_matters() -> None:
    classifier, params, tokens, _ = golden()
    expected = apply(classifier, params, tokens)
    flat = flatten_dict(params, sep="/")
    for name, value in flat.items():
        layers = [(i,) for i in range(len(value))] if "/blocks/" in name else [()]
        for layer in layers:
            changed = value.copy()
            changed[layer] += 0.1 * random_tokens(*value[layer].shape)
            changed = unflatten_dict({**flat, name: changed}, sep="/")
            change = relative_error(apply(classifier, changed, tokens), expected)
            # The softmax does not see what is added to all keys.
            unseen = name.endswith("attention/key/bias")
            assert change < 1e-6 if unseen else change > 100 * MODULE, (name, layer, change)


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
        ({"frames_per_clip": 3}, "frames_per_clip = 3; it must be 1 or a multiple of .* 2"),
    ):
        config = dataclasses.replace(classifier.config, **changes)
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(classifier, config=config).apply({"params": params}, tokens)
    for frames in (0, 16.0, True):
        right = f"ClassifierConfig.frames_per_clip = {frames}; it must be a whole number above 0"
        with pytest.raises(ConfigError, match=right):
            dataclasses.replace(classifier.config, frames_per_clip=frames)
    with pytest.raises(ConfigError, match="attention = 'flash'; it must be one of"):
        dataclasses.replace(classifier, attention="flash").apply({"params": params}, tokens)
