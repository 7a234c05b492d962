import dataclasses
import importlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jvjepa import EncoderConfig, PredictorConfig
from jvjepa.encoder import forward_flops

FOLDER = Path(__file__).parent.parent / "benchmarks"
sys.path[:0] = [str(FOLDER), str(FOLDER / "peers")]
growth, pretrain, process, rows, speed, table = map(
    importlib.import_module, ("growth", "pretrain", "process", "rows", "speed", "table")
)
protocol = importlib.import_module("peers.protocol")
Work = importlib.import_module("peers.work").Work
split_tokens = importlib.import_module("peers.work").split_tokens
ROWS = {row.key: row for row in rows.ROWS}
MACHINE = ["CPU: a processor, 2 cores", "jax: 1.2"]


def facts(*seconds: float, peak: int | None = 3_000_000_000) -> dict[str, Any]:
    memory = {"base_bytes": 500_000_000, "peak_bytes": peak}
    versions = {"jax": "1.2", "saccadic": "3.4"}
    return {"seconds": list(seconds), "compile_seconds": 2.5, "versions": versions, **memory}


def result(
    row: str = "clip/16f-256", left_out: dict[str, str] | None = None, **seconds: tuple[float, ...]
) -> dict[str, Any]:
    chosen = ROWS[row]
    competitors = {name.replace("_", " "): facts(*values) for name, values in seconds.items()}
    matmul = {"jvjepa": [0.5, 0.25, 0.3]} if "jvjepa" in seconds else {}
    return {
        "title": chosen.title,
        "work": dataclasses.asdict(chosen.work),
        "competitors": competitors,
        "matmul": matmul,
        "left_out": left_out or {},
    }


def test_keys_are_unique_and_every_competitor_is_a_column() -> None:
    assert len(ROWS) == len(rows.ROWS)
    for row in rows.ROWS:
        assert row.competitors[0] == rows.BASELINE
        assert set(row.competitors) <= set(rows.COMPETITORS)
        assert len(set(row.competitors)) == len(row.competitors)
        assert row.rounds >= 1
        assert row.gpu_dtype in ("float32", "bfloat16")


def test_every_worker_exists_and_knows_the_kinds_that_its_rows_ask_for() -> None:
    for row in rows.ROWS:
        for name in row.competitors:
            worker = rows.COMPETITORS[name].worker
            text = (FOLDER / "peers" / f"{worker}_worker.py").read_text()
            assert worker == "saccadic" or f'"{row.work.kind}": _' in text
            if worker == "saccadic":
                assert row.work.kind == "step"
                assert row.work.batch == 1


@pytest.mark.parametrize("passes", ["forward", "train"])
@pytest.mark.parametrize("what", ["dense", "masked"])
def test_area_rows_have_the_tokens_that_they_name_and_can_be_split(passes: str, what: str) -> None:
    for tokens in (512, 1152, 2048, 4608, 18432):
        row = ROWS[f"areas/{tokens}/{passes}/{what}"]
        assert row.work.tokens == tokens
        assert row.work.kind == ("train" if passes == "train" else "clip")
        assert row.work.seen == (tokens // 4 if what == "masked" else tokens)
        assert row.work.area_layers / row.work.layers == 0.75
        for name in row.competitors[1:]:
            spatial, temporal = map(int, rows.COMPETITORS[name].variant.split("x"))
            assert row.work.grid[0] % temporal == row.work.grid[1] % spatial == 0
            assert rows.COMPETITORS[name].areas == temporal * spatial


def test_there_is_a_row_for_everything_that_is_claimed() -> None:
    streams = {r.work.batch for r in rows.ROWS if r.work.kind == "step" and r.work.window == 8}
    assert streams == {1, 8, 32}
    assert {r.work.window for r in rows.ROWS if r.work.kind == "step"} == {8, 32}
    assert {r.work.kind for r in rows.ROWS} == {r.work.kind for r in rows.ROWS if r.quick}
    clips = {(r.work.frames, r.work.resolution) for r in rows.ROWS if r.key.startswith("clip/")}
    assert clips == {(16, 256), (64, 256), (64, 384)}


def test_a_gpu_has_whole_models_and_the_dtype_of_the_row() -> None:
    for row in rows.ROWS:
        assert row.on("cpu") is row
        there = row.on("gpu").work
        assert (there.platform, there.dtype) == ("gpu", row.gpu_dtype)
        assert there.layers == {"predictor": 12, "classifier": 3}.get(there.kind, 24)


def test_tiny_rows_are_tiny_and_say_so() -> None:
    for row in rows.ROWS:
        tiny = row.tiny()
        assert "not really" in tiny.title
        assert tiny.work.flops() is None or tiny.work.flops() < 1e8
        assert tiny.work.kind == row.work.kind
        assert tiny.work.visible == row.work.visible


def config(work: Any) -> EncoderConfig:
    return EncoderConfig(
        hidden_size=work.hidden,
        num_layers=work.layers,
        num_heads=work.heads,
        mlp_dim=work.mlp,
        crop_size=work.resolution,
    )


def test_operations_agree_with_the_library() -> None:
    work = Work(kind="clip", layers=5, frames=8, resolution=96, batch=3)
    whole = forward_flops(config(work), work.tokens, work.tokens)
    assert work.flops() == 3 * whole
    assert dataclasses.replace(work, kind="train").flops() == 9 * whole
    step = Work(kind="step", layers=5, resolution=96, window=7)
    assert step.flops() == forward_flops(config(step), 36, 7 * 36)
    assert dataclasses.replace(step, kind="skip").flops() is None


def test_areas_and_masks_save_the_operations_of_what_nobody_sees() -> None:
    work = Work(kind="clip", layers=4)
    scores = 4 * work.tokens * work.tokens * work.hidden  # of one layer
    assert work.area_layers == 3
    assert work.flops(1) - work.flops(4) == 3 * scores * 3 // 4
    masked = dataclasses.replace(work, visible=0.25)
    patches = 2 * work.tokens * 1536 * work.hidden
    dense_layers = work.flops() - patches
    of_scores = 4 * scores
    assert masked.flops() - patches == (dense_layers - of_scores) // 4 + of_scores // 16


def test_operations_of_the_heads() -> None:
    predictor = Work(kind="predictor", layers=12, visible=0.25)
    default = PredictorConfig()
    assert predictor.predictor_width == default.hidden_size
    assert predictor.predictor_heads == default.num_heads
    tokens, width = 2048, 384
    layer = 12 * width**2 + 2 * tokens * width
    assert predictor.flops() == 2 * tokens * (width * 1024 + 12 * layer)
    classifier = Work(kind="classifier", layers=3)
    layer = 2 * 2048 * (12 * 1024**2 + 2 * 2048 * 1024)
    assert classifier.flops() == 3 * layer + 4 * 2048 * 1024**2


def test_split_tokens() -> None:
    seen, hidden = split_tokens(Work(kind="predictor", layers=1, visible=0.25))
    assert len(seen) == 512
    assert sorted(seen + hidden) == list(range(2048))
    assert (seen, hidden) == (sorted(seen), sorted(hidden))
    every = split_tokens(Work(kind="predictor", layers=1))
    assert every == (list(range(2048)), list(range(2048)))
    assert Work(kind="predictor", layers=1).predicted == 2048


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        ([1.2345], "1,234 (1,234 to 1,234)"),
        ([0.02, 0.0101, 0.04], "20.0 (10.1 to 40.0)"),
        ([0.001, 0.003], "2.00 (1.00 to 3.00)"),
    ],
)
def test_milliseconds(seconds: list[float], text: str) -> None:
    assert table.milliseconds(seconds) == text


def test_cells() -> None:
    measured = result(jvjepa=(1.0, 1.2, 0.9), transformers_SDPA=(2.0, 2.1))
    line = table.cells(measured, ["jvjepa", "transformers eager", "transformers SDPA"])
    assert line[0] == "clip, 16 frames, 256 px (2,048 tokens), 6 layers, float32"
    assert line[1:4] == ["1,000 (900 to 1,200)", "", "2,050 (2,000 to 2,100), 2.05 x"]
    work = ROWS["clip/16f-256"].work
    rate = work.matmul_flops / 0.3
    shares = [work.flops() / seconds / rate for seconds in (1.0, 2.05)]
    assert line[4:] == [f"{shares[0]:.0%} · {shares[1]:.0%}", "2.50 · 2.50", "2.5 · 2.5"]


def test_cells_of_what_nobody_knows() -> None:
    measured = result("skip/window-8", jvjepa=(0.004,))
    measured["competitors"]["jvjepa"]["peak_bytes"] = None
    assert table.cells(measured, ["jvjepa"])[2:] == ["–", "–", "2.5"]
    alone = result(transformers_SDPA=(2.0,), left_out={"jvjepa": "why"})
    assert table.cells(alone, ["transformers SDPA"])[1:3] == ["2,000 (2,000 to 2,000)", "–"]


def test_areas_count_their_own_operations() -> None:
    key = "areas/18432/forward/dense"
    measured = result(key, jvjepa=(20.0,), areas_2x2=(10.0,))
    work = ROWS[key].work
    rate = work.matmul_flops / 0.3
    share = table.cells(measured, ["jvjepa", "areas 2x2"])[3]
    expected = [work.flops() / 20 / rate, work.flops(4) / 10 / rate]
    assert share == " · ".join(f"{value:.0%}" for value in expected)


def test_markdown_is_one_table_with_the_columns_that_are_needed() -> None:
    results = {
        "clip/16f-256": result(jvjepa=(1.0,), transformers_eager=(4.0,)),
        "step/window-8": result("step/window-8", {"saccadic": "no"}, jvjepa=(0.2,)),
        "step/window-32": result("step/window-32", {"saccadic": "no"}, jvjepa=(0.4,)),
    }
    text = table.markdown({"machine": MACHINE, "rows": results})
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 5
    assert {line.count("|") for line in lines} == {7}
    assert "transformers eager" in lines[0]
    assert "SDPA" not in lines[0]
    assert "- left out: saccadic in step/window-8, step/window-32: no" in text
    assert text.endswith(f"\n- {MACHINE[0]}\n- jax: 1.2\n- saccadic: 3.4\n")
    rate = ROWS["clip/16f-256"].work.matmul_flops / 0.3 / 1e9
    assert f"plain float32 matrix products in the process of jvjepa: {rate:,.0f} GFLOP/s" in text


@pytest.mark.parametrize(
    ("seconds", "calls"),
    [(30.0, (0, 1)), (1.0, (0, 1)), (0.4, (1, 2)), (0.1, (1, 5)), (1e-5, (1, 50))],
)
def test_turn(seconds: float, calls: tuple[int, int]) -> None:
    assert speed.turn(seconds) == calls


def test_a_broken_run_goes_on_where_it_was(tmp_path: Path) -> None:
    measured = {
        "step/window-8": result("step/window-8", jvjepa=(0.2,)),
        "clip/16f-256": result(jvjepa=(1.0,)),
        "clip/64f-384": result("clip/64f-384", {"jvjepa": "out of memory"}),
    }
    speed.write(tmp_path, MACHINE, measured)
    assert {path.name for path in tmp_path.iterdir()} == {"table.json", "table.md"}
    written = json.loads((tmp_path / "table.json").read_text())
    assert list(written["rows"]) == ["clip/16f-256", "clip/64f-384", "step/window-8"]
    done = speed.load(tmp_path / "table.json", MACHINE)
    assert done == {key: measured[key] for key in ("clip/16f-256", "step/window-8")}
    assert speed.is_done(ROWS["clip/16f-256"], done)
    assert not speed.is_done(ROWS["clip/16f-256"].with_layers(7), done)
    assert not speed.is_done(ROWS["clip/64f-384"], done)
    assert speed.load(tmp_path / "none.json", MACHINE) == {}
    with pytest.raises(SystemExit, match="another machine"):
        speed.load(tmp_path / "table.json", ["CPU: another"])


def test_choose() -> None:
    quick = speed.choose("", "cpu", layers=None, quick=True)
    assert [row.key for row in quick] == [row.key for row in rows.ROWS if row.quick]
    assert all(row.work.hidden == 64 for row in quick)
    (row,) = speed.choose("^clip/16f-256$", "gpu", layers=3, quick=False)
    assert (row.work.layers, row.work.dtype, row.work.platform) == (3, "bfloat16", "gpu")
    with pytest.raises(SystemExit, match="no row matches 'nothing'"):
        speed.choose("nothing", "cpu", layers=None, quick=False)


def setting(**fields: Any) -> Any:
    own = Path(sys.executable)
    pythons = {"jvjepa": own, "transformers": own, "saccadic": "it is not there"}
    default = {"platform": "cpu", "device": "cpu", "memory": 24 << 30, "environment": {}}
    return speed.Setting(**{**default, "pythons": pythons, **fields})


def test_who_cannot_take_part_is_left_out_with_the_reason() -> None:
    here = setting()
    assert speed.why_not(ROWS["step/window-8"], "saccadic", here) == "it is not there"
    assert speed.why_not(ROWS["clip/16f-256"], "transformers eager", here) is None
    reason = speed.why_not(ROWS["clip/64f-384"], "transformers eager", here)
    assert reason == "its attention scores alone would take 65 GB"
    assert speed.why_not(ROWS["clip/64f-384"], "transformers SDPA", here) is None
    large = setting(memory=1 << 40)
    assert speed.why_not(ROWS["clip/64f-384"], "transformers eager", large) is None


SCRIPT = """
import sys
sys.path.insert(0, {peers!r})
import os
from protocol import serve

def fail(message):
    raise ValueError("no")

def setup(message):
    assert message["work"]["layers"] == 6
    return dict(call_seconds={call}, compile_seconds=0.0, base_bytes=1, peak_bytes=2)

def time_it(message):
    if message["what"] == {breaks!r}:
        os._exit(3)
    return dict(seconds=[float(i) for i in range(message["repeats"])])

serve(dict(ready=lambda _: dict(), setup={setup}, time=time_it))
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a worker that fails where it is told to, and takes as long as it is told."""

    def make(name: str, *, call: float = 0.3, breaks: str = "", setup: str = "setup") -> None:
        text = SCRIPT.format(peers=str(FOLDER / "peers"), call=call, breaks=breaks, setup=setup)
        (tmp_path / f"{name}_worker.py").write_text(text)

    monkeypatch.setattr(speed, "PEERS", tmp_path)
    return make


def test_turns_and_products_of_a_row(fake: Any) -> None:
    fake("jvjepa")
    fake("transformers", call=7.0)
    measured = speed.measure(ROWS["clip/16f-256"], setting(), 3)
    assert list(measured["competitors"]) == list(ROWS["clip/16f-256"].competitors)
    assert measured["competitors"]["jvjepa"]["seconds"] == [1.0, 2.0] * 3
    for name in ROWS["clip/16f-256"].competitors[1:]:  # the call of the setup is the first round
        assert measured["competitors"][name]["seconds"] == [7.0, 0.0, 0.0]
    assert measured["matmul"] == {"jvjepa": [1.0] * 3, "transformers eager": [1.0] * 3}
    assert measured["left_out"] == {}


@pytest.mark.parametrize("breaks", ["work", "matmul", "setup"])
def test_a_worker_that_ends_is_left_out_and_the_others_go_on(fake: Any, breaks: str) -> None:
    fake("jvjepa")
    fake("transformers", breaks=breaks, setup="fail" if breaks == "setup" else "setup")
    measured = speed.measure(ROWS["clip/16f-256/whole"].with_layers(6), setting(), 2)
    assert list(measured["competitors"]) == list(measured["matmul"]) == ["jvjepa"]
    assert measured["competitors"]["jvjepa"]["seconds"] == [1.0, 2.0] * 2
    ended = "transformers_worker ended with exit code"
    why = f"{ended} 1: ValueError: no" if breaks == "setup" else f"{ended} 3"
    assert measured["left_out"] == {"transformers SDPA": why}


def test_last_line() -> None:
    text = "a_worker ended with exit code 1 at {'op': 'setup'}\nTraceback\n  x\nValueError: no\n\n"
    reason = speed.last_line(protocol.WorkerError(text))
    assert reason == "a_worker ended with exit code 1: ValueError: no"
    killed = protocol.WorkerError("a_worker ended with exit code -9 at {'op': 'time'}\n")
    assert speed.last_line(killed) == "a_worker ended with exit code -9"


def test_saccadic_is_not_made_unless_asked(tmp_path: Path) -> None:
    assert (
        speed.find_saccadic(tmp_path / "env", make=False) == "there is no environment for it in env"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("power", [0.0, 1.0, 1.7, 2.0])
def test_exponent_is_that_of_the_upper_half(power: float) -> None:
    x = [512, 1152, 2048, 4608, 8192, 18432]
    y = [3.0 * n**power for n in x]
    assert growth.exponent(x, y) == pytest.approx(power, abs=1e-9)
    bent = [50.0 * y[-1]] * 3 + y[3:]
    assert growth.exponent(x, bent) == pytest.approx(power, abs=1e-9)
    odd = [1, 2, 4, 8, 16, 32, 64]
    bent = [1e9] * 3 + [2.0 * n**power for n in odd[3:]]
    assert growth.exponent(odd, bent) == pytest.approx(power, abs=1e-9)


def test_growth_points_and_picture(tmp_path: Path) -> None:
    points = growth.rows()
    for axis, attribute in (("tokens", "tokens"), ("window", "window")):
        assert points[axis]
        for row in points[axis]:
            assert getattr(row.work, attribute) == int(row.key.partition("/")[2])
    curves = {}
    for axis, names in (("tokens", ("jvjepa", "areas 2x2")), ("window", ("jvjepa",))):
        x = [getattr(row.work, axis) for row in points[axis]]
        each = [facts(1e-6 * n**2, peak=500_000_000 + 1000 * n) for n in x]
        curves[axis] = {name: growth.curve(x, each) for name in names}
        exponents = curves[axis]["jvjepa"]["exponents"]
        assert exponents == pytest.approx({"seconds": 2.0, "bytes": 1.0})
    growth.draw(tmp_path / "docs" / "growth.png", curves)
    picture = (tmp_path / "docs" / "growth.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 200_000
    unknown = growth.curve([1, 2, 4, 8], [facts(1.0, peak=None)] * 4)
    assert list(unknown["exponents"]) == ["seconds"]


def test_peak_memory_is_that_since_the_reset() -> None:
    large = bytearray(200_000_000)
    del large
    process.reset_peak()
    before = process.peak()
    assert before < process.resident() + 50_000_000
    large = bytearray(100_000_000)
    assert process.peak() - before > 90_000_000
    assert len(large) == 100_000_000
    assert process.cores() >= 1


@pytest.mark.slow
def test_the_quick_table_end_to_end(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "speed.py"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "table.json").read_text())
    quick = [row for row in rows.ROWS if row.quick]
    assert list(report["rows"]) == [row.key for row in quick]
    for row in quick:
        measured = report["rows"][row.key]
        for name, reason in measured["left_out"].items():
            assert rows.COMPETITORS[name].worker == "saccadic" or name == "torch.compile", reason
        assert set(measured["competitors"]) | set(measured["left_out"]) == set(
            row.tiny().competitors
        )
        for fact in measured["competitors"].values():
            assert all(second > 0 and math.isfinite(second) for second in fact["seconds"])
            assert fact["peak_bytes"] >= fact["base_bytes"] > 0
        assert measured["matmul"]["jvjepa"]
    assert re.search(r"^\| tiny, not really: clip", (tmp_path / "table.md").read_text(), re.M)
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    assert again.stdout.splitlines() == [str(tmp_path / "table.md")]


def accuracies(validation: float, test: float) -> dict[str, dict[str, float]]:
    each = {"validation": validation, "test": test}
    return dict.fromkeys(("linear", "few", "neighbours"), each)


def test_the_best_random_encoder_is_chosen_on_the_validation_set() -> None:
    encoders = {
        "pretrained": accuracies(0.2, 0.9),
        "random": accuracies(0.5, 0.3),
        "random-8": accuracies(0.6, 0.4),
        "random-12": accuracies(0.4, 0.8),
    }
    found = pretrain.compared(encoders)
    assert found["pretrained"] == dict.fromkeys(("linear", "few", "neighbours"), 0.9)
    assert set(found["random"].values()) == {0.3}
    assert set(found["best random"].values()) == {0.4}


def test_the_table_of_the_pretraining_has_means_and_both_ends_of_all_seeds() -> None:
    seeds = [
        {
            "encoders": {
                "pretrained": accuracies(0.0, 0.5 + shift),
                "random": accuracies(0.0, 0.2 + shift),
                "random-8": accuracies(0.1, 0.3 + shift),
            }
        }
        for shift in (0.0, 0.1)
    ]
    text = pretrain.make_table(seeds)
    lines = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith("| ")}
    assert "means of 2 seeds" in text
    assert lines["| pretrained"].count("55.0 (50.0 to 60.0)") == 3
    assert lines["| random, as it began"].count("25.0 (20.0 to 30.0)") == 3
    assert lines["| the best random one"].count("35.0 (30.0 to 40.0)") == 3
