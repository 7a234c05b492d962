"""CSV files with a header, read strictly."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from jvjepa.errors import InputError


def read_csv(
    source: Path, columns: Sequence[str], content: bytes | None = None
) -> list[tuple[int, dict[str, str]]]:
    """Reads the rows of a CSV file that has certain columns.

    Args:
        source: the file; messages begin with it.
        columns: those that must be there, each once. Others may be, and the rows have them too.
        content: what is in the file, where it has been read already.

    Returns:
        Every row, and before it the line where it ends, counted from 1.

    Raises:
        InputError: there is no such file, it is no text in UTF-8 or no CSV, a column is missing or
            there twice, or a row has not as many fields as the header.
    """
    try:
        text = (source.read_bytes() if content is None else content).decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"{source}: there is no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{source}: is not a text in UTF-8 ({error.reason})") from None
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        header = list(reader.fieldnames or ())
        _check_header(source, header, columns)
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise InputError(f"{source}:{reader.reader.line_num}: is no CSV ({error})") from None
    for line, row in rows:
        if None in row or None in row.values():
            raise InputError(
                f"{source}:{line}: has more or fewer fields than the header, which has "
                f"{len(header)}"
            )
    return rows


def _check_header(source: Path, header: Sequence[str], columns: Sequence[str]) -> None:
    missing = [name for name in columns if name not in header]
    if missing:
        raise InputError(
            f"{source}: has no column {', '.join(missing)}; it has {', '.join(header) or 'none'}, "
            f"and {', '.join(columns)} are needed"
        )
    twice = [name for name in columns if header.count(name) > 1]
    if twice:
        raise InputError(f"{source}: has the column {twice[0]} more than once")
