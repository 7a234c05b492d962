import collections
import io
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._weights_only_unpickler import _get_allowed_globals
from torchfiles import DTYPES, GOLDEN, ODD, checkpoint, refused, rezip, saved, with_pickle

from jvjepa.convert.torchfile import open_torch
from jvjepa.convert.torchpickle import _PLAIN, NUMPY_NUMBER, inspect_pickle, open_archive


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return checkpoint(tmp_path)


def check_refused(path: Path, *words: str) -> None:
    """Expects the same refusal before torch is asked, and from the reader that would ask it."""
    with refused(path, *words):
        open_archive(path)
    with refused(path, *words):
        open_torch(path).__enter__()


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
    assert set(inspect_pickle(file).code) == set(theirs) - NUMPY_NUMBER
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
