"""One check for each kind of value that a user gives; errors name the flag, what was found and what is expected."""

import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from neuroal_jax.errors import UserError
from neuroal_jax.files.protection import lies_in, same_place
from neuroal_jax.machine.group import Group
from neuroal_jax.masks.patterns import NONE, read_pattern
from neuroal_jax.registry import Option

LAMBDA_SETS = ("paper", "reference")
ALL, AUTO = "all", "auto"
MAX_LAMBDA = 0.5  # densities span 2 * lambda, and no span exceeds 1

T = TypeVar("T")


def flag(name: str) -> str:
    """An option's flag on the command line."""
    return "--" + name.replace("_", "-")


def shown(value: Any) -> str:
    """A value in a message."""
    try:
        return repr(value)
    except ValueError:  # Python writes no number of more than 4300 digits
        return "a number of thousands of digits"


def unknown(name: str, value: Any, choices: Collection[str]) -> str:
    """What to say of a name that is not one of some."""
    text = value if isinstance(value, str) else shown(value)
    close = get_close_matches(text[:99], list(choices), n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    return f"{flag(name)} {text} is unknown{hint}: expected one of {', '.join(choices)}"


def optional(check: Callable[[str, Any], T], name: str, value: Any) -> T | None:
    """None, or what `check` makes of the value."""
    return None if value is None else check(name, value)


def choice(name: str, value: Any, choices: Collection[str]) -> str:
    """One of some names."""
    if not isinstance(value, str) or value not in choices:
        raise UserError(unknown(name, value, choices))
    return value


def text(name: str, value: Any) -> str:
    """A name or a path; `~` is expanded."""
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise UserError(f"{flag(name)} is {shown(value)}, expected a name or a path")
    return os.path.expanduser(value)


def name(name: str, value: Any) -> str:
    """A name of something in a file."""
    if not isinstance(value, str) or not value:
        raise UserError(f"{flag(name)} is {value!r}, expected a name")
    return value


def path_to(name: str, value: Any) -> Path:
    """A path; as the type of a flag of argparse, with its `name` given."""
    return Path(text(name, value))


def _number(name: str, value: Any, expected: str) -> float:
    try:
        if isinstance(value, bool | bytes):  # `!!binary` of YAML
            raise ValueError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{flag(name)} is {shown(value)}, expected {expected}") from None


def fraction(name: str, value: Any) -> float:
    """A number between 0 and 1, both excluded."""
    expected = "a number between 0 and 1, both excluded"
    number = _number(name, value, expected)
    if not 0 < number < 1:  # false for NaN too
        raise UserError(f"{flag(name)} is {value}, expected {expected}")
    return number


def whole(name: str, value: Any, low: int, high: float = math.inf) -> int:
    """A whole number of at least `low`, and at most `high`."""
    expected = f"a whole number of at least {low}" if high == math.inf else f"a whole number from {low} to {high}"
    number = _number(name, value, expected)
    if not math.isfinite(number) or number != int(number) or not low <= number <= min(high, 2**31 - 1):
        raise UserError(f"{flag(name)} is {value}, expected {expected}")
    return int(number)


def positive(name: str, value: Any) -> int:
    """A whole number of at least 1."""
    return whole(name, value, low=1)


def count_or_all(name: str, value: Any) -> int | str:
    """A whole number of at least 1, or `all`."""
    if value == ALL:
        return ALL
    try:
        return positive(name, value)
    except UserError as error:
        raise UserError(f"{error}, or {ALL}") from None


def processes(name: str, value: Any) -> str:
    """`auto`, or the processes of a run and which of them this is; see `group`."""
    if value != AUTO:
        group(name, value)
    return str(value)


def group(name: str, value: Any) -> Group:
    """The processes of a run and which of them this is, of HOST:PORT,PROCESSES,RANK."""
    match = re.fullmatch(r"([^\s,:]+):(\d{1,5}),(\d{1,5}),(\d{1,5})", value) if isinstance(value, str) else None
    found = Group(match[1], *map(int, match.groups()[1:])) if match else None
    if found is None or not (0 < found.port < 2**16 and 0 <= found.rank < found.processes):
        raise UserError(
            f"{flag(name)} is {shown(value)}, expected {AUTO} or HOST:PORT,PROCESSES,RANK with a rank from 0 to "
            "PROCESSES - 1, as node1:4000,2,0"
        )
    return found


def kept_of(name: str, value: Any) -> str:
    """How many of every few neighbours stay, as 2:4 or auto:8, or none."""
    try:
        if not isinstance(value, str):
            raise ValueError
        return str(read_pattern(value) or NONE)
    except ValueError:
        raise UserError(
            f"{flag(name)} is {shown(value)}, expected N:M, where N of every M neighbouring inputs of a row stay, as "
            "2:4; or auto:M, where every block has its own N, as auto:8; or none"
        ) from None


def memory_size(name: str, value: Any) -> int:
    """Bytes, as a whole number or as 80GiB, 24GB, 512MiB."""
    units = {"GiB": 2**30, "MiB": 2**20, "GB": 10**9, "MB": 10**6}
    unit = next((unit for unit in units if isinstance(value, str) and value.strip().endswith(unit)), None)
    digits = value.strip().removesuffix(unit) if isinstance(value, str) and unit else value
    expected = f"a number of bytes, or one of {', '.join(units)} as 80GiB"
    size = _number(name, digits, expected) * units.get(unit or "", 1)
    if not 1 <= size < 2**60:
        raise UserError(f"{flag(name)} is {shown(value)}, expected {expected}")
    return int(size)


def ranged(name: str, value: Any, low: float, high: float) -> float:
    """A finite number from `low` to `high`."""
    bounds = f"from {low} to {high}" if math.isfinite(high) else f"of at least {low}"
    number = _number(name, value, f"a number {bounds}")
    if not low <= number <= high or not math.isfinite(number):
        raise UserError(f"{flag(name)} is {value}, expected a number {bounds}")
    return number


def boolean(name: str, value: Any) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise UserError(f"{flag(name)} is {shown(value)}, expected true or false")
    return value


def own_option(option: Option, value: Any) -> int | float | tuple[float, ...]:
    """A value of a method's own option: a whole number where its default is one, numbers where it is a tuple."""
    if isinstance(option.default, tuple):
        return numbers(option, value)
    if isinstance(option.default, int):
        return whole(option.name, value, int(option.low), option.high)
    return ranged(option.name, value, option.low, option.high)


def numbers(option: Option, value: Any) -> tuple[float, ...]:
    """Numbers within an option's bounds, of which none appears twice; `none` is no number at all."""
    if value == "none":
        return ()
    items = value.replace(",", " ").split() if isinstance(value, str) else value
    if isinstance(value, str) and not items:
        raise UserError(f"{flag(option.name)} is empty, expected numbers like 0.1,0.2, or none")
    items = items if isinstance(items, list | tuple) else [items]
    found = tuple(ranged(option.name, item, option.low, option.high) for item in items)
    if len(set(found)) < len(found):
        raise UserError(f"{flag(option.name)} is {shown(value)}, expected every number once")
    return found


def lambdas(name: str, value: Any) -> str | tuple[float, ...]:
    """The name of a set of lambdas, or numbers."""
    if isinstance(value, str) and value in LAMBDA_SETS:
        return value
    items = value.replace(",", " ").split() if isinstance(value, str) else value
    expected = f"'paper', 'reference' or numbers from 0 to {MAX_LAMBDA}"
    if not isinstance(items, list | tuple):
        items = [items]
    if not items:
        raise UserError(f"{flag(name)} is empty, expected {expected}")
    numbers = tuple(_number(name, item, expected) for item in items)
    bad = [number for number in numbers if not 0 <= number <= MAX_LAMBDA]
    if bad:
        raise UserError(f"{flag(name)} holds {bad[0]}, expected {expected}")
    return numbers


def sources(text: str) -> list[str]:
    """Texts separated by commas; a file whose name has a comma stands alone."""
    return [text] if os.path.isfile(text) else [os.path.expanduser(item.strip()) for item in text.split(",")]


def refuse_same_directory(paths: Mapping[str, str | None]) -> None:
    """Raises UserError if two of these directories, by flag, are one, whatever their names."""
    seen: dict[str, str] = {}
    for flag, value in paths.items():
        if value is not None and not (flag == "--model" and value == "demo"):
            for other, place in seen.items():
                if same_place(place, value):
                    raise UserError(f"{other} and {flag} are the same directory, {value}: choose another")
            seen[flag] = value


def refuse_within(flag: str, directory: str | None, paths: Mapping[str, str | None]) -> None:
    """Raises UserError if one of these paths, by flag, lies in a directory that holds one thing alone."""
    for other, path in paths.items():
        if directory is not None and path is not None and lies_in(path, directory):
            raise UserError(f"{other} {path} lies in {flag} {directory}, which holds the model alone: choose another")


def check_names(values: Mapping[str, Any], known: Collection[str], origin: str) -> dict[str, Any]:
    """Option names with underscores; raises UserError for one that is not `known`."""
    result = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise UserError(f"{origin}: " + unknown("option", str(key), tuple(known)).removeprefix("--option "))
        if name in result:
            raise UserError(f"{origin}: {name} appears twice")
        result[name] = value
    return result
