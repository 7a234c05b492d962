"""Checks of the fields of a configuration, each with one message, and the way back from JSON."""

import dataclasses
import json
import math
from typing import Any, TypeVar

from jvjepa.errors import ConfigError

_T = TypeVar("_T")


class Config:
    """What the configuration of a whole model inherits; a dataclass, as those inside of it."""

    def to_json(self) -> dict[str, Any]:
        """Returns the configuration as plain JSON values; `from_json` is the way back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def check(ok: bool, owner: object, field: str, right: str) -> None:
    """Raises ConfigError, which names the field and its value and says `right`, unless `ok`."""
    if not ok:
        value = getattr(owner, field)
        raise ConfigError(f"{type(owner).__name__}.{field} = {value!r}; it must be {right}")


def is_whole(value: object, least: int = 0) -> bool:
    """Whether a value is a whole number, `least` or more; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object, least: float = -math.inf, most: float = math.inf) -> bool:
    """Whether a value is a finite number from `least` to `most`; true and false are none."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and -math.inf < value < math.inf and least <= value <= most


def check_positive_ints(owner: object, *fields: str) -> None:
    """Raises ConfigError unless all these fields are whole numbers above 0."""
    for field in fields:
        check(is_whole(getattr(owner, field), 1), owner, field, "a whole number above 0")


def check_bools(owner: object, *fields: str) -> None:
    """Raises ConfigError unless all these fields are true or false."""
    for field in fields:
        check(isinstance(getattr(owner, field), bool), owner, field, "true or false")


def check_choices(owner: object, **choices: tuple[object, ...]) -> None:
    """Raises ConfigError unless each of these fields has one of the values given for it."""
    for field, right in choices.items():
        check(getattr(owner, field) in right, owner, field, f"one of {right}")


def check_kinds(owner: object, **kinds: type) -> None:
    """Raises ConfigError unless each of these fields is of the class given for it."""
    for field, right in kinds.items():
        fits = isinstance(getattr(owner, field), right)
        check(fits, owner, field, f"of the class {right.__name__}")


def check_eps(owner: object) -> None:
    """Raises ConfigError unless the field `layer_norm_eps` is between 0 and 1."""
    eps = getattr(owner, "layer_norm_eps")  # noqa: B009 (the owners share no base class)
    check(isinstance(eps, float) and 0 < eps < 1, owner, "layer_norm_eps", "between 0 and 1")


def build(cls: type[_T], values: object) -> _T:
    """Builds a configuration without nested ones from its JSON form.

    Args:
        cls: the dataclass.
        values: should be an object with its fields.

    Returns:
        The configuration, checked.

    Raises:
        ConfigError: it is no object, or a field is missing, unknown or impossible.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{cls.__name__} must be a JSON object, not {values!r}")
    # JSON has no tuples.
    values = {key: tuple(x) if isinstance(x, list) else x for key, x in values.items()}
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    unknown = sorted(set(values) - {field.name for field in fields})
    needed = {field.name for field in fields if field.default is dataclasses.MISSING}
    missing = sorted(needed - set(values))
    if unknown or missing:
        raise ConfigError(f"{cls.__name__}: missing fields {missing}, unknown fields {unknown}")
    return cls(**values)
