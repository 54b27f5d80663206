"""Tables in text: CSV and its kin, with a header."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from ptq3d.errors import FileError, clipped, line_of


def read_rows(path: Path, *, columns: Sequence[str] = (), delimiter: str = "") -> list[dict[str, str]]:
    """The rows of a table, each by the names of its columns in lower case; empty rows are left out.

    Args:
        path: UTF-8, with or without the mark at its start.
        columns: that the header must have.
        delimiter: what sets cells apart; "" for comma, semicolon or tab, by the header.

    Raises:
        FileError: unreadable, a column that is missing or stands there twice, or a row with more cells than columns.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            file.seek(0)
            rows = list(csv.reader(file, delimiter=delimiter or max(",;\t", key=header.count)))
    except (OSError, ValueError, csv.Error) as error:
        raise FileError(f"{path} is no readable table ({type(error).__name__}: {line_of(error)}); mend it.") from error
    names = [cell.strip().lower() for cell in rows[0]] if rows else []
    if len(set(names)) < len(names):
        raise FileError(
            f"{path}: wanted a header that names each column once, got {clipped(names)}; rename one of them."
        )
    if set(columns) - set(names):
        apart = f", set apart by {delimiter!r}" if delimiter else ""
        raise FileError(
            f"{path}: wanted a header with the columns {list(columns)}{apart}, got {clipped(names)}; add them."
        )
    for number, row in enumerate(rows[1:], start=2):
        if len(row) > len(names):
            raise FileError(f"{path}: row {number} has {len(row)} cells under {len(names)} columns; mend the row.")
    return [dict(zip(names, row, strict=False)) for row in rows[1:] if any(cell.strip() for cell in row)]
