"""Where the time goes: XLA's own trace of one encoder forward and of one streaming step.

Every operation of the compiled program is timed by `jax.profiler` and put down to the line of the
model that it comes from, by the names that XLA keeps. Random weights of ViT-L; fewer layers.

    python benchmarks/costs.py [--layers 4] [--frames 16] [--size 256] [--window 8] [--repeats 5]
"""

import argparse
import collections
import gzip
import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import machine
from rich.console import Console
from rich.table import Table

from jvjepa import Encoder, EncoderConfig, streaming
from jvjepa.encoder import forward_flops

_NAMED = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?op_name="([^"]*)"', re.MULTILINE)
# The first pattern that is found in an operation's name says what it is.
_KINDS = {
    "MLP, products and what XLA fused with them": r"mlp/",
    "attention, projections": r"attention[^/]*/(query|key|value|proj)/",
    "attention, products of queries, keys and values": r"attention[^/]*/.*dot_general",
    "attention, softmax": r"attention[^/]*/.*(exp|reduce_max|reduce_sum|div|sub|max)$",
    "cache, writing": r"dynamic_update_slice",
    "attention, rope and layout": r"attention[^/]*/",
    "norms": r"norm\d?/",
    "weights out of the stack": r"(dynamic_slice|squeeze|while/body/.*slice)",
    "patches": r"patch",
}
_OTHER = "other"


def main() -> int:
    """Traces both programs and prints a table for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"layers": 4, "frames": 16, "size": 256, "window": 8}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    config = EncoderConfig(hidden_size=1024, num_layers=options.layers, num_heads=16, mlp_dim=4096)
    encoder = Encoder(config)
    clip = jax.random.normal(jax.random.key(0), (1, options.frames, options.size, options.size, 3))
    params = jax.jit(encoder.init)(jax.random.key(1), clip[:, :2])["params"]
    tokens = (options.size // 16) ** 2
    every = options.frames // 2 * tokens

    def forward(params: dict, clip: jax.Array) -> jax.Array:
        return encoder.apply({"params": params}, clip)

    def step(
        params: dict, state: streaming.StreamState, tubelet: jax.Array
    ) -> streaming.StepOutput:
        return streaming.step(encoder, params, state, tubelet)[1]

    sides = {"height": options.size, "width": options.size}
    state = streaming.init_state(encoder, 1, options.window, **sides)
    console = Console(width=120)
    console.print(machine.describe())
    works = {
        f"clip of {every:,} tokens": (forward, (params, clip), every, every),
        f"step at window {options.window}": (
            step,
            (params, state, clip[:, :2]),
            tokens,
            options.window * tokens,
        ),
    }
    for name, (function, arguments, queries, keys) in works.items():
        program = jax.jit(function).lower(*arguments).compile()
        seconds = _trace(lambda p=program, a=arguments: p(*a), options.repeats)
        flops = forward_flops(config, queries, keys)
        console.print(_report(name, program.as_text(), seconds, options.repeats, flops))
        cost = program.cost_analysis()
        console.print(
            f"XLA's own count (loop bodies once): {cost['flops'] / 1e9:,.1f} GFLOP, "
            f"{cost['bytes accessed'] / 1e9:,.2f} GB touched\n"
        )
    return 0


def _trace(run: Callable[[], object], repeats: int) -> dict[str, float]:
    """Seconds that each instruction of a program took in all, by its name."""
    jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(repeats):
                jax.block_until_ready(run())
        (file,) = Path(folder).glob("plugins/profile/*/*.trace.json.gz")
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    seconds: dict[str, float] = collections.defaultdict(float)
    for event in events:
        if event.get("ph") == "X":
            seconds[event["name"]] += event.get("dur", 0) / 1e6
    return seconds


def _report(name: str, program: str, seconds: dict[str, float], repeats: int, flops: int) -> Table:
    """One row for each kind of work; loops are left out, as what is in them is counted."""
    kinds: dict[str, float] = collections.defaultdict(float)
    paths = dict(_NAMED.findall(program))
    for instruction, time in seconds.items():
        if instruction in paths and not instruction.startswith(("while", "call", "conditional")):
            path = paths[instruction]
            kind = next((k for k, pattern in _KINDS.items() if re.search(pattern, path)), _OTHER)
            kinds[kind] += time / repeats
    total = sum(kinds.values())
    rate = flops / total / 1e9
    table = Table("work", "ms", "share", title=f"{name}: {1e3 * total:.0f} ms, {rate:.0f} GFLOP/s")
    for kind, time in sorted(kinds.items(), key=lambda item: -item[1]):
        table.add_row(kind, f"{1e3 * time:.1f}", f"{time / total:.1%}")
    return table


if __name__ == "__main__":
    sys.exit(main())
