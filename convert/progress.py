"""A progress bar on stderr, and silence where stderr is not a terminal."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

_T = TypeVar("_T")


def progress(items: Iterable[_T], total: int, text: str) -> Iterator[_T]:
    """Yields the items and shows how many of `total` have passed."""
    silent = not sys.stderr.isatty()
    console = Console(stderr=True)
    yield from track(items, text, total, console=console, transient=True, disable=silent)
