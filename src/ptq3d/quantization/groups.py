"""Tensors that share a scale."""

from __future__ import annotations

from collections.abc import Sequence


class Groups:
    """Disjoint sets of tensor names, in the order in which they were first seen."""

    def __init__(self) -> None:
        self._of: dict[str, list[str]] = {}

    def join(self, names: Sequence[str]) -> None:
        """Put these, and all that are together with one of them, into one set."""
        merged: list[str] = []
        for name in names:
            for member in self._of.get(name, [name]):
                if member not in merged:
                    merged.append(member)
        for member in merged:
            self._of[member] = merged

    def tuples(self) -> tuple[tuple[str, ...], ...]:
        """Every set once."""
        seen: dict[int, tuple[str, ...]] = {}
        for members in self._of.values():
            seen.setdefault(id(members), tuple(members))
        return tuple(seen.values())
