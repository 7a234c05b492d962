import hashlib
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hfcheckpoints import HFModel, save_checkpoint, tiny_config
from safetensors.numpy import load_file, save_file

import jvjepa
from jvjepa.convert import convert
from jvjepa.errors import CheckpointError, ConfigError, InputError

LABELS = 11  # so that the order of numbers is not the order of letters


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, HFModel]:
    folder = tmp_path_factory.mktemp("hf") / "classifier"
    return folder, save_checkpoint(folder, tiny_config(head_width=24, labels=LABELS))


@pytest.fixture(scope="module")
def original(made: tuple[Path, HFModel]) -> Path:
    """A classifier's folder; read only."""
    return made[0]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An encoder's folder to damage, in a folder of its own."""
    folder = tmp_path / "in" / "hf"
    save_checkpoint(folder, tiny_config(layers=2))
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where to convert to, in a folder that holds nothing else."""
    (tmp_path / "to").mkdir()
    return tmp_path / "to" / "out"


def nothing_there(out: Path) -> bool:
    return list(out.parent.iterdir()) == []


def edit_weights(folder: Path, edit: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


# --- What is written ----------------------------------------------------------------------------


def test_weights_arrive_where_they_belong(made: tuple[Path, HFModel], out: Path) -> None:
    folder, hf = made
    report = convert(str(folder), out)
    ours = load_file(out / "model.safetensors")
    theirs = {name: value.numpy() for name, value in hf.state_dict().items()}
    for layer in range(2):
        prefix = f"vjepa2.encoder.layer.{layer}"
        for name in ("query", "key", "value", "proj"):
            kernel = ours[f"encoder/blocks/attention/{name}/kernel"][layer]
            bias = ours[f"encoder/blocks/attention/{name}/bias"][layer]
            np.testing.assert_array_equal(kernel, theirs[f"{prefix}.attention.{name}.weight"].T)
            np.testing.assert_array_equal(bias, theirs[f"{prefix}.attention.{name}.bias"])
        norm = ours["encoder/blocks/norm2/scale"][layer]
        np.testing.assert_array_equal(norm, theirs[f"{prefix}.norm2.weight"])
        fc1 = ours["predictor/blocks/mlp/fc1/kernel"][layer]
        np.testing.assert_array_equal(
            fc1, theirs[f"vjepa2.predictor.layer.{layer}.mlp.fc1.weight"].T
        )
    tokens = theirs["vjepa2.predictor.embeddings.mask_tokens"]
    np.testing.assert_array_equal(ours["predictor/mask_tokens"], tokens.reshape(4, 32))
    pooler = "classifier/pooler"
    np.testing.assert_array_equal(ours[f"{pooler}/query_tokens"], theirs["pooler.query_tokens"][0])
    query = theirs["pooler.cross_attention_layer.cross_attn.q_proj.weight"]
    np.testing.assert_array_equal(ours[f"{pooler}/cross_attention/attention/query/kernel"], query.T)
    out_proj = theirs["pooler.self_attention_layers.2.self_attn.out_proj.weight"]
    np.testing.assert_array_equal(ours[f"{pooler}/blocks/attention/proj/kernel"][2], out_proj.T)
    np.testing.assert_array_equal(ours["classifier/linear/kernel"], theirs["classifier.weight"].T)
    assert sum(report.parameters.values()) == sum(p.numel() for p in hf.parameters())
    assert set(report.parameters) == {"encoder", "predictor", "classifier"}
    assert report.num_bytes == (out / "model.safetensors").stat().st_size
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]
    first, *parts, last = str(report).splitlines()
    assert first.startswith(f"{out}: 252,")
    assert first.endswith(" parameters, float32, 1.0 MB")
    assert parts[1] == "  predictor: 24,592 parameters"
    assert last == f"  from {folder}, sha256 {report.source.sha256}"


def test_the_patch_kernel_is_the_convolution(made: tuple[Path, HFModel], out: Path) -> None:
    folder, hf = made
    convert(str(folder), out)
    model = jvjepa.load(out)
    clip = np.random.default_rng(0).normal(size=(1, 4, 64, 64, 3)).astype(np.float32)
    ours = model.encoder.apply({"params": model.params["encoder"]}, clip, method="embed_patches")
    with torch.inference_mode():
        theirs = hf.vjepa2.encoder.embeddings(torch.from_numpy(clip).permute(0, 1, 4, 2, 3))
    np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-5)


def test_the_record_says_where_it_came_from(original: Path, out: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(original, folder)
    preprocessor = {"crop_size": {"height": 64, "width": 64}, "do_resize": True}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(preprocessor))
    (folder / "preprocessor_config.json").write_text('{"older": true}')
    report = convert(str(folder), out)
    model = jvjepa.load(out)
    assert model.source == report.source
    assert model.source is not None
    assert model.source.name == str(folder)
    assert model.source.revision == ""
    assert model.source.converter == jvjepa.__version__
    assert model.source.config == json.loads((folder / "config.json").read_text())
    assert model.source.preprocessor == preprocessor
    content = (folder / "model.safetensors").read_bytes()
    assert model.source.sha256 == hashlib.sha256(content).hexdigest()
    assert model.config.classifier is not None
    assert model.config.classifier.labels == tuple(f"Doing thing {i}" for i in range(LABELS))
    assert model.config.classifier.num_heads == model.config.encoder.num_heads == 2
    assert model.config.encoder.mlp_dim == 120


@pytest.mark.parametrize("index", [True, False])
def test_shards_are_the_same_as_one_file(
    made: tuple[Path, HFModel], out: Path, tmp_path: Path, index: bool
) -> None:
    folder, hf = made
    hf.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 3
    if not index:
        (tmp_path / "shards" / "model.safetensors.index.json").unlink()
    report = convert(str(tmp_path / "shards"), out)
    convert(str(folder), out.with_name("single"))
    assert report.source is not None
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in shards))
    assert report.source.sha256 == digest.hexdigest()
    ours, single = (load_file(out.with_name(n) / "model.safetensors") for n in ("out", "single"))
    assert {k: v.tobytes() for k, v in ours.items()} == {k: v.tobytes() for k, v in single.items()}


# --- dtype --------------------------------------------------------------------------------------


def saved_as(hf: HFModel, folder: Path, dtype: torch.dtype) -> Path:
    state = {name: value.to(dtype) for name, value in hf.state_dict().items()}
    hf.save_pretrained(folder, state_dict=state)
    return folder


def test_float32_can_be_rounded_to_bfloat16(made: tuple[Path, HFModel], out: Path) -> None:
    assert convert(str(made[0]), out, dtype="bfloat16").dtype == "bfloat16"
    ours = load_file(out / "model.safetensors")
    assert {value.dtype for value in ours.values()} == {np.dtype(ml_dtypes.bfloat16)}
    name = "encoder.layer.1.mlp.fc2.weight"
    theirs = made[1].vjepa2.state_dict()[name].bfloat16().float().numpy()
    rounded = ours["encoder/blocks/mlp/fc2/kernel"][1].astype(np.float32)
    np.testing.assert_array_equal(rounded, theirs.T)


def test_bfloat16_is_kept(made: tuple[Path, HFModel], out: Path, tmp_path: Path) -> None:
    folder = saved_as(made[1], tmp_path / "hf", torch.bfloat16)
    assert convert(str(folder), out).dtype == "bfloat16"
    assert convert(str(folder), out.with_name("wide"), dtype="float32").dtype == "float32"
    ours, wide = (load_file(out.with_name(n) / "model.safetensors") for n in ("out", "wide"))
    for name, value in ours.items():
        np.testing.assert_array_equal(value.astype(np.float32), wide[name])


def test_float16_needs_a_dtype(made: tuple[Path, HFModel], out: Path, tmp_path: Path) -> None:
    folder = saved_as(made[1], tmp_path / "hf", torch.float16)
    with pytest.raises(InputError, match=r"float16 .* --dtype, one of float32, bfloat16"):
        convert(str(folder), out)
    assert nothing_there(out)
    convert(str(folder), out, dtype="float32")
    theirs = load_file(folder / "model.safetensors")["classifier.weight"]
    ours = load_file(out / "model.safetensors")["classifier/linear/kernel"]
    np.testing.assert_array_equal(ours, theirs.T.astype(np.float32))


def test_mixed_dtypes_need_a_dtype(source: Path, out: Path) -> None:
    name = "encoder.layernorm.bias"
    edit_weights(source, lambda t: t.update({name: t[name].astype(ml_dtypes.bfloat16)}))
    with pytest.raises(InputError, match=rf"bfloat16 \({name}\).*--dtype"):
        convert(str(source), out)
    assert convert(str(source), out, dtype="float32").dtype == "float32"


@pytest.mark.parametrize("dtype", [np.float64, np.int32])
def test_other_dtypes_are_refused(source: Path, out: Path, dtype: type) -> None:
    name = "encoder.layernorm.bias"
    edit_weights(source, lambda t: t.update({name: t[name].astype(dtype)}))
    with pytest.raises(CheckpointError, match=rf"model.safetensors: {name} is [FI]"):
        convert(str(source), out, dtype="float32")
    with pytest.raises(ConfigError, match="dtype = 'float16'"):
        convert(str(source), out, dtype="float16")


# --- Bad input ----------------------------------------------------------------------------------


def test_one_error_lists_everything_that_does_not_fit(source: Path, out: Path) -> None:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        del tensors["encoder.layernorm.bias"]
        del tensors["predictor.proj.weight"]
        tensors["encoder.layernorm.bia"] = np.zeros(3, np.float32)
        tensors["encoder.layer.2.norm1.weight"] = np.zeros(64, np.float32)
        tensors["encoder.layer.0.mlp.fc1.weight"] = np.zeros((64, 160), np.float32)

    edit_weights(source, edit)
    with pytest.raises(CheckpointError) as caught:
        convert(str(source), out)
    message = str(caught.value)
    assert str(source) in message
    assert "5 tensors do not fit" in message
    assert "missing encoder.layernorm.bias [64]" in message
    assert "missing predictor.proj.weight [64, 32]" in message
    assert "unexpected encoder.layernorm.bia [3] (like encoder.layernorm.bias?)" in message
    assert "unexpected encoder.layer.2.norm1.weight [64]" in message
    assert "encoder.layer.0.mlp.fc1.weight has shape [64, 160], [160, 64] would be" in message
    assert nothing_there(out)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(source: Path, out: Path, value: float) -> None:
    name = "predictor.layer.1.mlp.fc2.weight"
    edit_weights(source, lambda t: np.put(t[name], 5, value))
    with pytest.raises(CheckpointError, match=rf"{name} holds values that are not finite"):
        convert(str(source), out)
    assert nothing_there(out)


def test_values_too_large_for_bfloat16_are_refused(source: Path, out: Path) -> None:
    name = "encoder.layernorm.weight"
    edit_weights(source, lambda t: np.put(t[name], 5, np.finfo(np.float32).max))
    with pytest.raises(CheckpointError, match=rf"{name} holds .* not finite in bfloat16"):
        convert(str(source), out, dtype="bfloat16")


def test_damaged_weight_files_are_named(source: Path, out: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not whole"):
        convert(str(source), out)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        convert(str(source), out)
    assert nothing_there(out)


def test_a_tensor_in_two_files_is_refused(source: Path, out: Path) -> None:
    twice = {"encoder.layernorm.bias": np.zeros(64, np.float32)}
    save_file(twice, source / "more.safetensors")
    with pytest.raises(
        CheckpointError, match=r"layernorm\.bias is in .*model\.s.* in .*more\.safetensors"
    ):
        convert(str(source), out)


@pytest.mark.parametrize("edit", ["shard gone", "shard extra", "moved", "unlisted", "phantom"])
def test_an_index_that_does_not_agree_is_refused(tmp_path: Path, out: Path, edit: str) -> None:
    save_checkpoint(tmp_path / "hf", tiny_config(), shard_size="100KB")
    path = tmp_path / "hf" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first, *_, last = sorted(set(index["weight_map"].values()))
    name = next(key for key, file in index["weight_map"].items() if file == last)
    if edit == "shard gone":
        (tmp_path / "hf" / last).unlink()
        message = f"{last} is missing"
    elif edit == "shard extra":
        save_file({"x": np.zeros(1)}, tmp_path / "hf" / "extra.safetensors")
        message = "extra.safetensors is not in it; x is not in it"
    elif edit == "moved":
        index["weight_map"][name] = first
        message = f"{name} is not in {first}"
    elif edit == "unlisted":
        del index["weight_map"][name]
        message = f"{name} is not in it"
    else:
        index["weight_map"]["phantom"] = last
        message = f"phantom is not in {last}"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(str(tmp_path / "hf"), out)
    assert str(path) in str(caught.value)
    path.write_text('{"weight_map": ["a"]}')
    with pytest.raises(CheckpointError, match="has no object 'weight_map'"):
        convert(str(tmp_path / "hf"), out)


def test_folders_without_a_readable_config_are_refused(source: Path, out: Path) -> None:
    path = source / "config.json"
    for content, message in (
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ('{"format": "jvjepa-1"}', "is converted already"),
        ('{"model_type": "vit"}', "model_type = 'vit'; it must be 'vjepa2'"),
    ):
        path.write_text(content)
        with pytest.raises(InputError, match=message) as caught:
            convert(str(source), out)
        assert str(path) in str(caught.value)
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        convert(str(source), out)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"config\.json does not exist; SOURCE must be"):
        convert(str(source), out)
    empty = source.parent / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match=r"empty/config\.json does not exist"):
        convert(str(empty), out)
    assert nothing_there(out)


def test_a_wrong_config_is_refused_with_its_file(source: Path, out: Path) -> None:
    edit_config(source, hidden_size=0)
    with pytest.raises(ConfigError, match=r"config\.json: hidden_size = 0; it must be"):
        convert(str(source), out)
    edit_config(source, hidden_size=64, num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"missing encoder\.layer\.2\.norm1\.weight"):
        convert(str(source), out)
    edit_config(source, architectures=["VJEPA2ForVideoClassification"], num_hidden_layers=2)
    with pytest.raises(CheckpointError, match=r"missing vjepa2\.encoder"):
        convert(str(source), out)


# --- OUT ----------------------------------------------------------------------------------------


def test_out_is_replaced_only_with_force(original: Path, out: Path) -> None:
    out.mkdir()
    for name in ("mine.txt", "model.safetensors"):
        (out / name).write_text("mine")
    with pytest.raises(InputError, match=r"out exists; .* --force"):
        convert("no/such/source", out)  # said before anything is looked up
    assert sorted(path.name for path in out.iterdir()) == ["mine.txt", "model.safetensors"]
    convert(str(original), out, force=True)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    with pytest.raises(InputError, match="nowhere is not a folder"):
        convert(str(original), out / "nowhere" / "out")


def test_out_may_not_be_the_source(source: Path) -> None:
    (source.parent / "model.safetensors").touch()  # else it is no folder to be replaced anyway
    before = sorted(path.name for path in source.iterdir())
    for out in (source, source.parent, source / ".." / "hf"):
        with pytest.raises(InputError, match=r"(is|holds) the source"):
            convert(str(source), out, force=True)
    assert sorted(path.name for path in source.iterdir()) == before


@pytest.mark.parametrize("exists", [False, True])
def test_an_interrupted_conversion_leaves_out_alone(
    original: Path, out: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    if exists:
        out.mkdir()
        (out / "model.safetensors").write_text("mine")
    real, calls = np.isfinite, []

    def interrupt(value: np.ndarray) -> np.ndarray:
        calls.append(value.shape)
        if len(calls) == 20:
            partial = [path for path in out.parent.iterdir() if path != out]
            assert len(partial) == 1  # it was writing
            raise KeyboardInterrupt
        return real(value)

    monkeypatch.setattr(np, "isfinite", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(str(original), out, force=True)
    assert len(calls) == 20
    if exists:
        assert (out / "model.safetensors").read_text() == "mine"
        shutil.rmtree(out)
    assert nothing_there(out)


SCRIPT = """
import resource, sys, time
import numpy as np
from jvjepa.convert import convert
source, out, how = sys.argv[1:]
if how == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
else:
    real = np.isfinite
    def slow(value):
        print("writing", flush=True)
        time.sleep(1)
        return real(value)
    np.isfinite = slow
convert(source, out)
"""


def test_a_full_disk_leaves_nothing(original: Path, out: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, original, out, "full"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "OSError: [Errno 27]" in done.stderr
    assert nothing_there(out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing(original: Path, out: Path, number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, original, out, "slow"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        assert not nothing_there(out)
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert process.returncode != 0
    assert nothing_there(out)
    assert "━" not in errors.decode()  # no progress bar where stderr is no terminal
