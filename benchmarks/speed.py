"""The speed table: jvjepa, areas, transformers, torch.compile and saccadic, in one run.

    python benchmarks/speed.py                       # all rows: about half an hour on two cores
    python benchmarks/speed.py --rows '^step' --rounds 9
    python benchmarks/speed.py --resume              # goes on where a run was broken off

Rows are in `rows.py`, and what the numbers mean is in the notes above the table. Rows are measured
one after the other; within a row everybody has a turn in each round. Every competitor is a process
of its own, only one of them computes at a time, and all get the same setting of the C library's
allocator, without which torch loses up to half of its time to page faults (`--default-allocator`
measures without). After each row `table.json` and `table.md` are written anew.

It runs where JAX runs: on a GPU in bfloat16, and with peers that see that GPU too. saccadic gets a
virtual environment, made at the first run. jax-ml/bonsai is not measured, because no registry has
it: `bonsai` on PyPI is an LDAP client, and `jax-bonsai` is empty.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import machine
import table
from peers import make_env
from peers.protocol import KEEP_FREED_MEMORY, Worker, WorkerError
from rows import BASELINE, COMPETITORS, ROWS, Row
from table import Result

HERE = Path(__file__).parent
PEERS = HERE / "peers"
ENVIRONMENT = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # a GPU has several of us
    "JAX_ENABLE_COMPILATION_CACHE": "0",
    "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    "JAX_TRACEBACK_FILTERING": "off",  # so that a traceback ends with the error
}
LONG = 5.0  # seconds of a call that needs no other one before it to be warm
EAGER_COPIES = 3  # of the scores, that eager attention has at a time

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Where a run measures.

    Args:
        platform: that of JAX, "cpu" or "gpu".
        device: its name.
        memory: its bytes.
        pythons: the interpreter of each worker; of those that cannot run, the reason.
        environment: variables of all workers.
    """

    platform: str
    device: str
    memory: int
    pythons: dict[str, Path | str]
    environment: dict[str, str]

    def start(self, worker: str) -> Worker:
        """Starts a worker."""
        script = PEERS / f"{worker}_worker.py"
        return Worker(self.pythons[worker], script, self.environment)

    def describe(self) -> list[str]:
        """Lines about the machine."""
        lines = machine.describe().splitlines()
        if self.platform != "cpu":
            lines.append(f"Device: {self.device}, {self.memory / 2**30:.1f} GiB for JAX")
        kept = KEEP_FREED_MEMORY.items() <= self.environment.items()
        return [*lines, f"Allocator: {'keeps freed memory' if kept else 'as it is'}"]


def find_setting(saccadic: Path | str, *, default_allocator: bool = False) -> Setting:
    """Asks JAX what it runs on.

    Args:
        saccadic: its interpreter, or why there is none.
        default_allocator: leave the C library's allocator as it is.

    Returns:
        The setting.
    """
    own = Path(sys.executable)
    pythons: dict[str, Path | str] = {"jvjepa": own, "transformers": own, "saccadic": saccadic}
    environment = ENVIRONMENT | ({} if default_allocator else KEEP_FREED_MEMORY)
    with Worker(own, PEERS / "jvjepa_worker.py", environment) as worker:
        about = worker.request({"op": "about"})
    return Setting(
        platform=about["platform"],
        device=about["device"],
        memory=about["memory"] or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        pythons=pythons,
        environment=environment,
    )


def measure(row: Row, setting: Setting, rounds: int | None = None) -> Result:
    """Measures a row.

    Args:
        row: the row, on the setting's platform.
        setting: where.
        rounds: None means the row's own.

    Returns:
        `title`, `work`, `competitors` (of each the `seconds` of all calls, `compile_seconds`,
        `base_bytes`, `peak_bytes` and `versions`), `matmul` (seconds by competitor), and
        `left_out`, the reason by competitor.
    """
    work = dataclasses.asdict(row.work)
    result: Result = {"title": row.title, "work": work}
    result |= {"competitors": {}, "matmul": {}, "left_out": {}}
    measured, matmul, workers = result["competitors"], result["matmul"], {}

    def leave_out(name: str, reason: str) -> None:
        result["left_out"][name] = reason
        for part in (measured, matmul, workers):
            part.pop(name, None)

    def attempt(name: str, what: Callable[[Worker], _T]) -> _T | None:
        try:
            return what(workers[name])
        except WorkerError as error:
            leave_out(name, last_line(error))
            return None

    with contextlib.ExitStack() as stack:
        for name in row.competitors:
            if reason := why_not(row, name, setting):
                leave_out(name, reason)
            else:
                workers[name] = stack.enter_context(setting.start(COMPETITORS[name].worker))
        for name in list(workers):  # nobody is set up while others still import
            attempt(name, lambda worker: worker.request({"op": "ready"}))
        for name in list(workers):
            message = {"op": "setup", "work": work, "variant": COMPETITORS[name].variant}
            facts = attempt(name, lambda worker, message=message: worker.request(message))
            if facts is not None:
                long = facts["call_seconds"] >= LONG
                measured[name] = {**facts, "seconds": [facts["call_seconds"]] if long else []}
        matmul |= {name: [] for name in _one_of_each_worker(list(workers))}
        for done in range(rounds or row.rounds):
            for name in list(workers):
                facts = measured[name]
                has_call = done == 0 and len(facts["seconds"]) == 1
                attempt(name, functools.partial(_take_turn, facts, matmul.get(name), has_call))
    return result


def _take_turn(
    facts: dict[str, Any], matmul: list[float] | None, has_call: bool, worker: Worker
) -> None:
    if not has_call:
        warm_up, calls = turn(facts["call_seconds"])
        facts["seconds"] += worker.time("work", warm_up + calls)[warm_up:]
    if matmul is not None:
        matmul += worker.time("matmul", 2)[1:]  # the first one finds cold caches, or compiles


def _one_of_each_worker(names: Sequence[str]) -> list[str]:
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(COMPETITORS[name].worker, name)
    return list(first.values())


def turn(seconds: float) -> tuple[int, int]:
    """Says how many calls make a turn.

    Args:
        seconds: that a call takes.

    Returns:
        Calls that do not count, because they find the caches as others have left them, and calls
        that do: half a second of them at least.
    """
    if seconds >= 1:
        return 0, 1
    return 1, min(50, max(2, math.ceil(0.5 / seconds)))


def why_not(row: Row, name: str, setting: Setting) -> str | None:
    """Says why a competitor cannot take part in a row; None if it can, as far as is known."""
    python = setting.pythons[COMPETITORS[name].worker]
    if isinstance(python, str):
        return python
    needed = EAGER_COPIES * row.work.score_bytes
    if name == "transformers eager" and row.work.kind == "clip" and needed > setting.memory / 2:
        return f"its attention scores alone would take {needed / 1e9:.0f} GB"
    return None


def last_line(error: WorkerError) -> str:
    """Says in a line why a worker ended; the last line of a traceback names the error."""
    first, *rest = str(error).splitlines()
    lines = [line.strip() for line in rest if line.strip()]
    return ": ".join([first.partition(" at {")[0], *lines[-1:]])


def find_saccadic(folder: Path, *, make: bool) -> Path | str:
    """Returns saccadic's interpreter, or why there is none.

    Args:
        folder: its virtual environment.
        make: make the environment if there is none; several GB.

    Returns:
        The interpreter, or the reason.
    """
    python = make_env.python_of(folder.absolute())
    if python.exists():
        return python
    if not make:
        return f"there is no environment for it in {folder.name}"
    try:
        return make_env.make(folder.absolute())
    except subprocess.CalledProcessError as error:
        return f"its environment could not be made: {error}"


def load(path: Path, machine_lines: list[str]) -> dict[str, Result]:
    """Reads the rows of an earlier run, to go on with it.

    Args:
        path: its JSON, which need not exist.
        machine_lines: `Setting.describe` of this run.

    Returns:
        The rows in which jvjepa was measured.

    Raises:
        SystemExit: the earlier run was elsewhere.
    """
    if not path.exists():
        return {}
    report = json.loads(path.read_text())
    if report["machine"] != machine_lines:
        there, here = ("; ".join(lines) for lines in (report["machine"], machine_lines))
        raise SystemExit(f"{path} is of another machine ({there}), not of this one ({here})")
    return {key: row for key, row in report["rows"].items() if BASELINE in row["competitors"]}


def is_done(row: Row, done: dict[str, Result]) -> bool:
    """Says whether the rows of an earlier run have this one, with the same work."""
    return row.key in done and done[row.key]["work"] == dataclasses.asdict(row.work)


def write(folder: Path, machine_lines: list[str], results: dict[str, Result]) -> None:
    """Writes `table.json` and `table.md`, each whole or not at all."""
    order = [row.key for row in ROWS]
    ordered = dict(sorted(results.items(), key=lambda item: order.index(item[0])))
    report: dict[str, Any] = {"machine": machine_lines, "rows": ordered}
    folder.mkdir(parents=True, exist_ok=True)
    contents = {"table.json": json.dumps(report, indent=1) + "\n"}
    contents["table.md"] = table.markdown(report)
    for name, text in contents.items():
        work = folder / f"{name}.part"
        work.write_text(text, encoding="utf-8")
        work.replace(folder / name)


def choose(pattern: str, platform: str, *, layers: int | None, quick: bool) -> list[Row]:
    """Returns the rows to measure.

    Args:
        pattern: regular expression that is searched in the keys.
        platform: "cpu" or "gpu".
        layers: instead of the rows' own; None leaves them.
        quick: the rows that are marked so, and tiny.

    Returns:
        The rows, in the order of the table.

    Raises:
        SystemExit: there is none.
    """
    rows = [row for row in ROWS if re.search(pattern, row.key) and (row.quick or not quick)]
    if not rows:
        raise SystemExit(f"no row matches {pattern!r}; there are {[row.key for row in ROWS]}")
    rows = [row.on(platform) for row in rows]
    rows = [row.tiny() for row in rows] if quick else rows
    return [row.with_layers(layers) for row in rows] if layers else rows


def main() -> int:
    """Measures and writes; exit code 1 if jvjepa failed in a row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="", metavar="REGEX", help="which; default: all")
    parser.add_argument("--rounds", type=int, help="turns of everybody; default: the rows' own")
    parser.add_argument("--layers", type=int, help="of every model; default: the rows' own")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for the table")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    parser.add_argument("--quick", action="store_true", help="a smoke test: tiny, meaningless")
    parser.add_argument("--saccadic", type=Path, default=make_env.DEFAULT_FOLDER, metavar="VENV")
    parser.add_argument("--default-allocator", action="store_true", help="torch pays for it")
    options = parser.parse_args()
    saccadic = find_saccadic(options.saccadic, make=not options.quick)
    setting = find_setting(saccadic, default_allocator=options.default_allocator)
    rows = choose(options.rows, setting.platform, layers=options.layers, quick=options.quick)
    about = setting.describe()
    results = load(options.out / "table.json", about) if options.resume else {}
    failed = []
    for row in rows:
        if is_done(row, results):
            continue
        result = results[row.key] = measure(row, setting, options.rounds)
        write(options.out, about, results)
        names = list(result["competitors"])
        print(row.key, *table.cells(result, names)[1:], sep=" | ", flush=True)
        for name, reason in result["left_out"].items():
            print(f"  {name} is left out: {reason}", flush=True)
        failed += [row.key] if BASELINE in result["left_out"] else []
    print(options.out / "table.md")
    for key in failed:
        print(f"failed: {key}: {results[key]['left_out'][BASELINE]}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
