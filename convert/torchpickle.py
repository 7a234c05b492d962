"""Torch's `.pt` files without torch: what is in the zip file, and what its pickle would run."""

import dataclasses
import hashlib
import io
import pickletools
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from jvjepa.errors import CheckpointError

DTYPES = {  # torch's name: safetensors' name
    **{f"torch.float{bits}": f"F{bits}" for bits in (16, 32, 64)},
    **{f"torch.int{bits}": f"I{bits}" for bits in (8, 16, 32, 64)},
    **{f"torch.uint{bits}": f"U{bits}" for bits in (8, 16, 32, 64)},
    "torch.bfloat16": "BF16",
    "torch.bool": "BOOL",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e5m2": "F8_E5M2",
}
_ITEM_BYTES = {  # of a storage, whose class is torch.<name>Storage
    **dict.fromkeys(["Bool", "Byte", "Char", "QInt8", "QUInt8", "storage.Untyped"], 1),
    **dict.fromkeys(["BFloat16", "Half", "Short"], 2),
    **dict.fromkeys(["Float", "Int", "QInt32"], 4),
    **dict.fromkeys(["ComplexFloat", "Double", "Long"], 8),
    "ComplexDouble": 16,
}
# What tensors and plain values need. weights_only=True accepts these and a few more.
_PLAIN = frozenset(
    """
    _codecs.encode builtins.bytearray builtins.complex builtins.set
    collections.Counter collections.OrderedDict
    torch.Size torch.Tensor torch.device torch.nn.parameter.Parameter
    torch._tensor._rebuild_from_type_v2 torch._utils._rebuild_meta_tensor_no_storage
    torch._utils._rebuild_parameter torch._utils._rebuild_parameter_with_state
    torch._utils._rebuild_qtensor torch._utils._rebuild_sparse_tensor
    torch._utils._rebuild_tensor torch._utils._rebuild_tensor_v2 torch._utils._rebuild_tensor_v3
    torch.complex128 torch.complex64 torch.qint32 torch.qint8 torch.quint8
    torch.per_channel_affine torch.per_tensor_affine torch.serialization._get_layout
    """.split()
).union(DTYPES, (f"torch.{name}Storage" for name in _ITEM_BYTES))
# What a NumPy number needs, as a best score often is; the first is the name before NumPy 2.
NUMPY_SCALAR = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
NUMPY_NUMBER = frozenset((*NUMPY_SCALAR, "numpy.dtype"))
_LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # how files of torch before 1.6 begin, as a pickle
_ZIP = b"PK\x03\x04"
_RIGHT = "what torch.save(model.state_dict(), ..) writes would be right"
_UNKNOWN = object()  # a value that only running the pickle would give
_BEGINNINGS = {  # of what people take for a checkpoint
    rb"\Z": "empty",
    rb"\x80": "a pickle, which is code",
    rb"\s*<": "a web page, perhaps of a failed download",
    rb"version https://git-lfs": "a pointer of git-lfs, which did not fetch the file",
    rb".{8}\{": "a safetensors file",
}


class _Record(NamedTuple):
    offset: int
    size: int
    checksum: int  # CRC-32; 0 where torch was told to leave it out


@dataclasses.dataclass(frozen=True, kw_only=True)
class Archive:
    """The zip file that torch.save writes, without compression.

    Args:
        path: the file.
        records: where its records are, in the order of the file, by name without the folder.
    """

    path: Path
    records: dict[str, _Record]

    def read(self, name: str) -> bytes:
        """Reads one record; raises CheckpointError if it is not what was saved."""
        with open(self.path, "rb") as file:
            file.seek(self.records[name].offset)
            content = file.read(self.records[name].size)
        self._check(name, zlib.crc32(content))
        return content

    def check_sizes(self, storages: dict[str, int]) -> None:
        """Raises CheckpointError if storages are cut; torch would read on in what comes next."""
        for key, size in storages.items():
            found = self.records[name].size if (name := f"data/{key}") in self.records else 0
            if found < size:
                raise CheckpointError(
                    f"{self.path} is damaged: {name} has {found} bytes, {size} are needed"
                )

    def sha256(self) -> str:
        """Reads the whole file once, for its digest and its records' checksums.

        Returns:
            The hexadecimal digest of the file.

        Raises:
            CheckpointError: a record is not what was saved.
        """
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            for name, record in self.records.items():
                _feed(digest, file, record.offset - file.tell())
                self._check(name, _feed(digest, file, record.size))
            _feed(digest, file, self.path.stat().st_size - file.tell())
        return digest.hexdigest()

    def _check(self, name: str, checksum: int) -> None:
        expected = self.records[name].checksum
        if expected and checksum != expected:
            raise CheckpointError(f"{self.path} is damaged: {name} is not what its checksum says")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PickleReport:
    """What the pickle in a `.pt` file asks for, found without running it.

    Args:
        protocol: of the pickle; torch writes 2.
        names: every function and class, as module.name, sorted.
        storages: how many bytes of every storage, by its key. Tensors are views of storages.
    """

    protocol: int
    names: tuple[str, ...]
    storages: dict[str, int]

    @property
    def code(self) -> tuple[str, ...]:
        """The names that tensors, plain values, and NumPy's numbers do not need: none if good."""
        return tuple(name for name in self.names if name not in _PLAIN | NUMPY_NUMBER)


def inspect_pickle(path: str | Path) -> PickleReport:
    """Looks through the pickle in a `.pt` file. Nothing of it is run, and torch is not needed.

    Args:
        path: what torch.save wrote, since torch 1.6.

    Returns:
        What the pickle asks for.

    Raises:
        CheckpointError: the file is missing, damaged, or of another kind.
    """
    path = Path(path)
    content = _read_archive(path).read("data.pkl")
    try:
        protocol, names, asked = _follow(io.BytesIO(content))
    except (ValueError, LookupError) as error:
        raise CheckpointError(f"{path} is damaged: its pickle is not whole: {error}") from None
    storages: dict[str, int] = {}
    for identity in asked:
        match identity:
            case ("storage", str(kind), str(key), _, int(count), *_) if count >= 0:
                item = _ITEM_BYTES.get(kind.removeprefix("torch.").removesuffix("Storage"), 0)
                storages[key] = max(count * item, storages.get(key, 0))
            case _:
                raise CheckpointError(f"{path} is damaged: its pickle asks for {identity}")
    return PickleReport(protocol=protocol, names=tuple(sorted(names)), storages=storages)


def open_archive(path: str | Path) -> Archive:
    """Opens what torch may load: what holds no code, and is whole as far as can be told now.

    Args:
        path: what torch.save wrote.

    Returns:
        Its records, not read yet.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind, or holds code.
    """
    path = Path(path)
    report = inspect_pickle(path)
    if report.code:
        names = ", ".join(report.code[:5]) + (", .." if len(report.code) > 5 else "")
        raise CheckpointError(f"{path} holds code ({names}): it is not loaded; {_RIGHT}")
    if report.protocol != 2:
        raise CheckpointError(
            f"{path} has pickle protocol {report.protocol}; torch loads only its default, 2, "
            f"without running code: save it again without pickle_protocol"
        )
    if path.name.endswith(".safetensors"):
        raise CheckpointError(f"{path} is of torch.save; rename it to {path.stem}.pt")
    archive = _read_archive(path)
    archive.check_sizes(report.storages)
    return archive


def _follow(content: BinaryIO) -> tuple[int, set[str], list[object]]:
    """Follows a pickle without doing what it says; pickletools knows what each step takes.

    Returns its protocol, the functions and classes that it names, and the identities of the data
    outside of it that it asks for.
    """
    protocol = 0
    names: set[str] = set()
    asked: list[object] = []
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    for step, arg, _ in pickletools.genops(content):
        if step.name == "MARK":
            marks.append(len(stack))
            continue
        takes = step.stack_before
        start = len(stack)
        if pickletools.markobject in takes:
            start = marks.pop()
            takes = takes[: takes.index(pickletools.markobject)]
        start -= len(takes)
        if start < (marks[-1] if marks else 0):
            raise ValueError(f"{step.name} has nothing to take")
        taken = stack[start:]
        del stack[start:]
        made = _UNKNOWN if taken else arg
        match step.name:
            case "PROTO":
                protocol = arg
            case "GLOBAL" | "INST":
                names.add(made := arg.replace(" ", ".", 1).replace("__builtin__", "builtins", 1))
            case "STACK_GLOBAL":
                names.add(made := ".".join(p if isinstance(p, str) else "?" for p in taken))
            case "EXT1" | "EXT2" | "EXT4":
                names.add(made := f"copyreg extension {arg}")
            case "GET" | "BINGET" | "LONG_BINGET":
                made = memo[int(arg)]
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[int(arg)] = stack[-1]
            case "MEMOIZE":
                made = memo[len(memo)] = taken[0]
            case "DUP":
                made = taken[0]
            case "EMPTY_TUPLE" | "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                made = tuple(taken)
            case "PERSID" | "BINPERSID":
                asked.append(taken[0] if taken else arg)
        stack += [made] * len(step.stack_after)
    return protocol, names, asked


def _feed(digest: Any, file: BinaryIO, size: int) -> int:
    """Adds a file's next bytes to a digest and returns their CRC-32."""
    checksum = 0
    while size and (chunk := file.read(min(size, 1 << 20))):
        digest.update(chunk)
        checksum = zlib.crc32(chunk, checksum)
        size -= len(chunk)
    return checksum


def _read_archive(path: Path) -> Archive:
    """Reads the list of records; raises CheckpointError if they are not whole or not of torch."""
    _check_beginning(path)
    try:
        with zipfile.ZipFile(path) as file:
            members = sorted(file.infolist(), key=lambda member: member.header_offset)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise CheckpointError(
            f"{path} is cut off or damaged: its {path.stat().st_size} bytes do not end as they "
            f"should ({error}); fetch it again"
        ) from None
    names = {member.filename for member in members}
    folders = {name.partition("/")[0] for name in names}
    folder = min(folders, default="")
    if len(folders) != 1 or not {f"{folder}/data.pkl", f"{folder}/version"} <= names:
        raise CheckpointError(
            f"{path} is a zip file, but not of torch.save: that has one folder, with data.pkl and "
            f"version in it"
        )
    if f"{folder}/constants.pkl" in names:
        raise CheckpointError(
            f"{path} is a TorchScript program of torch.jit.save: it is not loaded; {_RIGHT}"
        )
    records: dict[str, _Record] = {}
    end = 0
    with open(path, "rb") as file:
        for member in members:
            name = member.filename.removeprefix(f"{folder}/")
            if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
                raise CheckpointError(
                    f"{path}: {name} is compressed or encrypted, which torch.save does not do; "
                    f"unzip it, and zip it again with level 0"
                )
            if name in records or member.header_offset < end:
                raise CheckpointError(f"{path} is damaged: {name} is not where it should be")
            file.seek(member.header_offset + 26)
            name_size, extra_size = struct.unpack("<HH", file.read(4).ljust(4, b"\0"))
            offset = member.header_offset + 30 + name_size + extra_size
            end = offset + member.file_size
            records[name] = _Record(offset, member.file_size, member.CRC)
    return Archive(path=path, records=records)


def _check_beginning(path: Path) -> None:
    """Raises CheckpointError for what people take for a checkpoint, and says what it is."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file; a .pt file would be right")
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(_ZIP):
        return
    if _LEGACY in head:
        raise CheckpointError(
            f"{path} is in the format of torch before 1.6, which cannot be read tensor by tensor; "
            f"torch.save(torch.load({str(path)!r}, weights_only=True), 'new.pt') makes it new"
        )
    known = (kind for start, kind in _BEGINNINGS.items() if re.match(start, head, re.DOTALL))
    kind = next(known, f"not of torch, it begins with {head[:16]!r}")
    raise CheckpointError(f"{path} is {kind}; {_RIGHT}")
