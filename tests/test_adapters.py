"""Saved adapters: the folder, what ties it to its base, `jvjepa.load(lora=..)`, the commands."""

import dataclasses
import functools
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import commandline
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import random_lora
from commandline import FRAMES_PER_CLIP, listing, load_npz, refused, run, write_scene
from flax.traverse_util import flatten_dict, unflatten_dict
from models import random_params, random_video, relative_error, tiny_config
from safetensors.numpy import load_file, save_file

import jvjepa
from jvjepa import ClassifierConfig, Encoder, Model, ModelConfig, streaming
from jvjepa.adapters import (
    Adapters,
    base_sha256,
    load_adapters,
    save_adapters,
    weights_sha256,
)
from jvjepa.errors import CheckpointError, InputError
from jvjepa.lora import LoraConfig, init_lora, merge_lora, variables
from jvjepa.parameters import parameter_shapes, unstack_layers
from jvjepa.typing import Params
from jvjepa.weights import Source

CONFIG = LoraConfig(rank=4, alpha=6.0, dropout=0.25, layers=(1,))
FILES = ["adapters.safetensors", "config.json"]


def make_adapters(params: Params, config: LoraConfig = CONFIG, seed: int = 0) -> Adapters:
    lora = random_lora(params, config, seed)
    return Adapters(config=config, base=base_sha256(params, lora), lora=lora)


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, `adapter` of it, and `scene.mp4`; read only."""
    folder = tmp_path_factory.mktemp("adapters")
    model = commandline.tiny_model()
    source = Source(name="somewhere", revision="", sha256="0" * 64, converter="1")
    jvjepa.save(folder / "model", dataclasses.replace(model, source=source))
    save_adapters(folder / "adapter", make_adapters(model.params))
    write_scene(folder / "scene.mp4")
    return folder


# --- There and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_save_and_load(assets: Path, tmp_path: Path, dropout: float) -> None:
    params = jvjepa.load(assets / "model").params
    targets = (".*/attention/query", "encoder/patch_embed")
    config = LoraConfig(rank=3, alpha=1.5, dropout=dropout, targets=targets)
    adapters = make_adapters(params, config)
    save_adapters(tmp_path / "a", adapters)
    assert listing(tmp_path) == ["a"]
    assert listing(tmp_path / "a") == FILES
    for loaded in (load_adapters(tmp_path / "a"), load_adapters(tmp_path / "a", params)):
        assert loaded.config == config
        assert loaded.base == adapters.base
        chex.assert_trees_all_equal(loaded.lora, adapters.lora)
        chex.assert_trees_all_equal_dtypes(loaded.lora, adapters.lora)
    with pytest.raises(InputError, match="exists; choose another name or pass --force"):
        save_adapters(tmp_path / "a", adapters)
    save_adapters(tmp_path / "a", make_adapters(params), force=True)
    assert load_adapters(tmp_path / "a").config == CONFIG


def test_unstacked_adapters_are_the_same_file(assets: Path, tmp_path: Path) -> None:
    params = jvjepa.load(assets / "model").params
    unstacked = unstack_layers(params)
    adapters = make_adapters(unstacked)
    assert "blocks_1" in adapters.lora["encoder"]
    save_adapters(tmp_path / "a", adapters)
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (assets / "adapter" / name).read_bytes()
    chex.assert_trees_all_equal(load_adapters(tmp_path / "a", unstacked).lora, adapters.lora)


def test_what_cannot_be_saved_leaves_nothing(assets: Path, tmp_path: Path) -> None:
    adapters = load_adapters(assets / "adapter")
    name = "encoder/blocks/attention/value/b"
    flat = flatten_dict(adapters.lora, sep="/")
    for leaf, message in (
        (flat[name].at[1, 0, 0].set(jnp.nan), f"{name} holds values that are not finite"),
        (flat[name][:, :3], f"{name} has rank 3, the config says 4"),
        (flat[name].astype(jnp.bfloat16), f"{name} is bfloat16; it must be float32"),
    ):
        lora = unflatten_dict({**flat, name: leaf}, sep="/")
        with pytest.raises(InputError, match=message):
            save_adapters(tmp_path / "a", dataclasses.replace(adapters, lora=lora))
    with pytest.raises(InputError, match=r"base = \{\}; it must have encoder"):
        save_adapters(tmp_path / "a", dataclasses.replace(adapters, base={}))
    with pytest.raises(InputError, match="there are no adapters"):
        save_adapters(tmp_path / "a", dataclasses.replace(adapters, lora={}))
    assert listing(tmp_path) == []


# --- The base ------------------------------------------------------------------------------------


def test_the_hash_is_of_names_dtypes_shapes_and_values() -> None:
    params = random_params(Encoder(tiny_config(num_layers=12)))  # 10 is after 9, not after 1
    found = weights_sha256(params)
    assert weights_sha256(unstack_layers(params)) == found
    by_hand = hashlib.sha256()
    for name, leaf in sorted(flatten_dict(params, sep="/").items()):
        by_hand.update(f"{name} float32 {leaf.shape}\n".encode() + np.asarray(leaf).tobytes())
    assert found == by_hand.hexdigest()
    flat = flatten_dict(params, sep="/")
    name = "blocks/mlp/fc2/bias"
    for other in (
        {**flat, name: flat[name].at[11, 3].add(1e-3)},
        {**flat, name: flat[name][::-1]},
        {**flat, name: flat[name].astype(jnp.bfloat16)},
        {**flat, name: flat[name].reshape(6, -1)},
        {**{key: leaf for key, leaf in flat.items() if key != name}, "other": flat[name]},
    ):
        assert weights_sha256(unflatten_dict(other, sep="/")) != found


def test_merging_leaves_the_base_as_it_is(assets: Path) -> None:
    model = jvjepa.load(assets / "model")
    adapters = load_adapters(assets / "adapter", model.params)
    merged = merge_lora(model.params, adapters.lora)
    assert weights_sha256(model.params["encoder"]) == adapters.base["encoder"]
    assert weights_sha256(merged["encoder"]) != adapters.base["encoder"]


def test_other_parts_of_the_model_do_not_matter(assets: Path) -> None:
    """Adapters of the encoder still fit when a classifier is attached."""
    model = jvjepa.load(assets / "model")
    classifier = ClassifierConfig(labels=("a", "b"), num_layers=1, num_heads=2)
    config = ModelConfig(encoder=model.config.encoder, classifier=classifier)
    head = {
        tuple(name.split("/")): jnp.ones(shape)
        for name, shape in parameter_shapes(config).items()
        if name.startswith("classifier/")
    }
    params = {**model.params, **unflatten_dict(head)}
    lora = load_adapters(assets / "adapter", params).lora
    merged = merge_lora(params, lora)
    assert merged["classifier"]["linear"]["kernel"] is params["classifier"]["linear"]["kernel"]


def other_width(model: Model) -> Params:
    return {"encoder": random_params(Encoder(tiny_config(head_width=12, num_layers=2)))}


def deeper(model: Model) -> Params:
    return {"encoder": random_params(Encoder(tiny_config(num_layers=3)))}


def shallower(model: Model) -> Params:
    return {"encoder": random_params(Encoder(tiny_config(num_layers=1)))}


def other_weights(model: Model) -> Params:
    return {"encoder": random_params(model.encoder, seed=1)}


def other_dtype(model: Model) -> Params:
    return {"encoder": random_params(model.encoder.clone(param_dtype=jnp.bfloat16))}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (other_width, r"8 tensors do not fit: .*query/a has shape \[2, 48, 4\], \[2, 24, 4\]"),
        (deeper, r"8 tensors do not fit: .*query/b has shape \[2, 4, 48\], \[3, 4, 48\]"),
        (shallower, r"adapter does not fit the model: LoraConfig.layers = \(1,\); .* 0 to 0"),
        (other_weights, "adapter was trained on other weights: those of its encoder had the sha"),
        (other_dtype, "adapter was trained on other weights"),
    ],
)
def test_adapters_of_another_base_are_refused(
    assets: Path, other: Callable[[Model], Params], message: str
) -> None:
    params = other(jvjepa.load(assets / "model"))
    with pytest.raises(CheckpointError, match=message):
        load_adapters(assets / "adapter", params)
    with pytest.raises(CheckpointError, match=message):
        load_adapters(assets / "adapter", unstack_layers(params))


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    record = json.loads(path.read_text())
    record["lora"] |= values
    path.write_text(json.dumps(record))


def edit(folder: Path, name: str, leaf: np.ndarray | None) -> None:
    tensors = load_file(folder / FILES[0])
    if leaf is None:
        del tensors[name]
    else:
        tensors[name] = leaf
    save_file(tensors, folder / FILES[0])


QUERY_B = "encoder/blocks/attention/query/b"


@pytest.mark.parametrize("digest", [None, "", "0" * 63, "G" * 64, 3])
def test_a_base_is_a_digest(assets: Path, tmp_path: Path, digest: object) -> None:
    """Nothing stands for any weights."""
    folder = shutil.copytree(assets / "adapter", tmp_path / "adapter")
    record = json.loads((folder / "config.json").read_text())
    record["base"]["encoder"] = digest
    (folder / "config.json").write_text(json.dumps(record))
    message = f"config.json: base.encoder = {digest!r}; it must be a sha256 in hex"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_adapters(folder, jvjepa.load(assets / "model").params)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: change(f, rank=8), "key/a has rank 4, the config says 8"),
        (lambda f: change(f, rank=0), "config.json: LoraConfig.rank = 0"),
        (lambda f: change(f, bias=True), "config.json: .*unexpected keyword argument 'bias'"),
        (lambda f: change(f, targets=["encoder/x"]), "does not fit the model: .*'encoder/x' match"),
        (lambda f: change(f, layers=[0, 2]), "does not fit the model: .*layers = .0, 2."),
        (lambda f: edit(f, QUERY_B, None), "1 tensors do not fit: missing .*query/b"),
        (
            lambda f: edit(f, "encoder/blocks/mlp/fc1/a", np.ones((2, 48, 4), np.float32)),
            r"1 tensors do not fit: unexpected encoder/blocks/mlp/fc1/a \[2, 48, 4\]",
        ),
        (
            lambda f: edit(f, QUERY_B, np.ones((2, 4, 24), np.float32)),
            r"query/b has shape \[2, 4, 24\], \[2, 4, 48\] would be right",
        ),
        (
            lambda f: edit(f, QUERY_B, np.full((2, 4, 48), np.inf, np.float32)),
            "query/b holds values that are not finite",
        ),
        (
            lambda f: edit(f, QUERY_B, np.ones((2, 4, 48), np.float16)),
            "query/b is float16; it must be float32",
        ),
        (
            lambda f: edit(f, "encoder/norm/scale", np.ones((48,), np.float32)),
            r"encoder/norm/scale \[48\] is no factor a or b",
        ),
        (lambda f: (f / FILES[0]).unlink(), "adapters.safetensors does not exist"),
        (lambda f: (f / FILES[0]).write_bytes(b"x" * 30), "adapters.safetensors is not whole"),
        (lambda f: (f / FILES[1]).unlink(), "config.json does not exist; .* holds no adapters"),
        (lambda f: (f / FILES[1]).write_text("{"), "config.json is not JSON"),
        (lambda f: (f / FILES[1]).write_text("{}"), "config.json is not of format 'jvjepa-lora-1'"),
        (
            lambda f: (f / FILES[1]).write_text('{"format": "jvjepa-lora-1"}'),
            "config.json: lora = None, base = None; both must be objects",
        ),
    ],
)
def test_damaged_folders_are_refused(
    assets: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    for name in FILES:
        (tmp_path / name).write_bytes((assets / "adapter" / name).read_bytes())
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        jvjepa.load(assets / "model", lora=tmp_path)


def test_a_base_for_each_part_is_needed(assets: Path, tmp_path: Path) -> None:
    for name in FILES:
        (tmp_path / name).write_bytes((assets / "adapter" / name).read_bytes())
    record = json.loads((tmp_path / "config.json").read_text())
    record["base"] = {"predictor": record["base"]["encoder"]}
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"base has \['predictor'\], .* of \['encoder'\]"):
        load_adapters(tmp_path)


# --- jvjepa.load ---------------------------------------------------------------------------------


def test_load_merges(assets: Path) -> None:
    plain, adapted = (
        jvjepa.load(assets / "model", lora=lora) for lora in (None, assets / "adapter")
    )
    adapters = load_adapters(assets / "adapter", plain.params)
    chex.assert_trees_all_equal(adapted.params, merge_lora(plain.params, adapters.lora))
    unrolled = jvjepa.load(assets / "model", lora=assets / "adapter", scan=False)
    chex.assert_trees_all_close(
        unrolled.params, unstack_layers(adapted.params), rtol=1e-6, atol=1e-7
    )
    video = random_video(1, 6, 64, 64)
    worn = variables(plain.params["encoder"], adapters.lora["encoder"])
    run = jax.jit(functools.partial(plain.encoder.apply, window=2))
    right = run(worn, video)
    assert relative_error(run({"params": plain.params["encoder"]}, video), right) > 0.01
    for model in (adapted, unrolled):
        state = streaming.init_state(model.encoder, 1, 2)
        tubelets = video.reshape(1, 3, 2, 64, 64, 3).swapaxes(0, 1)
        params = model.params["encoder"]
        _, out = streaming.scan(model.encoder, params, state, tubelets, positions="absolute")
        found = np.swapaxes(out.tokens, 0, 1).reshape(1, 48, 48)
        assert relative_error(found, right) <= 1e-5


def test_merged_models_say_so_and_are_no_base(assets: Path, tmp_path: Path) -> None:
    model = jvjepa.load(assets / "model", lora=assets / "adapter")
    digest = hashlib.sha256((assets / "adapter" / FILES[0]).read_bytes()).hexdigest()
    assert model.source.lora == ({"name": str(assets / "adapter"), "sha256": digest},)
    jvjepa.save(tmp_path / "merged", model)
    assert jvjepa.load(tmp_path / "merged").source == model.source
    with pytest.raises(CheckpointError, match="was trained on other weights"):
        jvjepa.load(tmp_path / "merged", lora=assets / "adapter")


def test_everything_that_was_merged_is_recorded(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = jvjepa.load(assets / "model", lora=assets / "adapter")
    jvjepa.save(tmp_path / "once", model)
    save_adapters(tmp_path / "second", make_adapters(model.params, seed=1))
    assert run("lora", "merge", tmp_path / "once", tmp_path / "second", tmp_path / "twice") == 0
    lora = jvjepa.load(tmp_path / "twice").source.lora
    assert [one["name"] for one in lora] == [str(assets / "adapter"), str(tmp_path / "second")]
    assert lora[0] == model.source.lora[0]
    assert run("info", tmp_path / "twice") == 0
    shown = capfd.readouterr().out
    for one in lora:
        assert f"adapters merged: {one['name']}, sha256 {one['sha256']}\n" in shown


@pytest.mark.parametrize("of_old", [None, {"name": "a", "sha256": "0"}])
def test_old_records_of_adapters(
    assets: Path, tmp_path: Path, of_old: dict[str, str] | None
) -> None:
    shutil.copytree(assets / "model", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    record = json.loads(path.read_text())
    record["source"]["lora"] = of_old
    path.write_text(json.dumps(record))
    assert jvjepa.load(tmp_path / "model").source.lora == ((of_old,) if of_old else ())


def test_adapters_of_a_model_that_was_not_converted(assets: Path, tmp_path: Path) -> None:
    folder = commandline.save_tiny(tmp_path / "model")
    assert jvjepa.load(folder).source is None
    source = jvjepa.load(folder, lora=assets / "adapter").source
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert (source.name, source.sha256) == (str(folder), digest)
    assert [one["name"] for one in source.lora] == [str(assets / "adapter")]


# --- Commands ------------------------------------------------------------------------------------


def test_merge_and_embed(assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, adapter, scene = assets / "model", assets / "adapter", assets / "scene.mp4"
    merged = tmp_path / "merged"
    assert run("lora", "merge", model, adapter, merged) == 0
    text, errors = capfd.readouterr()
    assert text == f"wrote {merged}: {model} with {adapter} merged into it\n"
    assert errors == ""
    found = jvjepa.load(merged)
    expected = jvjepa.load(model, lora=adapter)
    chex.assert_trees_all_equal(found.params, expected.params)
    assert found.source == expected.source
    assert run("info", merged) == 0
    assert f"adapters merged: {adapter}, sha256 " in capfd.readouterr().out
    how = ("--num-frames", FRAMES_PER_CLIP, "--out")
    assert run("embed", model, scene, *how, tmp_path / "a.npz", "--lora", adapter) == 0
    assert run("embed", merged, scene, *how, tmp_path / "b.npz") == 0
    assert run("embed", model, scene, *how, tmp_path / "c.npz") == 0
    a, b, c = (load_npz(tmp_path / f"{name}.npz")["embedding"] for name in "abc")
    assert np.array_equal(a, b)
    assert relative_error(c, a) > 0.01
    assert f"{merged} exists" in refused(capfd, "lora", "merge", model, adapter, merged)
    assert run("lora", "merge", model, adapter, merged, "--force") == 0
    message = refused(capfd, "lora", "merge", merged, adapter, tmp_path / "twice")
    assert "was trained on other weights" in message
    assert listing(tmp_path) == ["a.npz", "b.npz", "c.npz", "merged"]


def test_info(assets: Path, capfd: pytest.CaptureFixture[str]) -> None:
    adapter = assets / "adapter"
    assert run("lora", "info", adapter) == 0
    first, base, *factors = capfd.readouterr().out.splitlines()
    assert first == f"{adapter}: rank 4, alpha 6, dropout 0.25, layers 1; 3,072 values"
    digest = weights_sha256(jvjepa.load(assets / "model").params["encoder"])
    assert base == f"trained on encoder weights with sha256 {digest}"
    assert len(factors) == 8
    assert f"  {QUERY_B} [2, 4, 48]" in factors
    message = refused(capfd, "lora", "info", assets / "model")
    assert "config.json is not of format 'jvjepa-lora-1'" in message


def test_new_adapters_saved_and_loaded_change_nothing(assets: Path, tmp_path: Path) -> None:
    params = jvjepa.load(assets / "model").params
    lora = init_lora(params, CONFIG, jax.random.key(0))
    base = base_sha256(params, lora)
    save_adapters(tmp_path / "new", Adapters(config=CONFIG, base=base, lora=lora))
    merged = jvjepa.load(assets / "model", lora=tmp_path / "new").params
    chex.assert_trees_all_equal(merged, dict(params))
