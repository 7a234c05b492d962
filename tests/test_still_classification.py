"""Pictures where a video is expected: classified as `embed` encodes them, or refused."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from anticipators import setup
from commandline import refused, run
from exports import NEW, tiny
from models import relative_error
from PIL import Image
from videofiles import moving_frames, write_video

import jvjepa
from jvjepa import Model
from jvjepa.classification import classify
from jvjepa.errors import InputError
from jvjepa.forecasting import forecast
from jvjepa.pictures import read_picture
from jvjepa.preprocessing import crops

V2, V2_1 = tiny(), tiny(**NEW)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`picture.png` of 96 x 48, `clip.mp4`, and `v2`, a converted model."""
    made = tmp_path_factory.mktemp("still")
    Image.fromarray(moving_frames(1, 48, 96)[0]).save(made / "picture.png")
    write_video(made / "clip.mp4", moving_frames(12), 20)
    jvjepa.save(made / "v2", V2)
    return made


@pytest.mark.parametrize("combine", ["tokens", "probabilities"])
@pytest.mark.parametrize(("model", "repeat"), [(V2, True), (V2_1, False)], ids=["2.0", "2.1"])
@pytest.mark.parametrize("views", [1, 3])
def test_a_picture_is_a_clip_of_one_frame(
    folder: Path, model: Model, repeat: bool, views: int, combine: str
) -> None:
    path = folder / "picture.png"
    found = classify(model, path, views=views, combine=combine, repeat_frame=repeat)

    pixels = crops(read_picture(path), model.config, views)
    tokens = model.encoder.apply({"params": model.params["encoder"]}, pixels)
    logits = model.classifier.apply({"params": model.params["classifier"]}, tokens)
    assert relative_error(found.probabilities, jax.nn.softmax(logits).mean(axis=0)) < 1e-5
    assert (found.clips, found.views) == (1, views)
    np.testing.assert_array_equal(found.times, [[0.0]])


def test_a_model_of_videos_takes_pictures_only_if_asked(folder: Path) -> None:
    refusal = r"picture.png: is a picture, and this model \(V-JEPA 2\) .*; --repeat-frame encodes"
    with pytest.raises(InputError, match=refusal):
        classify(V2, folder / "picture.png")
    with pytest.raises(InputError, match=r"\(V-JEPA 2\.1\) takes as it is; leave out"):
        classify(V2_1, folder / "picture.png", repeat_frame=True)
    with pytest.raises(InputError, match="is no picture, and only those need --repeat-frame"):
        classify(V2, folder / "clip.mp4", repeat_frame=True)


@pytest.mark.parametrize("options", [{"clips": 2}, {"num_frames": 1}, {"frame_step": 2}])
def test_a_picture_has_no_frames_to_choose(folder: Path, options: dict[str, int]) -> None:
    with pytest.raises(InputError, match="is a picture; --clips, --num-frames and --frame-step ch"):
        classify(V2_1, folder / "picture.png", **options)


def test_the_command(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ("classify", folder / "v2", folder / "picture.png", "--json", tmp_path / "a.json")
    assert "--repeat-frame encodes it as a still clip" in refused(capfd, *command)
    assert run(*command, "--repeat-frame", "--views", "3") == 0
    assert "a picture, 3 views, " in capfd.readouterr().out
    record = json.loads((tmp_path / "a.json").read_text())
    assert (record["clips"], record["views"]) == (1, 3)
    assert len(record["labels"]) == 3


def test_what_comes_next_is_not_in_a_picture(folder: Path) -> None:
    right = setup(frames_per_clip=8)
    model = Model(
        config=right.config,
        encoder=right.encoder,
        predictor=right.predictor,
        anticipator=right.anticipator,
        params=right.params,
        source=None,
    )
    with pytest.raises(InputError, match="png: is a picture, and anticipating needs a video"):
        forecast(model, folder / "picture.png")
