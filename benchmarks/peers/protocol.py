"""The line protocol between a benchmark and its competitors, each in a process of its own.

One line of JSON each way. A worker blocks on its standard input between requests, so that only
one competitor computes at a time and the rounds of all of them can be interleaved. This module
uses the standard library only: it is imported in the environments of all competitors.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

Message = dict[str, Any]
Handler = Callable[[Message], Message]

STDERR_TAIL = 4000

# Environment of a worker that has glibc keep what is freed. By default it returns large blocks to
# the system, and faulting them in again costs torch much of each call on a CPU.
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
}


def versions(names: Sequence[str]) -> dict[str, str]:
    """Looks up the versions of installed distributions.

    Args:
        names: Names as on the package index.

    Returns:
        The version of each.
    """
    return {name: importlib.metadata.version(name) for name in names}


def time_calls(run: Callable[[], object], repeats: int) -> list[float]:
    """Times calls one by one.

    Args:
        run: The call; it must return only when its result is computed.
        repeats: How many.

    Returns:
        The wall-clock seconds of each call.
    """
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return seconds


def serve(handlers: Mapping[str, Handler]) -> None:
    """Answers requests on standard input until `quit` or its end; the loop of a worker.

    Whatever else is written to standard output goes to standard error. An exception in a handler
    ends the worker, and its traceback reaches the main side.

    Args:
        handlers: The function of each operation, from the request to the reply.
    """
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        message = json.loads(line)
        if message["op"] == "quit":
            return
        replies.write(json.dumps(handlers[message["op"]](message)) + "\n")
        replies.flush()


class WorkerError(RuntimeError):
    """A worker that ended or answered something else than was asked."""


class Worker:
    """The main side of one worker process; use it as a context manager."""

    def __init__(
        self, python: str | Path, script: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        """Starts the process.

        Args:
            python: The interpreter of the competitor's environment.
            script: The worker to run.
            environment: Variables to add to those of this process.
        """
        self.name = script.stem
        self._stderr = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [str(python), str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**os.environ, **(environment or {})},
            encoding="utf-8",
        )

    def __enter__(self) -> "Worker":
        """Returns this worker."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends the process."""
        self.close()

    def request(self, message: Message) -> Message:
        """Sends one request and waits for its reply.

        Args:
            message: The request.

        Returns:
            The reply.

        Raises:
            WorkerError: If the worker ends before it replies, or replies with no JSON object.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps(message) + "\n")
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            raise self._error(f"ended with exit code {code} at {message}")
        try:
            reply = json.loads(line)
        except json.JSONDecodeError as error:
            raise self._error(f"answered {line!r} to {message}") from error
        if not isinstance(reply, dict):
            raise self._error(f"answered {line!r} to {message}")
        return reply

    def time(self, what: str, repeats: int) -> list[float]:
        """Has the worker time one of its subjects.

        Args:
            what: The subject.
            repeats: How many calls.

        Returns:
            The seconds of each call.

        Raises:
            WorkerError: If it fails.
        """
        reply = self.request({"op": "time", "what": what, "repeats": repeats})
        seconds = reply.get("seconds")
        if not isinstance(seconds, list) or len(seconds) != repeats:
            raise self._error(f"answered {reply} to time {what} x {repeats}")
        return seconds

    def close(self) -> None:
        """Asks the process to quit, and kills it if it does not within ten seconds."""
        try:
            self._process.communicate(json.dumps({"op": "quit"}) + "\n", timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        self._stderr.close()

    def _error(self, what: str) -> WorkerError:
        """Returns an error with the end of the worker's standard error."""
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - STDERR_TAIL))
        tail = self._stderr.read().decode(errors="replace")
        return WorkerError(f"{self.name} {what}\n{tail}")
