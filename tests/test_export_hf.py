import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hfcheckpoints import HFModel, save_checkpoint, tiny_config
from models import relative_error
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import (
    VJEPA2Config,
    VJEPA2ForVideoClassification,
    VJEPA2Model,
)

import jvjepa
from jvjepa import ClassifierConfig, EncoderConfig, ModelConfig, PredictorConfig
from jvjepa.config import ActionPredictorConfig
from jvjepa.convert import convert, export_hf, from_hf_config, to_hf_config
from jvjepa.convert.huggingface import DEFAULTS, TABLE, hf_entries
from jvjepa.convert.tables import expected_shapes
from jvjepa.errors import CheckpointError, ConfigError, InputError
from jvjepa.parameters import parameter_shapes
from jvjepa.registry import RELEASES

TINY = ModelConfig(
    encoder=EncoderConfig(hidden_size=48, num_layers=2, num_heads=2, mlp_dim=120, crop_size=64),
    predictor=PredictorConfig(hidden_size=32, num_layers=2, num_heads=2, mlp_dim=96),
    classifier=ClassifierConfig(labels=("a", "b", "c"), num_heads=2),
)


def hf_model(config: VJEPA2Config, classifier: bool) -> type[HFModel]:
    return VJEPA2ForVideoClassification if classifier else VJEPA2Model


# --- The table ----------------------------------------------------------------------------------


def test_every_parameter_has_one_row() -> None:
    assert sorted(row.ours for row in TABLE) == sorted(parameter_shapes(TINY))
    assert len({row.theirs for row in TABLE}) == len(TABLE)


HUB = [name for name, release in RELEASES.items() if not release.key]


@pytest.mark.parametrize("name", HUB)
def test_entries_are_the_tensors_of_every_release(name: str) -> None:
    release = RELEASES[name]
    config = VJEPA2Config.from_dict(to_hf_config(release.config, None))
    with torch.device("meta"):
        model = hf_model(config, release.config.classifier is not None)(config)
    theirs = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    ours = expected_shapes(hf_entries(release.config))
    assert ours == theirs
    assert len(ours) == len(hf_entries(release.config))
    assert sum(map(math.prod, ours.values())) == release.num_params["all"]


def test_every_transform_has_an_inverse() -> None:
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(TINY)
    for entry in hf_entries(TINY):
        theirs = rng.normal(size=entry.their_shape).astype(np.float32)
        ours = entry.transform.to_ours(theirs)
        assert ours.shape == shapes[entry.ours][0 if entry.layer is None else 1 :]
        back = entry.transform.to_theirs(ours, TINY.encoder)
        assert back.shape == theirs.shape
        assert back.tobytes() == theirs.tobytes()


# --- config.json --------------------------------------------------------------------------------


def test_the_defaults_are_those_of_transformers() -> None:
    theirs = VJEPA2Config()
    assert {key: getattr(theirs, key) for key in DEFAULTS} == DEFAULTS
    config = from_hf_config({"model_type": "vjepa2", "architectures": ["VJEPA2Model"]})
    assert config == RELEASES["vjepa2-vitl-fpc64-256"].config
    labelled = {"model_type": "vjepa2", "architectures": ["VJEPA2ForVideoClassification"]}
    classifier = from_hf_config(labelled).classifier
    assert classifier is not None
    assert dict(enumerate(classifier.labels)) == theirs.id2label
    assert len(from_hf_config({**labelled, "num_labels": 5}).classifier.labels) == 5


@pytest.mark.parametrize("name", HUB)
def test_configs_go_there_and_back(name: str) -> None:
    config = RELEASES[name].config
    assert from_hf_config(to_hf_config(config, None)) == config


def test_the_mlp_width_survives_every_ratio() -> None:
    assert (
        from_hf_config(
            hf_values(hidden_size=1408, num_attention_heads=22, mlp_ratio=48 / 11)
        ).encoder.mlp_dim
        == 6144
    )
    odd = 0
    for width in (*range(12, 400, 12), 1408, 1664):
        for mlp_dim in (*range(1, 500, 7), 6144, 8192, 8193):
            encoder = EncoderConfig(hidden_size=width, num_layers=1, num_heads=1, mlp_dim=mlp_dim)
            config = ModelConfig(encoder=encoder, predictor=PredictorConfig())
            values = to_hf_config(config, None)
            assert from_hf_config(values).encoder.mlp_dim == mlp_dim
            odd += int(width * (mlp_dim / width)) != mlp_dim
    assert odd > 0  # the plain quotient would not do


def hf_values(**changes: Any) -> dict[str, Any]:
    return {**to_hf_config(TINY, None), **changes}


def test_a_base_is_kept_word_for_word() -> None:
    base = {
        "transformers_version": "4.53.0",
        **hf_values(mlp_ratio=2.5000001, pred_mlp_ratio=3, image_size=64, torch_dtype="float32"),
    }
    del base["tubelet_size"]
    assert to_hf_config(TINY, base) == base
    assert list(to_hf_config(TINY, base)) == list(base)
    larger = ModelConfig(encoder=TINY.encoder, predictor=TINY.predictor)
    changed = to_hf_config(larger, base)
    assert changed == {**base, "architectures": ["VJEPA2Model"]}
    labels = ClassifierConfig(labels=("a", "x", "c"), num_heads=2)
    relabelled = ModelConfig(encoder=TINY.encoder, predictor=TINY.predictor, classifier=labels)
    changed = to_hf_config(relabelled, base)
    assert changed["id2label"] == {"0": "a", "1": "x", "2": "c"}
    assert changed["label2id"] == {"a": 0, "x": 1, "c": 2}


def test_labels_are_in_the_order_of_their_numbers() -> None:
    names = {str(i): f"n{i}" for i in sorted(range(12), key=str)}
    classifier = from_hf_config(hf_values(id2label=names)).classifier
    assert classifier is not None
    assert classifier.labels == tuple(f"n{i}" for i in range(12))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "vit"}, "model_type = 'vit'; it must be 'vjepa2'"),
        ({"hidden_act": "gelu_new"}, "hidden_act = 'gelu_new' is not supported; only 'gelu' is"),
        ({"qkv_bias": False}, "qkv_bias = False is not supported"),
        ({"in_chans": 1}, "in_chans = 1 is not supported"),
        ({"use_rope_interleave": True}, "use_rope_interleave = True is not supported"),
        ({"per_layer_config": {"0": {}}}, "per_layer_config = .* is not supported"),
        ({"architectures": None}, "architectures = None; it must be"),
        ({"architectures": ["VJEPA2Predictor"]}, "architectures = .'VJEPA2Predictor'.; it must"),
        ({"hidden_size": 0}, "hidden_size = 0; it must be"),
        ({"hidden_size": "48"}, "hidden_size = '48'; it must be"),
        ({"num_attention_heads": 5}, "num_heads = 5; it must be a divisor of the width 48"),
        ({"num_attention_heads": 16}, "num_heads = 16; it must be .* head width"),
        ({"crop_size": 72}, "crop_size = 72; it must be a multiple of patch_size = 16"),
        ({"patch_size": [16, 16]}, r"patch_size = \[16, 16\]; it must be a whole number"),
        ({"num_hidden_layers": -1}, "num_layers = -1"),
        ({"num_hidden_layers": True}, "num_layers = True"),
        ({"mlp_ratio": float("nan")}, "mlp_ratio = nan; it must be"),
        ({"mlp_ratio": 0.01}, "mlp_dim = 0"),
        ({"mlp_ratio": None}, "mlp_ratio = None"),
        ({"layer_norm_eps": 0}, "layer_norm_eps = 0"),
        ({"pred_num_mask_tokens": 0}, "num_mask_tokens = 0"),
        ({"num_pooler_layers": 0}, "num_layers = 0"),
        ({"id2label": {"0": "a", "2": "b"}}, r"id2label has the keys \['2'\]; the 2 .* 0 to 1"),
        ({"id2label": {"x": "a"}}, r"id2label has the keys \['x'\]"),
        ({"id2label": {}}, "labels = "),
        ({"id2label": {"0": 7}}, "labels = "),
        ({"id2label": ["a"]}, "id2label = .*; it must be an object"),
        ({"num_labels": 4}, "num_labels = 4, but id2label has 3 names"),
        ({"id2label": None, "num_labels": -1}, "num_labels = -1"),
    ],
)
def test_configs_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_hf_config(hf_values(**changes))


def test_what_their_code_cannot_run_is_not_exported() -> None:
    parts = {"encoder": TINY.encoder, "predictor": TINY.predictor}
    sizes = {"hidden_size": 48, "num_layers": 2, "num_heads": 2, "mlp_dim": 120}
    interleaved = EncoderConfig(**sizes, rope="interleaved")
    other_predictor = PredictorConfig(layer_norm_eps=1e-5)
    two_layers = ClassifierConfig(labels=("a",), num_heads=2, layers=(0, 1))
    four_heads = ClassifierConfig(labels=("a",), num_heads=4)
    other_eps = ClassifierConfig(labels=("a",), num_heads=2, layer_norm_eps=1e-5)
    shorter = ClassifierConfig(labels=("a",), num_heads=2, frames_per_clip=16)
    for changes, message in (
        ({"encoder": interleaved, "predictor": None}, "this is V-JEPA 2.1"),
        ({"action_predictor": ActionPredictorConfig()}, "this is V-JEPA 2-AC"),
        ({"predictor": other_predictor}, "layer_norm_eps = 1e-05: .* always the encoder's"),
        ({"classifier": two_layers}, r"layers = \(0, 1\): .* the last layer alone"),
        ({"predictor": None}, "there is no predictor"),
        ({"classifier": four_heads}, "num_heads = 4: .* always the encoder's, 2"),
        ({"classifier": other_eps}, "layer_norm_eps = 1e-05: .* always the encoder's"),
        ({"classifier": shorter}, "frames_per_clip = 16: .* always the encoder's, 64"),
    ):
        with pytest.raises(ConfigError, match=message):
            to_hf_config(ModelConfig(**{**parts, **changes}), None)
    same = ClassifierConfig(labels=("a",), num_heads=2, frames_per_clip=64)
    assert to_hf_config(ModelConfig(**parts, classifier=same), None)["frames_per_clip"] == 64


# --- export_hf ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("labels", [0, 11])
def test_the_round_trip_is_byte_equal(tmp_path: Path, labels: int, dtype: torch.dtype) -> None:
    config = tiny_config(head_width=24, labels=labels)
    hf = save_checkpoint(tmp_path / "first", config)
    hf.to(dtype).save_pretrained(tmp_path / "hf")
    convert(str(tmp_path / "hf"), tmp_path / "ours")
    report = export_hf(tmp_path / "ours", tmp_path / "back")

    theirs, back = (load_file(tmp_path / n / "model.safetensors") for n in ("hf", "back"))
    assert set(back) == set(theirs)
    for name, value in theirs.items():
        assert back[name].dtype == value.dtype
        assert back[name].shape == value.shape
        assert back[name].tobytes() == value.tobytes()
    first, second = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("hf", "back"))
    assert second == first
    assert list(second) == list(first)
    with safe_open(tmp_path / "back" / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
    assert report.parameters["encoder"] == sum(
        p.numel() for n, p in hf.named_parameters() if "encoder" in n
    )
    assert report.source is not None
    assert report.source.name == str(tmp_path / "hf")

    loaded, info = type(hf).from_pretrained(
        tmp_path / "back", output_loading_info=True, local_files_only=True
    )
    assert not any(info.values()), info
    assert loaded.dtype == dtype
    for name, value in hf.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    clip = torch.randn(1, 4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours, right = (model.eval().float()(clip).to_tuple()[0] for model in (loaded, hf))
    # The weights lie at other addresses, so that sums may be taken in another order.
    assert relative_error(ours.numpy(), right.numpy()) < 1e-5


def test_a_changed_dtype_is_written_down(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "hf", tiny_config())
    convert(str(tmp_path / "hf"), tmp_path / "ours", dtype="bfloat16")
    assert export_hf(tmp_path / "ours", tmp_path / "back").dtype == "bfloat16"
    first, second = (json.loads((tmp_path / n / "config.json").read_text()) for n in ("hf", "back"))
    assert second == {**first, "dtype": "bfloat16"}
    model = VJEPA2Model.from_pretrained(tmp_path / "back", local_files_only=True)
    assert model.dtype == torch.bfloat16


def test_changed_weights_and_saved_models_are_exported(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "hf", tiny_config())
    convert(str(tmp_path / "hf"), tmp_path / "ours")
    model = jvjepa.load(tmp_path / "ours")
    kernel = model.params["encoder"]["blocks"]["mlp"]["fc1"]["kernel"]
    model.params["encoder"]["blocks"]["mlp"]["fc1"]["kernel"] = kernel.at[1, 3, 5].set(7.0)
    jvjepa.save(tmp_path / "changed", model)
    export_hf(tmp_path / "changed", tmp_path / "back")
    theirs, back = (load_file(tmp_path / n / "model.safetensors") for n in ("hf", "back"))
    name = "encoder.layer.1.mlp.fc1.weight"
    assert back[name][5, 3] == 7.0
    assert {n for n in theirs if theirs[n].tobytes() != back[n].tobytes()} == {name}
    assert jnp.isfinite(kernel).all()


def test_the_preprocessor_comes_along(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "hf", tiny_config())
    values = {
        "video_processor_type": "VJEPA2VideoProcessor",
        "crop_size": {"height": 64, "width": 64},
        "size": {"shortest_edge": 73},
    }
    (tmp_path / "hf" / "video_preprocessor_config.json").write_text(json.dumps(values))
    convert(str(tmp_path / "hf"), tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "back")
    path = tmp_path / "back" / "video_preprocessor_config.json"
    assert json.loads(path.read_text()) == values


def test_bad_models_and_outs_are_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "hf", tiny_config())
    ours, back = tmp_path / "ours", tmp_path / "back"
    with pytest.raises(CheckpointError, match=r"hf/config\.json is not of format"):
        export_hf(tmp_path / "hf", back)
    with pytest.raises(CheckpointError, match=r"none/config\.json does not exist"):
        export_hf(tmp_path / "none", back)
    convert(str(tmp_path / "hf"), ours)
    with pytest.raises(InputError, match="hf exists"):
        export_hf(ours, tmp_path / "hf")
    record = json.loads((ours / "config.json").read_text())
    for part in ("encoder", "predictor"):
        record["model"][part]["rope"] = "interleaved"
    shutil.copytree(ours, tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"other/config\.json: rope = 'interleaved'"):
        export_hf(tmp_path / "other", back)
    weights = load_file(ours / "model.safetensors")
    scale = weights.pop("encoder/norm/scale")
    save_file(weights, ours / "model.safetensors")
    with pytest.raises(CheckpointError, match="missing encoder/norm/scale"):
        export_hf(ours, back)
    weights["encoder/norm/scale"] = scale.astype(np.float16)
    save_file(weights, ours / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has dtypes \['F16', 'F32'\]"):
        export_hf(ours, back)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "other", "ours"]
