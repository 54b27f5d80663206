"""Tables say what they are given, letter by letter."""

from __future__ import annotations

import pytest

from ptq3d.checking import Problem
from ptq3d.tables import new_table, problems_table, show_table


def test_square_brackets_are_letters(capsys: pytest.CaptureFixture[str]) -> None:
    """Names of extras and files, which rich would take for styles."""
    show_table(problems_table([Problem("pat[red]01[bold]", "error", "unreadable", "pip install 'ptq3d[itk]'")]))
    shown = capsys.readouterr().out
    assert "pat[red]01[bold]" in shown
    assert "pip install 'ptq3d[itk]'" in shown


def test_a_table_without_names_has_no_header(capsys: pytest.CaptureFixture[str]) -> None:
    table = new_table("", "", right=False)
    table.add_row("a", "b")
    show_table(table)
    assert capsys.readouterr().out.split() == ["a", "b"]
