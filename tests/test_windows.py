"""Windows and blending are MONAI's sliding window inference, or nnU-Net's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.inferers import sliding_window_inference
from monai.inferers.utils import _get_scan_interval
from torch import Tensor

from ptq3d import windows
from ptq3d.errors import OptionError, ShapeError
from ptq3d.windows import Windowing, blend, even_starts, gaussian_importance, nnunet_importance, slabs, window_starts

Size = tuple[int, int, int]
OVERLAPS = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.625, 0.75, 0.9]) | st.floats(0, 0.95)


def sizes(low: int, high: int) -> st.SearchStrategy[Size]:
    return st.tuples(*[st.integers(low, high)] * 3)


def identity(windows: Iterable[Tensor]) -> Iterator[Tensor]:
    return iter(windows)


class Convolution:
    """A network whose answer depends on where the window ends: 3 classes from all channels, zero padding."""

    def __init__(self, channels: int) -> None:
        torch.manual_seed(0)
        self.weight = torch.randn(3, channels, 3, 3, 3)

    def __call__(self, windows: Tensor) -> Tensor:
        return torch.nn.functional.conv3d(windows.contiguous(), self.weight, padding=1).tanh() * 10

    def stream(self, windows: Iterable[Tensor]) -> Iterator[Tensor]:
        return (self(window[None])[0] for window in windows)


@settings(max_examples=300, deadline=None)
@given(sizes(1, 40), sizes(1, 24), OVERLAPS)
def test_window_starts_are_monais(shape: Size, window: Size, overlap: float) -> None:
    if np.prod([max(size, 1) / max(width * (1 - overlap), 1) for size, width in zip(shape, window, strict=True)]) > 4e3:
        shape = (shape[0], 1, 1)
    padded = tuple(max(size, width) for size, width in zip(shape, window, strict=True))
    slices = dense_patch_slices(padded, window, _get_scan_interval(padded, window, 3, (overlap,) * 3))
    assert window_starts(shape, window, overlap) == [tuple(int(part.start) for part in box) for box in slices]


@settings(deadline=None)
@given(sizes(1, 40))
def test_importance_is_monais(window: Size) -> None:
    theirs = compute_importance_map(window, mode="gaussian", sigma_scale=0.125)
    torch.testing.assert_close(gaussian_importance(window), theirs, rtol=0, atol=1e-7)


@settings(deadline=None)
@given(sizes(1, 60), sizes(2, 24), st.sampled_from([0.5, 0.25, 0.75]))
def test_even_starts_are_nnunets(shape: Size, window: Size, overlap: float) -> None:
    module = pytest.importorskip("nnunetv2.inference.sliding_window_prediction")
    padded = tuple(max(size, width) for size, width in zip(shape, window, strict=True))
    steps = module.compute_steps_for_sliding_window(padded, window, 1 - overlap)
    assert even_starts(shape, window, overlap) == list(itertools.product(*steps))


@settings(max_examples=30, deadline=None)
@given(sizes(2, 40))
def test_nnunets_importance_is_nnunets(window: Size) -> None:
    module = pytest.importorskip("nnunetv2.inference.sliding_window_prediction")
    theirs = module.compute_gaussian(window, 1 / 8, 1, torch.float32, torch.device("cpu"))
    torch.testing.assert_close(nnunet_importance(window), theirs, rtol=1e-5, atol=1e-7)


@settings(max_examples=100, deadline=None)
@given(
    sizes(1, 20),
    sizes(3, 12),
    OVERLAPS,
    st.integers(1, 2),
    st.integers(0, 2),
    st.sampled_from([0.0, -1.5]),
    st.sampled_from(["gaussian", "constant"]),
)
def test_blending_is_monais(
    shape: Size, window: Size, overlap: float, channels: int, axis: int, outside: float, mode: str
) -> None:
    if len(window_starts(shape, window, overlap)) > 500:
        overlap = 0.5
    image = torch.from_numpy(np.random.default_rng(1).normal(size=(channels, *shape)).astype(np.float32))
    network = Convolution(channels)
    ours = blend(image, network.stream, Windowing(window, overlap, outside, axis, blending=mode))
    theirs = sliding_window_inference(image[None], window, 1, network, overlap=overlap, mode=mode, cval=outside)[0]
    # to the bit where windows come in MONAI's order; another order adds in another order
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0 if axis == 0 else 1e-4)


@settings(max_examples=60, deadline=None)
@given(sizes(1, 20), sizes(1, 9), st.sampled_from([0.0, 0.25, 0.5, 0.7]))
def test_an_identity_network_reproduces_the_volume(shape: Size, window: Size, overlap: float) -> None:
    image = torch.from_numpy(np.random.default_rng(2).normal(size=(2, *shape)).astype(np.float32))
    torch.testing.assert_close(blend(image, identity, Windowing(window, overlap)), image, rtol=1e-5, atol=1e-6)


def test_memory_order_of_the_image_does_not_matter() -> None:
    image = torch.randn(1, 12, 13, 14)
    turned = image.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
    torch.testing.assert_close(
        blend(turned, identity, Windowing((8, 8, 8))), blend(image, identity, Windowing((8, 8, 8)))
    )


def test_windows_are_contiguous_and_counted() -> None:
    seen: list[tuple[int, ...]] = []
    steps: list[tuple[int, int]] = []

    def network(windows: Iterable[Tensor]) -> Iterator[Tensor]:
        for window in windows:
            assert window.is_contiguous()
            seen.append(tuple(window.shape))
            yield window

    image = torch.randn(1, 8, 8, 13)
    blend(image, network, Windowing((8, 8, 6)), progress=lambda done, total: steps.append((done, total)))
    assert seen == [(1, 8, 8, 6)] * 4
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("planes", [2, 5, 100])
def test_the_number_of_planes_that_are_blended_at_a_time_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, planes: int, axis: int
) -> None:
    image = torch.from_numpy(np.random.default_rng(4).normal(size=(2, 17, 13, 15)).astype(np.float32))
    network, windowing = Convolution(2), Windowing((7, 6, 5), 0.6, 0.0, axis)
    one_by_one = blend(image, network.stream, windowing)
    monkeypatch.setattr(windows, "planes_at_once", lambda *_: planes)
    assert torch.equal(blend(image, network.stream, windowing), one_by_one)


@settings(max_examples=60, deadline=None)
@given(sizes(1, 20), sizes(2, 9), st.sampled_from([0.0, 0.25, 0.5, 0.7]), st.integers(0, 2))
def test_slabs_cover_the_volume_once_beside_the_plane_they_share(
    shape: Size, window: Size, overlap: float, axis: int
) -> None:
    image = torch.from_numpy(np.random.default_rng(3).normal(size=(2, *shape)).astype(np.float32))
    network = Convolution(2)
    windowing = Windowing(window, overlap, 0.0, axis)
    whole = blend(image, network.stream, windowing)
    reached = 0
    for slab in slabs(image, network.stream, windowing):
        assert slab.first == max(reached - 1, 0)
        part = whole.narrow(1 + axis, slab.first, slab.values.shape[axis])
        torch.testing.assert_close(slab.values.movedim(-1, 0), part, rtol=0, atol=0)
        reached = slab.first + slab.values.shape[axis]
    assert reached == shape[axis]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_integer_answers_are_blended_as_their_values(dtype: torch.dtype) -> None:
    def network(windows: Iterable[Tensor]) -> Iterator[Tensor]:
        return ((window * 20).to(dtype) for window in windows)

    image = torch.rand(2, 13, 9, 10)
    theirs = blend(image, lambda windows: (answer.float() for answer in network(windows)), Windowing((6, 6, 6)))
    torch.testing.assert_close(blend(image, network, Windowing((6, 6, 6))), theirs, rtol=0, atol=0)


@settings(max_examples=40, deadline=None)
@given(sizes(1, 30), st.integers(0, 2), st.integers(0, 2**20))
def test_skipping_empty_windows_leaves_the_others_as_they_are(shape: Size, axis: int, seed: int) -> None:
    """Where every window that sees a voxel has something in it, nothing changes; elsewhere it is told or is a mean of fewer."""
    random = np.random.default_rng(seed)
    image = torch.zeros(1, *shape)
    place = [int(random.integers(size)) for size in shape]
    image[0, place[0], place[1], place[2]] = 1.0
    window: Size = (4, 4, 4)
    asked: list[Tensor] = []

    def network(windows: Iterable[Tensor]) -> Iterator[Tensor]:
        for one in windows:
            asked.append(one)
            yield one + 1

    padded = tuple(max(size, 4) for size in shape)
    off = tuple((wide - size) // 2 for wide, size in zip(padded, shape, strict=True))
    full = [
        start
        for start in window_starts(shape, window, 0.5)
        if all(first <= at + shift < first + 4 for first, at, shift in zip(start, place, off, strict=True))
    ]
    seen = torch.zeros(padded, dtype=torch.bool)
    for x, y, z in full:
        seen[x : x + 4, y : y + 4, z : z + 4] = True
    inside = tuple(slice(shift, shift + size) for shift, size in zip(off, shape, strict=True))
    for slab in slabs(image, network, Windowing(window, 0.5, 0.0, axis, skip_empty=True)):
        part = (axis, slab.first, slab.values.shape[axis])
        assert slab.seen is not None
        assert torch.equal(slab.seen, seen[inside].narrow(*part))
        expected = (image[0] + 1).narrow(*part)[slab.seen]
        torch.testing.assert_close(slab.values[slab.seen][:, 0], expected, rtol=1e-5, atol=1e-6)
        assert not slab.values[~slab.seen].any()
    assert len(asked) == len(full)


@pytest.mark.parametrize(
    "network",
    [
        lambda window: window[:, :-1],
        lambda window: window[0],
        lambda window: window[:0],
        lambda window: window.double(),
    ],
)
def test_a_network_that_answers_something_else_is_refused(network: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ShapeError, match="network"):
        blend(torch.zeros(1, 8, 8, 8), lambda windows: map(network, windows), Windowing((4, 4, 4)))


@pytest.mark.parametrize("image", [torch.zeros(8, 8, 8), torch.zeros(1, 0, 8, 8), torch.zeros(1, 8, 8, 8).double()])
def test_what_is_no_image_is_refused(image: Tensor) -> None:
    with pytest.raises(ShapeError, match="image to blend"):
        blend(image, identity, Windowing((4, 4, 4)))


@pytest.mark.parametrize(
    "options",
    [
        {"overlap": 1.0},
        {"overlap": -0.1},
        {"overlap": float("nan")},
        {"window": (4, 0, 4)},
        {"window": (4, 4)},
        {"blending": "x"},
    ],
)
def test_options_without_meaning_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        Windowing(**{"window": (4, 4, 4), **options})
