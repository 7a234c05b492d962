"""Every frame of a video of any length, encoded in clips or as a stream."""

import dataclasses
import functools
import itertools
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import official
import pytest
from commandline import FRAMES, cut_short, tiny_model, write_scene
from models import random_params, relative_error
from numpy.typing import NDArray
from PIL import Image
from videofiles import moving_frames, serve, write_video

import jvjepa
from jvjepa import long, streaming
from jvjepa.errors import InputError, VideoError
from jvjepa.long import Part, embed_clips, embed_stream, tubelets_that_fit
from jvjepa.typing import Array, Params

TOKENS = 16  # of one tubelet of the tiny model
TOLERANCE = 1e-6
Frames = Iterator[tuple[NDArray[np.uint8], float]]

pytestmark = pytest.mark.usefixtures("no_file_stays_open")


@pytest.fixture(scope="module")
def model() -> jvjepa.Model:
    return tiny_model()


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scene(tmp_path_factory.mktemp("long") / "scene.mp4")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, scene: Path) -> Callable[[Frames], Path]:
    """Makes `jvjepa.long` read frames from an iterator; returns the source to give it."""

    def install(frames: Frames) -> Path:
        def stream(*_: object, **__: object) -> Generator[tuple[NDArray[np.uint8], float]]:
            yield from frames

        monkeypatch.setattr(long.video, "stream", stream)
        return scene

    return install


def numbered(count: int) -> Frames:
    for i in range(count):
        yield np.full((64, 64, 3), i % 256, np.uint8), float(i)


def of_config(config: jvjepa.EncoderConfig, params: Params | None = None) -> jvjepa.Model:
    encoder = jvjepa.Encoder(config)
    return dataclasses.replace(
        tiny_model(),
        config=jvjepa.ModelConfig(encoder=config, predictor=None, classifier=None),
        encoder=encoder,
        params={"encoder": random_params(encoder) if params is None else params},
    )


@functools.partial(jax.jit, static_argnums=0)
def forward(encoder: jvjepa.Encoder, params: Params, clip: Array) -> Array:
    return encoder.apply({"params": params}, clip)


def assert_clips_equal_the_forward_pass(
    model: jvjepa.Model, parts: Sequence[Part], video: Path, starts: Sequence[int]
) -> None:
    frames, times = jvjepa.video.read(video)
    assert len(parts) == len(starts)
    for part, start in zip(parts, starts, strict=True):
        span = slice(start, start + len(part.times))
        pixels = jvjepa.video.preprocess(frames[span], model.config)
        tokens = np.asarray(forward(model.encoder, model.params["encoder"], pixels[None])[0])
        assert relative_error(part.tokens, tokens) <= TOLERANCE
        assert relative_error(part.embedding, tokens.astype(np.float64).mean(0)) <= TOLERANCE
        np.testing.assert_array_equal(part.times, times[span])
        assert {part.tokens.dtype, part.embedding.dtype} == {np.dtype(np.float32)}


# Clips


@pytest.mark.parametrize(
    ("max_tokens", "lengths"),
    [
        (TOKENS, [2] * 35),
        (7 * TOKENS - 1, [12] * 5 + [10]),
        (5 * TOKENS, [10] * 7),
    ],
)
def test_every_clip_equals_the_forward_pass_over_it(
    model: jvjepa.Model, scene: Path, max_tokens: int, lengths: list[int]
) -> None:
    parts = list(embed_clips(model, scene, max_tokens=max_tokens))
    assert [len(part.times) for part in parts] == lengths
    assert all(len(part.tokens) <= max_tokens for part in parts)
    starts = [0, *itertools.accumulate(lengths[:-1])]
    assert_clips_equal_the_forward_pass(model, parts, scene, starts)


@pytest.mark.parametrize(("overlap", "starts"), [(2, range(0, 68, 10)), (10, range(0, 60, 2))])
def test_clips_that_overlap(model: jvjepa.Model, scene: Path, overlap: int, starts: range) -> None:
    parts = list(embed_clips(model, scene, max_tokens=6 * TOKENS, overlap=overlap))
    assert [len(part.times) for part in parts][:-1] == [12] * (len(starts) - 1)
    assert parts[-1].times[-1] == jvjepa.video.read(scene)[1][-1]
    assert_clips_equal_the_forward_pass(model, parts, scene, starts)


def test_other_grids_and_v2_1_whose_last_frame_is_no_image(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_video(tmp_path / "v.mp4", moving_frames(9))
    model = of_config(dataclasses.replace(official.TEACHER.encoder, crop_size=80))
    assert model.config.encoder.image_tokenizer
    parts = list(embed_clips(model, path, max_tokens=2 * 25 + 24))
    assert [len(part.times) for part in parts] == [4, 4]
    assert "1 frames at the end do not fill a tubelet of 2" in caplog.text
    assert_clips_equal_the_forward_pass(model, parts, path, [0, 4])


def test_the_clips_are_those_of_the_definition(
    model: jvjepa.Model, fake: Callable[[Frames], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_pixels(encoder: jvjepa.Encoder, params: Params, clip: np.ndarray) -> np.ndarray:
        return clip[0, ::2, 0, 0]

    monkeypatch.setattr(long, "_encode", first_pixels)
    black_to_white = np.arange(40, dtype=np.uint8)[:, None, None, None]
    values = jvjepa.video.preprocess(
        np.broadcast_to(black_to_white, (40, 64, 64, 3)).copy(), model.config
    )[:, 0, 0]
    for total, length, overlap in itertools.product(range(2, 24), (2, 4, 6, 10), (0, 2, 4)):
        if overlap >= length:
            continue
        source = fake(numbered(total))
        parts = embed_clips(model, source, max_tokens=length // 2 * TOKENS, overlap=overlap)
        found = list(parts)
        even = total // 2 * 2
        starts = range(0, max(1, even - overlap), length - overlap)
        spans = [range(start, min(start + length, even)) for start in starts]
        assert [part.times.tolist() for part in found] == [list(span) for span in spans]
        assert set().union(*spans) == set(range(even))
        for part, span in zip(found, spans, strict=True):
            np.testing.assert_array_equal(part.tokens, values[span][::2])


def test_rates_and_ranges_are_those_of_the_stream(
    model: jvjepa.Model, scene: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(long, "_encode", lambda encoder, params, clip: clip[0, :, 0, 0])

    def times(**how: float) -> list[float]:
        parts = embed_clips(model, scene, max_tokens=4 * TOKENS, **how)
        return [at for part in parts for at in part.times.tolist()]

    def expected(**how: float) -> list[float]:
        return [at for _, at in jvjepa.video.stream(scene, **how)]

    assert times(fps=8) == expected(fps=8)
    assert len(times(fps=8)) == 28
    assert times(frame_step=3) == expected()[::3]
    assert times(start=0.5, end=2.0) == expected(start=0.5, end=2.0)
    assert times(start=0.5, end=2.0, frame_step=5) == expected(start=0.5, end=2.0)[::5]


def test_at_most_two_programs_are_compiled(
    model: jvjepa.Model, fake: Callable[[Frames], Path], compilations: Callable[[], int]
) -> None:
    def count(frames: int) -> int:
        before = compilations()
        for _ in embed_clips(model, fake(numbered(frames)), max_tokens=9 * TOKENS):
            pass
        return compilations() - before

    assert count(5 * 18 + 16) == 2
    assert count(7 * 18) == 0
    assert count(3 * 18 + 16) == 0


# The stream


@pytest.mark.parametrize("window", [3, 40])
def test_the_stream_equals_the_scan(model: jvjepa.Model, scene: Path, window: int) -> None:
    parts = list(embed_stream(model, scene, max_tokens=window * TOKENS + 5))
    frames, times = jvjepa.video.read(scene)
    pixels = jvjepa.video.preprocess(frames, model.config).reshape(-1, 1, 2, 64, 64, 3)
    state = streaming.init_state(model.encoder, 1, window)
    _, out = streaming.scan(model.encoder, model.params["encoder"], state, pixels)
    assert relative_error(np.stack([part.tokens for part in parts]), out.tokens[:, 0]) <= TOLERANCE
    embeddings = np.stack([part.embedding for part in parts])
    assert relative_error(embeddings, out.embedding[:, 0]) <= TOLERANCE
    np.testing.assert_array_equal([part.times for part in parts], times.reshape(-1, 2))


def test_the_stream_compiles_once(
    model: jvjepa.Model, fake: Callable[[Frames], Path], compilations: Callable[[], int]
) -> None:
    def run_over(frames: int) -> None:
        for _ in embed_stream(model, fake(numbered(frames)), max_tokens=3 * TOKENS):
            pass

    run_over(4)
    before = compilations()
    run_over(12)
    assert compilations() == before


# Memory


@pytest.mark.parametrize(
    ("how", "max_tokens", "length"), [(embed_clips, 96, 12), (embed_stream, 48, 2)]
)
def test_no_more_than_one_frame_waits_as_it_came(
    model: jvjepa.Model,
    fake: Callable[[Frames], Path],
    how: Callable[..., Iterator[Part]],
    max_tokens: int,
    length: int,
) -> None:
    alive = most = 0

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def counted(count: int) -> Frames:
        nonlocal alive, most
        for frame, at in numbered(count):
            kept = frame.copy()
            weakref.finalize(kept, gone)
            alive += 1
            most = max(most, alive)
            yield kept, at
            del frame, kept

    parts = how(model, fake(counted(60)), max_tokens=max_tokens)
    assert [len(part.times) for part in parts] == [length] * (60 // length)
    assert 1 <= most <= 2  # the one that is preprocessed, and the one that is decoded
    assert alive == 0


# Errors


def test_the_smallest_number_of_tokens_is_named(model: jvjepa.Model, scene: Path) -> None:
    for max_tokens in (-1, 0, TOKENS - 1):
        for how in (embed_clips, embed_stream):
            with pytest.raises(InputError) as caught:
                how(model, scene, max_tokens=max_tokens)
            assert str(caught.value) == (
                f"max_tokens = {max_tokens}; it must be at least {TOKENS}, the tokens of one "
                "tubelet (2 frames of 64 x 64 pixels)"
            )
    assert tubelets_that_fit(model.config.encoder, TOKENS) == 1
    assert tubelets_that_fit(model.config.encoder, 5 * TOKENS - 1) == 4
    released = jvjepa.registry.get("vjepa2-vitg-fpc64-384").config.encoder
    assert tubelets_that_fit(released, 18_432) == 32


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"overlap": -2}, "overlap = -2; clips have 8 frames, so it must be a multiple of 2"),
        ({"overlap": 3}, "overlap = 3; clips have 8 frames, so it must be a multiple of 2"),
        ({"overlap": 8}, "overlap = 8; clips have 8 frames.* of 2 from 0 to 6"),
        ({"frame_step": 0}, "frame_step = 0; it must be 1 or more"),
        ({"frame_step": 2, "fps": 5.0}, "fps = 5.0 and frame_step = 2; give one of the two"),
        ({"fps": 0.0}, "fps = 0.0; it must be above 0"),
        ({"start": 2.0, "end": 1.0}, "end = 1.0; it must be above start = 2.0"),
    ],
)
def test_impossible_numbers_are_refused_at_once(
    model: jvjepa.Model, scene: Path, how: dict[str, float], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        embed_clips(model, scene, max_tokens=4 * TOKENS, **how)


def test_sources_that_are_no_files_of_a_video(
    model: jvjepa.Model, tmp_path: Path, clips: dict[str, Path]
) -> None:
    picture = tmp_path / "p.png"
    Image.fromarray(moving_frames(1)[0]).save(picture)
    for how in (embed_clips, embed_stream):
        with pytest.raises(InputError, match=r"p\.png: is a picture; max_tokens is for videos"):
            how(model, picture, max_tokens=TOKENS)
        with pytest.raises(VideoError, match=r"rtsp://camera/1: is live .* jvjepa stream"):
            how(model, "rtsp://name:secret@camera/1", max_tokens=TOKENS)
        with pytest.raises(VideoError, match=r"none\.mp4: there is no such file"):
            how(model, tmp_path / "none.mp4", max_tokens=TOKENS)
    with serve([clips["ts"].read_bytes()]) as (address, _):
        with pytest.raises(VideoError, match="is live and has no end"):
            embed_clips(model, f"{address}/x.ts", max_tokens=TOKENS)


def test_a_url_of_a_file_is_a_file(model: jvjepa.Model, scene: Path) -> None:
    with serve([scene.read_bytes()], sized=True, seekable=True) as (address, _):
        found = list(embed_clips(model, f"{address}/scene.mp4", max_tokens=96))
    assert_clips_equal_the_forward_pass(model, found, scene, range(0, 70, 12))


def test_clips_before_the_damage_are_good(model: jvjepa.Model, scene: Path, tmp_path: Path) -> None:
    damaged = cut_short(scene, tmp_path / "cut.mp4", 0.7)
    found = []
    with pytest.raises(VideoError, match=r"cut\.mp4: .*cut off"):
        found.extend(embed_clips(model, damaged, max_tokens=6 * TOKENS))
    assert 12 * len(found) < FRAMES
    assert_clips_equal_the_forward_pass(model, found, scene, range(0, 12 * len(found), 12))
    assert len(found) >= 2


def test_a_video_without_a_tubelet(model: jvjepa.Model, tmp_path: Path) -> None:
    short = write_video(tmp_path / "one.mp4", moving_frames(1))
    for how in (embed_clips, embed_stream):
        parts = how(model, short, max_tokens=TOKENS)
        with pytest.raises(VideoError, match=r"one\.mp4 has no whole tubelet of 2 frames"):
            next(parts)


def test_a_change_of_size_is_an_error(model: jvjepa.Model, fake: Callable[[Frames], Path]) -> None:
    wide = ((np.zeros((48, 96, 3), np.uint8), at) for at in (12.0, 13.0))
    parts = embed_clips(model, fake(itertools.chain(numbered(12), wide)), max_tokens=96)
    assert len(next(parts).times) == 12
    with pytest.raises(VideoError, match=r"size changes from 64 x 64 to 96 x 48 at 12\.000 s"):
        next(parts)


def test_what_the_encoder_refuses_names_the_clip(scene: Path) -> None:
    tiny = tiny_model()
    areas = {"area_layers": (0, 1), "area_temporal_splits": 2, "area_spatial_splits": 1}
    config = dataclasses.replace(tiny.config.encoder, **areas)
    model = of_config(config, tiny.params["encoder"])
    parts = embed_clips(model, scene, max_tokens=96, end=0.7)
    assert len(next(parts).tokens) == 96
    with pytest.raises(InputError) as caught:
        next(parts)
    message = str(caught.value)
    assert message.startswith(f"{scene}: the clip of 2 frames from 0.60 to 0.65 s: ")
    assert "area_temporal_splits" in message
    assert message.endswith("; max_tokens and end change its length")
    with pytest.raises(InputError, match="area_temporal_splits"):
        next(embed_stream(model, scene, max_tokens=2 * TOKENS))
