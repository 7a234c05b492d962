import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from hfcheckpoints import random_model, save_checkpoint, tiny_config
from safetensors.numpy import load_file, save_file
from transformers import VJEPA2Config

from jvjepa.convert import PartCheck, convert, verify
from jvjepa.convert.comparison import TOLERANCE, relative_error
from jvjepa.convert.oracle import Oracle
from jvjepa.errors import CheckpointError, ConfigError, InputError

WEIGHTS = ["encoder, weights", "predictor, weights", "classifier, weights"]
OUTPUTS = ["encoder", "encoder, one frame", "encoder, another grid", "encoder, masked"]
ENCODER = [*OUTPUTS, "encoder, layers"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `hf`, a classifier, and `ours`, converted; read only."""
    folder = tmp_path_factory.mktemp("verify")
    save_checkpoint(folder / "hf", tiny_config(head_width=24, labels=3))
    convert(str(folder / "hf"), folder / "ours")
    return folder


@pytest.fixture
def ours(made: Path, tmp_path: Path) -> Path:
    """A copy of the converted checkpoint, to change."""
    return Path(shutil.copytree(made / "ours", tmp_path / "ours"))


def failed(checks: list[PartCheck]) -> list[str]:
    return [check.name for check in checks if not check.ok]


def test_a_good_conversion_passes(made: Path) -> None:
    checks = verify(made / "ours", str(made / "hf"))
    assert [check.name for check in checks] == [*WEIGHTS, *ENCODER, "predictor", "classifier"]
    assert failed(checks) == []
    for check in checks[:3]:
        assert check.error == check.tolerance == 0
    for check in checks[3:]:
        assert 0 < check.error < TOLERANCE == check.tolerance
        assert f"against transformers {transformers.__version__}" in check.detail
    details = {check.name: check.detail for check in checks}
    assert "2 x 4 frames of 64 x 64" in details["encoder"]
    assert "2 x 1 frames" in details["encoder, one frame"]
    assert "64 x 80" in details["encoder, another grid"]
    assert "10 of 32 tokens" in details["encoder, masked"]
    assert "10 of 32 tokens seen" in details["predictor"]
    assert "2 x 32 tokens, 3 classes" in details["classifier"]
    assert jax.config.jax_default_matmul_precision == "float32"  # as conftest set it


def test_bfloat16_passes_against_rounded_weights(made: Path, tmp_path: Path) -> None:
    convert(str(made / "hf"), tmp_path / "ours", dtype="bfloat16")
    checks = verify(tmp_path / "ours", str(made / "hf"))
    assert failed(checks) == []
    assert "bit by bit in bfloat16" in checks[0].detail
    assert all("weights rounded to bfloat16" in check.detail for check in checks[3:])
    # The rounding is not below the tolerance by itself:
    video = np.random.default_rng(0).normal(size=(1, 2, 64, 64, 3)).astype(np.float32)
    exact, rounded = (
        Oracle.from_folder(made / "hf", classifier=True, rounding=dtype).tokens(video)
        for dtype in ("float32", "bfloat16")
    )
    assert relative_error(rounded, exact) > 10 * TOLERANCE


@pytest.mark.slow
def test_sizes_and_seed_are_used(made: Path) -> None:
    first, other = (
        verify(made / "ours", str(made / "hf"), frames=2, clips=1, seed=seed) for seed in (0, 1)
    )
    assert "1 x 2 frames" in first[3].detail
    assert all(a.error != b.error for a, b in zip(first[3:], other[3:], strict=True))


def test_swapped_weights_fail(made: Path, ours: Path) -> None:
    tensors = load_file(ours / "model.safetensors")
    names = [f"encoder/blocks/attention/{name}/kernel" for name in ("query", "key")]
    tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]
    save_file(tensors, ours / "model.safetensors")
    checks = verify(ours, str(made / "hf"))
    assert failed(checks) == ["encoder, weights", *ENCODER]
    assert "4 differ: " in checks[0].detail
    assert "attention.query.weight" in checks[0].detail
    assert "worst after layer" in checks[7].detail


@pytest.mark.parametrize("parts", [["encoder"], ["predictor", "classifier"]])
def test_the_smallest_change_of_a_weight_is_found(made: Path, ours: Path, parts: list[str]) -> None:
    tensors = load_file(ours / "model.safetensors")
    for part in parts:
        name = next(name for name in reversed(tensors) if name.startswith(part + "/"))
        tensors[name].flat[1] = np.nextafter(tensors[name].flat[1], np.float32(9))
    save_file(tensors, ours / "model.safetensors")
    checks = verify(ours, str(made / "hf"))
    assert failed(checks) == [f"{part}, weights" for part in parts]


def test_a_zero_of_the_other_sign_is_found(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "hf", tiny_config())
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    for value in (-0.0, 0.0):
        tensors["encoder.layernorm.bias"][3] = value
        save_file(tensors, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
        if not (tmp_path / "ours").exists():
            convert(str(tmp_path / "hf"), tmp_path / "ours")
    checks = verify(tmp_path / "ours", str(tmp_path / "hf"))
    assert failed(checks) == ["encoder, weights"]


def test_the_other_rotary_variant_fails(made: Path, ours: Path) -> None:
    record = json.loads((ours / "config.json").read_text())
    for part in ("encoder", "predictor"):
        record["model"][part]["rope"] = "interleaved"
    (ours / "config.json").write_text(json.dumps(record))
    checks = verify(ours, str(made / "hf"))
    assert failed(checks) == [*ENCODER, "predictor"]
    assert all(check.error > 100 * TOLERANCE for check in checks if not check.ok)


def test_not_a_number_is_not_ok() -> None:
    check = PartCheck(name="x", error=float("nan"), tolerance=1.0, detail="")
    assert not check.ok
    assert dataclasses.replace(check, error=1.0).ok
    assert np.isnan(relative_error([1.0, np.nan], [1.0, 2.0]))
    assert relative_error([1.0, 5.0], [1.0, -10.0]) == 1.5
    assert relative_error([0.0], [0.0]) == 0.0
    with pytest.raises(InputError, match="cannot be compared"):
        relative_error([1.0], [1.0, 2.0])


def test_bad_arguments_are_refused(made: Path, tmp_path: Path) -> None:
    ours, hf = made / "ours", str(made / "hf")
    for frames in (0, 1, 3, -2):
        with pytest.raises(InputError, match=f"frames = {frames}; it must be a multiple of 2"):
            verify(ours, hf, frames=frames)
    with pytest.raises(InputError, match="clips = 0"):
        verify(ours, hf, clips=0)
    with pytest.raises(CheckpointError, match="is not of format"):
        verify(made / "hf", hf)
    with pytest.raises(ConfigError, match="is converted already"):
        verify(ours, str(ours))
    save_checkpoint(tmp_path / "wider", tiny_config(head_width=32, labels=3))
    with pytest.raises(CheckpointError, match=r"encoder\.layernorm\.bias has shape \[64\], \[48\]"):
        verify(ours, str(tmp_path / "wider"))


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_brings_no_torch() -> None:
    script = "import sys, jvjepa.convert; print(sorted({'torch', 'transformers'} & {*sys.modules}))"
    assert run(script) == "[]\n"


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_without_torch_the_error_says_what_to_install(made: Path, missing: str) -> None:
    script = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from jvjepa import InputError; from jvjepa.convert import verify\n"
        f"try: verify({str(made / 'ours')!r}, {str(made / 'hf')!r})\n"
        "except InputError as error: print(error)"
    )
    assert run(script) == f"verify needs {missing}: pip install 'jvjepa[torch]' brings it\n"


@pytest.mark.slow
def test_vit_l_at_full_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Random weights of the sizes that transformers initialises, 24 layers, 16 frames at 256."""
    model = random_model(VJEPA2Config(architectures=["VJEPA2Model"]))
    with torch.no_grad():  # tame what is wild for 24 layers, and keep every parameter random
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not name.endswith("mask_tokens"):
                parameter.mul_(0.5)
    model.save_pretrained(tmp_path / "hf")
    del model
    convert(str(tmp_path / "hf"), tmp_path / "ours")
    checks = verify(tmp_path / "ours", str(tmp_path / "hf"), frames=16, clips=1)
    with capsys.disabled():
        for check in checks:
            print(f"\n{check.name}: {check.error:.2e} ({check.detail})", end="")
    assert failed(checks) == []
