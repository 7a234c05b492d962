"""Conversion, loading and parity of released architectures at full size, with random weights.

    python benchmarks/conversion.py                                    # a ViT-g, both formats
    python benchmarks/conversion.py vjepa2_1_vit_base_384 --verify     # and its parity

For every release that is named: a source with random weights is made, in the format of the release
(a Hugging Face folder or a `.pt` file); it is copied, which is what the disk allows; it is
converted and loaded, each in a process of its own; and with --verify it is compared with the
PyTorch original.

Linux only: memory is from /proc/self/status. VmHWM is the peak in all, and counts pages of the
source that are mapped, which the system can drop at any time; RssAnon, sampled every 2 ms, is what
the process itself holds.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import machine
import numpy as np
from rich.console import Console
from rich.table import Table

DEFAULT = ("vjepa2-vitg-fpc64-256", "vjepa2_vit_giant")


def make(name: str, folder: Path) -> None:
    """Writes the source."""
    from jvjepa import registry
    from jvjepa.convert.huggingface import hf_entries, to_hf_config
    from jvjepa.convert.meta import meta_entries
    from jvjepa.convert.tables import expected_shapes
    from jvjepa.storage import write_safetensors

    release = registry.get(name)
    if not release.key:
        shapes = expected_shapes(hf_entries(release.config))
        source = folder / "hf"
        source.mkdir()
        (source / "config.json").write_text(json.dumps(to_hf_config(release.config, None)))
        pieces = _random(shapes)
        write_safetensors(
            source / "model.safetensors", shapes, np.dtype(np.float32), pieces, {"format": "pt"}
        )
        return
    import torch

    content: dict[str, dict[str, torch.Tensor]] = {}
    for tensor, value in _random(expected_shapes(meta_entries(release.config))):
        part, _, rest = tensor.partition(".")
        key = release.key if part == "encoder" else "predictor"
        content.setdefault(key, {})[f"module.backbone.{rest}"] = torch.from_numpy(value)
    torch.save(content, folder / release.source.rpartition("/")[2])


def _random(shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, np.ndarray]]:
    """Weights of the size that trained ones have; larger ones amplify rounding chaotically."""
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        value = rng.standard_normal(shape, dtype=np.float32)
        if "norm" in name.split(".")[-2] or "norms_block" in name:
            value = value * np.float32(0.1) + np.float32(name.endswith("weight"))
        elif name.endswith("weight"):
            value *= np.float32(0.5 / np.sqrt(np.prod(shape[1:])))
        else:
            value *= np.float32(0.1)
        yield name, value


def copy(source: Path, out: Path) -> None:
    """Reads and writes the source's bytes, and prints how long it took."""
    start = time.perf_counter()
    with open(source, "rb") as reading, open(out, "wb") as writing:
        while chunk := reading.read(1 << 24):
            writing.write(chunk)
        writing.flush()
        os.fsync(writing.fileno())
    print(json.dumps({"seconds": time.perf_counter() - start}))


def convert(source: Path, out: Path) -> None:
    """Converts, and prints time and memory."""
    from jvjepa.convert import convert

    with _Memory() as memory:
        start = time.perf_counter()
        report = convert(str(source), out)
        seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "bytes": report.num_bytes, **memory.peaks()}))


def load(folder: Path) -> None:
    """Loads to the device, and prints time and memory."""
    import jax

    import jvjepa

    jax.block_until_ready(jax.numpy.zeros(1))
    with _Memory() as memory:
        start = time.perf_counter()
        jax.block_until_ready(jvjepa.load(folder).params)
        seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, **memory.peaks()}))


def verify(folder: Path, source: Path) -> None:
    """Prints every check."""
    from jvjepa.convert import verify

    checks = verify(folder, str(source), frames=4, clips=1)
    print(json.dumps([(check.name, check.error, check.ok, check.detail) for check in checks]))


class _Memory:
    """Samples the memory of this process while it is entered."""

    def __enter__(self) -> "_Memory":
        self.anonymous, self.done = 0, threading.Event()
        self.sampler = threading.Thread(target=self._sample)
        self.sampler.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.sampler.join()

    def _sample(self) -> None:
        while not self.done.wait(0.002):
            self.anonymous = max(self.anonymous, _status()["RssAnon"])

    def peaks(self) -> dict[str, int]:
        return {"peak": _status()["VmHWM"], "anonymous": self.anonymous}


def _status() -> dict[str, int]:
    """Returns the memory lines of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = (line.split(":") for line in lines if line.endswith(" kB"))
    return {name: 1024 * int(value.removesuffix(" kB")) for name, value in pairs}


def measure(name: str, folder: Path, *, parity: bool, repeats: int) -> tuple[list[str], bool]:
    """Runs everything for one release; returns a row of the table, and whether parity is met."""
    _child("make", name, folder)
    source = next(folder.iterdir())
    file = source / "model.safetensors" if source.is_dir() else source
    out, copied = folder / "out", folder / "copy"
    copies, conversions = [], []
    for _ in range(repeats):  # interleaved, as the disk's speed changes
        copies.append(_child("copy", file, copied)["seconds"])
        copied.unlink()
        subprocess.run(["rm", "-rf", str(out)], check=True)
        conversions.append(_child("convert", source, out))
    loads = [_child("load", out) for _ in range(repeats)]
    size = file.stat().st_size / 1e9
    copy_s, convert_s = np.median(copies), np.median([run["seconds"] for run in conversions])
    row = [
        f"{name} ({'safetensors' if source.is_dir() else '.pt'}, {size:.2f} GB)",
        f"{copy_s:.1f}",
        f"{convert_s:.1f} ({convert_s / size:.2f} a GB)",
        f"{convert_s / copy_s:.1f} x",
        f"{max(run['peak'] for run in conversions) / size / 1e9:.2f}",
        f"{max(run['anonymous'] for run in conversions) / size / 1e9:.2f}",
        f"{np.median([run['seconds'] for run in loads]):.1f}",
        f"{max(run['peak'] for run in loads) / size / 1e9:.2f}",
    ]
    good = True
    if parity:
        for check, error, ok, detail in _child("verify", out, source):
            good &= ok
            print(f"{name}: {check}: {error:.1e} ({detail}){'' if ok else ' FAILED'}", flush=True)
    return row, good


def _child(*arguments: object) -> dict:
    command = [sys.executable, str(Path(__file__)), *map(str, arguments)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output) if output else {}


def main() -> int:
    """Measures and prints; exit code 1 if parity is not met."""
    parser = argparse.ArgumentParser(description="conversion, loading and parity at full size")
    parser.add_argument("names", nargs="*", default=DEFAULT, help="releases, as jvjepa info knows")
    parser.add_argument("--folder", type=Path, help="for the files; default: a temporary one")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--verify", action="store_true", help="compare with the original")
    options = parser.parse_args()
    table = Table(title="memory in GB a GB of the source; seconds are medians")
    for column in ("source", "copy, s", "convert, s", "convert / copy", "peak", "of its own"):
        table.add_column(column)
    for column in ("load, s", "peak"):
        table.add_column(column)
    good = True
    for name in options.names:
        with tempfile.TemporaryDirectory(dir=options.folder) as work:
            row, met = measure(name, Path(work), parity=options.verify, repeats=options.repeats)
        table.add_row(*row)
        good &= met
    print(machine.describe())
    Console(width=160).print(table)
    return 0 if good else 1


if __name__ == "__main__":
    children = {"make": make, "copy": copy, "convert": convert, "load": load, "verify": verify}
    if sys.argv[1:2] and sys.argv[1] in children:
        first, *rest = sys.argv[2:]
        child = children[sys.argv[1]]
        child(first if child is make else Path(first), *map(Path, rest))
    else:
        sys.exit(main())
