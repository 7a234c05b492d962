"""The side of a worker: it builds one subject, says what that needs, and times it.

Standard library only; imported in the environments of all competitors.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence

import process
from protocol import Message, serve, time_calls, versions
from work import Work

KEPT = 2 << 30  # bytes that a worker may keep while others compute


@dataclasses.dataclass(frozen=True)
class Subject:
    """What one worker times.

    Args:
        run: the work, which returns when its result is there.
        check: raises RuntimeError unless the last result is sound.
        multiply: the products of `Work.matmul_shapes`.
        compile_seconds: what came before the first call; None if the first call compiles.
        settle: calls until the next one is the work that is meant.
        peak: the most bytes used on the device so far; None for a CPU, whose memory is the
            process's.
    """

    run: Callable[[], object]
    check: Callable[[], None]
    multiply: Callable[[], object]
    compile_seconds: float | None = 0.0
    settle: int = 0
    peak: Callable[[], int] | None = None


def serve_subject(
    build: Callable[[Work, str], Subject],
    packages: Sequence[str],
    about: Callable[[Message], Message] | None = None,
) -> None:
    """Answers `ready`, `setup`, `time` and `quit`, and `about` where the worker can.

    Args:
        build: makes the subject of a piece of work and a variant, both of the `setup` request.
        packages: whose versions the reply names.
        about: answers for the machine.
    """
    current: list[Subject] = []

    def setup(message: Message) -> Message:
        base = process.resident()
        subject = build(Work(**message["work"]), message["variant"])
        current.append(subject)
        for _ in range(subject.settle):
            subject.run()
        process.reset_peak()
        (first,) = time_calls(subject.run, 1)
        subject.check()
        if subject.peak is None:
            peak = process.peak()
        else:
            base, peak = 0, subject.peak()
        compiles = subject.compile_seconds is None
        seconds = time_calls(subject.run, 1)[0] if compiles or first < 2 else first
        return {
            "versions": versions(packages),
            "base_bytes": base,
            "peak_bytes": peak,
            "compile_seconds": first - seconds if compiles else subject.compile_seconds,
            "call_seconds": seconds,
        }

    def time_it(message: Message) -> Message:
        (subject,) = current
        run = {"work": subject.run, "matmul": subject.multiply}[message["what"]]
        seconds = time_calls(run, message["repeats"])
        if message["what"] == "work":
            subject.check()
        process.give_back(KEPT)
        return {"seconds": seconds}

    handlers = {"ready": lambda _: {}, "setup": setup, "time": time_it}
    serve(handlers if about is None else {**handlers, "about": about})


def timed(function: Callable[[], object]) -> tuple[object, float]:
    """Returns what a function returns, and the seconds that it took."""
    start = time.perf_counter()
    return function(), time.perf_counter() - start
