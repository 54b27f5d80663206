"""Tables for people: what the verbs of the command line show."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from ptq3d.checking import CaseFacts, Problem
    from ptq3d.deployment import CaseResult
    from ptq3d.evaluation.comparison import Comparison

MEGABYTE = 1e6
MANY_CASES = 40  # more rows than anyone reads
WIDTH = 200  # columns, where the output is no terminal


def show_table(table: Table) -> None:
    """Print a table to stdout."""
    from rich.console import Console

    console = Console(file=sys.stdout, markup=False)  # names of files and packages have square brackets
    if not console.is_terminal:
        console = Console(file=sys.stdout, markup=False, width=WIDTH)
    console.print(table)


def new_table(*columns: str, right: bool = True) -> Table:
    """A table without rows; without a header where all columns are nameless.

    Args:
        columns: their names.
        right: all but the first are set to the right.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_header=any(columns))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index and right else "left", overflow="fold")
    return table


def cases_table(cases: Sequence[CaseFacts]) -> Table:
    """What was read of each case; of a large set only of those with problems."""
    shown = [case for case in cases if case.problems] if len(cases) > MANY_CASES else cases
    table = new_table("case", "split", "channels", "voxels", "spacing mm", "axes", "values", "label values", "problems")
    for case in shown:
        sizes = (" x ".join(map(str, case.shape)), " x ".join(f"{size:.3g}" for size in case.spacing), case.orientation)
        values = " .. ".join(f"{value:.6g}" for value in case.intensity)
        labels = f"{sum(value > 0 for value, _ in case.values)} of 1..{case.values[-1][0]}" if case.values else "none"
        table.add_row(case.name, case.split, str(case.channels), *sizes, values, labels, str(len(case.problems)))
    return table


def problems_table(problems: Sequence[Problem]) -> Table:
    """What is wrong with a data set."""
    table = new_table("", "case", "what", "found", right=False)
    for problem in problems:
        table.add_row(problem.severity, problem.case or "all", problem.kind, problem.text)
    return table


def deploy_table(results: Sequence[CaseResult]) -> Table:
    """Seconds of every step of each case, and Dice where labels are known; below, Dice of each class over the cases."""
    steps = list(results[0].seconds)
    judged = [result for result in results if result.dice]
    more = ["windows/s", "GB", *(["mean Dice"] if judged else [])]
    table = new_table("case", *(f"{step} s" for step in steps), *more)
    for result in results:
        dice = [f"{result.mean_dice:.4f}" if result.dice else "-"] if judged else []
        figures = [f"{result.windows_per_second:.1f}", f"{result.peak_memory_bytes / 1e9:.2f}"]
        table.add_row(result.name, *(f"{result.seconds[step]:.2f}" for step in steps), *figures, *dice)
    for name in judged[0].dice if judged else ():
        values = [value for result in judged if not math.isnan(value := result.dice[name])]
        table.add_row(f"  {name}", *[""] * (len(steps) + 2), f"{sum(values) / len(values):.4f}" if values else "absent")
    return table


def compare_table(found: Comparison) -> Table:
    """A comparison for people; ratios are against the first row."""
    table = new_table(
        "",
        "engine",
        "precision",
        "MB",
        "x",
        "window ms (p5-p95)",
        "x",
        "case s",
        "GB",
        "Dice",
        "change [95 %]",
        "fidelity",
        "INT8 MACs",
    )
    first, several = found.rows[0], len(found.cases) > 1  # an interval of one case would say nothing
    for row in found.rows:
        change = row.dice_change
        table.add_row(
            row.name if len({Path(other.name).name for other in found.rows}) < len(found.rows) else Path(row.name).name,
            row.engine,
            row.precision,
            f"{row.size_bytes / MEGABYTE:.2f}",
            f"{first.size_bytes / row.size_bytes:.2f}",
            f"{row.latency.median:.1f} ({row.latency.p5:.1f}-{row.latency.p95:.1f})",
            f"{first.latency.median / row.latency.median:.2f}",
            f"{median(row.case_seconds):.2f}",
            f"{row.peak_memory_bytes / 1e9:.2f}",
            "-" if row.mean_dice is None else f"{row.mean_dice:.4f}",
            "-"
            if change is None
            else f"{change.mean:+.4f}{f' [{change.low:+.4f}, {change.high:+.4f}]' if several else ''}",
            "-" if row.mean_fidelity is None else f"{row.mean_fidelity:.4f}",
            "unknown" if row.precision == "unknown" else f"{row.int8_mac_share:.1%}",
        )
    return table
