import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from commandline import FRAMES, cut_short, tiny_model, write_scene
from numpy.typing import NDArray
from videofiles import moving_frames, serve, write_video

import jvjepa
from jvjepa import gating, live
from jvjepa.decoding import UnexpectedError
from jvjepa.errors import VideoError
from jvjepa.gating import Gate
from jvjepa.live import Session, Tubelet, tubelets

Frames = Iterator[tuple[NDArray[np.uint8], float]]
AHEAD = 4


@pytest.fixture(scope="module")
def model() -> jvjepa.Model:
    return tiny_model()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scene(tmp_path_factory.mktemp("live") / "scene.mp4")


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    assert readers() == []
    yield
    assert readers() == []


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "jvjepa-reader"]


def join_reader() -> None:
    for thread in readers():
        thread.join(60)
        assert not thread.is_alive()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes `tubelets` read from a function that yields frames, as a live source or a file."""

    def install(source: Callable[[], Frames], *, is_live: bool) -> None:
        def stream(*_: object, **__: object) -> Generator[tuple[NDArray[np.uint8], float]]:
            yield from source()

        monkeypatch.setattr(live.video, "stream", stream)
        monkeypatch.setattr(live, "is_live", lambda place: is_live)

    return install


def numbered(count: int) -> Frames:
    """Frames of `count` tubelets; the time is the frame's number, and so is its colour."""
    for i in range(2 * count):
        yield np.full((8, 8, 3), i, np.uint8), float(i)


def numbers(found: list[Tubelet]) -> list[int]:
    """Which tubelets these are."""
    assert all(tubelet.time % 2 == 1 for tubelet in found)
    assert all((tubelet.frame == int(tubelet.time)).all() for tubelet in found)
    return [int(tubelet.time) // 2 for tubelet in found]


def collect(incoming: Iterator[Tubelet], found: list[Tubelet]) -> None:
    """Appends one by one, so that `found` holds what came before an error."""
    for tubelet in incoming:
        found.append(tubelet)


def test_of_a_file_every_tubelet_comes_in_order(model: jvjepa.Model, clip: Path) -> None:
    found = list(tubelets(str(clip), model))
    frames, times = jvjepa.video.read(clip)
    assert len(found) == FRAMES // 2
    for i, tubelet in enumerate(found):
        pair = frames[2 * i : 2 * i + 2]
        np.testing.assert_array_equal(tubelet.frame, pair[1])
        np.testing.assert_array_equal(
            tubelet.pixels, jvjepa.video.preprocess(pair, model.config), strict=True
        )
        assert tubelet.time == times[2 * i + 1]
        assert tubelet.dropped == 0


def test_the_range_and_the_rate_are_passed_on(model: jvjepa.Model, clip: Path) -> None:
    found = [t.time for t in tubelets(str(clip), model, fps=5, start=1.0, end=2.5)]
    expected = [t for _, t in jvjepa.video.stream(clip, fps=5, start=1.0, end=2.5)]
    assert found == expected[1::2]
    assert len(found) == 4


def test_a_slow_caller_loses_nothing_of_a_file(
    model: jvjepa.Model, fake: Callable[..., None]
) -> None:
    made = 0

    def source() -> Frames:
        nonlocal made
        for made, item in enumerate(numbered(20), start=1):  # noqa: B007
            yield item

    fake(source, is_live=False)
    found = []
    for tubelet in tubelets("http://camera/", model):
        found.append(tubelet)
        assert made <= 2 * (len(found) + AHEAD + 1)  # the reader waits: memory is bounded
    assert numbers(found) == list(range(20))
    assert {tubelet.dropped for tubelet in found} == {0}


@pytest.mark.parametrize("count", [1, 3, 4, 5, 6, 50])
def test_of_a_live_source_the_oldest_are_dropped_and_counted(
    model: jvjepa.Model, fake: Callable[..., None], count: int
) -> None:
    fake(lambda: numbered(count), is_live=True)
    incoming = tubelets("http://camera/", model)
    found = [next(incoming)]
    join_reader()  # the caller is slower than the whole source
    found += incoming
    assert numbers(found)[1:] == list(range(numbers(found)[0] + 1, count))[-AHEAD:]
    assert numbers(found)[-1] == count - 1
    for place, tubelet in enumerate(found):
        assert tubelet.dropped == numbers([tubelet])[0] - place
    assert found[-1].dropped == count - len(found)


def test_the_end_of_a_live_source_drops_nothing(
    model: jvjepa.Model, fake: Callable[..., None]
) -> None:
    begin, full = threading.Event(), threading.Event()

    def source() -> Frames:
        frames = list(numbered(1 + AHEAD))
        yield from frames[:2]
        assert begin.wait(60)
        yield from frames[2:]
        full.set()

    fake(source, is_live=True)
    incoming = tubelets("http://camera/", model)
    found = [next(incoming)]
    begin.set()
    assert full.wait(60)
    join_reader()
    found += incoming
    assert numbers(found) == list(range(1 + AHEAD))
    assert found[-1].dropped == 0


def test_a_caller_that_keeps_up_loses_nothing_of_a_live_source(
    model: jvjepa.Model, fake: Callable[..., None]
) -> None:
    wanted = threading.Semaphore(0)

    def source() -> Frames:
        for i, item in enumerate(numbered(30)):
            if i % 2 == 0:
                assert wanted.acquire(timeout=60)
            yield item

    fake(source, is_live=True)
    incoming = tubelets("http://camera/", model)
    found = []
    for _ in range(30):
        wanted.release()
        found.append(next(incoming))
    assert next(incoming, None) is None
    assert numbers(found) == list(range(30))
    assert {tubelet.dropped for tubelet in found} == {0}


@pytest.mark.parametrize("is_live", [False, True])
@pytest.mark.parametrize("count", [0, 1, AHEAD])
def test_errors_come_with_their_type_after_the_tubelets_before_them(
    model: jvjepa.Model, fake: Callable[..., None], is_live: bool, count: int
) -> None:
    class CameraError(VideoError):
        pass

    def source() -> Frames:
        yield from numbered(count)
        raise CameraError("the camera fell down")

    fake(source, is_live=is_live)
    found: list[Tubelet] = []
    with pytest.raises(CameraError, match="fell down"):
        collect(tubelets("http://camera/", model), found)
    assert numbers(found) == list(range(count))


def test_errors_that_nobody_thought_of_come_too(
    model: jvjepa.Model, fake: Callable[..., None]
) -> None:
    def source() -> Frames:
        yield from numbered(2)
        raise SystemExit(3)

    fake(source, is_live=False)
    incoming = tubelets("http://camera/", model)
    assert numbers([next(incoming), next(incoming)]) == [0, 1]
    with pytest.raises(SystemExit):
        next(incoming)
    assert next(incoming, None) is None


def test_an_error_that_nobody_waits_for_is_not_printed(
    model: jvjepa.Model,
    fake: Callable[..., None],
    capfd: pytest.CaptureFixture[str],
) -> None:
    def source() -> Frames:
        yield from numbered(1)
        raise VideoError("the camera fell down")

    fake(source, is_live=True)
    incoming = tubelets("http://camera/", model)
    next(incoming)
    incoming.close()
    join_reader()
    assert capfd.readouterr() == ("", "")


def test_damage_keeps_its_type_and_the_tubelets_before(
    model: jvjepa.Model, clip: Path, tmp_path: Path
) -> None:
    damaged = cut_short(clip, tmp_path / "cut.mp4", 0.7)
    found: list[Tubelet] = []
    with pytest.raises(UnexpectedError, match=r"cut\.mp4: .* at \d"):
        collect(tubelets(str(damaged), model), found)
    assert 0 < len(found) < FRAMES // 2
    frames, _ = jvjepa.video.read(clip)
    for i, tubelet in enumerate(found):
        np.testing.assert_array_equal(tubelet.frame, frames[2 * i + 1])


def test_no_thread_before_the_first_tubelet_is_asked_for(model: jvjepa.Model, clip: Path) -> None:
    incoming = tubelets(str(clip), model)
    assert readers() == []
    incoming.close()
    assert next(incoming, None) is None
    with pytest.raises(VideoError, match="no such file"):
        next(tubelets("none.mp4", model))


@pytest.mark.parametrize("is_live", [False, True])
def test_closing_stops_the_reader_and_its_source(
    model: jvjepa.Model, fake: Callable[..., None], is_live: bool
) -> None:
    closed_in: list[threading.Thread] = []

    def source() -> Frames:
        try:
            while True:
                yield from numbered(100)
        finally:
            closed_in.append(threading.current_thread())

    fake(source, is_live=is_live)
    incoming = tubelets("http://camera/", model)
    next(incoming)
    (reader,) = readers()
    incoming.close()
    join_reader()
    assert closed_in == [reader]  # where it was used, and not by the garbage collector


def test_closing_does_not_wait_for_a_camera_that_hangs(
    model: jvjepa.Model, fake: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_PATIENCE", 0.01)
    answer = threading.Event()

    def source() -> Frames:
        yield from numbered(1)
        assert answer.wait(60)
        yield from numbered(1)

    fake(source, is_live=True)
    incoming = tubelets("http://camera/", model)
    next(incoming)
    incoming.close()
    assert len(readers()) == 1
    answer.set()
    join_reader()


def test_closing_ends_the_wait_for_a_lost_source(
    model: jvjepa.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = threading.Event()
    monkeypatch.setattr(jvjepa.video._log, "warning", lambda *_: lost.set())
    path = write_video(tmp_path / "live.ts", moving_frames(24), 30)
    with serve([path.read_bytes()] * 3 + [b""]) as (address, requests):  # then 503 for ever
        incoming = tubelets(address, model)
        # A reader that is ahead drops all but the newest few.
        found = [next(incoming) for _ in range(live._AHEAD)]
        assert len({tubelet.time for tubelet in found}) == live._AHEAD
        assert lost.wait(60)
        incoming.close()  # the reader waits for a second now, and would for 2, 4, 8... more
        join_reader()
    assert len(requests) < 6


def test_a_live_server_that_ends_and_comes_back(model: jvjepa.Model, tmp_path: Path) -> None:
    path = write_video(tmp_path / "live.ts", moving_frames(24), 30)
    with serve([path.read_bytes()]) as (address, _):
        incoming = tubelets(address, model, end=1.2)
        found = list(incoming)  # 0.8 s and, after a second's wait, again
    times = [tubelet.time for tubelet in found]
    assert times == sorted(set(times))
    assert times[-1] < 1.2
    frames, _ = jvjepa.video.read(path)
    np.testing.assert_array_equal(found[0].frame, frames[1])


@pytest.fixture(scope="module")
def session(model: jvjepa.Model) -> Session:
    return Session(model, Gate(tau=0.01), window=3)


def test_a_session_gives_what_gated_steps_give(
    model: jvjepa.Model, clip: Path, session: Session
) -> None:
    gate = Gate(tau=0.01, max_hold=5)
    session.restart(gate)
    state = gating.init_state(model.encoder, 1, 3)
    params = model.params["encoder"]
    for tubelet in tubelets(str(clip), model):
        result = session.step(tubelet)
        state, out = gating.step(model.encoder, params, state, tubelet.pixels[None], gate)
        np.testing.assert_array_equal(result.embedding, out.embedding[0], strict=True)
        assert result.is_new == bool(out.is_new[0])
        assert result.surprise == float(out.surprise[0])
        assert result.finite is True
        assert result.tubelet is tubelet
        assert result.seconds > 0
    expected = gating.statistics(state.gate, model.config.encoder, window=3)
    found = session.statistics()
    assert 0 < found.encoded[0] < found.seen[0] == FRAMES // 2
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_session_forgets_when_it_restarts(clip: Path, session: Session) -> None:
    found = list(tubelets(str(clip), session.model))
    runs = []
    for _ in range(2):
        session.restart(Gate(tau=0.01))
        assert session.statistics().seen[0] == 0
        runs.append(np.stack([session.step(tubelet).embedding for tubelet in found]))
    np.testing.assert_array_equal(*runs)


def test_after_a_session_is_made_nothing_compiles(
    model: jvjepa.Model, compilations: Callable[[], int]
) -> None:
    session = Session(model, Gate(), window=2)
    tubelet = Tubelet(np.ones((2, 64, 64, 3), np.float32), np.zeros((8, 8, 3), np.uint8), 0.0, 0)
    before = compilations()
    session.step(tubelet)
    session.step(tubelet)
    session.restart(Gate(tau=0.5, max_hold=3, settle=2))
    session.step(tubelet)
    session.statistics()
    assert compilations() == before


def test_what_is_not_finite_is_flagged(session: Session) -> None:
    session.restart(Gate())
    pixels = np.full((2, 64, 64, 3), np.nan, np.float32)
    result = session.step(Tubelet(pixels, np.zeros((8, 8, 3), np.uint8), 0.0, 0))
    assert (result.finite, result.is_new) == (False, True)
    assert np.isnan(result.surprise)


def test_statistics_survive_an_interrupted_step(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.restart(Gate())
    tubelet = Tubelet(np.ones((2, 64, 64, 3), np.float32), np.zeros((8, 8, 3), np.uint8), 0.0, 0)
    session.step(tubelet)
    real = gating.step

    def interrupted(*arguments: object, **how: object) -> None:
        jax.block_until_ready(real(*arguments, **how))
        raise KeyboardInterrupt  # as Ctrl-C does between the step's end and its result's arrival

    monkeypatch.setattr(gating, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.step(tubelet)
    assert session.state.gate.seen.is_deleted()  # or this test tests nothing
    found = session.statistics()
    assert (found.seen[0], found.encoded[0], found.compute) == (1, 1, 1.0)
