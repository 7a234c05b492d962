"""QualiVision's checkpoints, in all layouts, become models that give the original's scores."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from berts import save_sentence_encoder
from commandline import refused, run
from models import random_video, relative_error
from quality import PROMPTS, VOCABULARY
from qualivision import HIDDEN, Original
from torchfiles import rezip, saved
from transformers import AutoTokenizer, BertModel, VJEPA2Config, VJEPA2Model

from jvjepa.convert import Hints, convert_quality, convert_text, is_text_source
from jvjepa.convert.qualivision import open_qualivision
from jvjepa.convert.torchfile import open_torch
from jvjepa.errors import CheckpointError, InputError
from jvjepa.quality import load_quality, score
from jvjepa.text_weights import load_text

HINTS = Hints(heads=2, crop_size=32)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The released text encoder's folder, as the user names it."""
    folder = tmp_path_factory.mktemp("text") / "bge"
    save_sentence_encoder(folder)
    return folder


@pytest.fixture(scope="module")
def original(text: Path) -> Original:
    config = VJEPA2Config(
        crop_size=32,
        hidden_size=48,
        num_attention_heads=2,
        num_hidden_layers=2,
        mlp_ratio=1.5,
        pred_hidden_size=24,
        pred_num_attention_heads=2,
        pred_num_hidden_layers=2,
        pred_num_mask_tokens=3,
    )
    return Original(VJEPA2Model(config), BertModel.from_pretrained(text))


def from_training(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What the original's training script saves."""
    return {
        "epoch": 3,
        "model_state_dict": state,
        "optimizer_state_dict": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []},
        "best_score": np.float64(0.63),
        "config": {"batch_size": 6, "lr": 2e-4},
    }


def from_notebook(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What the notebook saves while it trains."""
    more = {"scheduler_state_dict": {"T_max": 5}, "scaler_state_dict": {"scale": 1024.0}}
    return {**from_training(state), **more, "loss_manager_state": {"alpha": np.float32(0.7)}}


def final(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What the notebook saves at its end."""
    metrics = {"spearman": np.float64(0.6), "epochs": np.int64(5)}
    return {"model_state_dict": state, "model_config": {}, "performance_metrics": metrics}


def wrapped(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    return from_training({f"module._orig_mod.{name}": value for name, value in state.items()})


LAYOUTS = {
    "training": from_training,
    "notebook": from_notebook,
    "final": final,
    "wrapped": wrapped,
    "alone": lambda state: state,
}


def checkpoint(folder: Path, original: Original, layout: str = "training", **changes: Any) -> Path:
    """A `.pt` file; of the state dict, `changes` replace tensors, or take away those of None."""
    state = {**original.state_dict(), **changes}
    state = {name: value for name, value in state.items() if value is not None}
    return saved(folder / "vjepa_best.pt", LAYOUTS[layout](state))


def convert(path: Path, text: Path, name: str = "model", **how: Any) -> Path:
    out = path.with_name(name)
    convert_quality(str(path), out, text=str(text), hints=HINTS, **how)
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_weights(
    original: Original, text: Path, tmp_path: Path, layout: str
) -> None:
    model = load_quality(convert(checkpoint(tmp_path, original, layout), text))
    state = {name: value.numpy() for name, value in original.state_dict().items()}
    params = model.params
    for i in range(2):
        theirs = state[f"venc.encoder.layer.{i}.mlp.fc1.weight"].T
        assert np.array_equal(params["encoder"]["blocks"]["mlp"]["fc1"]["kernel"][i], theirs)
        theirs = state[f"tenc.0.auto_model.encoder.layer.{i}.output.dense.bias"]
        assert np.array_equal(params["text"]["blocks"]["mlp"]["fc2"]["bias"][i], theirs)
    assert np.array_equal(params["head"]["norm"]["scale"], state["head.net.0.weight"])
    assert np.array_equal(params["head"]["fc3"]["kernel"], state["head.net.7.weight"].T)


def test_scores_are_the_originals(original: Original, text: Path, tmp_path: Path) -> None:
    model = load_quality(convert(checkpoint(tmp_path, original), text))
    assert model.config.feature == "first_token"
    assert model.config.num_frames == 64
    assert model.config.crop_size == 32
    assert model.config.head.hidden == HIDDEN
    clips = random_video(3, 6, 32, 32)
    how = {"padding": True, "return_tensors": "pt"}
    theirs = AutoTokenizer.from_pretrained(text)([p.lower() for p in PROMPTS], **how)
    expected = original.scores(clips, theirs["input_ids"], theirs["attention_mask"])
    found = np.stack([score(model, c, p) for c, p in zip(clips, PROMPTS, strict=True)])
    assert relative_error(found, expected) < 1e-4


def test_the_record_says_what_became_of_every_tensor(
    original: Original, text: Path, tmp_path: Path
) -> None:
    path = checkpoint(tmp_path, original)
    report = convert_quality(str(path), tmp_path / "out", text=str(text), hints=HINTS)
    record = load_quality(tmp_path / "out").source
    assert report.source == record
    assert record.name == str(path)
    assert record.keys == dict.fromkeys(("encoder", "text", "head"), "model_state_dict")
    assert record.text is None
    predictor = {name for name in original.state_dict() if name.startswith("venc.predictor.")}
    pooler = {f"tenc.0.auto_model.pooler.dense.{name}" for name in ("weight", "bias")}
    position_ids = {"tenc.0.auto_model.embeddings.position_ids"} & original.state_dict().keys()
    assert record.dropped.keys() == predictor | pooler | position_ids
    count = sum(value.numel() for value in original.state_dict().values())
    left_out = sum(original.state_dict()[name].numel() for name in record.dropped)
    assert sum(report.parameters.values()) == count - left_out
    assert sorted(report.parameters) == ["encoder", "head", "text"]


def test_a_file_without_the_text_encoder_takes_the_released_one(
    original: Original, text: Path, tmp_path: Path
) -> None:
    whole = convert(checkpoint(tmp_path, original), text)
    (tmp_path / "less").mkdir()
    without = {name: None for name in original.state_dict() if name.startswith("tenc.")}
    less = convert(checkpoint(tmp_path / "less", original, **without), text)
    assert_same_weights(whole, less)
    record = load_quality(less).source
    assert record.text.name == str(text)
    assert "text" not in record.keys
    assert "pooler.dense.bias" in record.text.dropped


def assert_same_weights(one: Path, other: Path) -> None:
    from safetensors.numpy import load_file

    left, right = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert left.keys() == right.keys()
    assert all(np.array_equal(left[name], right[name]) for name in left)


def test_bfloat16(original: Original, text: Path, tmp_path: Path) -> None:
    model = load_quality(convert(checkpoint(tmp_path, original), text, dtype="bfloat16"))
    assert model.params["head"]["fc1"]["kernel"].dtype == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head.net.7.weight": None}, r"missing head.net.7.weight \[5, 8\]"),
        ({"head.net.8.weight": torch.ones(2)}, "unexpected head.net.8.weight"),
        ({"head.net.0.weight": torch.ones(60)}, r"\[60\], \[72\] would be right"),
        ({"head.net.7.weight": torch.ones(4, 8)}, r"\[4, 8\], \[5, 8\] would be right"),
        ({"head.net.1.weight": None}, "head.net.1.weight is missing"),
        ({"venc.encoder.layer.1.norm1.bias": None}, "missing venc.encoder.layer.1.norm1.bias"),
        ({"venc.predictor.extra": torch.ones(2)}, "unexpected venc.predictor.extra"),
        ({"venc.encoder.layer.0.mlp.fc1.weight": None}, "fc1.weight is missing"),
        ({"tenc.0.auto_model.embeddings.LayerNorm.bias": None}, "missing tenc.0.auto_model"),
        ({"tenc.1.weight": torch.ones(2)}, "unexpected tenc.1.weight"),
        ({"head.net.1.bias": torch.full((16,), torch.nan)}, "not finite"),
    ],
)
def test_checkpoints_that_are_not_whole_are_refused(
    original: Original, text: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = checkpoint(tmp_path, original, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(path, text)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_several_problems_are_in_one_error(original: Original, text: Path, tmp_path: Path) -> None:
    changes = {"head.net.7.bias": None, "head.net.9": torch.ones(1)}
    path = checkpoint(tmp_path, original, **changes, **{"venc.encoder.layernorm.bias": None})
    with pytest.raises(CheckpointError, match="3 tensors do not fit") as caught:
        convert(path, text)
    for name in ("head.net.7.bias", "head.net.9", "venc.encoder.layernorm.bias"):
        assert name in str(caught.value)


def test_another_text_encoder_is_refused(original: Original, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, original)
    save_sentence_encoder(tmp_path / "wide", hidden_size=30)
    with pytest.raises(CheckpointError, match=r"tenc.*\[24\], \[30\] would be right"):
        convert(path, tmp_path / "wide")
    save_sentence_encoder(tmp_path / "deep", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"missing tenc\.0\.auto_model\.encoder\.layer\.2"):
        convert(path, tmp_path / "deep")
    with pytest.raises(InputError, match="is not a folder"):
        convert(path, tmp_path / "none")


def test_other_files_are_refused(original: Original, text: Path, tmp_path: Path) -> None:
    path = saved(tmp_path / "dover.pt", {"model_state_dict": {"dover.weight": torch.ones(2)}})
    with pytest.raises(CheckpointError, match="is no checkpoint of QualiVision's V-JEPA model"):
        convert(path, text)
    arrays = saved(tmp_path / "arrays.pt", {"x": torch.ones(1), "scores": np.ones(2)})
    with pytest.raises(CheckpointError, match=r"holds code .*numpy"):
        convert(arrays, text)
    state = original.state_dict()
    name = "head.net.7.bias"
    twice = saved(tmp_path / "twice.pt", {**state, f"module.{name}": state[name]})
    with pytest.raises(CheckpointError, match=f"holds {re.escape(name)} twice"):
        convert(twice, text)


def test_numbers_of_numpy_are_read_and_nothing_else_of_it(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pt", {"x": torch.ones(2), "best_score": np.float64(0.63)})

    def as_numpy_1(name: str, content: bytes) -> bytes:
        return content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")

    for _ in range(2):
        with open_torch(path) as file:
            assert file.top["best_score"] == 0.63
            assert list(file.parts) == [""]
        rezip(path, as_numpy_1)
    for odd in (np.complex64(1), np.str_("x"), np.array(["x"], object)[0:1]):
        with pytest.raises(CheckpointError, match=r"x\.pt(:| holds code)") as caught:
            open_torch(saved(path, {"x": torch.ones(2), "odd": odd})).__enter__()
        assert "\n" not in str(caught.value)


def test_the_text_encoder_may_come_from_the_hub(
    original: Original, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--BAAI--bge-large-en-v1.5"
    shutil.copytree(text, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    assert is_text_source("BAAI/bge-large-en-v1.5")
    convert_text("BAAI/bge-large-en-v1.5", tmp_path / "text")
    assert load_text(tmp_path / "text").source.revision == commit
    path = checkpoint(tmp_path, original)
    how = {"text": "BAAI/bge-large-en-v1.5", "hints": HINTS}
    convert_quality(str(path), tmp_path / "model", **how)
    assert_same_weights(tmp_path / "model", convert(path, text, "local"))
    with pytest.raises(InputError, match="BAAI/none is not in the cache"):
        convert_text("BAAI/none", tmp_path / "none")


def test_what_the_file_does_not_say_must_be_said(
    original: Original, text: Path, tmp_path: Path
) -> None:
    path = checkpoint(tmp_path, original)
    with pytest.raises(InputError, match="width 48, and no released model has that width"):
        convert_quality(str(path), tmp_path / "out", text=str(text))
    with pytest.raises(CheckpointError, match="num_heads = 5"):
        convert_quality(str(path), tmp_path / "out", text=str(text), hints=Hints(heads=5))
    convert_quality(str(path), tmp_path / "out", text=str(text), hints=Hints(heads=2))
    assert load_quality(tmp_path / "out").config.crop_size == 384


# --- The command --------------------------------------------------------------------------------


def test_the_command_converts(
    original: Original, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint(tmp_path, original)
    how = ("--text", text, "--heads", 2, "--crop-size", 32)
    assert run("convert", path, tmp_path / "model", *how) == 0
    printed = capfd.readouterr().out
    for words in (
        "head taken from 'model_state_dict'",
        "left out venc.predictor.proj.weight: V-JEPA's predictor",
        "head:",
        "float32",
    ):
        assert words in printed
    assert run("convert", text, tmp_path / "text") == 0
    assert load_text(tmp_path / "text").config.vocab_size == len(VOCABULARY)
    assert "left out pooler.dense.weight" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), r"is a checkpoint of QualiVision, .* --text BAAI/bge-large-en-v1.5"),
        (("--text", "TEXT", "--key", "encoder"), "--key is not for --text"),
        (("--text", "TEXT", "--area", "2x2"), "--area is not for --text"),
        (("--text", "TEXT", "--labels", "x"), "--labels is for --probe"),
    ],
)
def test_options_that_do_not_go_together(
    original: Original,
    text: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    path = checkpoint(tmp_path, original)
    given = [text if option == "TEXT" else option for option in options]
    assert re.search(message, refused(capfd, "convert", path, tmp_path / "out", *given))


def test_options_of_text_encoders(
    text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    error = refused(capfd, "convert", text, tmp_path / "out", "--heads", 3)
    assert error.startswith("--heads is not for text encoders")
    assert "OUT is missing" in refused(capfd, "convert", text)
    assert "exists" in refused(capfd, "convert", text, tmp_path)


def test_the_tensors_are_not_read_to_be_listed(
    original: Original, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint(tmp_path, original)

    def never(*args: object) -> Callable[..., object]:
        raise AssertionError

    with open_torch(path) as file:
        monkeypatch.setattr("jvjepa.convert.torchfile.TorchWeights.read", never)
        weights = open_qualivision(file)
        assert weights.has_text
        assert weights.shapes["head.net.7.bias"] == (5,)


# --- Looking at folders and files ---------------------------------------------------------------


def test_info_and_doctor_know_the_folders(
    original: Original, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = checkpoint(tmp_path, original)
    folder = convert(path, text)
    run("convert", text, tmp_path / "text")
    for made, parts, facts in (
        (folder, ("encoder", "text", "head"), "head: sees the first token of a video"),
        (tmp_path / "text", ("text",), "width 24, 2 layers, cls pooling"),
    ):
        capfd.readouterr()
        assert run("info", made, "--shapes") == 0
        printed = capfd.readouterr().out
        assert facts in printed
        assert "text/blocks/mlp/fc1/kernel [2, 24, 40]" in printed
        assert all(f"\n{part}:" in printed for part in parts)
        assert run("doctor", made) == 0
        assert "whole: every tensor is there" in capfd.readouterr().out
    assert run("doctor", text) == 0
    assert f"next: jvjepa convert {text} OUT" in capfd.readouterr().out
    assert run("doctor", path) == 0
    assert f"next: jvjepa convert {path} OUT --text" in capfd.readouterr().out


@pytest.mark.parametrize("with_text", [True, False])
def test_doctor_looks_at_every_tensor_of_a_checkpoint(
    original: Original, tmp_path: Path, capfd: pytest.CaptureFixture[str], with_text: bool
) -> None:
    changes = {} if with_text else {n: None for n in original.state_dict() if n[:4] == "tenc"}
    path = checkpoint(tmp_path, original, **changes)
    assert run("doctor", path) == 0
    printed = capfd.readouterr().out
    assert "whole" in printed
    assert f"text encoder: {'in' if with_text else 'not in'} the file" in printed
    checkpoint(tmp_path, original, **changes, **{"head.net.4.bias": None})
    assert run("doctor", path) == 1
    assert "missing head.net.4.bias [8]" in capfd.readouterr().out
    name = "tenc.0.auto_model.encoder.layer.1.output.dense.bias"
    checkpoint(tmp_path, original, **{**changes, name: torch.ones(3)})
    assert run("doctor", path) == 1
    assert f"{name} has shape [3]" in capfd.readouterr().out or not with_text


def test_doctor_says_what_is_wrong(
    text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run("convert", text, tmp_path / "text")
    config = tmp_path / "text" / "config.json"
    config.write_text(config.read_text().replace('"mlp_dim": 40', '"mlp_dim": 41'))
    capfd.readouterr()
    assert run("doctor", tmp_path / "text") == 1
    assert "[2, 24, 41] would be right" in capfd.readouterr().out
    assert "[2, 24, 41] would be right" in refused(capfd, "info", tmp_path / "text")
    (tmp_path / "text" / "vocab.txt").unlink()
    assert run("doctor", tmp_path / "text") == 1
    assert "has no tokenizer.json and no vocab.txt" in capfd.readouterr().out
