import collections
import hashlib
import random
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torchfiles import DTYPES, GOLDEN, ODD, checkpoint, refused, rezip, saved, with_pickle

from jvjepa.convert.source import StoredTensor
from jvjepa.convert.torchfile import open_torch
from jvjepa.convert.torchpickle import inspect_pickle
from jvjepa.errors import CheckpointError, InputError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return checkpoint(tmp_path)


def outcome(path: Path) -> dict[str, list[Any]] | None:
    """What is read of a file, or None where it is refused with one line about it."""
    try:
        with open_torch(path) as file:
            weights = file.part("encoder")
            weights.sha256()
            return {name: weights.read(name).tolist() for name in weights.tensors}
    except CheckpointError as error:
        if not re.fullmatch(re.escape(str(path)) + ".*", str(error)):
            raise
    return None


def test_a_released_layout() -> None:
    expected, before = torch.load(GOLDEN, weights_only=True), GOLDEN.read_bytes()
    with open_torch(str(GOLDEN)) as file:
        assert file.path == GOLDEN
        sizes = [value.nbytes for part in file.parts.values() for value in part.values()]
        assert sorted(inspect_pickle(GOLDEN).storages.values()) == sorted(sizes)
        assert list(file.parts) == ["target_encoder", "encoder", "predictor"]
        assert file.others == {"epoch": "3"}
        assert str(file) == "target_encoder (53), encoder (52), predictor (53), epoch (3)"
        for part in file.parts:
            weights = file.part(part)
            assert weights.shapes == {name: tuple(v.shape) for name, v in expected[part].items()}
            assert weights.sha256() == hashlib.sha256(before).hexdigest()
            for name, value in expected[part].items():
                stored = StoredTensor(path=GOLDEN, shape=tuple(value.shape), dtype="F32")
                assert weights.tensors[name] == stored
                read = weights.read(name)
                np.testing.assert_array_equal(read, value.numpy())
                read[...] = 0  # the caller's own
                np.testing.assert_array_equal(weights.read(name), value.numpy())
    assert GOLDEN.read_bytes() == before


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(5, 3), (), (0, 2)], ids=str)
def test_every_bit_arrives(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    value = torch.zeros(shape, dtype=getattr(torch, name))
    bits = np.random.default_rng(0).integers(0, 2 if name == "bool" else 256, value.nbytes)
    content = bits.astype(np.uint8)
    value.untyped_storage().copy_(torch.from_numpy(content).untyped_storage())
    save_file({"x": value}, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="numpy") as file:
        word = file.get_slice("x").get_dtype()
    with open_torch(saved(tmp_path / "x.pt", {"part": {"x": value}})) as file:
        weights = file.part("part")
        read = weights.read("x")
    assert weights.tensors["x"].dtype == word
    assert weights.shapes == {"x": shape}
    assert (read.shape, read.dtype) == (shape, getattr(ml_dtypes, name, name))
    assert read.tobytes() == content.tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_views_of_shared_storages(tmp_path: Path, dtype: torch.dtype) -> None:
    rng = random.Random(0)
    big = torch.arange(4 * 6 * 5).reshape(4, 6, 5).to(dtype)
    part = {"tied": big, "row": big[2], "wide": big[0, 0, :1].expand(3, 7), "last": big[3, 5, 4]}
    part |= torch.nn.BatchNorm1d(3).state_dict(keep_vars=True)  # parameters, and a number
    part["negative"] = torch.tensor([1 + 2j, 3 - 4j]).conj().imag  # by a flag, not by its values
    assert part["weight"].requires_grad
    assert part["negative"].is_neg()
    for number in range(30):
        view = big.permute(*rng.sample(range(3), 3))
        for axis, size in enumerate(view.shape):
            start = rng.randrange(size)
            view = view.narrow(axis, start, rng.randrange(1, size - start + 1))
        part[f"view{number}"] = view[:: rng.choice([1, 2])]
    parts = {"one": collections.OrderedDict(part), "two": {"again": big, "other": big.clone()}}
    with open_torch(saved(tmp_path / "views.pt", parts)) as file:
        for key, part in parts.items():
            for name, value in part.items():
                read = file.part(key).read(name)
                assert read.flags.c_contiguous
                assert read.shape == tuple(value.shape) == file.part(key).shapes[name]
                assert read.astype(np.float64).tolist() == value.double().tolist()


def test_lists_of_state_dicts(tmp_path: Path) -> None:
    probe = {
        "classifiers": [{"linear": torch.full((2,), float(i))} for i in range(3)],
        "opt": [{"state": {0: {"step": torch.ones(1)}}, "param_groups": []}],
        **{"scaler": None, "epoch": 20, "loss": 0.5, "config": {"model": "vitl"}, "name": "probe"},
    }
    others = {"opt": "list of 1", "scaler": "None", "epoch": "20", "loss": "0.5"}
    with open_torch(saved(tmp_path / "probe.pt", probe)) as file:
        assert list(file.parts) == ["classifiers[0]", "classifiers[1]", "classifiers[2]"]
        assert file.others == {**others, "config": "dict of 1", "name": "str"}
        for weights in (file.part("classifiers", 2), file.part("classifiers[2]")):
            assert weights.read("linear").tolist() == [2, 2]
        for key, index in (("classifiers", None), ("classifiers", 3), ("opt", 0), ("epoch", None)):
            with refused(file.path, f"no state dict '{key}", "classifiers[2] (1)", "epoch (20)"):
                file.part(key, index)


def test_a_state_dict_alone_and_nothing_at_all(tmp_path: Path) -> None:
    with open_torch(saved(tmp_path / "linear.pt", torch.nn.Linear(2, 3).state_dict())) as file:
        assert list(file.parts) == [""]
        assert str(file) == "tensors (2)"
        assert file.part("").shapes == {"weight": (3, 2), "bias": (3,)}
    with open_torch(saved(tmp_path / "nothing.pt", {})) as file:
        assert str(file) == "nothing"


def from_a_gpu(name: str, content: bytes) -> bytes:
    return content.replace(b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:1")


def from_the_other_byte_order(name: str, content: bytes) -> bytes:
    if name.startswith("data/"):
        return np.frombuffer(content, np.float32).byteswap().tobytes()
    return {b"little": b"big", b"big": b"little"}.get(content, content)


@pytest.mark.parametrize("edit", [from_a_gpu, from_the_other_byte_order])
def test_files_of_other_machines(file: Path, edit: Callable[[str, bytes], bytes]) -> None:
    expected = outcome(file)
    rezip(file, edit)  # which also leaves nothing aligned
    before = file.read_bytes()
    assert (b"cuda:1" in before) == (edit is from_a_gpu)
    assert outcome(file) == expected is not None
    assert file.read_bytes() == before


def mapped(path: Path) -> int | None:
    """Bytes of the file that this process holds in memory by its mappings; None without one."""
    mapping = re.escape(str(path)) + r"\n(?:\w+:.*\n)*?Rss: *(\d+) kB"
    sizes = re.findall(mapping, Path("/proc/self/smaps").read_text())
    return sum(map(int, sizes)) * 1024 if sizes else None


def test_only_what_is_read_is_touched(tmp_path: Path) -> None:
    big = torch.ones(16, 1 << 20)  # 64 MiB
    part = {"big": big, "last": torch.full((8,), 2.0), "slice": big[7, :9]}
    path = saved(tmp_path / "big.pt", {"encoder": part, "predictor": {"also": big}})
    with open_torch(path) as file:
        weights = file.part("encoder")
        assert weights.shapes["big"] == (16, 1 << 20)
        assert weights.read("last").tolist() == [2] * 8
        assert weights.read("slice").tolist() == [1] * 9
        assert 0 < mapped(path) < 16 << 20
        assert weights.read("big").nbytes == 64 << 20
        assert mapped(path) >= 64 << 20
    del file, weights
    assert mapped(path) is None


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, that some of these may change
@pytest.mark.parametrize(("make", "words"), ODD, ids=[words for _, words in ODD])
def test_other_entries_are_named(tmp_path: Path, make: Callable[[], object], words: str) -> None:
    one = torch.ones(1)
    parts = {"encoder": {"x": one, "its.name": make()}, "numbers": {7: one}, "good": {"x": one}}
    with open_torch(saved(tmp_path / "odd.pt", parts)) as file:
        assert file.part("good").shapes == {"x": (1,)}
        with refused(file.path, f"its.name of encoder is {words}", "a dense tensor of real"):
            file.part("encoder")
        with refused(file.path, "7 of numbers is keyed by int, not by a name"):
            file.part("numbers")


def test_the_top_must_be_a_dictionary(file: Path) -> None:
    tops = {"tensor": torch.ones(3), "list of 1": [{"x": torch.ones(3)}], "3": 3, "str": "text"}
    for words, top in tops.items():
        with refused(saved(file, top), f"holds a {words}; a dictionary would be right"):
            open_torch(file).__enter__()


def test_torch_is_needed_to_read_only(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys, jvjepa.convert.torchfile; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout == "False\n", result.stderr
    monkeypatch.setitem(sys.modules, "torch", None)
    assert inspect_pickle(file).code == ()
    with pytest.raises(InputError, match=r"vitl\.pt needs torch: pip install 'jvjepa\[torch\]'"):
        open_torch(file).__enter__()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_wrong_byte_is_found_or_means_nothing(file: Path) -> None:
    whole, expected = bytearray(file.read_bytes()), outcome(file)
    found = []
    for position in range(0, len(whole), 3):
        whole[position] ^= 0xFF
        file.write_bytes(whole)
        whole[position] ^= 0xFF
        found.append(outcome(file))
        assert found[-1] in (None, expected), position
    assert found.count(None) > 200


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_wrong_pickle_is_refused_with_one_line_or_read(file: Path) -> None:
    rng = random.Random(0)
    whole = zipfile.Path(file, "vitl/data.pkl").read_bytes()
    results = []
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2])):
            start, other = rng.randrange(len(damaged)), rng.randrange(len(damaged))
            new = [bytes([rng.randrange(256)]), damaged[other : other + 5], b"R", b"", b"Q", b"("]
            damaged[start : start + rng.randrange(3)] = rng.choice(new)
        results.append(outcome(with_pickle(file, bytes(damaged))))
    assert 5 < results.count(None) < 395


def test_files_without_checksums(file: Path) -> None:
    expected = outcome(file)
    torch.serialization.set_crc32_options(False)
    try:
        saved(file, torch.load(file))
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(file) as archive:
        assert {member.CRC for member in archive.infolist()} == {0}
    assert outcome(file) == expected
