"""Names for rules: an insertion-ordered table that refuses to be overwritten."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

from gossamer.errors import ArgumentError, closest

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A table of name → immutable rule, open to new names and closed to changed ones.

    It holds definitions only, never anything of a run, so that two runs can share it.

    Args:
        kind: what the entries are, in the singular, for messages.
        of: their type, where only one is taken.

    Example:
        >>> table = Registry("colour")
        >>> table.register("red", 1)
        1
        >>> table["red"]
        1
    """

    def __init__(self, kind: str, of: type | None = None) -> None:
        self.kind, self.of = kind, of
        self._entries: dict[str, T] = {}

    def register(self, name: str, rule: T) -> T:
        """Adds a rule under a new name and returns it.

        Args:
            name: a Python identifier that is not taken yet.
            rule: the immutable value to find under it.

        Raises:
            ArgumentError: the name is taken, or is no identifier, or the rule is of another type.

        Example:
            >>> Registry("colour").register("blue", 2)
            2
        """
        if not isinstance(name, str) or not name.isidentifier():
            raise ArgumentError(f"{self.kind} name {name!r} is not an identifier; use letters, digits and '_'")
        if name in self._entries:
            raise ArgumentError(f"{self.kind} {name!r} is registered already; choose another name")
        if self.of is not None and not isinstance(rule, self.of):
            raise ArgumentError(
                f"{self.kind} {name!r} must be a {self.of.__name__}, got {type(rule).__name__}; make one of it first"
            )
        self._entries[name] = rule
        return rule

    def __getitem__(self, name: str) -> T:
        try:
            return self._entries[name]
        except KeyError:
            raise ArgumentError(f"unknown {self.kind} {name!r}. {closest(str(name), self._entries)}") from None

    def get(self, name: str, default: Any = None) -> Any:
        """The rule of that name, or the default where there is none."""
        return self._entries.get(name, default)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
