"""Meta's `.pt` files: what arrives, which encoder is taken, and what is refused."""

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import official
import pytest
import torch
from models import relative_error

import jvjepa
from jvjepa.config import ModelConfig
from jvjepa.convert import Hints, attach_probe, convert, export_hf, verify
from jvjepa.convert.architecture import infer
from jvjepa.convert.meta import DROPPED, TABLE, meta_entries
from jvjepa.convert.tables import expected_shapes
from jvjepa.encoder import concatenate_levels
from jvjepa.errors import CheckpointError, ConfigError, InputError
from jvjepa.parameters import parameter_shapes
from jvjepa.registry import RELEASES
from jvjepa.weights import read_record

GOLDEN = official.GOLDEN
HINTS = Hints(heads=2, predictor_heads=2, crop_size=64)
LABELS = tuple("abcdefg")
FILES = {
    "vjepa2_tiny": (dataclasses.replace(official.V2, classifier=None, action_predictor=None)),
    "vjepa2_1_tiny_teacher": official.TEACHER,
    "vjepa2_1_tiny_distilled": official.DISTILLED,
    "vjepa2_ac_tiny": (dataclasses.replace(official.V2, classifier=None, predictor=None)),
}
KEYS = {"vjepa2_1_tiny_distilled": "ema_encoder", "vjepa2_ac_tiny": "encoder"}


def without_clip_length(config: ModelConfig) -> ModelConfig:
    """A `.pt` file does not say how many frames it was trained on."""
    return dataclasses.replace(
        config, encoder=dataclasses.replace(config.encoder, frames_per_clip=64)
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every golden file converted, and a probe attached; read only."""
    folder = tmp_path_factory.mktemp("meta")
    for name in FILES:
        convert(str(GOLDEN / f"{name}.pt"), folder / name, hints=HINTS)
    attach_probe(
        GOLDEN / "vjepa2_tiny_probe.pt",
        folder / "vjepa2_tiny",
        folder / "probe",
        labels=LABELS,
        heads=2,
    )
    return folder


# --- What arrives -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_every_weight_arrives_where_it_belongs(made: Path, name: str) -> None:
    model = jvjepa.load(made / name)
    assert model.config == without_clip_length(FILES[name])
    key = KEYS.get(name, "target_encoder")
    right = {"encoder": official.encoder(official.weights(f"{name}.pt", key))}
    theirs = official.weights(f"{name}.pt", "predictor")
    if name == "vjepa2_ac_tiny":
        right["action_predictor"] = official.action_predictor(theirs)
    else:
        right["predictor"] = official.predictor(theirs)
    jax.tree.map(np.testing.assert_array_equal, model.params, right)
    assert model.source is not None
    assert model.source.keys["encoder"] == key
    assert len(model.source.sha256) == 64


def test_the_whole_way_from_a_file_to_metas_outputs(made: Path) -> None:
    model, data = jvjepa.load(made / "probe"), official.data("vjepa2_tiny")
    params = {part: {"params": model.params[part]} for part in model.params}
    video = official.video(data["in.video"])
    tokens = model.encoder.apply(params["encoder"], video)
    assert relative_error(tokens, data["out.video"]) <= 1e-5
    logits = model.classifier.apply(params["classifier"], tokens)
    assert relative_error(logits, data["out.logits"]) <= 1e-5
    ids = [jnp.asarray(data[f"in.masks_{x}"], jnp.int32) for x in "xy"]
    context = model.encoder.apply(params["encoder"], video, ids[0])
    out = model.predictor.apply(params["predictor"], context, *ids, (4, 4, 4), mask_index=0)
    assert relative_error(out.targets, data["out.pred_m0"]) <= 1e-5


@pytest.mark.parametrize("name", ["vjepa2_1_tiny_teacher", "vjepa2_1_tiny_distilled"])
def test_the_whole_way_of_2_1(made: Path, name: str) -> None:
    model, data = jvjepa.load(made / name, scan=False), official.data(name)
    encoder, predictor = ({"params": model.params[x]} for x in ("encoder", "predictor"))
    ids = [jnp.asarray(data[f"in.image_masks_{x}"], jnp.int32) for x in "xy"]
    image = official.video(data["in.image"])
    levels = model.encoder.apply(encoder, image, ids[0], method="levels")
    context = concatenate_levels(levels[-model.config.predictor.num_levels :])
    how = {"mask_index": 0, "modality": "image"}
    out = model.predictor.apply(predictor, context, *ids, (1, 4, 4), **how)
    assert relative_error(out.targets, data["out.image_pred"]) <= 1e-5
    assert relative_error(out.context, data["out.image_pred_context"]) <= 1e-5


def test_what_is_left_out_is_named_with_a_reason(made: Path) -> None:
    _, source = read_record(made / "vjepa2_tiny")
    assert set(source.dropped) == {"encoder.pos_embed", "predictor.predictor_pos_embed"}
    _, source = read_record(made / "vjepa2_ac_tiny")
    extrinsics = "action_predictor.extrinsics_encoder"
    assert set(source.dropped) == {f"{extrinsics}.weight", f"{extrinsics}.bias"}
    assert all(len(reason) > 20 for reason in DROPPED.values())
    _, source = read_record(made / "vjepa2_1_tiny_teacher")
    assert source.dropped == {}


def test_the_probe_keeps_the_encoder_byte_by_byte(made: Path) -> None:
    before, after = jvjepa.load(made / "vjepa2_tiny"), jvjepa.load(made / "probe")
    for part in ("encoder", "predictor"):
        jax.tree.map(np.testing.assert_array_equal, before.params[part], after.params[part])
    right = official.classifier(official.weights("vjepa2_tiny_probe.pt", "classifiers", 0))
    jax.tree.map(np.testing.assert_array_equal, after.params["classifier"], right)
    assert after.config.classifier == official.V2.classifier
    assert before.source.sha256 == after.source.sha256
    assert after.source.probe.keys == {"classifier": "classifiers[0]"}


def test_an_exported_file_is_hugging_faces(made: Path, tmp_path: Path) -> None:
    from transformers import VJEPA2Model

    export_hf(made / "vjepa2_tiny", tmp_path / "hf")
    data = official.data("vjepa2_tiny")
    video = torch.from_numpy(np.moveaxis(data["in.video"], 1, 2).copy())
    with torch.inference_mode():
        tokens = VJEPA2Model.from_pretrained(tmp_path / "hf")(video, skip_predictor=True)
    assert relative_error(tokens.last_hidden_state.numpy(), data["out.video"]) <= 1e-5
    convert(str(tmp_path / "hf"), tmp_path / "back")
    jax.tree.map(
        np.testing.assert_array_equal,
        jvjepa.load(tmp_path / "back").params,
        jvjepa.load(made / "vjepa2_tiny").params,
    )


@pytest.mark.parametrize("name", [*FILES, "probe"])
def test_verify(made: Path, name: str) -> None:
    file, probe = (name, None)
    if name == "probe":
        file, probe = "vjepa2_tiny", GOLDEN / "vjepa2_tiny_probe.pt"
    checks = verify(made / name, str(GOLDEN / f"{file}.pt"), probe=probe)
    assert [check.name for check in checks if not check.ok] == []
    names = [check.name for check in checks]
    assert {"encoder, weights", "encoder", "encoder, masked"} <= set(names)
    oracles = {check.detail.rpartition("against ")[2] for check in checks if check.tolerance}
    assert any("transformers" in oracle for oracle in oracles) == (file == "vjepa2_tiny")
    more = {
        "vjepa2_tiny": {"predictor"},
        "vjepa2_1_tiny_teacher": {"predictor, image", "predictor, video, seen tokens"},
        "vjepa2_1_tiny_distilled": {"encoder, levels", "predictor, image, seen tokens"},
        "vjepa2_ac_tiny": {"action predictor", "action_predictor, weights"},
        "probe": {"classifier", "classifier, weights"},
    }
    assert more[name] <= set(names)


def test_verify_finds_another_encoder(made: Path, tmp_path: Path) -> None:
    path = str(GOLDEN / "vjepa2_tiny.pt")
    convert(path, tmp_path / "online", key="encoder", hints=HINTS)
    assert all(check.ok for check in verify(tmp_path / "online", path))
    record = json.loads((tmp_path / "online" / "config.json").read_text())
    record["source"]["keys"]["encoder"] = "target_encoder"
    (tmp_path / "online" / "config.json").write_text(json.dumps(record))
    failed = [check.name for check in verify(tmp_path / "online", path) if not check.ok]
    assert failed[0] == "encoder, weights"
    assert "encoder, masked" in failed
    assert "predictor" not in failed


def test_verify_asks_for_the_probe(made: Path, tmp_path: Path) -> None:
    source = str(GOLDEN / "vjepa2_tiny.pt")
    trained = shutil.copytree(made / "probe", tmp_path / "trained")
    record = json.loads((trained / "config.json").read_text())
    record["source"]["probe"] |= {"name": "jvjepa.train.probe", "keys": {}}
    (trained / "config.json").write_text(json.dumps(record))
    for probe in (None, GOLDEN / "vjepa2_tiny_probe.pt"):
        with pytest.raises(InputError, match=r"train\.probe, which has no PyTorch original"):
            verify(trained, source, probe=probe)
    with pytest.raises(InputError, match=r"vjepa2_tiny_probe\.pt; give it with --probe"):
        verify(made / "probe", source)
    with pytest.raises(InputError, match="was made without a probe"):
        verify(made / "vjepa2_tiny", source, probe=GOLDEN / "vjepa2_tiny_probe.pt")


# --- The table and the architecture -------------------------------------------------------------


def test_the_table_fills_every_parameter_of_every_release() -> None:
    for release in RELEASES.values():
        names = set(parameter_shapes(release.config))
        assert names <= {row.ours for row in TABLE}
    ours = [row.ours for row in TABLE]
    assert len(ours) == len(set(ours))


@pytest.mark.parametrize("name", [name for name, release in RELEASES.items() if release.key])
def test_every_released_file_is_known_by_its_shapes(name: str) -> None:
    release = RELEASES[name]
    shapes = expected_shapes(meta_entries(release.config))
    file = Path(release.source.rpartition("/")[2])
    assert infer(file, shapes, Hints()) == release.config
    if "giant" in name and release.config.encoder.rope == "tiled":
        # By any other name a ViT-g could have been trained for 256 or 384 pixels.
        with pytest.raises(InputError, match=r"--crop-size; released with .* \[256, 384\]"):
            infer(Path("mine.pt"), shapes, Hints())
        hints = Hints(crop_size=release.config.crop_size)
        assert infer(Path("mine.pt"), shapes, hints) == release.config
    else:
        assert infer(Path("mine.pt"), shapes, Hints()) == release.config


def test_a_released_name_is_not_for_another_model() -> None:
    shapes = expected_shapes(meta_entries(RELEASES["vjepa2_vit_large"].config))
    with pytest.raises(CheckpointError, match=r"vith\.pt is called as a released file and is"):
        infer(Path("vith.pt"), shapes, Hints())


@pytest.mark.parametrize("name", [name for name, release in RELEASES.items() if release.key])
def test_hints_may_not_contradict_a_released_name(name: str) -> None:
    release = RELEASES[name]
    shapes = expected_shapes(meta_entries(release.config))
    file = Path(release.source.rpartition("/")[2])
    predictor = release.config.predictor or release.config.action_predictor
    right = {"heads": release.config.encoder.num_heads, "crop_size": release.config.crop_size}
    right["predictor_heads"] = predictor.num_heads
    assert infer(file, shapes, Hints(**right)) == release.config
    for hint, value in right.items():
        option = f"--{hint.replace('_', '-')}"
        message = f"{file} is called as a released file, for which {option} {value} is right and "
        with pytest.raises(CheckpointError, match=f"{message}{2 * value} is not; give another"):
            infer(file, shapes, Hints(**{hint: 2 * value}))


@pytest.mark.parametrize("name", ["heads", "predictor_heads", "crop_size"])
@pytest.mark.parametrize("value", [0, -2, 2.5, True])
def test_hints_are_whole_numbers_above_0(name: str, value: float) -> None:
    message = rf"Hints\.{name} = {value}; it must be a whole number above 0"
    with pytest.raises(ConfigError, match=message):
        Hints(**{name: value})


def test_what_shapes_do_not_say_must_be_said() -> None:
    path = str(GOLDEN / "vjepa2_tiny.pt")
    for hints, message in (
        (Hints(), "attention heads of an encoder of width 32, .* --heads"),
        (Hints(heads=2), "which size of input .* --crop-size$"),
        (Hints(heads=2, crop_size=64), "heads of a predictor of width 24, .* --predictor-heads"),
        (Hints(heads=5, crop_size=64, predictor_heads=2), "num_heads = 5; .* divisor of .* 32"),
        (Hints(heads=2, crop_size=65, predictor_heads=2), "crop_size = 65"),
    ):
        with pytest.raises(InputError, match=message):
            convert(path, "never", hints=hints)
    assert not Path("never").exists()


# --- Files that are changed ---------------------------------------------------------------------


def changed(path: Path, name: str, change: Callable[[dict[str, Any]], None]) -> str:
    """A golden file with something changed."""
    content = torch.load(GOLDEN / f"{name}.pt", weights_only=True)
    change(content)
    torch.save(content, path / "changed.pt")
    return str(path / "changed.pt")


def refused(source: str, out: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        convert(source, out, **{"hints": HINTS, **options})
    assert not out.exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_keys(tmp_path: Path) -> None:
    tiny, out = str(GOLDEN / "vjepa2_tiny.pt"), tmp_path / "out"
    assert "has no 'ema_encoder'; --key may be target_encoder, encoder" in refused(
        tiny, out, key="ema_encoder"
    )
    only = changed(tmp_path, "vjepa2_tiny", lambda content: content.pop("target_encoder"))
    assert "only the online encoder" in refused(only, out)
    convert(only, out, key="encoder", hints=HINTS)
    shutil.rmtree(out)

    def both(content: dict[str, Any]) -> None:
        content["ema_encoder"] = content["encoder"]

    message = refused(changed(tmp_path, "vjepa2_tiny", both), out)
    assert "both target_encoder and ema_encoder" in message
    none = changed(tmp_path, "vjepa2_tiny", lambda content: content.pop("encoder"))
    assert "'target_encoder'; --key may be" not in refused(none, out, key="encoder")
    no_encoder = str(GOLDEN / "vjepa2_tiny_probe.pt")
    assert "is a probe without an encoder; attach it" in refused(no_encoder, out)


def test_an_encoder_alone_has_no_predictor(tmp_path: Path) -> None:
    alone = changed(tmp_path, "vjepa2_tiny", lambda content: content.pop("predictor"))
    report = convert(alone, tmp_path / "out", hints=HINTS)
    assert set(report.parameters) == {"encoder"}
    assert jvjepa.load(tmp_path / "out").predictor is None


PREFIX = "module.backbone."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["target_encoder"].pop(f"{PREFIX}blocks.2.attn.qkv.bias"), "missing encoder.b"),
        (
            lambda c: c["target_encoder"].update({f"{PREFIX}cls_token": torch.ones(1, 1, 32)}),
            r"unexpected encoder\.cls_token \[1, 1, 32\]",
        ),
        (
            lambda c: c["target_encoder"].update({f"{PREFIX}norm.weight": torch.ones(31)}),
            r"encoder\.norm\.weight has shape \[31\], \[32\] would be right",
        ),
        (
            lambda c: c["predictor"].pop(f"{PREFIX}mask_tokens.4"),
            r"missing predictor\.mask_tokens\.4 \[1, 1, 24\]",
        ),
        (
            lambda c: c["target_encoder"].update({"norm.weight": torch.ones(32)}),
            "target_encoder holds norm.weight twice",
        ),
        (
            lambda c: c["target_encoder"][f"{PREFIX}norm.weight"].fill_(float("nan")),
            "encoder.norm.weight holds values that are not finite",
        ),
        (
            lambda c: c["target_encoder"].pop(f"{PREFIX}patch_embed.proj.weight"),
            "has no encoder.patch_embed.proj.weight; it is not of Meta's",
        ),
        (lambda c: c.update(predictor={}), r"missing|has no"),
        (
            lambda c: c["target_encoder"].update({f"{PREFIX}blocks.1.x": "text"}),
            "is no tensor but str",
        ),
    ],
)
def test_tensors_that_do_not_fit(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    if message == r"missing|has no":  # an empty state dict is no state dict
        convert(changed(tmp_path, "vjepa2_tiny", change), tmp_path / "out", hints=HINTS)
        assert jvjepa.load(tmp_path / "out").predictor is None
        return
    text = refused(changed(tmp_path, "vjepa2_tiny", change), tmp_path / "out")
    assert re.search(message, text), text


def test_parts_of_different_models(tmp_path: Path) -> None:
    def predictor_of_2_1(content: dict[str, Any]) -> None:
        other = torch.load(GOLDEN / "vjepa2_1_tiny_distilled.pt", weights_only=True)
        content["predictor"] = other["predictor"]

    message = refused(changed(tmp_path, "vjepa2_tiny", predictor_of_2_1), tmp_path / "out")
    assert "these parts are of different families" in message

    def of_another_width(content: dict[str, Any]) -> None:
        content["predictor"][f"{PREFIX}predictor_embed.weight"] = torch.ones(24, 40)

    message = refused(changed(tmp_path, "vjepa2_tiny", of_another_width), tmp_path / "out")
    assert "takes 40 channels" in message
    assert "different models" in message


def test_mask_tokens_are_in_numeric_order(made: Path) -> None:
    """Ten tokens would not show it; they are sorted by name as text in the file of this test."""
    tokens = jvjepa.load(made / "vjepa2_tiny").params["predictor"]["mask_tokens"]
    theirs = official.weights("vjepa2_tiny.pt", "predictor")
    for i in range(10):
        np.testing.assert_array_equal(tokens[i], theirs[f"mask_tokens.{i}"][0, 0])


def test_eleven_mask_tokens(tmp_path: Path) -> None:
    def more(content: dict[str, Any]) -> None:
        weights = content["predictor"]
        weights[f"{PREFIX}mask_tokens.10"] = torch.full((1, 1, 24), 10.0)
        content["predictor"] = dict(sorted(weights.items()))  # 0, 1, 10, 2, ..

    convert(changed(tmp_path, "vjepa2_tiny", more), tmp_path / "out", hints=HINTS)
    tokens = jvjepa.load(tmp_path / "out").params["predictor"]["mask_tokens"]
    theirs = official.weights("vjepa2_tiny.pt", "predictor")
    np.testing.assert_array_equal(tokens[10], np.full(24, 10.0))
    np.testing.assert_array_equal(tokens[2], theirs["mask_tokens.2"][0, 0])


class Code:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch it-ran",)


def test_files_that_are_no_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    torch.save({"encoder": Code()}, tmp_path / "evil.pt")
    assert "evil.pt holds code (posix.system)" in refused("evil.pt", out)
    assert not (tmp_path / "it-ran").exists()
    whole = (GOLDEN / "vjepa2_tiny.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    assert "cut.pt" in refused("cut.pt", out)
    torch.save({"model": {"layer.weight": torch.ones(3)}}, tmp_path / "other.pt")
    assert "other.pt has no encoder, which is under target_encoder" in refused("other.pt", out)
    assert "revision 'v1' is for hub ids" in refused(
        str(GOLDEN / "vjepa2_tiny.pt"), out, revision="v1"
    )


def test_half_precision(tmp_path: Path) -> None:
    def to_bfloat16(content: dict[str, Any]) -> None:
        for key in ("target_encoder", "predictor"):
            content[key] = {name: x.bfloat16() for name, x in content[key].items()}

    path = changed(tmp_path, "vjepa2_tiny", to_bfloat16)
    assert convert(path, tmp_path / "out", hints=HINTS).dtype == "bfloat16"
    assert all(check.ok for check in verify(tmp_path / "out", path))
