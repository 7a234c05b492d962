import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import official
import pytest
import torch
from adapters import random_lora
from commandline import run, save_assets
from hfcheckpoints import save_checkpoint, tiny_config
from safetensors.numpy import load_file, save_file

import jvjepa
from jvjepa.adapters import Adapters, base_sha256, save_adapters
from jvjepa.convert import diagnose
from jvjepa.convert.meta import meta_entries
from jvjepa.convert.tables import expected_shapes
from jvjepa.convert.torchpickle import open_archive
from jvjepa.errors import CheckpointError, InputError
from jvjepa.export.manifest import Entry, Manifest, files_of
from jvjepa.lora import LoraConfig
from jvjepa.registry import RELEASES

GOLDEN = official.GOLDEN


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_assets(tmp_path_factory.mktemp("doctor"))
    save_checkpoint(folder / "classifier", tiny_config(labels=3))
    return folder


def test_a_checkpoint_of_metas() -> None:
    found = diagnose(GOLDEN / "vjepa2_tiny.pt")
    assert found.kind == "a checkpoint of Meta's V-JEPA"
    assert found.problems == []
    assert "target_encoder (53)" in found.facts["holds"]
    for key in ("target_encoder", "encoder"):
        assert found.facts[f"{key}, model"] == "V-JEPA 2, width 32, 4 layers"
        assert found.facts[f"{key}, parameters"] == "encoder 100,064, predictor 23,552"
        assert found.facts[f"{key}, dtype"] == "F32"
    assert "sine positions" in found.facts["left out, encoder.pos_embed"]
    assert len(found.facts["vjepa2_tiny.pt"].rpartition(" ")[2]) == 64
    options = "--heads .. --crop-size .. --predictor-heads .."
    assert found.commands == [
        f"jvjepa convert {GOLDEN / 'vjepa2_tiny.pt'} OUT --key {key} {options}"
        for key in ("target_encoder", "encoder")
    ]


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("vjepa2_1_tiny_teacher", "V-JEPA 2.1, width 32, 12 layers"),
        ("vjepa2_1_tiny_distilled", "V-JEPA 2.1, width 32, 12 layers"),
        ("vjepa2_ac_tiny", "V-JEPA 2-AC, width 32, 4 layers"),
    ],
)
def test_the_other_families(name: str, model: str) -> None:
    found = diagnose(GOLDEN / f"{name}.pt")
    assert found.problems == []
    assert found.facts["encoder, model"] == model


def test_a_released_size_is_named_and_needs_no_options(tmp_path: Path) -> None:
    config = RELEASES["vjepa2_1_vit_base_384"].config
    content: dict[str, dict[str, torch.Tensor]] = {"ema_encoder": {}, "predictor": {}}
    for name, shape in expected_shapes(meta_entries(config)).items():
        part, _, rest = name.partition(".")
        key = "ema_encoder" if part == "encoder" else part
        content[key][f"module.backbone.{rest}"] = torch.zeros(()).expand(shape)  # takes no space
    torch.save(content, tmp_path / "mine.pt")
    found = diagnose(tmp_path / "mine.pt")
    assert found.problems == []
    assert found.facts["ema_encoder, released with these sizes"] == "vjepa2_1_vit_base_384"
    assert found.commands == [f"jvjepa convert {tmp_path / 'mine.pt'} OUT --key ema_encoder"]


def test_a_probe() -> None:
    path = GOLDEN / "vjepa2_tiny_probe.pt"
    found = diagnose(path)
    assert "attentive probe" in found.kind
    assert found.facts["classes"] == "7, on an encoder of width 32"
    assert found.commands == [f"jvjepa convert --probe {path} --encoder MODEL --labels FILE OUT"]


def test_a_converted_folder(assets: Path) -> None:
    found = diagnose(assets / "model")
    assert (found.kind, found.problems) == ("a converted checkpoint", [])
    assert found.facts["dtype"] == "float32"
    assert found.commands[0] == f"jvjepa embed {assets / 'model'} VIDEO --out embedding.npz"


def test_a_hugging_face_folder(assets: Path) -> None:
    found = diagnose(assets / "classifier")
    assert "Hugging Face" in found.kind
    assert found.problems == []
    assert "classifier" in found.facts["parameters"]
    assert found.commands[0] == f"jvjepa convert {assets / 'classifier'} OUT"


@pytest.mark.parametrize("folder", ["model", "hf"])
def test_missing_tensors_are_problems(assets: Path, tmp_path: Path, folder: str) -> None:
    shutil.copytree(assets / folder, tmp_path / folder)
    path = tmp_path / folder / "model.safetensors"
    tensors = load_file(path)
    first = next(iter(tensors))
    del tensors[first]
    save_file(tensors, path, {"format": "pt"})
    found = diagnose(tmp_path / folder)
    (problem,) = found.problems
    assert f"missing {first}" in problem
    assert found.commands == []


def test_a_missing_tensor_of_one_encoder(tmp_path: Path) -> None:
    content = torch.load(GOLDEN / "vjepa2_tiny.pt", weights_only=True)
    del content["encoder"]["module.backbone.norm.bias"]
    torch.save(content, tmp_path / "x.pt")
    found = diagnose(tmp_path / "x.pt")
    (problem,) = found.problems
    assert "x.pt, encoder: 1 tensors do not fit: missing encoder.norm.bias [32]" in problem
    (command,) = found.commands
    assert "--key target_encoder" in command


@pytest.mark.parametrize("name", ["vjepa2_tiny", "vjepa2_tiny_probe"])
def test_a_damaged_record(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.pt"
    content = bytearray((GOLDEN / f"{name}.pt").read_bytes())
    last = max(open_archive(GOLDEN / f"{name}.pt").records.items(), key=lambda x: x[1].size)
    content[last[1].offset + 2] ^= 1
    path.write_bytes(content)
    found = diagnose(path)
    assert found.problems == [f"{path} is damaged: {last[0]} is not what its checksum says"]
    assert found.commands == []
    assert len(found.facts["x.pt"].rpartition(" ")[2]) == 64


def test_a_damaged_record_of_qualivision(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"model_state_dict": {"head.net.0.weight": torch.ones(999)}}, path)
    content = bytearray(path.read_bytes())
    content[content.rindex(np.float32(1).tobytes())] ^= 1
    path.write_bytes(content)
    found = diagnose(path)
    assert "is damaged: data/0 is not what its checksum says" in found.problems[-1]
    assert found.commands == []


def test_adapters(assets: Path, tmp_path: Path) -> None:
    params, config = jvjepa.load(assets / "model").params, LoraConfig(rank=2)
    lora = random_lora(params, config)
    folder = tmp_path / "adapters"
    base = base_sha256(params, lora)
    save_adapters(folder, Adapters(config=config, base=base, lora=lora))
    found = diagnose(folder)
    assert (found.kind, found.problems) == ("LoRA adapters", [])
    assert found.facts["adapters"] == "rank 2, alpha 32, dropout 0"
    assert base["encoder"] in found.facts["trained on, encoder"]
    merge = f"jvjepa lora merge MODEL {folder} OUT"
    assert found.commands == [f"jvjepa lora info {folder}", merge]
    assert run(*found.commands[0].split()[1:]) == 0
    with pytest.raises(CheckpointError, match=r"'jvjepa-2' but LoRA adapters, which --lora"):
        jvjepa.load(folder)


def test_an_export(assets: Path, tmp_path: Path) -> None:
    folder = tmp_path / "edge"
    folder.mkdir()
    (folder / "step.onnx").write_bytes(b"a graph")
    files = files_of(folder, [folder / "step.onnx"])
    entry = Entry(files=files, inputs=(), outputs=(), parity={}, tolerance=1e-4)
    Manifest(
        runtime="onnx",
        artefacts={"step": entry, "gate": entry},
        model={},
        crop_size=64,
        stream={"window": 2},
        labels=None,
        precision="float32",
        versions={},
    ).write(folder)
    found = diagnose(folder)
    assert (found.kind, found.problems) == ("an export for onnx", [])
    assert found.facts["holds"] == "step, gate"
    assert found.commands == [f"jvjepa stream {folder} VIDEO --runtime onnx --out F.npz"]
    (folder / "step.onnx").write_bytes(b"b graph")
    found = diagnose(folder)
    assert "step.onnx is damaged" in found.problems[0]
    assert found.commands == []


@pytest.mark.parametrize("folder", ["model", "hf"])
def test_weights_without_their_folder(assets: Path, folder: str) -> None:
    found = diagnose(assets / folder / "model.safetensors")
    assert found.problems[0].endswith(f"the config.json of their folder, {assets / folder}")
    assert found.commands == [f"jvjepa doctor {assets / folder}"]


class Code:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch it-ran",)


def test_code_is_named_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"target_encoder": {"a": torch.ones(2)}, "x": Code()}, "evil.pt")
    found = diagnose("evil.pt")
    assert "holds code; it was not loaded" in found.kind
    assert found.problems == ["loading it would run posix.system"]
    assert not Path("it-ran").exists()
    assert run("doctor", "evil.pt") == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("text.pt", b"hello, this is no checkpoint"),
        ("page.pt", b"<!DOCTYPE html><html>not found</html>"),
        ("empty.pt", b""),
        ("picture.png", b"\x89PNG\r\n\x1a\n" + bytes(50)),
    ],
)
def test_what_is_no_checkpoint(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    found = diagnose(tmp_path / name)
    assert found.kind == "cannot be used"
    assert len(found.problems) == 1
    assert found.commands == []


def test_a_checkpoint_of_another_project(tmp_path: Path) -> None:
    torch.save({"model": {"layer.weight": torch.ones(3)}, "epoch": 3}, tmp_path / "x.pt")
    found = diagnose(tmp_path / "x.pt")
    assert found.kind == "a file of torch.save, not of Meta's V-JEPA"
    assert "model (1)" in found.facts["holds"]
    assert "target_encoder" in found.problems[0]


def test_folders_of_other_kinds(tmp_path: Path) -> None:
    (tmp_path / "vitl.pt").touch()
    found = diagnose(tmp_path)
    assert found.kind == "a folder without a config.json"
    assert found.commands == [f"jvjepa doctor {tmp_path / 'vitl.pt'}"]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    assert diagnose(tmp_path).commands[0] == f"jvjepa doctor {tmp_path / 'model'}"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert "model_type = 'gpt2'" in diagnose(tmp_path).problems[0]
    (tmp_path / "config.json").write_text("{")
    assert "is not JSON" in diagnose(tmp_path).problems[0]
    with pytest.raises(InputError, match="nowhere does not exist"):
        diagnose(tmp_path / "nowhere")


def test_the_command(assets: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", assets / "model") == 0
    text = capfd.readouterr().out
    assert text.startswith(f"{assets / 'model'}: a converted checkpoint\n")
    assert "whole: every tensor is there, in its shape" in text
    assert "next: jvjepa stream" in text
    values = load_file(assets / "model" / "model.safetensors")
    assert f"encoder {sum(np.size(x) for x in values.values()):,}" in text
