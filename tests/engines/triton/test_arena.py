"""Laws of the arena: what lives at the same time never shares a byte, and it is no longer than it must be where that is known."""

from __future__ import annotations

from itertools import combinations

import torch
from hypothesis import given
from hypothesis import strategies as st

from ptq3d.engines.triton.ahead import Blueprint
from ptq3d.engines.triton.arena import Arena
from ptq3d.engines.triton.memory import ALIGNMENT, lifetimes, place, planned
from ptq3d.engines.triton.program import Buffer, Program
from ptq3d.engines.triton.steps import Dtype, Move, View

LIVES = st.tuples(st.integers(0, 12), st.integers(0, 6)).map(lambda pair: (pair[0], pair[0] + pair[1]))
BUFFERS = st.lists(st.tuples(st.integers(0, 5000), LIVES), max_size=24)


@given(BUFFERS)
def test_buffers_that_live_at_the_same_time_never_overlap(buffers: list[tuple[int, tuple[int, int]]]) -> None:
    sizes, lives = [size for size, _ in buffers], [life for _, life in buffers]
    places, total = place(sizes, lives)
    assert all(start % ALIGNMENT == 0 and start + size <= total for start, size in zip(places, sizes, strict=True))
    for one, other in combinations(range(len(sizes)), 2):
        if lives[one][0] <= lives[other][1] and lives[other][0] <= lives[one][1]:
            assert places[one] + sizes[one] <= places[other] or places[other] + sizes[other] <= places[one]


@given(BUFFERS)
def test_the_arena_is_between_the_fullest_moment_and_all_side_by_side(
    buffers: list[tuple[int, tuple[int, int]]],
) -> None:
    lengths = [-(-size // ALIGNMENT) * ALIGNMENT for size, _ in buffers]
    lives = [life for _, life in buffers]
    _, total = place([size for size, _ in buffers], lives)
    moments = [sum(n for n, (a, b) in zip(lengths, lives, strict=True) if a <= now <= b) for now in range(20)]
    assert max(moments) <= total <= sum(lengths)


def test_a_chain_of_steps_needs_two_buffers_beside_input_and_output() -> None:
    views = [View(number, 0, (1, 4096), (4096, 1), "int8") for number in range(12)]
    steps = tuple(Move(str(number), views[number + 1], views[number]) for number in range(11))
    program = planned(Program(steps, tuple(Buffer(4096, "int8") for _ in views), views[0], views[-1], ()))
    assert program.arena_bytes == 4 * 4096
    assert lifetimes(program)[0] == lifetimes(program)[-1] == (0, 10)
    assert lifetimes(program)[3] == (2, 3)


def test_a_buffer_that_nothing_needs_takes_no_memory() -> None:
    assert place([4096, 100], [(0, -1), (0, 3)]) == ((0, 0), ALIGNMENT)


@given(st.integers(0, 64), st.sampled_from(["int8", "fp16", "fp32"]))
def test_what_is_compiled_ahead_has_the_alignment_of_what_is_launched(offset: int, dtype: Dtype) -> None:
    """Triton compiles a kernel anew for a pointer that 16 does not divide: a slice of channels may start anywhere."""
    view = View(1, offset, (1, 4), (4, 1), dtype)
    first = View(0, 0, (1, 100), (100, 1), "int8")
    program = planned(Program((Move("", view, view),), (Buffer(100, "int8"), Buffer(68, dtype)), first, first, ()))
    real, ahead = Arena(program, torch.device("cpu")).view(view), Blueprint().view(view)
    assert ahead.dtype == real.dtype
    assert ahead.data_ptr() % 16 == real.data_ptr() % 16
