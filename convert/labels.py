"""The names of a probe's classes, which Meta's files do not hold."""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jvjepa.csv_file import read_csv
from jvjepa.errors import InputError

_VERB_NAMES, _NOUN_NAMES = "EPIC_100_verb_classes.csv", "EPIC_100_noun_classes.csv"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActionLabels:
    """The names of the classes of a probe that anticipates actions, in the order of its logits.

    Args:
        actions: of the actions.
        verbs: of the verbs; () where the probe has no classifier of verbs.
        nouns: of the nouns, likewise.
    """

    actions: tuple[str, ...]
    verbs: tuple[str, ...] = ()
    nouns: tuple[str, ...] = ()


def read_labels(path: str | Path) -> tuple[str, ...] | ActionLabels:
    """Reads the names of classes.

    Args:
        path: for a classifier, or for an anticipator of actions alone: a JSON list of names; a JSON
            object {"0": name, ..}, or one that has such an object under "id2label", as Hugging
            Face's config.json does; or a text with one name a line, in UTF-8. Classes may share a
            name, as ImageNet's two cranes do. For an anticipator: a JSON
            object {"verbs": [name, ..], "nouns": [name, ..], "actions": [[verb, noun], ..]} whose
            pairs are places in the two lists, from 0; or EPIC_100_train.csv, see
            `read_epic_labels`. What EPIC_100_verb_classes.csv and EPIC_100_noun_classes.csv call
            the classes is taken if they are beside it.

    Returns:
        The names, in the order of the logits.

    Raises:
        InputError: it is none of these; the message names the line of a text.
    """
    path = Path(path)
    if path.suffix == ".csv":
        beside = (path.with_name(name) for name in (_VERB_NAMES, _NOUN_NAMES))
        return read_epic_labels(path, *(file if file.exists() else None for file in beside))
    text = _read_text(path)
    if path.suffix != ".json":
        return _lines(path, text)
    try:
        values = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    if isinstance(values, dict) and "actions" in values:
        return _action_labels(path, values)
    if isinstance(values, dict):
        values = values.get("id2label", values)
    if isinstance(values, dict):
        if set(values) != {str(i) for i in range(len(values))}:
            raise InputError(f"{path}: the keys must be 0 to {len(values) - 1}, each once")
        values = [values[str(i)] for i in range(len(values))]
    return _names(path, values)


def read_epic_labels(
    train_csv: str | Path, verb_csv: str | Path | None = None, noun_csv: str | Path | None = None
) -> ActionLabels:
    """Reads the classes of Meta's EK100 probes out of the annotations that they were trained with.

    Meta numbers the classes as CPython iterates over sets of them: the pairs of `verb_class` and
    `noun_class`, put into a set row by row, are the actions; their verbs and nouns, put into sets
    in the order of that one, are the others. This does the same (`filter_annotations` in
    `evals/action_anticipation_frozen/epickitchens.py`). The order was taken from a description of
    that code. Numbers and pairs of them hash alike in every CPython from 3.8 on with 64 bits. It
    was not checked against a real probe.

    Args:
        train_csv: EPIC_100_train.csv, with the columns verb_class and noun_class.
        verb_csv: EPIC_100_verb_classes.csv, with the columns id and key; None calls the classes
            "verb 0", "verb 1", ..
        noun_csv: EPIC_100_noun_classes.csv, likewise.

    Returns:
        The names; an action's are those of its verb and its noun.

    Raises:
        InputError: a column, a number or a name is missing, or this Python orders sets otherwise.
    """
    if sys.implementation.name != "cpython" or sys.hash_info.width != 64:
        raise InputError(
            f"{train_csv}: the order of its classes is that of sets in CPython of 64 bits, which "
            "this Python is not; give the names as JSON"
        )
    columns = ("verb_class", "noun_class")
    numbers = [
        tuple(_number(train_csv, line, column, row[column]) for column in columns)
        for line, row in read_csv(Path(train_csv), columns)
    ]
    if not numbers:
        raise InputError(f"{train_csv} holds no rows")
    actions = set(numbers)
    verbs, nouns = (set([pair[i] for pair in actions]) for i in range(2))
    verb_names = _class_names("verb", verbs, verb_csv)
    noun_names = _class_names("noun", nouns, noun_csv)
    return ActionLabels(
        actions=tuple(f"{verb_names[verb]} {noun_names[noun]}" for verb, noun in actions),
        verbs=tuple(verb_names.values()),
        nouns=tuple(noun_names.values()),
    )


def _class_names(kind: str, numbers: set[int], path: str | Path | None) -> dict[int, str]:
    """The name of each class, in the order of the set."""
    if path is None:
        return {number: f"{kind} {number}" for number in numbers}
    rows = read_csv(Path(path), ("id", "key"))
    names = {_number(path, line, "id", row["id"]): row["key"] for line, row in rows}
    missing = sorted(number for number in numbers if not names.get(number))
    if missing:
        raise InputError(f"{path} has no key for the {kind} classes {missing}")
    return {number: names[number] for number in numbers}


def _number(path: str | Path, line: int, column: str, text: str) -> int:
    if not text.strip().isdecimal():
        raise InputError(f"{path}:{line}: {column} is {text!r}; it must be a whole number")
    return int(text)


def _action_labels(path: Path, values: Mapping[str, Any]) -> ActionLabels:
    unknown = sorted(set(values) - {"verbs", "nouns", "actions"})
    if unknown:
        raise InputError(f"{path} has {unknown}; it may have verbs, nouns and actions")
    verbs, nouns = (_names(path, values.get(kind, [])) for kind in ("verbs", "nouns"))
    names = values["actions"]
    if isinstance(names, list) and all(isinstance(pair, list) for pair in names):
        for pair in names:
            fits = len(pair) == 2 and all(type(place) is int for place in pair)
            if not fits or not (0 <= pair[0] < len(verbs) and 0 <= pair[1] < len(nouns)):
                raise InputError(
                    f"{path} has the action {pair}; it must be [verb, noun], places in the lists "
                    f"of {len(verbs)} verbs and {len(nouns)} nouns from 0"
                )
        names = [f"{verbs[verb]} {nouns[noun]}" for verb, noun in names]
    return ActionLabels(actions=_names(path, names), verbs=verbs, nouns=nouns)


def _read_text(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        raise InputError(f"{path}:{line}: is not a text in UTF-8 ({error.reason})") from None


def _lines(path: Path, text: str) -> tuple[str, ...]:
    """The names in a text; empty lines at its end are none."""
    names = text.splitlines()
    while names and not names[-1].strip():
        names.pop()
    for number, name in enumerate(names, 1):
        if not name.strip():
            raise InputError(f"{path}:{number}: is empty; it must be the name of a class")
    return _names(path, names)


def _names(path: Path, names: object) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(x, str) and x.strip() for x in names):
        raise InputError(f"{path} must hold the names of the classes, none of them empty")
    return tuple(names)
