"""What a command reads is never what it writes over, with --force neither."""

import os
from pathlib import Path

import pytest
from adapters import random_lora
from commandline import refused, save_tiny, tiny_model, write_scene
from PIL import Image

import jvjepa
from jvjepa.adapters import Adapters, base_sha256, save_adapters
from jvjepa.errors import InputError
from jvjepa.lora import LoraConfig
from jvjepa.storage import check_apart


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`in/model`, `in/adapter` of it, `in/v.mp4`, and the same video under other names."""
    folder = tmp_path_factory.mktemp("overwriting") / "in"
    folder.mkdir()
    save_tiny(folder / "model")
    params = tiny_model().params
    config = LoraConfig(rank=2)
    lora = random_lora(params, config)
    adapters = Adapters(config=config, base=base_sha256(params, lora), lora=lora)
    save_adapters(folder / "adapter", adapters)
    write_scene(folder / "v.mp4")
    for name in ("v.npz", "v.png", "v.json", "v.csv"):
        (folder / name).write_bytes((folder / "v.mp4").read_bytes())
    (folder / "names").mkdir()
    (folder / "names" / "labels.json").write_text('["a", "b"]')
    (folder / "link.mp4").symlink_to(folder / "v.npz")
    (folder / "models").symlink_to(folder)
    Image.new("RGB", (64, 64)).save(folder / "picture.png")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by its path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("export model model --what step", "model is the source"),
        ("export model model/.. --what gate", "model/.. holds the source"),
        ("export model adapter --lora adapter", "adapter is the source"),
        ("export model model/config.json", "model/config.json is a file of the source"),
        ("export-hf model model", "model is the source"),
        ("export-hf model .", ". holds the source, model"),
        ("export-hf models/model .", ". holds the source, models/model"),
        ("lora merge model adapter adapter", "adapter is the source"),
        ("lora merge model adapter model", "model is the source"),
        ("lora export-peft model adapter .", ". holds the source"),
        ("lora export-peft model adapter adapter", "adapter is the source"),
        ("quantize model model", "model is the source"),
        ("quantize model . --video v.mp4", ". holds the source"),
        (
            "convert --probe p.pt --encoder model --labels names/labels.json names",
            "names holds the source, names/labels.json",
        ),
        ("features model v.mp4 --pca v.mp4", "v.mp4 is the source"),
        ("features model picture.png --pca picture.png", "picture.png is the source"),
        ("features model v.npz --npz v.npz", "v.npz is the source"),
        ("embed model v.npz --out ../in/v.npz", "../in/v.npz is the source, v.npz"),
        ("embed model link.mp4 --out v.npz", "v.npz is the source, link.mp4"),
        ("embed model v.npz --max-tokens 96 --out v.npz", "v.npz is the source"),
        ("stream model v.npz --out v.npz", "v.npz is the source"),
        ("stream model v.png --out new.npz --plot v.png", "v.png is the source"),
        ("classify model v.json --json v.json", "v.json is the source"),
        ("classify model v.mp4 --json model/config.json", "model/config.json is a file of the"),
        ("classify model v.mp4 --lora adapter --json adapter/config.json", "is a file of the"),
        ("anticipate model v.json --json v.json", "v.json is the source"),
        ("mos model v.json --prompt x --json v.json", "v.json is the source"),
        ("mos model v.csv --out v.csv", "v.csv is the source"),
        ("mos model v.mp4 --prompt x --json model/config.json", "is a file of the source"),
    ],
)
def test_force_leaves_the_source(
    assets: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    command: str,
    message: str,
) -> None:
    monkeypatch.chdir(assets)
    before = contents(assets)
    error = refused(capfd, *command.split(), "--force")
    assert message in error
    assert error.endswith("; choose another name for the result")
    assert contents(assets) == before


@pytest.mark.parametrize(
    ("command", "mark"),
    [
        ("convert model", "model.safetensors"),
        ("convert file.pt --text nowhere", "model.safetensors"),
        ("convert --probe p.pt --encoder model --labels names/labels.json", "model.safetensors"),
        ("export model", "manifest.json"),
        ("export-hf model", "model.safetensors"),
        ("lora merge model adapter", "model.safetensors"),
        ("lora export-peft model adapter", "adapter_model.safetensors"),
        ("quantize model", "model.safetensors"),
        ("mos evaluate model v.csv --out", "report.html"),
    ],
)
def test_force_leaves_a_folder_of_another_kind(
    assets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    command: str,
    mark: str,
) -> None:
    monkeypatch.chdir(assets)
    project = tmp_path / "proj"
    (project / "src").mkdir(parents=True)
    (project / "src" / "a.py").write_text("mine")
    (project / "config.json").write_text("mine")
    before = contents(tmp_path)
    error = refused(capfd, *command.split(), project, "--force")
    assert error == (
        f"{project} holds config.json, src; only an empty folder or one with {mark} is replaced; "
        "choose another name, or remove it yourself"
    )
    assert contents(tmp_path) == before


def test_the_video_of_a_comparison_stays(
    assets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Videos that only measure are sources too."""
    (tmp_path / "v.mp4").write_bytes((assets / "v.mp4").read_bytes())
    command = ("quantize", assets / "model", tmp_path, "--force")
    for option in (("--video",), ("--scheme", "int8-static", "--calibrate")):
        assert "holds the source" in refused(capfd, *command, *option, tmp_path / "v.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["v.mp4"]


def test_what_is_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model" / "onnx").mkdir(parents=True)
    (tmp_path / "v.mp4").touch()
    (tmp_path / "modelled").mkdir()
    for out in ("new", "modelled", "model/onnx", "model/new.npz", "model/new"):
        check_apart(Path(out), "model", Path("v.mp4"), None)
    for source in ("http://host/v.mp4", f"http://host/{'v' * 300}", "camera:0", "gone"):
        check_apart(tmp_path, source)


def test_links_and_other_names(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (tmp_path / "data" / "model").mkdir(parents=True)
    home.mkdir()
    model, link = tmp_path / "data" / "model", home / "link"
    link.symlink_to(model)
    (model / "config.json").touch()
    os.link(model / "config.json", tmp_path / "same")
    with pytest.raises(InputError, match="link is the source"):
        check_apart(link, model)
    with pytest.raises(InputError, match="model is the source"):
        check_apart(model, link)
    with pytest.raises(InputError, match="data holds the source"):
        check_apart(tmp_path / "data", link)
    with pytest.raises(InputError, match="home holds the source"):
        check_apart(home, link)
    # As `new_folder` takes it: the folder that the link is in, and not that of the model.
    with pytest.raises(InputError, match=r"link/\.\. holds the source"):
        check_apart(link / "..", link)
    with pytest.raises(InputError, match="is a file of the source"):
        check_apart(link / "config.json", model)
    with pytest.raises(InputError, match="same is the source"):
        check_apart(tmp_path / "same", model / "config.json")


def test_saving_again_from_memory(tmp_path: Path) -> None:
    """In Python a model may replace the folder that it was loaded from."""
    model = jvjepa.load(save_tiny(tmp_path / "model"))
    before = contents(tmp_path)
    jvjepa.save(tmp_path / "model", model, force=True)
    assert contents(tmp_path) == before
