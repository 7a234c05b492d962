"""A few lines about the machine that a benchmark ran on."""

import importlib.metadata
import os
import platform
from pathlib import Path

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "peft")


def describe() -> str:
    """Describes the processor, the memory, the system, and the versions of what is installed.

    Returns:
        One line for each, without a final newline. Packages are looked up, not imported.
    """
    lines = [
        f"CPU: {_cpu()}, {_cores()} cores",
        f"Memory: {_memory()}",
        f"OS: {_system()}",
        f"Python: {platform.python_version()}",
    ]
    for name in PACKAGES:
        try:
            lines.append(f"{name}: {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return "\n".join(lines)


def _cpu() -> str:
    """Returns the name of the processor, with family and model where Linux tells them."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine()
    pairs = (line.partition(":") for line in path.read_text().split("\n\n")[0].splitlines())
    fields = {key.strip(): value.strip() for key, _, value in pairs}
    name = fields.get("model name", platform.machine())
    if "cpu family" in fields and "model" in fields:
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return name


def _cores() -> int | None:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _memory() -> str:
    """Returns the size of the memory."""
    if not hasattr(os, "sysconf"):
        return "unknown"
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"


def _system() -> str:
    """Returns the name of the distribution, where there is one, and the kernel."""
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        return platform.platform()
    return f"{name}, {platform.system()} {platform.release()}"


if __name__ == "__main__":
    print(describe())
