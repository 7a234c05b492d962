import dataclasses
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from models import random_video, relative_error, tiny_config
from safetensors.numpy import load_file, save_file

import jvjepa
from jvjepa import ClassifierConfig, Encoder, Model, ModelConfig, PredictorConfig
from jvjepa.errors import CheckpointError, ConfigError, InputError
from jvjepa.parameters import parameter_shapes, stack_layers, unstack_layers


def _model(dtype: str = "float32") -> Model:
    config = ModelConfig(
        encoder=tiny_config(),
        predictor=PredictorConfig(hidden_size=24, num_layers=2, num_heads=2, mlp_dim=48),
        classifier=ClassifierConfig(labels=("walk", "run"), num_layers=1, num_heads=4),
    )
    rng = np.random.default_rng(0)
    flat = {
        tuple(name.split("/")): jnp.asarray(rng.normal(size=shape), dtype)
        for name, shape in parameter_shapes(config).items()
    }
    encoder = Encoder(config.encoder, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))
    return Model(config=config, encoder=encoder, params=unflatten_dict(flat), source=None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_save_and_load(tmp_path: Path, dtype: str) -> None:
    model = _model(dtype)
    jvjepa.save(tmp_path / "m", model)
    loaded = jvjepa.load(tmp_path / "m")
    assert loaded.config == model.config
    assert loaded.encoder == model.encoder
    chex.assert_trees_all_equal(loaded.params, model.params)
    chex.assert_trees_all_equal_dtypes(loaded.params, model.params)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_other_computation_dtype(tmp_path: Path) -> None:
    jvjepa.save(tmp_path / "m", _model())
    model = jvjepa.load(tmp_path / "m", dtype="bfloat16", attention="xla")
    tokens = model.encoder.apply({"params": model.params["encoder"]}, random_video(1, 2, 32, 32))
    assert tokens.dtype == jnp.bfloat16
    assert model.encoder.param_dtype == jnp.float32
    with pytest.raises(ConfigError, match="dtype = 'float16'; it must be one of float32, bfloat16"):
        jvjepa.load(tmp_path / "m", dtype="float16")
    with pytest.raises(ConfigError, match="attention = 'flash'"):
        jvjepa.load(tmp_path / "m", attention="flash")


def test_save_refuses_what_does_not_fit(tmp_path: Path) -> None:
    model = _model()
    params = unflatten_dict(flatten_dict(model.params))
    params["encoder"]["norm"]["scale"] = jnp.ones((47,))
    del params["classifier"]["linear"]["bias"]
    with pytest.raises(CheckpointError, match=r"2 tensors do not fit: missing classifier/lin"):
        jvjepa.save(tmp_path / "m", dataclasses.replace(model, params=params))
    mixed = jax.tree.map(lambda x: x, dict(model.params))
    mixed["classifier"] = jax.tree.map(lambda x: x.astype(jnp.bfloat16), mixed["classifier"])
    with pytest.raises(InputError, match="all be float32 or all bfloat16"):
        jvjepa.save(tmp_path / "m", dataclasses.replace(model, params=mixed))
    assert not list(tmp_path.iterdir())


def test_save_replaces_only_when_told(tmp_path: Path) -> None:
    jvjepa.save(tmp_path / "m", _model())
    with pytest.raises(InputError, match="exists; choose another name or pass --force"):
        jvjepa.save(tmp_path / "m", _model())
    jvjepa.save(tmp_path / "m", _model("bfloat16"), force=True)
    assert jvjepa.load(tmp_path / "m").encoder.param_dtype == jnp.bfloat16


def _edit(folder: Path, change: str) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if change == "missing":
        del tensors["encoder/norm/bias"]
    elif change == "extra":
        tensors["encoder/norm/offset"] = np.ones(3, np.float32)
    elif change == "misshapen":
        tensors["encoder/norm/bias"] = np.ones(3, np.float32)
    elif change == "dtype":
        tensors["encoder/norm/bias"] = tensors["encoder/norm/bias"].astype(np.float16)
    save_file(tensors, path)
    if change == "truncated":
        path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"model.safetensors: 1 tensors do not fit: missing encoder/norm/bias \[48\]"),
        ("extra", r"unexpected encoder/norm/offset \[3\]"),
        ("misshapen", r"encoder/norm/bias has shape \[3\], \[48\] would be right"),
        ("dtype", r"has dtypes \['F16', 'F32'\]; F32 or BF16 alone would be right"),
        ("truncated", "model.safetensors is not whole"),
    ],
)
def test_damaged_weights_are_refused(tmp_path: Path, change: str, message: str) -> None:
    jvjepa.save(tmp_path / "m", _model())
    _edit(tmp_path / "m", change)
    with pytest.raises(CheckpointError, match=message):
        jvjepa.load(tmp_path / "m")


def test_folders_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json does not exist"):
        jvjepa.load(tmp_path / "absent")
    config = tmp_path / "config.json"
    config.write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json is not JSON"):
        jvjepa.load(tmp_path)
    config.write_text(json.dumps({"model_type": "vjepa2"}))
    with pytest.raises(CheckpointError, match="convert it first: jvjepa convert"):
        jvjepa.load(tmp_path)
    config.write_text(json.dumps({"format": "jvjepa-2", "model": {"encoder": {}}}))
    with pytest.raises(CheckpointError, match="missing fields"):
        jvjepa.load(tmp_path)


def test_stack_and_unstack_are_inverse() -> None:
    params = _model().params["encoder"]
    layers = unstack_layers(params)
    assert sorted(layers) == ["blocks_0", "blocks_1", "blocks_2", "norm", "patch_embed"]
    kernel = params["blocks"]["mlp"]["fc1"]["kernel"]
    assert np.array_equal(layers["blocks_1"]["mlp"]["fc1"]["kernel"], kernel[1])
    again = stack_layers(layers)
    chex.assert_trees_all_equal(again, dict(params))


def test_a_model_with_unstacked_layers_loads_and_saves(tmp_path: Path) -> None:
    jvjepa.save(tmp_path / "a", _model())
    stacked, unstacked = (jvjepa.load(tmp_path / "a", scan=scan) for scan in (True, False))
    video = random_video(1, 4, 32, 48)
    a, b = (m.encoder.apply({"params": m.params["encoder"]}, video) for m in (stacked, unstacked))
    assert relative_error(a, b) <= 1e-6
    jvjepa.save(tmp_path / "b", unstacked)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]
