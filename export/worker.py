"""Calls a function in a process of its own, which never outlives the one that asked for it.

Unlike `multiprocessing` it imports nothing of the caller's script, which may have no
`if __name__ == "__main__":`, or be no file.
"""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from jvjepa.errors import InputError

_T = TypeVar("_T")


def call(who: str, function: Callable[..., _T], *arguments: Any) -> _T:
    """Calls a function in a process of its own; what it prints is seen as if this one did.

    The process has ended when this is left, however that is, and ends if this one is killed.

    Args:
        who: what messages call the process.
        function: of a module that can be imported.
        arguments: what can be pickled.

    Returns:
        What the function returns.

    Raises:
        InputError: the process was killed, or ended without a result.
        Exception: whatever the function raises, with its traceback as a note.
    """
    command = [sys.executable, *(f"-W{option}" for option in sys.warnoptions)]
    # Modules are found where this process finds them, and not in the folder that it runs in.
    command += ["-P", "-m", "jvjepa.export.worker"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(pickle.dumps((function, arguments)))
        file.seek(0)
        with subprocess.Popen(
            [*command, str(file.fileno())],
            env=environment,
            pass_fds=[file.fileno()],
            stdin=subprocess.PIPE,  # nothing is written; its end says that this process has ended
        ) as process:
            try:
                process.wait()
            finally:
                process.kill()  # if it still runs, it must not write any more
                process.wait()
        file.seek(0)
        answer = file.read()
    if not answer:
        raise InputError(f"{who} {_end(process.returncode)}")
    result, error = pickle.loads(answer)
    if error is not None:
        raise error
    return result


def _end(status: int) -> str:
    if status < 0:
        return (
            f"was killed (signal {-status}); for lack of memory, if nobody did it: it needs about "
            "five times the size of the float32 weights"
        )
    return f"ended with exit status {status} and without a result; what it printed says why"


def main(descriptor: int) -> None:
    """Answers one call: reads it from an open file, and leaves (result, exception) there."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's, who ends this process
    threading.Thread(target=_end_with_caller, daemon=True).start()
    with open(descriptor, "r+b") as file:
        request = file.read()
        file.seek(0)
        file.truncate()  # what is there is the answer, or there is none
        function, arguments = pickle.loads(request)
        try:
            answer = pickle.dumps((function(*arguments), None))
        except Exception as error:  # handed to the caller, who raises it
            error.add_note(traceback.format_exc())  # which is not pickled
            answer = pickle.dumps((None, error))
            pickle.loads(answer)  # some exceptions can only be written; those end this process
        file.write(answer)


def _end_with_caller() -> None:
    """Ends this process when the pipe to it is closed."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]))
