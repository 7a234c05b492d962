"""Every damage to the files of a checkpoint is found and named, or it is harmless."""

import random
import shutil
from pathlib import Path

import pytest
from states import RECORD, abstract_of, assert_same_bits, make_state, two_steps

from jvjepa.errors import CheckpointError
from jvjepa.train.checkpoint import Checkpoints, flat, hashes


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return two_steps(tmp_path / "run")


# Where a read fails, orbax closes its event loop before tensorstore has told it of the others.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_every_flipped_bit_is_found_or_harmless(saved: Path) -> None:
    abstract, right = abstract_of(make_state(0)), make_state(3)
    files = sorted(path for path in (saved / "3").rglob("*") if path.is_file())
    data = max(files, key=lambda path: path.stat().st_size)
    choose = random.Random(0)
    refused = dict.fromkeys(files, 0)
    for path in files:
        whole = path.read_bytes()
        bits = choose.sample(range(8 * len(whole)), 32 if path == data else 4)
        wrong = [flip(whole, bit) for bit in bits] + [b"", whole[: len(whole) // 2]]
        for damaged in wrong:
            path.write_bytes(damaged)
            restored = problem = None
            try:
                with Checkpoints(saved, keep=2) as checkpoints:
                    restored = checkpoints.restore(abstract, 3)
                    assert checkpoints.record(3) == RECORD
            except CheckpointError as error:
                problem = str(error)
            if problem is None:
                assert_same_bits(restored, right)
            else:
                refused[path] += 1
                assert problem.startswith(f"{saved / '3'} is damaged, remove it; the steps 5 are")
                assert "\n" not in problem
        path.write_bytes(whole)
    assert refused[data] > 24
    assert refused[saved / "3" / "contents" / "metadata"] == 6
    assert refused[saved / "3" / "metrics" / "metrics"] == 6


def flip(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_arrays_that_were_exchanged_are_named(saved: Path) -> None:
    before, after = hashes(flat(make_state(3))), hashes(flat(make_state(5, seed=1)))
    shutil.rmtree(saved / "3" / "state")
    shutil.copytree(saved / "5" / "state", saved / "3" / "state")
    with Checkpoints(saved, keep=2) as checkpoints:
        with pytest.raises(CheckpointError) as raised:
            checkpoints.restore(abstract_of(make_state(0)), 3)
        changed = str(raised.value).partition("not what was saved: ")[2].split(", ")
        assert set(changed) == {name for name in before if before[name] != after[name]}
        assert {"step", "carried/teacher", "trained/head/kernel"} <= set(changed)
        assert_same_bits(checkpoints.restore(abstract_of(make_state(0))), make_state(5, seed=1))
