"""Speed on a CPU against transformers and saccadic, all in the same run, interleaved.

    python benchmarks/peers/make_env.py .venv-saccadic     # once
    python benchmarks/cpu.py --saccadic-python .venv-saccadic/bin/python

ViT-L width, 6 layers, 16 frames at 256 px (2,048 tokens), float32, batch 1, random weights, all
cores. Each competitor is a process of its own and only one of them computes at a time. All get the
same setting of the C library's allocator, without which torch loses up to half of its time to page
faults (`--default-allocator` measures without). Prints the median and the range of the rounds, and
ratios of medians.
"""

import argparse
import contextlib
import statistics
import sys
from pathlib import Path

from machine import describe
from peers.protocol import KEEP_FREED_MEMORY, Worker, Workload

PEERS = Path(__file__).parent / "peers"


def main() -> None:
    """Runs the rounds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--saccadic-python", type=Path, help="interpreter that has saccadic")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--default-allocator",
        action="store_true",
        help="leave the C library's allocator as it is, which torch pays for",
    )
    options = parser.parse_args()
    pythons = {"jvjepa": sys.executable, "transformers": sys.executable}
    if options.saccadic_python is None:
        print("saccadic is left out: --saccadic-python names no interpreter", file=sys.stderr)
    else:
        pythons["saccadic"] = options.saccadic_python
    environment = {} if options.default_allocator else KEEP_FREED_MEMORY
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker(python, PEERS / f"{name}_worker.py", environment))
            for name, python in pythons.items()
        }
        facts = {name: worker.setup(Workload()) for name, worker in workers.items()}
        subjects = [
            (name, what)
            for name, whats in {
                "jvjepa": ("clip", "step", "step_unrolled", "gated_encode", "gated_skip", "matmul"),
                "transformers": ("clip_sdpa", "clip_eager", "matmul"),
                "saccadic": ("step", "step_no_lora", "embed"),
            }.items()
            for what in whats
            if name in workers
        ]
        seconds: dict[tuple[str, str], list[float]] = {subject: [] for subject in subjects}
        for _ in range(options.rounds):
            for name, what in subjects:
                # the first call after the others have run finds cold caches, as theirs do
                seconds[name, what] += workers[name].time(what, 3)[1:]
    _report(seconds, facts)


def _report(seconds: dict[tuple[str, str], list[float]], facts: dict[str, dict]) -> None:
    print(describe())
    for name, fact in facts.items():
        print(f"{name}: {fact['versions']}")
    median = {subject: statistics.median(values) for subject, values in seconds.items()}
    print(f"\n{'':28s} {'median ms':>10s} {'min':>8s} {'max':>8s}")
    for (name, what), values in seconds.items():
        low, middle, high = (1e3 * f(values) for f in (min, statistics.median, max))
        print(f"{name + ' ' + what:28s} {middle:10.1f} {low:8.1f} {high:8.1f}")

    ours = facts["jvjepa"]
    rate = {
        "jax": ours["matmul_flops"] / median["jvjepa", "matmul"],
        "torch": facts["transformers"]["matmul_flops"] / median["transformers", "matmul"],
    }
    for library, flops in rate.items():
        print(f"float32 matmul rate of {library}: {flops / 1e9:.0f} GFLOP/s")
    for what in ("clip", "step"):
        achieved = ours[f"{what}_flops"] / median["jvjepa", what]
        share = achieved / rate["jax"]
        print(f"{what}: {achieved / 1e9:.0f} GFLOP/s, {share:.0%} of JAX's matmul rate")
    compiled = ", ".join(f"{what} {s:.1f} s" for what, s in ours["compile_seconds"].items())
    print(f"first call, compilation included: {compiled}\n")

    def ratio(what: str, slow: tuple[str, str], fast: tuple[str, str]) -> None:
        if slow in median:
            print(f"{what:64s} {median[slow] / median[fast]:6.2f} x")

    ratio("clip: transformers SDPA / jvjepa", ("transformers", "clip_sdpa"), ("jvjepa", "clip"))
    ratio("clip: transformers eager / jvjepa", ("transformers", "clip_eager"), ("jvjepa", "clip"))
    ratio("step at a full window of 8: saccadic / jvjepa", ("saccadic", "step"), ("jvjepa", "step"))
    without = "the same, saccadic without its adapters / jvjepa"
    ratio(without, ("saccadic", "step_no_lora"), ("jvjepa", "step"))
    ratio("re-encoding the window / a step, both jvjepa", ("jvjepa", "clip"), ("jvjepa", "step"))
    skipped = median["jvjepa", "gated_skip"] / median["jvjepa", "gated_encode"]
    print(f"{'a skipped step / an encoded one':64s} {skipped:6.1%}")


if __name__ == "__main__":
    main()
