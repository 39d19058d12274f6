"""Registries: what a run can be made of, by name. Entries are data that reads without JAX; code is imported on use."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, Generic, TypeVar


@dataclass(frozen=True)
class Option:
    """An option that a method brings with it: a field of `PruneConfig` and a flag, without effect under other methods.

    Attributes:
        name: In Python and YAML (`owl_m`); the flag is `--owl-m`.
        default: A whole number, a float, or a tuple of floats, as all its values are.
        help: What it means.
        low: The least value, of each number.
        high: The largest value, of each number.
    """

    name: str
    default: int | float | tuple[float, ...]
    help: str
    low: float = 0
    high: float = math.inf


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What every entry of a registry tells.

    Attributes:
        help: A few words for the command line and the report.
        options: What it brings with it.
        module: Where its code is, if not in the registry's package under the entry's name.
    """

    help: str
    options: tuple[Option, ...] = ()
    module: str | None = None


@dataclass(frozen=True)
class Settings:
    """The values of a method's own options in one run. Hashable: programs are specialised to them.

    Attributes:
        values: By the options' names.
        reference: Whether to repeat what the released code does, see `--budget`.
    """

    values: tuple[tuple[str, int | float | tuple[float, ...]], ...] = ()
    reference: bool = False

    def __getitem__(self, name: str) -> Any:
        return dict(self.values)[name]

    def replaced(self, values: Mapping[str, Any]) -> "Settings":
        """The same with other values of some options."""
        return Settings(tuple((name, values.get(name, value)) for name, value in self.values), self.reference)


NO_SETTINGS = Settings()
E = TypeVar("E", bound=Entry)


class Registry(Mapping[str, E], Generic[E]):
    """Entries by name, in the order in which they are listed.

    Args:
        package: Holds one module for each entry, named as the entry.
        entries: The entries by name.
    """

    def __init__(self, package: str, entries: Mapping[str, E]) -> None:
        self._package = package
        self._entries = dict(entries)

    def __getitem__(self, name: str) -> E:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def named(self, value: str) -> tuple[str, ...]:
        """The entries that an option's value names: one, several that are joined by +, or, as `none` does, no one."""
        names = (value,) if value in self else tuple(value.split("+"))
        return names if all(name in self for name in names) else ()

    def settings(self, value: str, values: Mapping[str, Any] | None = None, *, reference: bool = False) -> Settings:
        """The values of the options of what is `named`, from all of a run's; their defaults where there are none."""
        options = [option for name in self.named(value) for option in self[name].options]
        chosen = {option.name: (values or {}).get(option.name, option.default) for option in options}
        return Settings(tuple(chosen.items()), reference)

    def restricted(self, name: str, settings: Settings) -> Settings:
        """Of settings, those of one entry."""
        own = {option.name for option in self[name].options}
        return Settings(tuple(pair for pair in settings.values if pair[0] in own), settings.reference)

    def module(self, name: str) -> ModuleType:
        """The code of an entry, imported on first use."""
        return import_module(self[name].module or f"{self._package}.{name}")
