"""Windows and blending are MONAI's sliding window inference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.inferers import sliding_window_inference
from monai.inferers.utils import _get_scan_interval
from torch import Tensor

from ptq3d.errors import OptionError, ShapeError
from ptq3d.windows import blend, gaussian_importance, window_starts

Size = tuple[int, int, int]
OVERLAPS = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.625, 0.75, 0.9]) | st.floats(0, 0.95)


def sizes(low: int, high: int) -> st.SearchStrategy[Size]:
    return st.tuples(*[st.integers(low, high)] * 3)


def identity(windows: np.ndarray) -> np.ndarray:
    return windows


class Convolution:
    """A network whose answer depends on where the window ends: 3 classes from all channels, zero padding."""

    def __init__(self, channels: int) -> None:
        torch.manual_seed(0)
        self.weight = torch.randn(3, channels, 3, 3, 3)

    def __call__(self, windows: Tensor) -> Tensor:
        return torch.nn.functional.conv3d(windows.contiguous(), self.weight, padding=1).tanh() * 10

    def of_arrays(self, windows: np.ndarray) -> np.ndarray:
        return self(torch.from_numpy(windows)).numpy()


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


@settings(max_examples=100, deadline=None)
@given(sizes(1, 20), sizes(3, 12), OVERLAPS, st.integers(1, 2), st.integers(1, 5), st.sampled_from([0.0, -1.5]))
def test_blending_is_monais(
    shape: Size, window: Size, overlap: float, channels: int, batch: int, outside: float
) -> None:
    if len(window_starts(shape, window, overlap)) > 500:
        overlap = 0.5
    image = torch.from_numpy(np.random.default_rng(1).normal(size=(channels, *shape)).astype(np.float32))
    network = Convolution(channels)
    ours = blend(image, network.of_arrays, window=window, overlap=overlap, batch=batch, outside=outside)
    theirs = sliding_window_inference(
        image[None], window, batch, network, overlap=overlap, mode="gaussian", cval=outside
    )[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)  # to the bit, far within 1e-5


@settings(max_examples=60, deadline=None)
@given(sizes(1, 20), sizes(1, 9), st.sampled_from([0.0, 0.25, 0.5, 0.7]))
def test_an_identity_network_reproduces_the_volume(shape: Size, window: Size, overlap: float) -> None:
    image = torch.from_numpy(np.random.default_rng(2).normal(size=(2, *shape)).astype(np.float32))
    torch.testing.assert_close(blend(image, identity, window=window, overlap=overlap), image, rtol=1e-5, atol=1e-6)


def test_memory_order_of_the_image_does_not_matter() -> None:
    image = torch.randn(1, 12, 13, 14)
    turned = image.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
    torch.testing.assert_close(blend(turned, identity, window=(8, 8, 8)), blend(image, identity, window=(8, 8, 8)))


def test_windows_come_in_batches_with_progress() -> None:
    seen: list[tuple[int, ...]] = []
    steps: list[tuple[int, int]] = []

    def network(windows: np.ndarray) -> np.ndarray:
        assert windows.flags.c_contiguous
        assert windows.dtype == np.float32
        seen.append(windows.shape)
        return windows

    image = torch.randn(1, 8, 8, 13)
    blend(image, network, window=(8, 8, 6), batch=2, progress=lambda done, total: steps.append((done, total)))
    assert seen == [(2, 1, 8, 8, 6), (2, 1, 8, 8, 6)]
    assert steps == [(2, 4), (4, 4)]


def test_a_network_may_keep_its_windows_and_own_its_answers() -> None:
    kept: list[np.ndarray] = []
    answer = np.ones((1, 4, 6, 6, 6), np.float32)
    answer.flags.writeable = False

    def network(windows: np.ndarray) -> np.ndarray:
        kept.append(windows)
        return answer

    image = torch.randn(1, 9, 6, 6)
    logits = blend(image, network, window=(6, 6, 6))
    torch.testing.assert_close(logits, torch.ones(4, 9, 6, 6))
    for window, (x, _, _) in zip(kept, window_starts((9, 6, 6), (6, 6, 6), 0.5), strict=True):
        np.testing.assert_array_equal(window[0], image[:, x : x + 6].numpy())


@pytest.mark.parametrize(
    "network",
    [
        lambda windows: windows[:, :, :-1],
        lambda windows: windows[0],
        lambda windows: windows[:, :0],
        lambda windows: np.concatenate([windows, windows]),
        lambda windows: windows.astype(np.float64),
    ],
)
def test_a_network_that_answers_something_else_is_refused(network: object) -> None:
    with pytest.raises(ShapeError, match="network"):
        blend(torch.zeros(1, 8, 8, 8), network, window=(4, 4, 4))


@pytest.mark.parametrize("image", [torch.zeros(8, 8, 8), torch.zeros(1, 0, 8, 8), torch.zeros(1, 8, 8, 8).double()])
def test_what_is_no_image_is_refused(image: Tensor) -> None:
    with pytest.raises(ShapeError, match="image to blend"):
        blend(image, identity, window=(4, 4, 4))


@pytest.mark.parametrize(
    "options",
    [
        {"overlap": 1.0},
        {"overlap": -0.1},
        {"overlap": float("nan")},
        {"window": (4, 0, 4)},
        {"window": (4, 4)},
        {"batch": 0},
    ],
)
def test_options_without_meaning_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        blend(torch.zeros(1, 8, 8, 8), identity, **{"window": (4, 4, 4), **options})
