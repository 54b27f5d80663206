"""One progress bar for all long work: on a terminal's stderr, silent elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """Told how far the work is."""

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` pieces are finished."""


def silent(done: int, total: int) -> None:
    """Show nothing."""


@contextmanager
def bar(title: str, *, quiet: bool = False) -> Iterator[Progress]:
    """A progress bar that vanishes when the work is done.

    Args:
        title: what is going on.
        quiet: show nothing; so it is, too, where stderr is no terminal.
    """
    if quiet or not sys.stderr.isatty():
        yield silent
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(title, total=None)

        def update(done: int, total: int) -> None:
            shown.update(task, completed=done, total=total)

        yield update
