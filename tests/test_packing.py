"""Quantized checkpoints: what is stored, and that it comes back bit for bit."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commandline import tiny_model
from models import random_video
from safetensors.numpy import load_file, save_file

import jvjepa
from jvjepa.adapters import Adapters, base_sha256, load_adapters, save_adapters, weights_sha256
from jvjepa.convert import diagnose
from jvjepa.errors import CheckpointError, ConfigError, InputError
from jvjepa.lora import LoraConfig, init_lora, join, merge_lora, split, variables
from jvjepa.packing import Calibration, Quantization, packed_tensors
from jvjepa.parameters import parameter_shapes, unstack_layers
from jvjepa.quantization import SCHEMES, TILED, Scheme, nbytes, plan, quantize
from jvjepa.train.causal_lora import CausalLoraConfig, causal_lora_task, trained_adapters
from jvjepa.train.data import Batch, ClipConfig
from jvjepa.train.feeding import DataConfig
from jvjepa.train.finetune import FinetuneConfig, finetune_task
from jvjepa.train.loop import begin, make_step
from jvjepa.train.manifest import read_manifest
from jvjepa.train.synthetic import SyntheticConfig, write_videos
from jvjepa.typing import Params


def small_model(scheme: Scheme, dtype: jnp.dtype = jnp.float32) -> jvjepa.Model:
    model = tiny_model()
    params = jax.tree.map(lambda x: x.astype(dtype), model.params)
    shapes = parameter_shapes(model.config)
    names, tile = plan(shapes, scheme, tile=16 if scheme in TILED else None, exclude=(".*/proj",))
    ranges = None
    if scheme == "int8-static":
        ranges = {"encoder": {"blocks": {"attention": {}, "mlp": {}}}}
        for i, name in enumerate(names):
            *_, part, layer = name.split("/")
            ranges["encoder"]["blocks"][part][layer] = jnp.array([1.0, 2.0]) + i
    record = Quantization(
        scheme=scheme,
        layers=tuple(names),
        exclude=(".*/proj",),
        tile=tile,
        calibration=Calibration(videos=("a.mp4",), num_frames=4, percentile=99.9)
        if scheme == "int8-static"
        else None,
        model="model",
        sha256="0" * 64,
        base={"encoder": weights_sha256(params["encoder"])},
    )
    small = quantize(params, scheme, exclude=(".*/proj",), tile=tile, ranges=ranges)
    encoder = model.encoder.clone(dtype=dtype, param_dtype=dtype)
    return dataclasses.replace(model, encoder=encoder, params=small, quantization=record)


def assert_same(a: Params, b: Params) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_saved_model_is_loaded_bit_for_bit(
    tmp_path: Path, scheme: Scheme, dtype: jnp.dtype
) -> None:
    model = small_model(scheme, dtype)
    jvjepa.save(tmp_path / "small", model)
    loaded = jvjepa.load(tmp_path / "small")
    assert loaded.quantization == model.quantization
    assert loaded.encoder.param_dtype == dtype
    assert_same(loaded.params, model.params)
    apart = jvjepa.load(tmp_path / "small", scan=False)
    assert_same(apart.params, unstack_layers(model.params))
    jvjepa.save(tmp_path / "again", apart)
    again = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert again == (tmp_path / "small" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_file_is_as_small_as_it_says(tmp_path: Path, scheme: Scheme) -> None:
    model = small_model(scheme)
    jvjepa.save(tmp_path / "small", model)
    path = tmp_path / "small" / "model.safetensors"
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert path.stat().st_size - header == nbytes(model.params)
    shapes, dtypes = packed_tensors(parameter_shapes(model.config), model.quantization)
    stored = load_file(path)
    assert {name: x.shape for name, x in stored.items()} == shapes
    assert {name: stored[name].dtype for name in dtypes} == dtypes
    assert "encoder/blocks/attention/proj/kernel" in shapes
    kernels = 2 * (3 * 48 * 48 + 2 * 48 * 144)
    bits = 4 if scheme in TILED else 8
    values = sum(x.nbytes for name, x in stored.items() if name.endswith("/values"))
    assert values == kernels * bits // 8


def change_config(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "config.json"
    record = json.loads(path.read_text())
    change(record["quantization"])
    path.write_text(json.dumps(record))


def change_weights(folder: Path, change: Callable[[dict], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


FC1 = "encoder/blocks/mlp/fc1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(scheme="int3"), "quantization: scheme = 'int3'; it must be one of"),
        (lambda q: q.update(tile=24), r"scale has shape \[2, 3, 48\], \[2, 2, 48\] would be right"),
        (lambda q: q.update(tile=36), "Quantization.tile = 36; encoder/blocks/.* has 48 inputs"),
        (lambda q: q.update(tile=None), "Quantization.tile = None; int4 must have one"),
        (lambda q: q.update(layers=[]), "Quantization.layers = .*; it must name dense layers"),
        (lambda q: q["layers"].append("encoder/x"), r"has \['encoder/x'\], which are no dense"),
        (lambda q: q["layers"].remove(FC1), f"missing {FC1}/kernel .*unexpected {FC1}/kernel/va"),
        (lambda q: q.pop("base"), "quantization: .*missing 1 required.*'base'"),
        (lambda q: q.update(more=1), "quantization: .*unexpected keyword argument 'more'"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(
    tmp_path: Path, change: Callable[[dict], object], message: str
) -> None:
    jvjepa.save(tmp_path / "small", small_model("int4"))
    change_config(tmp_path / "small", change)
    with pytest.raises(CheckpointError, match=message) as caught:
        jvjepa.load(tmp_path / "small")
    assert str(tmp_path / "small") in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{FC1}/kernel/scale"), f"missing {FC1}/kernel/scale"),
        (lambda t: t.update(x=np.ones(3, np.float32)), "unexpected x"),
        (
            lambda t: t.update({f"{FC1}/kernel/values": t[f"{FC1}/kernel/values"][:, 1:]}),
            r"fc1/kernel/values has shape \[2, 23, 144\], \[2, 24, 144\] would be right",
        ),
        (
            lambda t: t.update({f"{FC1}/kernel/values": t[f"{FC1}/kernel/values"].view(np.int8)}),
            "fc1/kernel/values is I8; uint8 would be right",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    tmp_path: Path, change: Callable[[dict], object], message: str
) -> None:
    jvjepa.save(tmp_path / "small", small_model("int4"))
    change_weights(tmp_path / "small", change)
    with pytest.raises(CheckpointError, match=message):
        jvjepa.load(tmp_path / "small")
    (problem,) = diagnose(tmp_path / "small").problems
    assert re.search(message, problem)


def test_without_its_record_it_is_refused_clearly(tmp_path: Path) -> None:
    jvjepa.save(tmp_path / "small", small_model("int8"))
    path = tmp_path / "small" / "config.json"
    record = json.loads(path.read_text())
    del record["quantization"]
    path.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="holds quantized weights; the floating-point ones"):
        jvjepa.load(tmp_path / "small")


def test_saving_needs_the_record_that_fits(tmp_path: Path) -> None:
    model = small_model("int8")
    whole = dataclasses.replace(tiny_model(), quantization=model.quantization)
    with pytest.raises(CheckpointError, match="tensors do not fit"):
        jvjepa.save(tmp_path / "a", whole)
    with pytest.raises(InputError, match=r"hold quantized kernels; Model\.quantization must"):
        jvjepa.save(tmp_path / "a", dataclasses.replace(model, quantization=None))
    other = dataclasses.replace(model.quantization, scheme="fp8")
    with pytest.raises(CheckpointError, match=r"int8 .* arrived where .* uint8 were due"):
        jvjepa.save(tmp_path / "a", dataclasses.replace(model, quantization=other))
    assert list(tmp_path.iterdir()) == []


def test_a_record_is_checked() -> None:
    given = {"layers": ("a",), "model": "m", "sha256": "0", "base": {}}
    with pytest.raises(ConfigError, match="tile = 32 is for int4 and nf4; this is int8"):
        Quantization(scheme="int8", tile=32, **given)
    record = small_model("int8-static").quantization
    assert Quantization.from_json(json.loads(json.dumps(dataclasses.asdict(record)))) == record
    assert "int8-static in 5 dense layers or stacks of them, ranges of inputs from a.mp4" in (
        record.describe()
    )


def test_weights_that_are_quantized_cannot_be_fine_tuned() -> None:
    with pytest.raises(ConfigError, match="are quantized, which cannot be trained; take the"):
        finetune_task(small_model("int8"), FinetuneConfig(), None, steps=1)


def test_a_part_that_was_replaced_leaves_the_record() -> None:
    record = small_model("int8").quantization
    head = dataclasses.replace(record, layers=(*record.layers, "classifier/linear"))
    assert head.without("classifier") == record
    assert record.without("predictor") == record
    assert record.without("encoder") is None


# --- LoRA ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["int4", "int8-dynamic"])
def test_adapters_of_the_original_fit_and_run_beside_small_weights(
    tmp_path: Path, scheme: Scheme
) -> None:
    whole, small = tiny_model(), small_model(scheme)
    config = LoraConfig(rank=2, targets=("encoder/blocks/.*/(query|fc2|proj)",))
    lora = init_lora(small.params, config, jax.random.key(0))
    lora = jax.tree.map(lambda x: x + 0.05, lora)
    video = random_video(1, 4, 32, 32)
    apply = jax.jit(small.encoder.apply)
    out = apply(variables(small.params["encoder"], lora["encoder"]), video)
    plain = apply({"params": small.params["encoder"]}, video)
    assert np.abs(np.asarray(out - plain)).max() > 1e-2
    with pytest.raises(InputError, match="query is quantized; adapters can be applied beside it"):
        merge_lora(small.params, lora)

    lora = init_lora(whole.params, config, jax.random.key(0))
    adapters = Adapters(config=config, base=base_sha256(whole.params, split(lora)[0]), lora=lora)
    save_adapters(tmp_path / "adapter", adapters)
    found = load_adapters(tmp_path / "adapter", small.params, small.quantization)
    assert_same(found.lora, lora)
    with pytest.raises(CheckpointError, match="was trained on other weights"):
        load_adapters(tmp_path / "adapter", small.params)
    jvjepa.save(tmp_path / "small", small)
    with pytest.raises(CheckpointError, match=f"holds {scheme} weights, into which no adapters"):
        jvjepa.load(tmp_path / "small", lora=tmp_path / "adapter")

    lora = init_lora(small.params, config, jax.random.key(0))
    own = Adapters(config=config, base=base_sha256(small.params, split(lora)[0]), lora=lora)
    save_adapters(tmp_path / "own", own)
    assert_same(load_adapters(tmp_path / "own", small.params).lora, lora)
    apart = jvjepa.load(tmp_path / "small", scan=False).params
    assert weights_sha256(apart["encoder"]) == own.base["encoder"]


def test_gradients_reach_adapters_beside_integer_products() -> None:
    model = small_model("int8-dynamic")
    lora = init_lora(model.params, LoraConfig(rank=2), jax.random.key(0))
    trained, fixed = split(lora)
    video = random_video(1, 2, 32, 32)

    def loss(trained: Params) -> jax.Array:
        both = variables(model.params["encoder"], join(trained, fixed)["encoder"])
        return jnp.sum(model.encoder.apply(both, video) ** 2)

    gradient = jax.jit(jax.grad(loss))(trained)["encoder"]["blocks"]["attention"]["query"]["b"]
    assert np.isfinite(gradient).all()
    assert (np.abs(np.asarray(gradient)).max((1, 2)) > 1e-3).all()


def test_a_small_checkpoint_can_be_adapted_as_it_is(tmp_path: Path) -> None:
    sizes = SyntheticConfig(num_frames=6, height=32, width=32)
    manifest = read_manifest(write_videos(tmp_path / "videos", 2, sizes))
    jvjepa.save(tmp_path / "small", small_model("nf4"))
    model = jvjepa.load(tmp_path / "small")
    data = DataConfig(clip=ClipConfig(num_frames=4, crop_size=32), batch_size=2)
    config = CausalLoraConfig(lora=LoraConfig(rank=2), data=data, window=1)
    task = causal_lora_task(model, config, manifest, steps=200)
    assert task.record["base"] == {"encoder": weights_sha256(model.params["encoder"])}
    video = np.random.default_rng(0).integers(0, 256, (2, 4, 32, 32, 3)).astype(np.uint8)
    labels = np.full(2, -1, np.int32)
    batch = Batch(video, labels, np.arange(2, dtype=np.int32))
    state, metrics = jax.jit(make_step(task))(begin(task), task.frozen, batch, jax.random.key(0))
    assert np.isfinite(metrics["loss"])
    assert trained_adapters(model, config, task, state).base == task.record["base"]
    twice = dataclasses.replace(config, quantize="int8")
    with pytest.raises(InputError, match="is quantized already; take the floating-point weights"):
        causal_lora_task(model, twice, manifest, steps=200)
    static = dataclasses.replace(config, quantize="int8-static")
    with pytest.raises(ConfigError, match="int8-static needs ranges"):
        causal_lora_task(tiny_model(), static, manifest, steps=200)
