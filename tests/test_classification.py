"""What `classify` answers is what a plain reading of Meta's evaluation gives, step by step."""

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from evaluation import reference_indices, reference_logits, torch_crops
from flax.traverse_util import unflatten_dict
from models import relative_error
from rich.console import Console
from videofiles import decode_all, moving_frames, serve, write_video

import jvjepa
from jvjepa import Encoder, Model, ModelConfig, classification, cli, video
from jvjepa import clips as clip_reading
from jvjepa.classification import Classification, classify, classify_command
from jvjepa.config import ClassifierConfig, EncoderConfig
from jvjepa.errors import InputError, VideoError
from jvjepa.heads import Classifier
from jvjepa.parameters import parameter_shapes, unstack_layers
from jvjepa.preprocessing import crops
from jvjepa.typing import Params

CROP, FRAMES, STEP = 32, 4, 3  # of the tiny model, and of its clips
LABELS = ("Pushing [something] left", "Größe", "c", "d", "e", "f", "g")
FPS = 25
COUNT = 70  # frames of `wide`, of which a clip spans 12


@functools.cache
def tiny_model(*, layers: tuple[int, ...] = (), levels: bool = False) -> Model:
    encoder = EncoderConfig(
        hidden_size=24,
        num_layers=3,
        num_heads=2,
        mlp_dim=40,
        crop_size=CROP,
        frames_per_clip=FRAMES,
        **({"rope": "interleaved", "levels": (0, 2)} if levels else {}),
    )
    head = ClassifierConfig(labels=LABELS, num_layers=2, num_heads=3, layers=layers)
    return model_of(ModelConfig(encoder=encoder, classifier=head))


def model_of(config: ModelConfig) -> Model:
    """With parameters of which none is zero or one, of the size that trained ones have."""
    rng = np.random.default_rng(0)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        scale = shape[-2] ** -0.5 if name.endswith("kernel") else 0.3
        value = scale * rng.normal(size=shape) + (1.0 if name.endswith("scale") else 0.0)
        return value.astype(np.float32)

    flat = {name: draw(name, shape) for name, shape in parameter_shapes(config).items()}
    head = config.classifier
    return Model(
        config=config,
        encoder=Encoder(config.encoder),
        classifier=None if head is None else Classifier(head, config.encoder),
        params=jax.tree.map(jax.numpy.asarray, unflatten_dict(flat, sep="/")),
        source=None,
    )


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 frames of 80 x 48."""
    folder = tmp_path_factory.mktemp("wide")
    return write_video(folder / "wide.mp4", moving_frames(COUNT, 48, 80), FPS)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 frames of 48 x 64, taller than wide."""
    folder = tmp_path_factory.mktemp("short")
    return write_video(folder / "short.mp4", moving_frames(9, 64, 48), FPS)


# --- Answers ------------------------------------------------------------------------------------


@functools.cache
def all_layers(encoder: Encoder) -> Callable[..., Any]:
    return jax.jit(functools.partial(encoder.apply, method="layers"))


def tokens_by_hand(model: Model, pixels: np.ndarray) -> np.ndarray:
    """[n, D] of one clip [T, crop, crop, 3]."""
    params, config = model.params["encoder"], model.config
    outputs = all_layers(model.encoder)({"params": params}, pixels[None])
    wanted = config.classifier.layers
    if not wanted:
        return np.asarray(outputs.tokens)[0]
    normed = []
    for layer in wanted:
        x = np.asarray(outputs.layers[layer + 1], np.float64)[0]
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + config.encoder.layer_norm_eps)
        norm = params.get("norm") or {
            name: leaf[config.encoder.levels.index(layer)] for name, leaf in params["norms"].items()
        }
        normed.append(x * np.asarray(norm["scale"]) + np.asarray(norm["bias"]))
    return np.concatenate(normed)


def softmax_by_hand(model: Model, tokens: np.ndarray) -> np.ndarray:
    weights = np.exp(reference_logits(model.config.classifier, model.params["classifier"], tokens))
    return weights / weights.sum()


def by_hand(
    model: Model, path: Path, clips: int, views: int, combine: str, step: int = STEP
) -> np.ndarray:
    """Float64 [labels]: decodes everything, encodes every view of every clip, and says how."""
    frames = decode_all(path)[0]
    tokens = {}
    for clip, row in enumerate(reference_indices(len(frames), FRAMES, clips, step)):
        for view, pixels in enumerate(torch_crops(frames[row], CROP, views)):
            tokens[clip, view] = tokens_by_hand(model, pixels)
    if combine == "probabilities":
        return np.mean([softmax_by_hand(model, each) for each in tokens.values()], axis=0)
    answers = []
    for view in sorted({view for _, view in tokens}):
        together = np.concatenate([tokens[clip, view] for clip in range(clips)])
        answers.append(softmax_by_hand(model, together))
    return np.mean(answers, axis=0)


def check(model: Model, path: Path, clips: int, views: int, combine: str) -> Classification:
    found = classify(model, path, clips=clips, views=views, frame_step=STEP, combine=combine)
    assert found.probabilities.dtype == np.float32
    assert found.labels == LABELS
    assert abs(found.probabilities.sum() - 1) < 1e-6
    assert relative_error(found.probabilities, by_hand(model, path, clips, views, combine)) <= 1e-5
    return found


@pytest.mark.parametrize("combine", ["tokens", "probabilities"])
@pytest.mark.parametrize(("clips", "views"), [(1, 1), (1, 3), (3, 1), (3, 3)])
def test_is_what_the_steps_by_hand_give(wide: Path, clips: int, views: int, combine: str) -> None:
    found = check(tiny_model(), wide, clips, views, combine)

    assert (found.clips, found.views) == (clips, views)
    expected = np.array(reference_indices(COUNT, FRAMES, clips, STEP)) / FPS
    np.testing.assert_allclose(found.times, expected, rtol=0, atol=1e-6)


def test_the_ways_to_combine_differ(wide: Path) -> None:
    model, how = tiny_model(), {"frame_step": STEP}
    answers = [
        classify(model, wide, clips=3, views=3, **how),
        classify(model, wide, clips=3, views=3, combine="probabilities", **how),
        classify(model, wide, clips=3, views=1, **how),
        classify(model, wide, clips=1, views=3, **how),
    ]
    for a, b in itertools.combinations(answers, 2):
        assert relative_error(a.probabilities, b.probabilities) > 1e-4
    alone = classify(model, wide, views=3, combine="probabilities", **how)
    assert np.array_equal(alone.probabilities, answers[3].probabilities)  # of one clip the same


def test_several_layers_are_seen_one_after_the_other(wide: Path) -> None:
    found = check(tiny_model(layers=(0, 2), levels=True), wide, 2, 1, "tokens")
    last = by_hand(tiny_model(levels=True), wide, 2, 1, "tokens")
    assert relative_error(found.probabilities, last) > 1e-3


def test_unrolled_layers_and_bfloat16(wide: Path) -> None:
    model, how = tiny_model(layers=(0, 2)), {"clips": 2, "frame_step": STEP}

    def replaced(params: Params, **changes: Any) -> Model:
        parts = {"encoder": model.encoder, "classifier": model.classifier}
        parts = {name: dataclasses.replace(part, **changes) for name, part in parts.items()}
        return dataclasses.replace(model, **parts, params=params)

    params = unstack_layers(jax.tree.map(np.asarray, model.params))
    expected = by_hand(model, wide, 2, 1, "tokens")
    found = classify(replaced(params, scan=False), wide, **how).probabilities
    assert relative_error(found, expected) <= 1e-5

    dtype = jax.numpy.bfloat16
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    changes = {"scan": False, "dtype": dtype, "param_dtype": dtype, "attention": "xla"}
    found = classify(replaced(params, **changes), wide, **how).probabilities
    assert found.dtype == np.float32
    assert 1e-5 < relative_error(found, expected) <= 0.05


@pytest.mark.parametrize("combine", ["tokens", "probabilities"])
def test_a_short_video_repeats_its_end_and_has_one_clip(short: Path, combine: str) -> None:
    found = check(tiny_model(), short, 3, 2, combine)

    assert (found.clips, found.views) == (1, 2)
    # 9 frames at step 3: the first and the last but one; the rest is padding.
    np.testing.assert_allclose(found.times * FPS, [[0, 7, 7, 7]], rtol=0, atol=1e-4)


def test_a_square_video_has_one_view(tmp_path: Path) -> None:
    path = write_video(tmp_path / "square.mp4", moving_frames(30, 48, 48), FPS)
    found = check(tiny_model(), path, 3, 3, "tokens")
    assert (found.clips, found.views) == (3, 1)
    # It is not the view that a single one is, which is cut out of the middle.
    single = classify(tiny_model(), path, clips=3, frame_step=STEP)
    assert relative_error(single.probabilities, found.probabilities) > 1e-4


@pytest.mark.parametrize("kind", ["mp4", "mkv", "ts", "fast"])
def test_containers(clips: dict[str, Path], kind: str) -> None:
    check(tiny_model(), clips[kind], 3, 1, "tokens")


def test_a_variable_frame_rate_counts_frames_and_not_seconds(tmp_path: Path) -> None:
    times = np.cumsum(np.random.default_rng(0).uniform(0.01, 0.2, 40)).tolist()
    path = write_video(tmp_path / "clip.mkv", moving_frames(40), times=times)
    found = check(tiny_model(), path, 3, 1, "tokens")
    expected = np.array([float(time) for time in decode_all(path)[1]])
    rows = reference_indices(40, FRAMES, 3, STEP)
    np.testing.assert_allclose(found.times, expected[rows], rtol=0, atol=1e-9)


@pytest.mark.usefixtures("no_file_stays_open")
def test_a_file_on_a_server(wide: Path) -> None:
    with serve([wide.read_bytes()], sized=True, seekable=True) as (url, _):
        remote = classify(tiny_model(), f"{url}/wide.mp4", clips=3, frame_step=STEP)
    local = classify(tiny_model(), wide, clips=3, frame_step=STEP)
    assert np.array_equal(remote.probabilities, local.probabilities)


@pytest.mark.parametrize(
    ("num_frames", "step"), [(1, 64), (2, 32), (4, 16), (16, 4), (32, 2), (64, 2), (128, 2)]
)
def test_the_step_is_metas_unless_it_is_given(
    wide: Path, monkeypatch: pytest.MonkeyPatch, num_frames: int, step: int
) -> None:
    class EnoughError(Exception):
        pass

    def enough(*numbers: int) -> None:
        raise EnoughError(numbers)

    monkeypatch.setattr(classification, "clip_indices", enough)
    for given, expected in (({}, step), ({"frame_step": 7}, 7)):
        with pytest.raises(EnoughError) as caught:
            classify(tiny_model(), wide, num_frames=num_frames, clips=3, **given)
        assert caught.value.args[0] == (COUNT, num_frames, 3, expected)


def test_a_clip_is_as_long_as_the_classifier_was_trained_with(wide: Path) -> None:
    model = tiny_model()
    assert classify(model, wide).times.shape == (1, FRAMES)
    longer = dataclasses.replace(model.config.encoder, frames_per_clip=2 * FRAMES)
    head = dataclasses.replace(model.config.classifier, frames_per_clip=FRAMES)
    config = dataclasses.replace(model.config, encoder=longer, classifier=head)
    assert classify(dataclasses.replace(model, config=config), wide).times.shape == (1, FRAMES)


def test_compiles_once_whatever_the_number_of_clips(
    wide: Path, short: Path, compilations: Callable[[], int]
) -> None:
    model = tiny_model()

    def run(path: Path, **how: Any) -> None:
        classify(model, path, frame_step=STEP, views=2, **how)

    run(wide, clips=1, combine="probabilities")
    before = compilations()
    run(wide, clips=4, combine="probabilities")
    run(short, clips=2, combine="probabilities")
    run(wide, clips=1, combine="tokens")
    assert compilations() == before


@pytest.mark.usefixtures("no_file_stays_open")
def test_decodes_and_keeps_only_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "long.mp4", moving_frames(400), FPS, gop=20)
    decoded, kept = 0, []
    stream = video.stream

    def counting(*args: Any, **how: Any) -> Any:
        nonlocal decoded
        for item in stream(*args, **how):
            decoded += 1
            yield item

    def recording(frames: np.ndarray, *args: Any) -> np.ndarray:
        kept.append(frames.shape)
        return crops(frames, *args)

    monkeypatch.setattr(video, "stream", counting)
    monkeypatch.setattr(clip_reading, "crops", recording)
    classify(tiny_model(), path, clips=3, frame_step=STEP)
    assert kept == [(1, 48, 64, 3)] * (3 * FRAMES)  # one at a time
    assert decoded <= 3 * (FRAMES * STEP + 1)  # of 400


def test_packets_that_promise_too_much_do_not_decide(
    wide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = classify(tiny_model(), wide, clips=3, frame_step=STEP)

    def more(place: Any) -> Any:
        index = jvjepa.decoding.index_packets(place)
        between = (index.ticks[:-1] + index.ticks[1:]) // 2  # nothing is shown then
        return dataclasses.replace(index, ticks=np.sort(np.concatenate([index.ticks, between])))

    monkeypatch.setattr(clip_reading, "index_packets", more)
    found = classify(tiny_model(), wide, clips=3, frame_step=STEP)
    assert np.array_equal(found.probabilities, expected.probabilities)
    assert np.array_equal(found.times, expected.times)


def test_says_what_runs(wide: Path) -> None:
    said: list[str] = []
    classify(tiny_model(), wide, clips=3, frame_step=STEP, progress=said.append)
    assert said == ["clip 1 of 3", "clip 2 of 3", "clip 3 of 3"]


# --- Errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"clips": 0}, "clips = 0; it must be 1 or more"),
        ({"views": -1}, "views = -1; it must be 1 or more"),
        ({"num_frames": 0}, "num_frames = 0; it must be 1 or more"),
        ({"frame_step": 0}, "frame_step = 0; it must be 1 or more"),
        ({"num_frames": 3}, "num_frames = 3; it must be 1, or a multiple of 2"),
        ({"combine": "votes"}, "combine = 'votes'; it must be one of"),
    ],
)
def test_says_what_is_wrong_with_numbers(how: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        classify(tiny_model(), "not even there.mp4", **how)


NO_CLASSIFIER = (
    "has no classifier; convert a classification checkpoint, or attach a probe: "
    "jvjepa convert --probe FILE.pt --encoder MODEL OUT --labels FILE"
)


def test_says_that_there_is_no_classifier(wide: Path) -> None:
    model = model_of(ModelConfig(encoder=tiny_model().config.encoder))
    with pytest.raises(InputError, match=f"the model {NO_CLASSIFIER}"):
        classify(model, wide)


@pytest.mark.usefixtures("no_file_stays_open")
def test_says_what_is_wrong_with_a_video(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "cut.mkv").write_bytes(b"")
    for name, message in (
        ("absent.mp4", "absent.mp4: there is no such file"),
        ("text.mp4", "text.mp4: cannot be opened as a video"),
        ("cut.mkv", "cut.mkv: is empty"),
    ):
        with pytest.raises(VideoError, match=message):
            classify(tiny_model(), tmp_path / name)
    with pytest.raises(VideoError, match=r"udp://127\.0\.0\.1:9: is live and has no end"):
        classify(tiny_model(), "udp://127.0.0.1:9")

    def changing(*_: Any, **how: Any) -> Any:
        for i in range(COUNT):
            yield np.zeros((48, 80 if i < 30 else 64, 3), np.uint8), i / FPS

    monkeypatch.setattr(video, "stream", changing)
    with pytest.raises(VideoError, match=r"its size changes from 80 x 48 to 64 x 48 at 1\.\d+ s"):
        classify(tiny_model(), wide, num_frames=16)


@pytest.mark.usefixtures("no_file_stays_open")
def test_damage_where_a_clip_lies_is_an_error(wide: Path, tmp_path: Path) -> None:
    data = bytearray(wide.read_bytes())
    middle = data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 2
    data[middle : middle + 400] = bytes(400)
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(data)
    with pytest.raises(VideoError, match=r"damaged\.mp4: "):
        classify(tiny_model(), damaged, clips=4, frame_step=STEP)


# --- Top and the command ------------------------------------------------------------------------


def test_top_sorts_and_keeps_the_order_of_ties() -> None:
    probabilities = np.array([0.1, 0.3, 0.1, 0.4, 0.1], np.float32)
    found = Classification(
        probabilities=probabilities, labels=tuple("abcde"), views=1, times=np.zeros((1, 4))
    )
    assert [label for label, _ in found.top()] == list("dbace")
    assert found.top(2) == [("d", float(probabilities[3])), ("b", float(probabilities[1]))]
    for k in (0, 6, -1):
        with pytest.raises(InputError, match=f"top = {k}; there are 5 labels, take 1 to that many"):
            found.top(k)


def options_of(model: Path, source: Path, **given: Any) -> cli.Classify:
    """What the command line gives the command."""
    return cli.Classify(model=model, video=str(source), **given)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "model"
    jvjepa.save(path, tiny_model())
    return path


def command(options: cli.Classify, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Runs it as the command line does; returns the lines that it prints."""
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    capsys.readouterr()
    assert classify_command(options, console) == 0
    return capsys.readouterr().out.splitlines()


def test_command(
    folder: Path, wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.json"
    options = options_of(folder, wide, clips=3, views=3, frame_step=STEP, top=3, json=out)
    lines = command(options, capsys)

    found = classify(tiny_model(), wide, clips=3, views=3, frame_step=STEP)
    best = found.top(3)
    assert lines[:3] == [f"{probability:7.2%}  {label}" for label, probability in best]
    assert lines[3].startswith(
        f"3 x 3 (clips x views) of 4 frames from {found.times.min():.2f} to "
        f"{found.times.max():.2f} s, "
    )
    assert lines[4:] == [f"wrote {out}"]
    assert json.loads(out.read_text(encoding="utf-8")) == {
        "video": str(wide),
        "labels": [label for label, _ in best],
        "probabilities": [probability for _, probability in best],
        "clips": 3,
        "views": 3,
        "model": str(folder),
    }
    assert list(tmp_path.iterdir()) == [out]


def test_command_shows_all_labels_where_there_are_fewer(
    folder: Path, wide: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = command(options_of(folder, wide, top=99, frame_step=STEP), capsys)
    assert sorted(line[9:] for line in lines[:-1]) == sorted(LABELS)
    assert "1 x 1 (clips x views) of 4 frames" in lines[-1]


def test_command_replaces_a_file_only_if_told(
    folder: Path, wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.json"
    out.write_text("mine")
    options = options_of(folder, wide, frame_step=STEP, json=out)
    with pytest.raises(InputError, match=r"found\.json exists; .* pass --force"):
        command(options, capsys)
    assert out.read_text() == "mine"
    command(dataclasses.replace(options, force=True), capsys)
    assert len(json.loads(out.read_text(encoding="utf-8"))["labels"]) == 5
    with pytest.raises(InputError, match=r"found\.txt must end in \.json"):
        command(dataclasses.replace(options, json=tmp_path / "found.txt"), capsys)


def test_command_says_what_is_wrong_before_it_loads_a_model(
    wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jvjepa.save(tmp_path / "bare", model_of(ModelConfig(encoder=tiny_model().config.encoder)))
    (tmp_path / "bare" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=f"bare {NO_CLASSIFIER}"):
        command(options_of(tmp_path / "bare", wide), capsys)
    with pytest.raises(InputError, match="top = 0; it must be 1 or more"):
        command(options_of(tmp_path / "bare", wide, top=0), capsys)
