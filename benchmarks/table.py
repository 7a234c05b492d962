"""The speed table as Markdown, from what `speed.py` writes as JSON."""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from peers.work import Work
from rows import BASELINE, COMPETITORS

Result = dict[str, Any]  # of one row, as `speed.measure` returns it

NOTES = f"""\
Milliseconds: median (lowest to highest) of all calls, then the time over that of the column
{BASELINE}. The last three columns have a value for each competitor of the row, in the order of the
columns. Share: operations of the matrix products in a second, over those that JAX reaches in plain
products on the same device, measured in the same rounds. Peak memory: of a call with its weights
and inputs, above that of the process with its libraries loaded. Compilation: tracing included."""


def markdown(report: dict[str, Any]) -> str:
    """Writes the table, what was left out, and the machine.

    Args:
        report: `machine`, a list of lines, and `rows`, the result of each row by its key.

    Returns:
        The document, with a final newline.
    """
    results = report["rows"]
    columns = [
        name
        for name in COMPETITORS
        if any(name in result["competitors"] for result in results.values())
    ]
    head = ["work", *columns, "share of the matmul rate", "peak memory, GB", "compilation, s"]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    lines += [cells(result, columns) for result in results.values()]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    parts = ["# Speed", NOTES, table]
    about = [*report["machine"], *_other_versions(report)]
    for items in ([*rates(results.values()), *left_out(results)], about):
        parts.append("\n".join(f"- {item}" for item in items))
    return "\n\n".join(part for part in parts if part) + "\n"


def cells(result: Result, columns: Sequence[str]) -> list[str]:
    """Writes one line of the table.

    Args:
        result: of the row.
        columns: the competitors that have a column.

    Returns:
        The name of the row, a cell for each column (empty for who does not compete), and then the
        share of the matmul rate, the peak memory and the compile time of those who do.
    """
    work, measured = Work(**result["work"]), result["competitors"]
    there = [name for name in columns if name in measured]
    times = [_time(result, name) if name in there else "" for name in columns]
    facts = [
        [_share(result, name) for name in there],
        [_gigabytes(measured[name]) for name in there],
        [f"{measured[name]['compile_seconds']:.1f}" for name in there],
    ]
    return [_title(result["title"], work), *times, *(" · ".join(fact) for fact in facts)]


def rates(results: Sequence[Result]) -> Iterator[str]:
    """Says how fast each library multiplies matrices, over all rows."""
    found: dict[tuple[str, str], list[float]] = {}
    for result in results:
        work = Work(**result["work"])
        for worker, seconds in result["matmul"].items():
            found.setdefault((worker, work.dtype), []).append(
                work.matmul_flops / statistics.median(seconds) / 1e9
            )
    for (worker, dtype), values in found.items():
        low, middle, high = (f(values) for f in (min, statistics.median, max))
        rate = f"{middle:,.0f} GFLOP/s ({low:,.0f} to {high:,.0f} from row to row)"
        yield f"plain {dtype} matrix products in the process of {worker}: {rate}"


def left_out(results: dict[str, Result]) -> Iterator[str]:
    """Says who was left out of which rows, and why."""
    rows: dict[tuple[str, str], list[str]] = {}
    for key, result in results.items():
        for name, reason in result["left_out"].items():
            rows.setdefault((name, reason), []).append(key)
    for (name, reason), keys in rows.items():
        yield f"left out: {name} in {', '.join(keys)}: {reason}"


def milliseconds(seconds: Sequence[float]) -> str:
    """Writes median, lowest and highest."""
    values = [1e3 * f(seconds) for f in (statistics.median, min, max)]
    digits = 0 if values[0] >= 100 else 1 if values[0] >= 10 else 2
    middle, low, high = (f"{value:,.{digits}f}" for value in values)
    return f"{middle} ({low} to {high})"


def _other_versions(report: dict[str, Any]) -> list[str]:
    """Lines for the packages of other environments, which the machine's lines do not name."""
    facts = [fact for row in report["rows"].values() for fact in row["competitors"].values()]
    lines = {f"{name}: {version}" for fact in facts for name, version in fact["versions"].items()}
    return sorted(lines - set(report["machine"]))


def _time(result: Result, name: str) -> str:
    measured = result["competitors"]
    text = milliseconds(measured[name]["seconds"])
    if name == BASELINE or BASELINE not in measured:
        return text
    mine, base = (statistics.median(measured[who]["seconds"]) for who in (name, BASELINE))
    return f"{text}, {mine / base:.2f} x"


def _share(result: Result, name: str) -> str:
    """The share of JAX's matmul rate; there is none where no such products are counted."""
    work = Work(**result["work"])
    flops, matmul = work.flops(COMPETITORS[name].areas), result["matmul"].get(BASELINE)
    if flops is None or not matmul:
        return "–"
    achieved = flops / statistics.median(result["competitors"][name]["seconds"])
    return f"{achieved * statistics.median(matmul) / work.matmul_flops:.0%}"


def _gigabytes(facts: dict[str, Any]) -> str:
    peak, base = facts["peak_bytes"], facts["base_bytes"]
    return "–" if peak is None or base is None else f"{(peak - base) / 1e9:.2f}"


def _title(title: str, work: Work) -> str:
    batch = f", batch {work.batch}" if work.batch > 1 and work.kind in ("clip", "train") else ""
    layers = "1 layer" if work.layers == 1 else f"{work.layers} layers"
    return f"{title}{batch}, {layers}, {work.dtype}"
