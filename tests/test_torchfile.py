import collections
import contextlib
import hashlib
import io
import os
import pickle
import random
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch._weights_only_unpickler import _get_allowed_globals

from jvjepa.convert.source import StoredTensor
from jvjepa.convert.torchfile import _PLAIN, inspect_pickle, open_torch
from jvjepa.errors import CheckpointError, InputError

GOLDEN = Path(__file__).parent / "golden" / "vjepa2_tiny.pt"
DTYPES = "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 bool".split()
DTYPES += "int64 int32 int16 int8 uint64 uint32 uint16 uint8".split()
per_channel = torch.quantize_per_channel


def saved(path: Path, value: object, **options: Any) -> Path:
    torch.save(value, path, **options)
    return path


def rezip(path: Path, edit: Callable[[str, bytes], bytes | None], **options: Any) -> None:
    """Zips a file again, each record changed by its name without the folder, or left out."""
    with zipfile.ZipFile(path) as file:
        records = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", **options) as file:
        for name, content in records.items():
            if (changed := edit(name.partition("/")[2], content)) is not None:
                file.writestr(name, changed)


def with_pickle(path: Path, pickled: bytes) -> Path:
    rezip(path, lambda name, content: pickled if name == "data.pkl" else content)
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    values = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    parts = {"weight": values, "bias": values[0].clone(), "view": values[1:, :2]}
    return saved(tmp_path / "vitl.pt", {"encoder": parts, "epoch": 3})


@contextlib.contextmanager
def refused(path: Path, *words: str) -> Iterator[None]:
    """Expects one line about the file that has all the words."""
    with pytest.raises(CheckpointError) as caught:
        yield
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message


def check_refused(path: Path, *words: str) -> None:
    with refused(path, *words), open_torch(path):
        pass


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


ODD: list[tuple[Callable[[], object], str]] = [
    (lambda: torch.eye(3).to_sparse(), "a sparse tensor (torch.sparse_coo)"),
    (lambda: torch.eye(3).to_sparse_csr(), "a sparse tensor (torch.sparse_csr)"),
    (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "a tensor of torch.q"),
    (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint32), "a tensor of torch"),
    (lambda: per_channel(torch.ones(2, 2), *torch.ones(2, 2), 0, torch.quint8), "a tensor of to"),
    (lambda: torch.ones(2, dtype=torch.complex64), "a tensor of torch.complex64"),
    (lambda: torch.ones(3, device="meta"), "a tensor without values"),
    (lambda: "vitl", "no tensor but str"),
    (lambda: 0.5, "no tensor but 0.5"),
    (lambda: None, "no tensor but None"),
    (lambda: {"x": torch.ones(1)}, "no tensor but dict of 1"),
]


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
        check_refused(saved(file, top), f"holds a {words}; a dictionary would be right")


def test_code_is_named_and_not_run(tmp_path: Path) -> None:
    path, harm = tmp_path / "evil.pt", tmp_path / "harm"
    call = {"__reduce__": lambda self: (os.system, (f"touch {harm}",))}
    evil = {"encoder": {"x": torch.ones(2)}, "epoch": type("Call", (), call)()}
    for protocol in (2, 4):
        saved(path, evil, pickle_protocol=protocol)
        assert inspect_pickle(path).code == ("posix.system",)
        check_refused(path, "holds code (posix.system): it is not loaded", "state_dict()")
    saved(path, evil, _use_new_zipfile_serialization=False)
    check_refused(path, "torch before 1.6")
    path.write_bytes(pickle.dumps(evil))
    check_refused(path, "a pickle, which is code")
    assert not harm.exists()
    torch.load(saved(path, evil), weights_only=False)
    assert harm.exists()  # so the file was dangerous


def test_what_the_process_allows_is_still_code(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pt", {"epoch": Fraction(1, 2)})
    with torch.serialization.safe_globals([Fraction]):
        assert torch.load(path, weights_only=True) == {"epoch": Fraction(1, 2)}
        check_refused(path, "holds code (fractions.Fraction)")
    saved(path, torch.nn.TransformerEncoderLayer(8, 2))
    check_refused(path, "holds code (torch.nn.functional.relu, torch.nn.modules.", ", ..)")


def plain_values() -> dict[str, object]:
    tensor, parameter = torch.ones(2), torch.nn.Parameter(torch.ones(2))
    tensor.note = parameter.note = "an attribute"
    return {
        "tensors": [torch.zeros(2, dtype=getattr(torch, name)) for name in DTYPES],
        "parameters": [torch.nn.Parameter(torch.ones(2)), parameter],
        "values": [1, 2.5, "x", None, True, 1 << 70, b"bytes", bytearray(b"b"), 1j, {1, 2}, (3,)],
        "torch": [torch.Size([1]), torch.device("cuda:0"), torch.float32, torch.strided],
        "collections": collections.OrderedDict(counter=collections.Counter("abca"), tensor=tensor),
    }


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("make", "plain"),
    [
        (plain_values, True),
        (lambda: [make() for make, _ in ODD], True),
        (lambda: [np.float64(1.5), np.ones(2), Fraction(1, 2), Path("x"), print], False),
        (lambda: torch.nn.TransformerEncoderLayer(8, 2), False),
    ],
)
def test_torch_finds_the_same_names(file: Path, make: Callable[[], object], plain: bool) -> None:
    theirs = torch.serialization.get_unsafe_globals_in_checkpoint(saved(file, make()))
    assert set(inspect_pickle(file).code) == set(theirs)
    assert (theirs == []) == plain
    if plain:
        torch.load(file, weights_only=True)
    assert set(_get_allowed_globals()) >= _PLAIN


def names_by_running(content: bytes) -> list[str]:
    names = set()

    class Recorder(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> object:
            names.add(f"{module}.{name}".replace("__builtin__", "builtins"))
            return super().find_class(module, name)

    Recorder(io.BytesIO(content)).load()
    return sorted(names)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_names_are_what_unpickling_asks_for(file: Path, protocol: int) -> None:
    rng = random.Random(protocol)
    leaves = [
        *(Fraction, os.path.join, collections.deque, len, pickle.Unpickler.load),
        *(Fraction(1, 3), np.float32(2), np.arange(3), Path("x"), range(3), 1 << 80, "os", b"x"),
        *(collections.OrderedDict(a=1), {1, 2}, frozenset("a"), complex(1, 2), 0.5, None, True),
    ]

    def tree(depth: int) -> object:
        items = [rng.choice(leaves) if depth == 0 else tree(depth - 1) for _ in range(3)]
        return rng.choice([items, tuple(items), dict(enumerate(items)), {"again": [items, items]}])

    for _ in range(20):
        content = pickle.dumps(tree(2), protocol)
        assert list(inspect_pickle(with_pickle(file, content)).names) == names_by_running(content)


STRINGS = b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94"  # in the memo as 0 and 1
BY_HAND = {
    b"(S'x'\niposix\nsystem\n.": "posix.system",
    b"cposix\nsystem\n(S'x'\ntR.": "posix.system",
    STRINGS + b"\x93.": "posix.system",
    STRINGS + b"00N0h\x00h\x01\x93.": "posix.system",
    STRINGS + b"h\x01\x86(NN1K\x010\x8c\x01x\x8c\x01y\x93.": "x.y",
    STRINGS + b"\x85R\x8c\x06system\x93.": "?.system",
    b"\x80\x04\x8c\x02os2\x93.": "os.os",
    b"\x80\x02\x82\xf0.": "copyreg extension 240",
}


@pytest.mark.parametrize("content", BY_HAND)
def test_names_in_pickles_made_by_hand(file: Path, content: bytes) -> None:
    assert inspect_pickle(with_pickle(file, content)).code == (BY_HAND[content],)
    for bad in (content[:-1], b"\x80\x02R.", b"\x80\x02K\1(K\1\x86t.", b"\x80\x02h\1."):
        with refused(with_pickle(file, bad), "is damaged: its pickle is not whole: "):
            inspect_pickle(file)


BEGINNINGS = {
    "is empty": b"",
    "not of torch, it begins with b'hello, this is ": b"hello, this is a text\n",
    "a web page, perhaps of a failed download": b"\n  <!DOCTYPE html>\n<html><body>404",
    "a pointer of git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:12",
    "a safetensors file": (2).to_bytes(8, "little") + b"{}",
    "a pickle, which is code": pickle.dumps({"x": 1}),
    "not of torch, it begins with b'PK": b"PK\x05\x06" + bytes(18),
}


@pytest.mark.parametrize("words", BEGINNINGS)
def test_files_of_other_kinds(file: Path, words: str) -> None:
    file.write_bytes(BEGINNINGS[words])
    check_refused(file, words, "would be right")


def test_no_file(tmp_path: Path) -> None:
    check_refused(tmp_path / "vitl.pt", "does not exist")
    check_refused(tmp_path, "is not a file; a .pt file would be right")
    os.mkfifo(tmp_path / "pipe.pt")
    check_refused(tmp_path / "pipe.pt", "is not a file")


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_other_formats_of_torch(tmp_path: Path, protocol: int) -> None:
    path = saved(tmp_path / "x.pt", {"x": torch.ones(2)}, pickle_protocol=protocol)
    assert inspect_pickle(path).protocol == protocol
    check_refused(path, f"has pickle protocol {protocol}", "save it again")
    saved(path, {}, _use_new_zipfile_serialization=False, pickle_protocol=protocol - 1)
    check_refused(path, "torch before 1.6", f"torch.save(torch.load({str(path)!r}, weights_only")


def test_other_zip_files(file: Path) -> None:
    for missing in ("data.pkl", "version"):
        saved(file, {})
        rezip(file, lambda name, content, missing=missing: None if name == missing else content)
        check_refused(file, "a zip file, but not of torch.save")
    saved(file, {})
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("zoo/data.pkl", pickle.dumps({}, 2))
    check_refused(file, "a zip file, but not of torch.save")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_and_the_name_of_a_safetensors_file(file: Path) -> None:
    check_refused(file.rename(file.with_suffix(".safetensors")), "rename it to vitl.pt")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    check_refused(file, "a TorchScript program", "state_dict()")


def test_torch_is_needed_to_read_only(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys, jvjepa.convert.torchfile; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.stdout == "False\n", result.stderr
    monkeypatch.setitem(sys.modules, "torch", None)
    assert inspect_pickle(file).code == ()
    with pytest.raises(InputError, match=r"vitl\.pt needs torch: pip install 'jvjepa\[torch\]'"):
        open_torch(file).__enter__()


@pytest.mark.parametrize("length", ["10%", "50%", "99%", "-10", "-1"])
@pytest.mark.parametrize("large", [True, False])
def test_a_file_that_is_cut_off(file: Path, length: str, large: bool) -> None:
    content, number = (GOLDEN if large else file).read_bytes(), int(length.rstrip("%"))
    file.write_bytes(content[: len(content) * number // 100 if "%" in length else number])
    check_refused(file, "is cut off or damaged", "fetch it again")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_records_that_torch_would_read_wrongly(file: Path) -> None:
    whole = file.read_bytes()
    expected = torch.load(file)["encoder"]["weight"]
    rezip(file, lambda name, content: None if name == "data/1" else content)
    check_refused(file, "is damaged: data/1 has 0 bytes, 12 are needed")
    file.write_bytes(whole)
    rezip(file, lambda name, content: content[:-1] if name == "data/0" else content)
    assert not torch.equal(torch.load(file, mmap=True)["encoder"]["weight"], expected)
    check_refused(file, "is damaged: data/0 has 47 bytes, 48 are needed")
    count = (b"cpuq\x08K\x0c", b"cpuq\x08J\0\xff\xff\xff")  # 12 values become -256
    rezip(file, lambda name, content: content.replace(*count))
    check_refused(file, "its pickle asks for ('storage', 'torch.FloatStorage', '0', 'cpu', -256)")
    file.write_bytes(whole)
    rezip(file, lambda name, content: content, compression=zipfile.ZIP_DEFLATED)
    assert not torch.equal(torch.load(file, mmap=True)["encoder"]["weight"], expected)
    check_refused(file, "is compressed or encrypted", "level 0")
    file.write_bytes(whole)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("vitl/data/0", bytes(48))
    check_refused(file, "is damaged: data/0 is not where it should be")


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
