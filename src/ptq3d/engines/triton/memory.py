"""Where the buffers of a program lie: one arena, in which those that are never needed at the same time share bytes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from ptq3d.engines.triton.program import Program
from ptq3d.engines.triton.steps import Move, Step

ALIGNMENT = 512  # bytes
Life = tuple[int, int]


def planned(program: Program) -> Program:
    """The program with `places` and `arena_bytes`."""
    lives = lifetimes(program)
    places, total = place([buffer.nbytes for buffer in program.buffers], lives)
    return replace(program, places=places, arena_bytes=total)


def lifetimes(program: Program) -> tuple[Life, ...]:
    """First and last step of each buffer, both included; (0, -1) for one that nothing needs. Input and output live throughout."""
    lives = [(0, -1)] * len(program.buffers)
    for number, step in enumerate(program.steps):
        for buffer in used(step):
            first, last = lives[buffer]
            lives[buffer] = (number if last < first else first, number)
    for view in (program.input, program.output):
        lives[view.buffer] = (0, max(len(program.steps) - 1, 0))
    return tuple(lives)


def used(step: Step) -> Iterator[int]:
    """The buffers that a step reads or writes."""
    yield step.out.buffer
    yield from (view.buffer for view in step.reads)
    sums: int | None = getattr(step, "sums", None)
    if sums is not None:
        yield sums
    if isinstance(step, Move) and step.zeros is not None:
        yield step.zeros.buffer


def place(sizes: Sequence[int], lives: Sequence[Life]) -> tuple[tuple[int, ...], int]:
    """Byte offsets such that what lives at the same time never overlaps: the largest first, each in the smallest gap it fits.

    Args:
        sizes: in bytes.
        lives: first and last step of each, both included; empty where the last is before the first.

    Returns:
        (an offset for each, a multiple of `ALIGNMENT`; how long the arena is).

    Source: Pisarchyk & Lee 2020, "Efficient memory management for deep neural net inference", greedy by size.
    """
    lengths = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    places = [0] * len(sizes)
    done: list[int] = []
    for one in sorted(range(len(sizes)), key=lambda index: (-lengths[index], index)):
        if lives[one][1] < lives[one][0]:
            continue
        beside = sorted((places[other], lengths[other]) for other in done if _meet(lives[one], lives[other]))
        places[one] = _gap(lengths[one], beside)
        done.append(one)
    return tuple(places), max((places[one] + lengths[one] for one in done), default=0)


def _meet(one: Life, other: Life) -> bool:
    return one[0] <= other[1] and other[0] <= one[1]


def _gap(length: int, taken: list[tuple[int, int]]) -> int:
    """The start of the smallest gap that holds `length` bytes; what is taken is sorted and may overlap."""
    ends = list(itertools.accumulate((start + size for start, size in taken), max, initial=0))
    gaps = [(start - end, end) for end, (start, _) in zip(ends, taken, strict=False) if start - end >= length]
    return min(gaps)[1] if gaps else ends[-1]
