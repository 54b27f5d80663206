"""Labels made slab by slab are those of blending everything, resampling the logits and taking the argmax."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grids import affines, noise, orientations, shapes, spacings
from ptq3d.head import Head, classifier
from ptq3d.labelling import labels_of, labels_on
from ptq3d.volumes.preprocessing import Preprocessing
from ptq3d.volumes.resample import resample_onto
from ptq3d.volumes.volume import Grid, Volume
from ptq3d.windows import Windowing, blend, slabs

TIE = 1e-4  # logits of spread 3: rounding of float32 moves them by less
CPU = torch.device("cpu")


def network(features: int) -> Callable[[Iterable[Tensor]], Iterator[Tensor]]:
    """Features that differ from window to window, so that blending matters."""
    weight = torch.from_numpy(noise((features, 1, 3, 3, 3), seed=5))

    def stream(windows: Iterable[Tensor]) -> Iterator[Tensor]:
        return (torch.nn.functional.conv3d(window[None], weight, padding=1)[0].sin() for window in windows)

    return stream


def head_of(classes: int, features: int, *, late: bool) -> Head:
    if not late:
        return Head.none(features)
    return Head(noise((classes, features), seed=6), noise((classes,), seed=7))


def logits_of(image: Volume, head: Head, windowing: Windowing, stream: object) -> Volume:
    """The whole way in one piece: (K, X, Y, Z) logits on the image's grid."""
    features = blend(torch.from_numpy(image.data), stream, windowing).numpy()  # type: ignore[arg-type]
    logits = np.einsum("kf,fxyz->kxyz", head.matrix(), features) + head.bias[:, None, None, None]
    return Volume(np.ascontiguousarray(logits, np.float32), image.affine)


def assert_same(labels: np.ndarray, logits: np.ndarray) -> None:
    """Equal, or another class whose logit is as high up to rounding."""
    chosen = np.take_along_axis(logits, labels[None].astype(np.int64), axis=0)[0]
    np.testing.assert_allclose(chosen, logits.max(axis=0), rtol=0, atol=TIE)
    assert (labels == logits.argmax(0)).mean() >= 1 - 2 / labels.size


@settings(max_examples=150, deadline=None)
@given(
    affines(sheared=False) | affines(sheared=True),
    shapes(1, 14),
    orientations(),
    st.none() | spacings(),
    st.integers(0, 2),
    st.booleans(),
)
def test_labels_are_the_argmax_of_resampled_logits(
    affine: np.ndarray,
    shape: tuple[int, int, int],
    orientation: str,
    spacing: tuple[float, float, float] | None,
    axis: int,
    late: bool,
) -> None:
    """Anisotropic, oblique, left-handed, sheared, one slice thick, smaller than the window; with and without late head."""
    original = Volume(noise((1, *shape)), affine)
    image = Preprocessing(orientation, spacing).apply(original)
    head, windowing = head_of(7, 3, late=late), Windowing((6, 5, 7), 0.5, 0.0, axis)
    stream = network(head.features)
    planes = slabs(torch.from_numpy(image.data), stream, windowing)
    found = labels_on(original.grid, planes, image.grid, classifier(head, CPU), classes=head.classes)
    assert found.dtype == np.uint8
    assert found.shape == shape
    logits = resample_onto(logits_of(image, head, windowing, stream), *original.grid, mode="linear")
    assert_same(found, logits.data)


@pytest.mark.parametrize("scale", [1.0, 0.4, 2.3])
def test_smooth_regions_are_not_resampled_and_borders_are(scale: float) -> None:
    """The rule that spares the work, on a volume with large regions, on finer and coarser grids."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, 24)] * 3, indexing="ij")
    image = Volume(np.stack([x + y * z, y - x * z, z + 0.2])[:, :, :, :].astype(np.float32), np.eye(4))
    asked = 0
    rows = classifier(Head.none(3), CPU)

    def counting(features: Tensor) -> Tensor:
        nonlocal asked
        asked += len(features)
        return rows(features)

    size = round(23 / scale) + 1
    target: Grid = ((size, size, size), np.diag([scale, scale, scale, 1.0]))
    planes = slabs(torch.from_numpy(image.data), iter, Windowing((8, 8, 8)))
    found = labels_on(target, planes, image.grid, counting, classes=3)
    logits = resample_onto(image, *target, mode="linear")
    first, second = np.sort(logits.data, axis=0)[::-1][:2]
    clear = first - second > 1e-5
    np.testing.assert_array_equal(found[clear], logits.data.argmax(0)[clear])
    assert asked < 1.5 * 24**3 + 0.5 * size**3


@pytest.mark.parametrize(("classes", "dtype"), [(256, np.uint8), (300, np.uint16)])
def test_labels_take_the_smallest_type(classes: int, dtype: type) -> None:
    features = torch.zeros(classes, 4, 4, 4)
    features[classes - 1] = 1.0
    planes = slabs(torch.rand(1, 4, 4, 4), lambda windows: (features for _ in windows), Windowing((4, 4, 4)))
    found = labels_of(planes, (4, 4, 4), classifier(Head.none(classes), CPU), classes=classes)
    assert found.dtype == dtype
    assert (found == classes - 1).all()


@pytest.mark.parametrize("sheared", [False, True])
def test_outside_a_crop_is_background(sheared: bool) -> None:
    affine = np.eye(4)
    affine[0, 1] = 0.1 if sheared else 0.0
    planes = slabs(
        torch.ones(1, 4, 4, 4),
        lambda windows: (torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 4, 4, 4) for _ in windows),
        Windowing((4, 4, 4)),
    )
    target: Grid = ((9, 9, 9), np.diag([0.8, 0.8, 0.8, 1.0]))
    target[1][:3, 3] = -1.2
    found = labels_on(target, planes, ((4, 4, 4), affine), classifier(Head.none(2), CPU), classes=2, cropped=True)
    places = (
        np.linalg.inv(affine) @ target[1] @ np.concatenate([np.indices((9, 9, 9)).reshape(3, -1), np.ones((1, 729))])
    )
    inside = ((places[:3] >= -0.5) & (places[:3] <= 3.5)).all(axis=0).reshape(9, 9, 9)
    assert 0 < inside.sum() < inside.size
    np.testing.assert_array_equal(found, inside)


@settings(max_examples=60, deadline=None)
@given(affines(sheared=False) | affines(sheared=True), shapes(5, 12), spacings(), st.integers(0, 2))
def test_where_no_window_looked_is_background(
    affine: np.ndarray, shape: tuple[int, int, int], spacing: tuple[float, float, float], axis: int
) -> None:
    """With windows left out: 0 where a neighbour was not seen, else the argmax as ever."""
    data = np.zeros((1, *shape), np.float32)
    data[:, 0, 0, 0] = 1.0
    image = Volume(data, affine)
    head, windowing = head_of(6, 2, late=True), Windowing((4, 4, 4), 0.5, 0.0, axis, skip_empty=True)
    stream = network(2)
    target = Preprocessing(None, spacing).grid(image.grid)
    planes = slabs(torch.from_numpy(image.data), stream, windowing)
    found = labels_on(target, planes, image.grid, classifier(head, CPU), classes=6)
    seen = np.zeros((1, *shape), np.float32)
    for slab in slabs(torch.from_numpy(image.data), stream, windowing):
        place = [slice(None)] * 3
        place[axis] = slice(slab.first, slab.first + slab.values.shape[axis])
        assert slab.seen is not None
        seen[0][tuple(place)] = slab.seen
    covered = resample_onto(Volume(seen, affine), *target, mode="linear").data[0]
    assert not found[covered < 0.999].any()
    logits = resample_onto(logits_of(image, head, windowing, stream), *target, mode="linear").data
    first, second = np.sort(logits, axis=0)[::-1][:2]
    # on the rim of what was seen a neighbour of weight 0 may count as not seen: background is right there, too
    wrong = (found != logits.argmax(0)) & (first - second > TIE) & (covered >= 0.999)
    assert not found[wrong].any()
