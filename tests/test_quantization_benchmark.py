import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from jvjepa import Encoder, EncoderConfig, ModelConfig
from jvjepa.quantization import SCHEMES, nbytes

FOLDER = Path(__file__).parent.parent / "benchmarks"
sys.path[:0] = [str(FOLDER)]
benchmark = importlib.import_module("quantization")


@pytest.mark.slow
def test_everybody_is_measured_and_written(tmp_path: Path) -> None:
    config = EncoderConfig(hidden_size=64, num_layers=2, num_heads=2, mlp_dim=128, crop_size=32)
    encoder, params = Encoder(config), benchmark.random_params(ModelConfig(encoder=config))
    rng = np.random.default_rng(0)
    clip = rng.standard_normal((2, 32, 32, 3), np.float32)
    schemes = benchmark.measure_schemes(encoder, params, clip, 1)
    assert list(schemes) == ["float32", *SCHEMES]
    tubelets = rng.standard_normal((3, 1, 2, 32, 32, 3), np.float32)
    caches = benchmark.measure_caches(encoder, params["encoder"], tubelets, 2, 1)
    assert list(caches) == ["float32", "int8", "fp8"]
    for rows in (schemes, caches):
        whole = rows["float32"]
        assert (whole["largest"], round(whole["cosine"], 9)) == (0, 1)
        for name, row in rows.items():
            assert name == "float32" or 0 < row["largest"] < 0.5
            assert name == "float32" or row["bytes"] < whole["bytes"]
            assert all(second > 0 for second in row["seconds"])
    assert [len(row["seconds"]) for row in caches.values()] == [2, 2, 2]  # with a full window
    work = {"layers": 2, "unrolled": False, "frames": 2, "size": 32, "window": 2}
    report = {"machine": ["CPU: one"], "work": work, "schemes": schemes, "caches": caches}
    benchmark.write(tmp_path, report)
    text = (tmp_path / "quantization.md").read_text()
    for name in ("float32", *SCHEMES):
        assert f"\n| {name} | " in text
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "quantization.json",
        "quantization.md",
    ]


def test_the_bytes_are_those_of_all_layers() -> None:
    sizes = {"hidden_size": 64, "num_heads": 2, "mlp_dim": 128, "crop_size": 32}
    few, all_of_them = (
        benchmark.random_params(ModelConfig(encoder=EncoderConfig(num_layers=n, **sizes)))
        for n in (2, 24)
    )
    assert benchmark.whole_bytes(few["encoder"], 2) == nbytes(all_of_them)


def test_the_table_compares_with_float32() -> None:
    rows = {
        "float32": {"bytes": 4_000_000, "cosine": 1.0, "largest": 0.0, "seconds": [2.0, 1.0, 3.0]},
        "int8": {"bytes": 1_000_000, "cosine": 0.5, "largest": 0.25, "seconds": [1.0]},
    }
    lines = benchmark.table("scheme", rows).splitlines()
    assert (
        lines[2] == "| float32 | 4.0 | 100% | 1.000000 | 0.00% | 2,000 (1,000 to 3,000) | 1.00 x |"
    )
    assert lines[3] == "| int8 | 1.0 | 25% | 0.500000 | 25.00% | 1,000 (1,000 to 1,000) | 0.50 x |"
