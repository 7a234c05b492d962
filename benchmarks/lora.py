"""A step of LoRA training: jvjepa against peft on transformers, in the same run.

    python benchmarks/lora.py                          # ViT-L, a clip of 16 frames of 256 pixels
    python benchmarks/lora.py --layers 2 --size 128 --repeats 2

The student has adapters on query, key, value and proj; the teacher is the same model without them.
A step is both, the loss of `jvjepa.train.causal_lora`, its gradient, and AdamW. Both sides begin
with the same weights, adapters and clip, and must agree on loss and gradient, and on the next loss,
or nothing is reported. transformers has no causal V-JEPA 2, so they are compared with a student
that sees the whole clip; what is trained in jvjepa, where it sees the past alone, has rows of its
own. Each is measured without and with blocks computed anew for the gradient ("block", which is
gradient checkpointing in transformers).

Everybody is a process of its own, only one of them computes at a time, and rounds are interleaved.
It runs where JAX runs: on a CPU in float32, on a GPU with bfloat16 weights and computation and
float32 adapters, there after the sides have agreed in float32. Of JAX, `--unrolled` measures blocks
one after the other instead of a loop over them. Writes `lora.json` and `lora.md`.
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from peers.protocol import Worker, WorkerError
from peers.work import Work
from speed import HERE, Setting, find_setting, last_line, turn
from table import Result, milliseconds

WORKER = "lora"
TOLERANCE = 1e-4
REMATS = ("none", "block")
EXACT = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
SIZES = {
    "layers": (24, "of the encoder"),
    "frames": (16, "of a clip"),
    "size": (256, "pixels of a side of a frame"),
    "batch": (1, "clips of a step"),
    "window": (8, "tubelets that a causal student sees"),
    "repeats": (5, "turns of everybody"),
}

NOTES = """\
Milliseconds of a step: median (lowest to highest). Speed: clips a second over those of peft with
the same blocks computed anew. Peak memory: of steps with their weights, above that of the process
with its libraries loaded. Compilation: tracing included."""


class Competitor(NamedTuple):
    """Who trains.

    Args:
        side: "jvjepa" or "peft".
        causal: whether the student sees the past alone.
    """

    side: str
    causal: bool


OURS, PEFT, CAUSAL = "jvjepa", "peft", "jvjepa, causal"
COMPETITORS = {
    OURS: Competitor("jvjepa", False),
    PEFT: Competitor("peft", False),
    CAUSAL: Competitor("jvjepa", True),
}
ALIKE = (OURS, PEFT)


def measure(
    setting: Setting,
    work: Work,
    remat: str,
    rounds: int,
    names: tuple[str, ...] = tuple(COMPETITORS),
) -> Result:
    """Measures competitors that compute the same things anew.

    Args:
        setting: where.
        work: the sizes.
        remat: "none" or "block".
        rounds: turns of everybody; 0 only sets up.
        names: who.

    Returns:
        `competitors`: of each the `seconds` of all steps, `compile_seconds`, `base_bytes`,
        `peak_bytes`, `versions` and `start`, what the first two steps gave; and `left_out`, the
        reason by competitor.
    """
    measured: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name in names:
            message = {"op": "setup", "work": dataclasses.asdict(work), "remat": remat}
            worker = stack.enter_context(setting.start(WORKER))
            try:
                measured[name] = worker.request(message | COMPETITORS[name]._asdict())
            except WorkerError as error:
                left_out[name] = last_line(error)
                continue
            measured[name]["seconds"] = []
            workers[name] = worker
        for _ in range(rounds):
            for name, worker in list(workers.items()):
                warm_up, steps = turn(measured[name]["call_seconds"])
                try:
                    measured[name]["seconds"] += worker.time("step", warm_up + steps)[warm_up:]
                except WorkerError as error:
                    left_out[name] = last_line(error)
                    del workers[name], measured[name]
    return {"competitors": measured, "left_out": left_out}


def difference(result: Result) -> float:
    """Compares what the sides gave at first.

    Args:
        result: from `measure`, of one dtype.

    Returns:
        The largest relative difference.

    Raises:
        SystemExit: the sides differ, or one of them did not run.
    """
    _check_complete(result)
    ours, theirs = (result["competitors"][name]["start"] for name in ALIKE)
    errors = {what: abs(ours[what] / theirs[what] - 1) for what in theirs}
    for what, error in errors.items():
        if not error <= TOLERANCE:
            raise SystemExit(
                f"{what}: {ours[what]} in jvjepa and {theirs[what]} in peft differ by {error:.1e}; "
                f"at most {TOLERANCE:.0e} would be right"
            )
    return max(errors.values())


def _check_complete(result: Result) -> None:
    for name in ALIKE:
        if name in result["left_out"]:
            raise SystemExit(f"{name} failed: {result['left_out'][name]}")


def compare(setting: Setting, work: Work, remat: str, rounds: int) -> Result:
    """Measures, and sees to it that the sides train the same.

    Args:
        setting: where.
        work: the sizes.
        remat: "none" or "block".
        rounds: turns of everybody.

    Returns:
        As `measure`, and `difference` in float32.

    Raises:
        SystemExit: as `difference`.
    """
    if work.dtype == "float32":
        result = measure(setting, work, remat, rounds)
        return result | {"difference": difference(result)}
    exact = dataclasses.replace(setting, environment=setting.environment | EXACT)
    in_float32 = dataclasses.replace(work, dtype="float32")
    agreed = difference(measure(exact, in_float32, remat, 0, ALIKE))
    result = measure(setting, work, remat, rounds)
    _check_complete(result)
    return result | {"difference": agreed}


def markdown(report: dict[str, Any]) -> str:
    """Writes the table, what was left out, and the machine.

    Args:
        report: `machine`, a list of lines, `work`, and `rows`, the result of each remat.

    Returns:
        The document, with a final newline.
    """
    work = Work(**report["work"])
    head = ["computed anew", "student", "ms a step", "clips/s", "speed", "peak memory, GB"]
    head += ["compilation, s", "first loss"]
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2)]
    for remat, result in report["rows"].items():
        lines += [cells(remat, name, result, work.batch) for name in result["competitors"]]
    clip = f"{work.frames} frames of {work.resolution} pixels, batch {work.batch}"
    loop = "blocks one after the other" if work.unrolled else "a loop over blocks"
    model = f"{work.layers} layers of width {work.hidden}, {work.dtype}; {loop} in jvjepa"
    rows = report["rows"].items()
    agreed = [
        f"remat {remat}: losses and gradient norms of jvjepa and peft differ by at most "
        f"{result['difference']:.1e} in float32"
        for remat, result in rows
    ]
    left_out = [
        f"left out: {name}, remat {remat}: {reason}"
        for remat, result in rows
        for name, reason in result["left_out"].items()
    ]
    facts = [fact for _, result in rows for fact in result["competitors"].values()]
    versions = {
        f"{name}: {version}" for fact in facts for name, version in fact["versions"].items()
    }
    parts = ["# LoRA", f"{clip}; {model}.", NOTES]
    parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    about = [*report["machine"], *sorted(versions - set(report["machine"]))]
    parts += ["\n".join(f"- {line}" for line in items) for items in (agreed + left_out, about)]
    return "\n\n".join(parts) + "\n"


def cells(remat: str, name: str, result: Result, batch: int) -> list[str]:
    """Writes one line of the table.

    Args:
        remat: of the result.
        name: the competitor.
        result: from `compare`.
        batch: clips of a step.

    Returns:
        What is computed anew, who, milliseconds, clips per second, the speed over peft's, the peak
        memory, the compile time and the first loss.
    """
    fact = result["competitors"][name]
    mine, peft = (statistics.median(result["competitors"][who]["seconds"]) for who in (name, PEFT))
    peak, base = fact["peak_bytes"], fact["base_bytes"]
    return [
        remat,
        name,
        milliseconds(fact["seconds"]),
        f"{batch / mine:.3g}",
        f"{peft / mine:.2f} x",
        "–" if peak is None or base is None else f"{(peak - base) / 1e9:.2f}",
        f"{fact['compile_seconds']:.1f}",
        f"{fact['start']['loss']:.5f}",
    ]


def write(folder: Path, report: dict[str, Any]) -> None:
    """Writes `lora.json` and `lora.md`, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {"lora.json": json.dumps(report, indent=1) + "\n", "lora.md": markdown(report)}
    for name, text in contents.items():
        part = folder / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(folder / name)


def main() -> int:
    """Measures and writes; exit code 1 if jvjepa and peft do not train the same."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, (default, what) in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what}; {default}")
    parser.add_argument("--remat", choices=REMATS, nargs="+", default=REMATS, help="default: both")
    parser.add_argument("--unrolled", action="store_true", help="no loop over the blocks in JAX")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder for the table")
    options = parser.parse_args()
    for name in SIZES:
        if getattr(options, name) < 1:
            parser.error(f"--{name} = {getattr(options, name)}; it must be 1 or more")
    found = find_setting("not asked")
    setting = dataclasses.replace(found, pythons={WORKER: Path(sys.executable)})
    work = Work(
        kind="train",
        layers=options.layers,
        frames=options.frames,
        resolution=options.size,
        batch=options.batch,
        window=options.window,
        unrolled=options.unrolled,
        dtype="float32" if setting.platform == "cpu" else "bfloat16",
        platform=setting.platform,
    )
    rows: dict[str, Result] = {}
    report = {"machine": setting.describe(), "work": dataclasses.asdict(work), "rows": rows}
    for remat in options.remat:
        rows[remat] = compare(setting, work, remat, options.repeats)
        write(options.out, report)
        for name in rows[remat]["competitors"]:
            print(*cells(remat, name, rows[remat], work.batch), sep=" | ", flush=True)
        for name, reason in rows[remat]["left_out"].items():
            print(f"  {name} is left out: {reason}", flush=True)
    print(options.out / "lora.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
