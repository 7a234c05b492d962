"""How much memory a conversion takes: a random ViT-L, made by transformers, converted on its own.

    python benchmarks/convert_memory.py

Linux only: the numbers are from /proc/self/status of the process that converts. VmHWM is its peak
in all, and counts pages of the source file that are mapped, which the system can drop at any time;
the peak of RssAnon, sampled every 2 ms, is the memory that the conversion itself holds.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import machine
from rich.console import Console
from rich.table import Table

TARGET = 1.3  # peak over the bytes of the parameters
SHARD_SIZES = {"one file": "50GB", "shards of 200 MB": "200MB"}


def make(folder: Path, shard_size: str) -> None:
    """Writes the checkpoint; runs in a process of its own, because it needs torch."""
    from transformers import VJEPA2Config, VJEPA2Model

    VJEPA2Model(VJEPA2Config()).save_pretrained(folder, max_shard_size=shard_size)


def convert(source: Path, out: Path) -> None:
    """Converts, and prints what /proc says as JSON; runs in a process of its own."""
    from jvjepa.convert import convert

    before = _status()["VmRSS"]
    peak, done = 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, _status()["RssAnon"])

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    report = convert(str(source), out)
    seconds = time.perf_counter() - start
    done.set()
    sampler.join()
    width = {"float32": 4, "bfloat16": 2}[report.dtype]
    result = {
        "parameters": width * sum(report.parameters.values()),
        "before": before,
        "peak": _status()["VmHWM"],
        "anonymous": peak,
        "seconds": seconds,
    }
    print(json.dumps(result))


def _status() -> dict[str, int]:
    """Returns the memory lines of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = (line.split(":") for line in lines if line.endswith(" kB"))
    return {name: 1024 * int(value.removesuffix(" kB")) for name, value in pairs}


def main() -> None:
    """Measures and prints a table; exit code 1 if a peak is above the target."""
    parser = argparse.ArgumentParser(description="peak memory of a conversion")
    parser.add_argument("--folder", type=Path, help="for the 3 GB of files; default: a temporary")
    folder = parser.parse_args().folder
    table = Table(title=f"Converting a random ViT-L (target: peak / parameters <= {TARGET})")
    for column in ("source", "parameters", "after import", "VmHWM", "/ parameters"):
        table.add_column(column, justify="right")
    for column in ("RssAnon, peak", "/ parameters", "seconds"):
        table.add_column(column, justify="right")
    good = True
    for name, shard_size in SHARD_SIZES.items():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            source, out = str(Path(work) / "hf"), str(Path(work) / "out")
            _child("make", source, shard_size)
            measured = json.loads(_child("convert", source, out))
        size = measured["parameters"]
        good &= measured["peak"] <= TARGET * size
        table.add_row(
            name,
            _megabytes(size),
            _megabytes(measured["before"]),
            _megabytes(measured["peak"]),
            f"{measured['peak'] / size:.2f}",
            _megabytes(measured["anonymous"]),
            f"{measured['anonymous'] / size:.2f}",
            f"{measured['seconds']:.1f}",
        )
    print(machine.describe())
    Console(width=120).print(table)
    sys.exit(0 if good else 1)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f} MB"


def _child(*arguments: str) -> str:
    command = [sys.executable, str(Path(__file__)), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    if sys.argv[1:2] == ["make"]:
        make(Path(sys.argv[2]), sys.argv[3])
    elif sys.argv[1:2] == ["convert"]:
        convert(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
