"""The predictor and the classifier on a CPU against transformers, in the same run, interleaved.

    python benchmarks/heads.py

The released V-JEPA 2 ViT-L for Something-Something v2 at full size, with random weights: float32,
batch 1, all cores, transformers with SDPA. Its encoder does not run; the tokens are random, those
of 16 frames at 256 px (2,048). Both read the same checkpoint, ours converted from theirs, and each
is a process of its own that computes while the other waits. Both get the same setting of the C
library's allocator (see `cpu.py`; `--default-allocator` measures without).

Prints medians and ranges of the rounds, ratios of medians, and how far the two results are apart;
exit code 1 if that is more than 1e-4 of the largest value anywhere. Linux only.
"""

import argparse
import contextlib
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import conversion
import machine
import numpy as np
from numpy.typing import NDArray
from peers.protocol import KEEP_FREED_MEMORY, Message, Worker, serve, time_calls, versions
from rich.console import Console
from rich.table import Table

RELEASE = "vjepa2-vitl-fpc16-256-ssv2"
GRID = (8, 16, 16)
TOKENS, WIDTH = math.prod(GRID), 1024
TOLERANCE = 1e-4
QUARTER = "predictor, context 1/4, targets the rest"
FULL = "predictor, all are context and target"  # the masks that transformers assumes
CLASSIFIER = "pooler and classifier"
PARTS = (QUARTER, FULL, CLASSIFIER)
PEER = "JVJEPA_HEADS_PEER"  # makes this script a worker: the protocol starts scripts bare


class Subject(NamedTuple):
    """What one competitor does for one part.

    Args:
        run: the forward pass; returns when its result is there.
        compile_seconds: what came before the first one.
    """

    run: Callable[[], NDArray[np.float32]]
    compile_seconds: float = 0.0


class Inputs(NamedTuple):
    """The encoder's tokens [1, N, D], and the (context, target) ids [1, M] of each predictor."""

    tokens: NDArray[np.float32]
    masks: dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]


def make_inputs() -> Inputs:
    """Draws the same values in every process."""
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((1, TOKENS, WIDTH), dtype=np.float32)
    order, every = rng.permutation(TOKENS)[None], np.arange(TOKENS)[None]
    seen, hidden = np.split(order, [TOKENS // 4], axis=1)
    masks = {QUARTER: (np.sort(seen), np.sort(hidden)), FULL: (every, every)}
    return Inputs(tokens, masks)


def build_jvjepa(folder: Path, inputs: Inputs) -> dict[str, Subject]:
    """Compiles ours."""
    import jax

    import jvjepa
    from jvjepa import selection

    model = jvjepa.load(folder / "jvjepa")
    params = jax.block_until_ready(model.params)

    def predict(params: Any, tokens: jax.Array, seen: jax.Array, hidden: jax.Array) -> jax.Array:
        context = selection.gather(tokens, seen)
        return model.predictor.apply({"params": params}, context, seen, hidden, GRID).targets

    def classify(params: Any, tokens: jax.Array) -> jax.Array:
        return model.classifier.apply({"params": params}, tokens)

    def compiled(forward: Callable[..., jax.Array], *arguments: Any) -> Subject:
        start = time.perf_counter()
        run = jax.jit(forward).lower(*arguments).compile()
        seconds = time.perf_counter() - start
        return Subject(lambda: np.asarray(run(*arguments)), seconds)

    tokens = jax.device_put(inputs.tokens)
    subjects = {
        part: compiled(predict, params["predictor"], tokens, *map(jax.numpy.asarray, ids))
        for part, ids in inputs.masks.items()
    }
    subjects[CLASSIFIER] = compiled(classify, params["classifier"], tokens)
    return subjects


def build_transformers(folder: Path, inputs: Inputs) -> dict[str, Subject]:
    """Loads theirs; the oracle runs it with SDPA, and shares its tensors with NumPy."""
    import torch

    from jvjepa.convert.oracle import Oracle

    torch.set_num_threads(_cores())
    oracle = Oracle.from_folder(folder / "hf", classifier=True, rounding="float32")

    def predictor(seen: NDArray[np.int64], hidden: NDArray[np.int64]) -> Subject:
        return Subject(lambda: oracle.predict(inputs.tokens, seen, hidden))

    subjects = {part: predictor(*ids) for part, ids in inputs.masks.items()}
    subjects[CLASSIFIER] = Subject(lambda: oracle.classify(inputs.tokens))
    return subjects


BUILD = {"jvjepa": build_jvjepa, "transformers": build_transformers}
PACKAGES = {"jvjepa": ["jax", "jaxlib", "flax"], "transformers": ["torch", "transformers"]}


def work(peer: str) -> None:
    """Serves one competitor: `setup` builds it and saves what it computes, `time` times a part."""
    subjects: dict[str, Subject] = {}

    def setup(message: Message) -> Message:
        folder = Path(message["folder"])
        subjects.update(BUILD[peer](folder, make_inputs()))
        for part, subject in subjects.items():
            np.save(_result(folder, peer, part), subject.run())
        seconds = {part: subject.compile_seconds for part, subject in subjects.items()}
        return {"versions": versions(PACKAGES[peer]), "compile_seconds": seconds}

    def time_part(message: Message) -> Message:
        return {"seconds": time_calls(subjects[message["what"]].run, message["repeats"])}

    serve({"setup": setup, "time": time_part})


def main() -> int:
    """Measures and prints; exit code 1 if the results differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="for 3 GB of files; default: a temporary one")
    parser.add_argument(
        "--default-allocator",
        action="store_true",
        help="leave the C library's allocator as it is, which torch pays for",
    )
    options = parser.parse_args()
    environment = {} if options.default_allocator else KEEP_FREED_MEMORY
    seconds: dict[tuple[str, str], list[float]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        make_checkpoints(folder)
        workers = {
            peer: stack.enter_context(Worker(sys.executable, Path(__file__), environment | role))
            for peer, role in ((peer, {PEER: peer}) for peer in BUILD)
        }
        setup = {"op": "setup", "folder": str(folder)}
        facts = {peer: worker.request(setup) for peer, worker in workers.items()}
        errors = {part: relative_error(folder, part) for part in PARTS}
        for _ in range(options.rounds):
            for part in PARTS:
                for peer, worker in workers.items():
                    # the first call after the other has run finds cold caches, as the other's does
                    seconds.setdefault((peer, part), []).extend(worker.time(part, 3)[1:])
    print(f"{machine.describe()}\nallocator: {environment or 'default'}")
    for peer, fact in facts.items():
        print(f"{peer}: {fact['versions']}, {_cores()} threads")
    Console(width=150).print(report(seconds, facts["jvjepa"]["compile_seconds"], errors))
    apart = [part for part, error in errors.items() if not error <= TOLERANCE]
    for part in apart:
        print(f"{part}: the results differ by {errors[part]:.1e}, more than {TOLERANCE:.0e}")
    return 1 if apart else 0


def make_checkpoints(folder: Path) -> None:
    """Writes theirs into `hf` and ours into `jvjepa`."""
    from jvjepa.convert import convert

    conversion.make(RELEASE, folder)
    convert(str(folder / "hf"), folder / "jvjepa")


def relative_error(folder: Path, part: str) -> float:
    """The largest difference of the results over the largest value; not finite if one is not."""
    ours, theirs = (np.load(_result(folder, peer, part)) for peer in BUILD)
    if ours.shape != theirs.shape:
        raise RuntimeError(f"{part}: jvjepa gave {ours.shape}, transformers {theirs.shape}")
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def report(
    seconds: Mapping[tuple[str, str], list[float]],
    compile_seconds: Mapping[str, float],
    errors: Mapping[str, float],
) -> Table:
    """One row for each part."""
    table = Table("part", title="median (min to max) of all rounds")
    for column in ("jvjepa, ms", "transformers, ms", "transformers / jvjepa", "relative error"):
        table.add_column(column, justify="right")
    table.add_column("compilation, s", justify="right")
    for part in PARTS:
        ours, theirs = (seconds[peer, part] for peer in BUILD)
        table.add_row(
            part,
            _milliseconds(ours),
            _milliseconds(theirs),
            f"{statistics.median(theirs) / statistics.median(ours):.2f} x",
            f"{errors[part]:.1e}",
            f"{compile_seconds[part]:.1f}",
        )
    return table


def _milliseconds(seconds: list[float]) -> str:
    low, middle, high = (1e3 * f(seconds) for f in (min, statistics.median, max))
    return f"{middle:.0f} ({low:.0f} to {high:.0f})"


def _result(folder: Path, peer: str, part: str) -> Path:
    return folder / f"{peer}-{PARTS.index(part)}.npy"


def _cores() -> int:
    """Cores that this process may use; XLA takes as many threads."""
    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    if PEER in os.environ:
        work(os.environ[PEER])
    else:
        sys.exit(main())
