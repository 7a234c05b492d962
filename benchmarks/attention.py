"""The attention backends on a CPU against each other and torch's SDPA, in the same run.

    python benchmarks/attention.py            # up to 4,608 tokens
    python benchmarks/attention.py --long     # and 64 frames at 384 px: 18,432 tokens

16 heads of 64 channels (ViT-L), float32, batch 1, all cores, random values. Each backend at each
size is a process of its own; they compute in turns. All get the same setting of the C library's
allocator (see `speed.py`; `--default-allocator` measures without).

`--long` also runs one whole ViT-L layer over the 18,432 tokens with `chunked`. What would need more
than 4 GiB of scores is compiled, for its memory, and not run.

Prints medians and ranges, how far the process's memory peaked above where it was before the first
call, what XLA says that its program needs besides arguments and results, and the largest error of
64 queries against float64 over their largest value. Exit code 1 if an error is above 1e-5, or the
layer's memory above 2 GB. Linux only.
"""

import argparse
import contextlib
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import machine
import numpy as np
from numpy.typing import NDArray
from peers import process
from peers.protocol import KEEP_FREED_MEMORY, Message, Worker, serve, time_calls

HEADS, WIDTH = 16, 64
SIZES = {
    "a step": (256, 2048),
    "16f, 192 px": (1152, 1152),
    "16f, 256 px": (2048, 2048),
    "16f, 384 px": (4608, 4608),
}
LONG = ("64f, 384 px", (18432, 18432))
GRID = (32, 24, 24)  # of the long clip
PEERS = ("chunked", "xla", "torch")
MAX_SCORES = 4 << 30  # bytes
TOLERANCE = 1e-5
LAYER_LIMIT = 2e9  # bytes
PEER = "JVJEPA_ATTENTION_PEER"  # makes this script a worker: the protocol starts scripts bare


class Subject(NamedTuple):
    """One competitor at one size.

    Args:
        run: the computation; returns when its result is there.
        temporary: bytes of XLA's program besides arguments and results; None for torch.
    """

    run: Callable[[], object]
    temporary: int | None = None


def make_inputs(queries: int, keys: int) -> list[NDArray[np.float32]]:
    """Draws q [1, N, H, K], k and v [1, M, H, K]; the same values in every process."""
    rng = np.random.default_rng(0)
    shapes = ((1, n, HEADS, WIDTH) for n in (queries, keys, keys))
    return [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]


def build_jax(backend: str, queries: int, keys: int) -> Subject:
    """Compiles a backend of ours."""
    import jax

    from jvjepa.attention import attention

    arrays = [jax.device_put(x) for x in make_inputs(queries, keys)]
    run = jax.jit(lambda q, k, v: attention(q, k, v, backend=backend)).lower(*arrays).compile()
    memory = run.memory_analysis().temp_size_in_bytes
    return Subject(lambda: run(*arrays).block_until_ready(), memory)


def build_torch(queries: int, keys: int) -> Subject:
    """Lays the inputs out as torch wants them: [1, H, N, K]."""
    import torch

    torch.set_num_threads(process.cores())
    arrays = [torch.from_numpy(x).transpose(1, 2).contiguous() for x in make_inputs(queries, keys)]

    @torch.inference_mode()
    def run() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(*arrays).transpose(1, 2)

    return Subject(run)


def build_layer(backend: str) -> Subject:
    """Compiles one layer of ViT-L over the long clip."""
    import jax
    import jax.numpy as jnp

    from jvjepa import registry, rope
    from jvjepa.layers import Block, RopeTables

    config = registry.get("vjepa2-vitg-fpc64-384").config.encoder  # for its grid
    layout = rope.layout(config, *GRID[1:])
    positions = rope.positions(jnp.arange(math.prod(GRID))[None], layout)
    tables = RopeTables(*rope.tables(positions, WIDTH, config.rope))
    vitl = registry.get("vjepa2-vitl-fpc64-256").config.encoder.block
    block = Block(vitl, jnp.float32, jnp.float32, backend)
    x = jax.random.normal(jax.random.key(0), (1, math.prod(GRID), vitl.hidden_size))
    full = {"in_areas": None, "mask": None, "areas": None}
    params = jax.jit(lambda x: block.init(jax.random.key(1), x, tables=None, **full))(x[:, :2])
    run = jax.jit(lambda params, x: block.apply(params, x, tables=tables, **full)[0])
    run = run.lower(params, x).compile()
    memory = run.memory_analysis().temp_size_in_bytes
    return Subject(lambda: run(params, x).block_until_ready(), memory)


def work(peer: str) -> None:
    """Serves one competitor: `setup` builds it for one size and runs it once, `time` times it."""
    built: list[Subject] = []

    def setup(message: Message) -> Message:
        if message["layer"]:
            subject = build_layer(peer)
        elif peer == "torch":
            subject = build_torch(message["queries"], message["keys"])
        else:
            subject = build_jax(peer, message["queries"], message["keys"])
        built.append(subject)
        reply: Message = {"temporary": subject.temporary}
        if message["run"]:
            out, reply["peak"] = _peak(subject.run)
        if message["result"]:
            np.save(message["result"], np.asarray(out)[:, _sample(np.shape(out)[1])])
        return reply

    def time_it(message: Message) -> Message:
        return {"seconds": time_calls(built[0].run, message["repeats"])}

    serve({"setup": setup, "time": time_it})


def _peak(run: Callable[[], object]) -> tuple[object, int]:
    """Runs, and returns with the result the bytes by which the process's memory peaked."""
    process.reset_peak()
    before = process.resident()
    out = run()
    return out, process.peak() - before


def _sample(queries: int) -> NDArray[np.int64]:
    """The queries whose results are compared."""
    return np.sort(np.random.default_rng(1).permutation(queries)[:64])


def _error(file: Path, queries: int, keys: int) -> float:
    q, k, v = (x[0].astype(np.float64).swapaxes(0, 1) for x in make_inputs(queries, keys))
    scores = q[:, _sample(queries)] @ k.swapaxes(1, 2) / math.sqrt(WIDTH)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = (weights / weights.sum(-1, keepdims=True)) @ v
    return float(np.abs(np.load(file)[0].swapaxes(0, 1) - expected).max() / np.abs(expected).max())


def main() -> int:
    """Measures and prints; exit code 1 if a result is wrong or the layer too large."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--long", action="store_true", help="also 18,432 tokens; minutes")
    parser.add_argument(
        "--default-allocator",
        action="store_true",
        help="leave the C library's allocator as it is, which torch pays for",
    )
    options = parser.parse_args()
    environment = {} if options.default_allocator else KEEP_FREED_MEMORY
    sizes = SIZES | (dict([LONG]) if options.long else {})
    print(
        f"{machine.describe()}\nallocator: {environment or 'default'}, {process.cores()} threads\n"
    )
    head = ("median ms", "min", "max", "GFLOP/s", "x chunked", "peak MB", "XLA's MB", "error")
    print(f"{'queries x keys':36s}" + "".join(f"{column:>10s}" for column in head), flush=True)
    failed = []
    for name, (queries, keys) in sizes.items():
        facts, seconds, errors = _measure(queries, keys, options.rounds, environment)
        for peer in PEERS:
            flops = 4 * queries * keys * HEADS * WIDTH
            where = f"{queries} x {keys}, {name}"
            print(f"{where if peer == PEERS[0] else '':28s}{peer:8s}", end="")
            _print_row(peer, flops, facts, seconds, errors)
            failed += [f"{where}, {peer}"] if not errors.get(peer, 0) <= TOLERANCE else []
    if options.long:
        with Worker(sys.executable, Path(__file__), environment | {PEER: "chunked"}) as worker:
            fact = worker.request({"op": "setup", "layer": True, "run": True, "result": None})
            seconds = {"chunked": worker.time("", 1)}
        print(f"{'a ViT-L layer, 18432 tokens':28s}{'chunked':8s}", end="")
        _print_row("chunked", None, {"chunked": fact}, seconds, {})
        used = max(fact["peak"], fact["temporary"])
        failed += [f"the layer: {used / 1e9:.2f} GB"] if used > LAYER_LIMIT else []
    for what in failed:
        print(f"failed: {what}")
    return 1 if failed else 0


def _measure(
    queries: int, keys: int, rounds: int, environment: dict[str, str]
) -> tuple[dict[str, Message], dict[str, list[float]], dict[str, float]]:
    """What each peer says of itself, the seconds of its calls, and its error."""
    large = HEADS * queries * keys * 4 > MAX_SCORES
    facts, seconds, errors = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        workers = {}
        for peer in PEERS:
            role = environment | {PEER: peer}
            worker = stack.enter_context(Worker(sys.executable, Path(__file__), role))
            runs = peer != "xla" or not large
            result = str(Path(folder, f"{peer}.npy")) if runs else None
            message = {"op": "setup", "layer": False, "queries": queries, "keys": keys}
            facts[peer] = worker.request(message | {"run": runs, "result": result})
            if runs:
                workers[peer], seconds[peer] = worker, []
                errors[peer] = _error(Path(result), queries, keys)
        for _ in range(1 if large else rounds):
            for peer, worker in workers.items():
                # the first call after another has run finds cold caches, as the other's does
                seconds[peer] += worker.time("", 1 if large else 3)[0 if large else 1 :]
    return facts, seconds, errors


def _print_row(
    peer: str,
    flops: int | None,
    facts: dict[str, Message],
    seconds: dict[str, list[float]],
    errors: dict[str, float],
) -> None:
    temporary = facts[peer]["temporary"]
    says = "" if temporary is None else f"{temporary / 1e6:.0f}"
    if peer not in seconds:
        print(f"{'not run':>10s}{says:>60s}", flush=True)
        return
    low, middle, high = (1e3 * f(seconds[peer]) for f in (min, statistics.median, max))
    rate = "" if flops is None else f"{flops / middle / 1e6:.0f}"
    ratio = middle / statistics.median(seconds["chunked"]) / 1e3
    error = f"{errors[peer]:.1e}" if peer in errors else ""
    print(
        f"{middle:10.1f}{low:10.1f}{high:10.1f}{rate:>10s}{ratio:10.2f}"
        f"{facts[peer]['peak'] / 1e6:10.0f}{says:>10s}{error:>10s}",
        flush=True,
    )


if __name__ == "__main__":
    if PEER in os.environ:
        work(os.environ[PEER])
    else:
        sys.exit(main())
