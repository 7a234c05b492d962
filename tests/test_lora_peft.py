"""Our adapters in Hugging Face's peft library, on transformers' model."""

import json
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from adapters import random_lora
from commandline import listing, refused, run
from hfcheckpoints import HFModel, save_checkpoint, tiny_config
from models import random_video, relative_error
from safetensors.numpy import load_file

import jvjepa
from jvjepa import Model
from jvjepa.adapters import Adapters, base_sha256, save_adapters
from jvjepa.convert import convert
from jvjepa.convert.peft import export_peft
from jvjepa.errors import ConfigError
from jvjepa.lora import LoraConfig, variables

# peft 0.21 asks transformers 5.23 by the old name.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

ENCODER = LoraConfig(rank=4, alpha=6.0, layers=(0, 2))
BLOCKS = LoraConfig(
    rank=2,
    alpha=4.0,
    dropout=0.5,
    targets=(".*/blocks/attention/(query|proj)", ".*/fc[12]"),
)


def make(folder: Path, config: LoraConfig, labels: int = 0) -> tuple[HFModel, Model, Adapters]:
    """Writes `hf`, `ours` and `adapter`."""
    theirs = save_checkpoint(folder / "hf", tiny_config(layers=3, labels=labels))
    convert(str(folder / "hf"), folder / "ours")
    model = jvjepa.load(folder / "ours")
    lora = random_lora(model.params, config)
    adapters = Adapters(config=config, base=base_sha256(model.params, lora), lora=lora)
    save_adapters(folder / "adapter", adapters)
    return theirs, model, adapters


def pixels(video: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(video).permute(0, 1, 4, 2, 3)


def test_peft_gives_the_same_tokens(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    theirs, model, adapters = make(tmp_path, ENCODER)
    args = (tmp_path / "ours", tmp_path / "adapter", tmp_path / "peft")
    capfd.readouterr()
    assert run("lora", "export-peft", *args) == 0
    text, errors = capfd.readouterr()
    assert text == f"wrote {tmp_path / 'peft'}: 8 adapted layers, for the peft library\n"
    assert errors == ""
    assert listing(tmp_path / "peft") == ["adapter_config.json", "adapter_model.safetensors"]
    video = random_video(2, 4, 64, 64)
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "peft").eval()
    with torch.inference_mode():
        right = adapted(pixels(video), skip_predictor=True).last_hidden_state.numpy()
        with adapted.disable_adapter():
            base = adapted(pixels(video), skip_predictor=True).last_hidden_state.numpy()
    params, lora = model.params["encoder"], adapters.lora["encoder"]
    found = model.encoder.apply(variables(params, lora), video)
    assert relative_error(found, right) <= 1e-5
    assert relative_error(base, right) > 0.01
    merged = jvjepa.load(tmp_path / "ours", lora=tmp_path / "adapter").params["encoder"]
    with torch.inference_mode():
        theirs_merged = adapted.merge_and_unload()(pixels(video), skip_predictor=True)
    ours = model.encoder.apply({"params": merged}, video)
    assert relative_error(ours, theirs_merged.last_hidden_state.numpy()) <= 1e-5


def test_every_part_of_a_classifier(tmp_path: Path) -> None:
    theirs, model, adapters = make(tmp_path, BLOCKS, labels=3)
    assert set(adapters.lora) == {"encoder", "predictor", "classifier"}
    count = export_peft(tmp_path / "ours", tmp_path / "adapter", tmp_path / "peft")
    # Of each block: query, proj, fc1, fc2; cross-attention's query is not in blocks.
    assert count == 4 * (3 + 2 + 3) + 2
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert len(tensors) == 2 * count
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 4.0, 0.5)
    assert config["base_model_name_or_path"] == str(tmp_path / "hf")

    video = random_video(1, 4, 64, 64)
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "peft").eval()
    with torch.inference_mode():
        right = adapted(pixels(video)).logits.numpy()
    parts = {name: variables(model.params[name], lora) for name, lora in adapters.lora.items()}
    tokens = model.encoder.apply(parts["encoder"], video)
    logits = model.classifier.apply(parts["classifier"], tokens)
    assert relative_error(logits, right) <= 1e-5
    without = model.classifier.apply({"params": model.params["classifier"]}, tokens)
    assert relative_error(without, right) > 0.01


def test_peft_knows_all_that_we_wrote(tmp_path: Path) -> None:
    """Neither side has a tensor that the other has not, and the values are the same."""
    theirs, _, _ = make(tmp_path, ENCODER)
    export_peft(tmp_path / "ours", tmp_path / "adapter", tmp_path / "peft")
    written = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    adapted = peft.PeftModel.from_pretrained(theirs, tmp_path / "peft")
    loaded = peft.get_peft_model_state_dict(adapted)
    assert loaded.keys() == written.keys()
    for name, value in loaded.items():
        assert np.array_equal(value.numpy(), written[name])
    assert all(not value.requires_grad for value in adapted.parameters())


def test_what_peft_cannot_do_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = LoraConfig(rank=2, targets=("encoder/patch_embed",))
    make(tmp_path, config)
    with pytest.raises(ConfigError, match="encoder/patch_embed is no linear layer in transformers"):
        export_peft(tmp_path / "ours", tmp_path / "adapter", tmp_path / "peft")
    record = json.loads((tmp_path / "ours" / "config.json").read_text())
    for part in ("encoder", "predictor"):
        record["model"][part]["rope"] = "interleaved"
    (tmp_path / "ours" / "config.json").write_text(json.dumps(record))
    args = (tmp_path / "ours", tmp_path / "adapter", tmp_path / "peft")
    message = refused(capfd, "lora", "export-peft", *args)
    assert "config.json: rope = 'interleaved': this is V-JEPA 2.1" in message
    (tmp_path / "peft").mkdir()
    assert f"{tmp_path / 'peft'} exists" in refused(capfd, "lora", "export-peft", *args)
    assert listing(tmp_path) == ["adapter", "hf", "ours", "peft"]
    assert listing(tmp_path / "peft") == []
