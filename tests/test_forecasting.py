"""What `anticipate` says of a video is what the original says of the right frames of it."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from anticipators import CLASSES, setup
from commandline import refused, run
from models import relative_error
from videofiles import decode_all, moving_frames, write_video

import jvjepa
from jvjepa.errors import InputError, VideoError
from jvjepa.forecasting import Forecast, forecast

FPS = 20  # of the file; the clip's 8 frames at 8 a second are 2.5 of its frames apart
COUNT = 50  # 2.5 seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, a golden encoder and predictor with a random anticipator, and `video.mp4`."""
    made = tmp_path_factory.mktemp("forecasting")
    right = setup(frames_per_clip=8)
    model = jvjepa.Model(
        config=right.config,
        encoder=right.encoder,
        predictor=right.predictor,
        anticipator=right.anticipator,
        params=right.params,
        source=None,
    )
    jvjepa.save(made / "model", model)
    write_video(made / "video.mp4", moving_frames(COUNT, 48, 80), FPS)
    return made


@pytest.fixture(scope="module")
def model(folder: Path) -> jvjepa.Model:
    return jvjepa.load(folder / "model")


def by_hand(path: Path, at: float, ahead: float) -> dict[str, np.ndarray]:
    """Probabilities, by the port of Meta's code, from frames that are shown at given times."""
    right = setup(frames_per_clip=8)
    places = [int((at - 1 + i / 8) * FPS + 1e-6) for i in range(8)]
    pixels = jvjepa.video.preprocess(decode_all(path)[0][places], right.config)
    logits = right.theirs.anticipate(pixels[None], np.array([ahead]))
    return {
        kind: torch.from_numpy(values[0]).softmax(-1).numpy() for kind, values in logits.items()
    }


@pytest.mark.parametrize(("at", "ahead"), [(None, 1.0), (1.0, 0.3), (1.7, 1.75)])
def test_a_forecast_is_the_originals(
    folder: Path, model: jvjepa.Model, at: float | None, ahead: float
) -> None:
    found = forecast(model, folder / "video.mp4", at=at, ahead=ahead)
    end = COUNT / FPS if at is None else at
    expected = by_hand(folder / "video.mp4", end, ahead)
    assert list(found.probabilities) == list(CLASSES)
    for kind, right in expected.items():
        assert found.probabilities[kind].dtype == np.float32
        assert relative_error(found.probabilities[kind], right) <= 1e-5
        assert found.labels[kind] == getattr(model.config.anticipator, kind)
    assert (found.at, found.ahead) == (pytest.approx(end), ahead)
    places = np.floor((end - 1 + np.arange(8) / 8) * FPS + 1e-6)
    np.testing.assert_allclose(found.times, places / FPS, rtol=0, atol=1e-6)
    other = by_hand(folder / "video.mp4", end - 0.25 if end > 1.2 else end + 0.25, ahead)
    assert relative_error(found.probabilities["verbs"], other["verbs"]) > 1e-4


def test_the_best_come_first() -> None:
    values = {"verbs": np.float32([0.2, 0.5, 0.3]), "actions": np.float32([0.5, 0.5])}
    labels = {"verbs": ("a", "b", "c"), "actions": ("d", "e")}
    found = Forecast(probabilities=values, labels=labels, times=np.zeros(2), at=1.0, ahead=1.0)
    assert found.top(1) == {"verbs": [("b", 0.5)], "actions": [("d", 0.5)]}
    assert [label for label, _ in found.top()["verbs"]] == ["b", "c", "a"]
    assert [label for label, _ in found.top()["actions"]] == ["d", "e"]
    with pytest.raises(InputError, match="top = 0; it must be 1 or more"):
        found.top(0)


def test_a_file_that_is_just_long_enough(model: jvjepa.Model, tmp_path: Path) -> None:
    for name in ("exact.mp4", "exact.mkv"):
        path = write_video(tmp_path / name, moving_frames(30, 48, 64), 30)
        assert forecast(model, path).times[0] == 0
    path = write_video(tmp_path / "short.mp4", moving_frames(27, 48, 64), 30)
    message = r"short.mp4: lasts 0\.900 s, and at = 0\.900 s; before that there must be 1 s, 8 fra"
    with pytest.raises(VideoError, match=message):
        forecast(model, path)


def test_what_cannot_be_anticipated(folder: Path, model: jvjepa.Model, tmp_path: Path) -> None:
    path = folder / "video.mp4"
    for how, message in (
        ({"at": 0.5}, r"lasts 2\.500 s, and at = 0\.500 s; before that there must be 1 s"),
        ({"at": -1.0}, r"at = -1\.000 s; before that there must be 1 s"),
        ({"at": 2.6}, r"at = 2\.6, but it lasts 2\.500 s"),
        ({"at": float("nan")}, r"at = nan, but it lasts 2\.500 s"),
        ({"ahead": -1.0}, "ahead = -1; it must be 0 to 60 seconds"),
        ({"ahead": 61.0}, "ahead = 61; it must be 0 to 60 seconds"),
        ({"ahead": float("nan")}, "ahead = nan; it must be 0 to 60 seconds"),
    ):
        with pytest.raises(InputError, match=message):
            forecast(model, path, **how)
    with pytest.raises(VideoError, match="there is no such file"):
        forecast(model, tmp_path / "absent.mp4")
    with pytest.raises(VideoError, match=r"udp://127\.0\.0\.1:9: is live and has no end"):
        forecast(model, "udp://127.0.0.1:9")
    with pytest.raises(InputError, match="the model has no anticipator; attach a probe"):
        forecast(dataclasses.replace(model, anticipator=None), path)


def test_the_command(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, video = tmp_path / "out.json", folder / "video.mp4"
    command = ("anticipate", folder / "model", video)
    assert run(*command, "--at", "1.7", "--top", "4", "--json", out) == 0
    text = capfd.readouterr().out
    record = json.loads(out.read_text())
    assert (record["at"], record["ahead"]) == (1.7, 1.0)
    assert (record["video"], record["model"]) == (str(video), str(folder / "model"))
    expected, lines = by_hand(video, 1.7, 1.0), iter(text.splitlines())
    for kind, right in expected.items():
        order = np.argsort(-right)[:4]
        assert record[kind]["labels"] == [f"{kind} {i}" for i in order]
        assert relative_error(record[kind]["probabilities"], right[order]) <= 1e-5
        assert next(lines) == f"{kind}:"
        for i in order:
            assert next(lines) == f"{right[i]:7.2%}  {kind} {i}"
    assert next(lines).startswith("1 s after 1.70 s, seen 8 frames from 0.70 to 1.55 s, ")
    assert next(lines) == f"wrote {out}"
    assert "exists; choose another name" in refused(capfd, *command, "--json", out)
    assert "must end in .json" in refused(capfd, *command, "--json", tmp_path / "out.txt")
    assert "top = 0" in refused(capfd, *command, "--top", "0")
    assert "ahead = 61" in refused(capfd, *command, "--ahead", "61")
    config = jvjepa.load(folder / "model").config
    bare = jvjepa.Model(
        config=dataclasses.replace(config, anticipator=None, predictor=None),
        encoder=setup().encoder,
        params={"encoder": setup().params["encoder"]},
        source=None,
    )
    jvjepa.save(tmp_path / "bare", bare)
    message = refused(capfd, "anticipate", tmp_path / "bare", video)
    assert message.startswith(f"{tmp_path / 'bare'} has no anticipator; attach a probe")
