"""Grids as scanners and converters make them: permuted, flipped, oblique, anisotropic, rounded to float32, sheared."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import strategies as st

ROUNDED = st.booleans()


def rotation(angles: tuple[float, float, float]) -> np.ndarray:
    result = np.eye(3)
    for axis, angle in enumerate(angles):
        first, second = (index for index in range(3) if index != axis)
        turn = np.eye(3)
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        result = result @ turn
    return result


@st.composite
def affines(draw: st.DrawFn, *, oblique: bool = True, sheared: bool = False) -> np.ndarray:
    """(4, 4) voxel -> mm, left-handed in half of the cases, rounded to float32 in half of them."""
    order = draw(st.sampled_from(list(itertools.permutations(range(3)))))
    signs = draw(st.tuples(*[st.sampled_from([-1.0, 1.0])] * 3))
    spacing = draw(st.tuples(*[st.floats(0.5, 4.0).map(lambda value: round(value, 2))] * 3))
    angle = st.floats(-0.7, 0.7) if oblique else st.just(0.0)
    linear = rotation(draw(st.tuples(angle, angle, angle))) @ (np.eye(3)[:, order] * signs * spacing)
    if sheared:
        linear = linear @ np.array([[1, draw(st.floats(-0.2, 0.2)), 0], [0, 1, draw(st.floats(-0.2, 0.2))], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = linear
    affine[:3, 3] = draw(st.tuples(*[st.floats(-200, 200)] * 3))
    return affine.astype(np.float32).astype(np.float64) if draw(ROUNDED) else affine


def shapes(low: int = 1, high: int = 9) -> st.SearchStrategy[tuple[int, int, int]]:
    return st.tuples(*[st.integers(low, high)] * 3)


def spacings() -> st.SearchStrategy[tuple[float, float, float]]:
    return st.tuples(*[st.floats(0.6, 3.5)] * 3)


def orientations() -> st.SearchStrategy[str]:
    letters = [("L", "R"), ("P", "A"), ("I", "S")]
    codes = ["".join(code) for pairs in itertools.permutations(letters) for code in itertools.product(*pairs)]
    return st.sampled_from(codes)


def noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def world(shape: tuple[int, int, int], affine: np.ndarray) -> np.ndarray:
    """(3, X, Y, Z) mm."""
    voxels = np.indices(shape).reshape(3, -1)
    return (affine[:3, :3] @ voxels + affine[:3, 3:]).reshape(3, *shape)
