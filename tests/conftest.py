"""Strict numerics for every test, on the CPU, without a network."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
# Compiling takes most of the time, and a good part of that optimises machine code.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"

from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest
from videofiles import open_videos, write_clips

jax.config.update("jax_default_matmul_precision", "float32")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

_compilations = 0


def _count(event: str, duration: float, **metadata: str | int) -> None:
    global _compilations
    _compilations += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(_count)


@pytest.fixture
def compilations() -> Callable[[], int]:
    """How many programs XLA has compiled so far in this process."""
    return lambda: _compilations


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files of `write_clips`, to be read only."""
    return write_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture
def no_file_stays_open() -> Iterator[None]:
    """A failed read may leave its container open only as long as its exception lives."""
    before = open_videos()
    yield
    assert open_videos() == before
