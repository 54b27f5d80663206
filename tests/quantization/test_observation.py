"""Laws of what calibration sees: exact extremes, samples that are values of the tensor, memory that does not grow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from networks import NETWORKS, Builder, windows
from ptq3d.errors import CalibrationError
from ptq3d.quantization import calibration, equalization, planning, smoothing
from ptq3d.quantization.calibration import observe, watch
from ptq3d.quantization.observation import EDGES, NEAR, Observations, Observer, _Places
from ptq3d.quantization.observers import RANGE_METHODS
from ptq3d.quantization.quantizer import Recipe, quantize_graph
from ptq3d.quantization.targets import TARGETS
from quantizing import IMAGES, graph, observed, observed_exactly, outputs

ORDERS = ((0, 1, 2, 3, 4), (4, 2, 0, 3, 1), (1,), (3, 3, 3), (4, 1))


def volume(values: np.ndarray) -> np.ndarray:
    """(C, voxels); the channels of a tensor that is no volume come last."""
    return values[0].reshape(values.shape[1], -1) if values.ndim == 5 else values.reshape(-1, values.shape[-1]).T


def watched(model: ir.Model, seen: Observations, images: Sequence[np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The observed tensors of each window; an engine uses its memory again, hence the copies."""
    names = list(seen.tensors)
    return [{name: value.copy() for name, value in values.items()} for values in watch(model, names, images)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("network", ["unet", "attention"])
def test_extremes_of_channels_are_exact_whatever_the_windows(
    network: str, order: Sequence[int], tmp_path: Path
) -> None:
    model = graph(NETWORKS[network](tmp_path / "n.onnx"))
    images = [windows(5)[index][None] for index in order]
    seen = observed_exactly(model, images)
    values = watched(model, seen, images)
    assert seen.tensors
    for name, found in seen.tensors.items():
        whole = np.concatenate([volume(one[name]) for one in values], 1)
        assert np.array_equal(found.low, whole.min(1))
        assert np.array_equal(found.high, whole.max(1))


def test_samples_are_values_of_the_tensor_at_one_position_each(tmp_path: Path) -> None:
    model = graph(NETWORKS["unet"](tmp_path / "n.onnx"))
    seen = observed_exactly(model)
    values = watched(model, seen, IMAGES)
    for name, found in seen.tensors.items():
        there = {row.tobytes() for one in values for row in np.ascontiguousarray(volume(one[name]).T)}
        assert {row.tobytes() for row in found.values} <= there


def test_half_of_the_samples_lie_near_a_border_between_labels() -> None:
    logits = np.zeros((1, 2, 64, 16, 16), np.float32)
    logits[0, 1, 50:] = 1
    for sizes in ((64, 16, 16), (32, 8, 8)):
        x, y, z = _Places(logits, np.random.default_rng(0)).draw(sizes, 4000)
        assert all(axis.min() >= 0 and axis.max() < size for axis, size in zip((x, y, z), sizes, strict=True))
        assert (np.abs(x * 64 // sizes[0] - 49) <= NEAR + 1).mean() >= EDGES
        assert len(set(x)) == sizes[0]


@pytest.mark.parametrize("network", NETWORKS)
def test_a_pass_in_the_processors_own_precision_sees_the_same(network: str, tmp_path: Path) -> None:
    model = graph(NETWORKS[network](tmp_path / "n.onnx"))
    exact, found = observed_exactly(model), observed(model)
    assert set(found.tensors) == set(exact.tensors)
    assert set(found.layers) == set(exact.layers)
    for name, seen in found.tensors.items():
        span = exact.tensors[name].high.max() - exact.tensors[name].low.min()
        np.testing.assert_allclose(seen.low, exact.tensors[name].low, atol=0.05 * span, rtol=0)
        np.testing.assert_allclose(seen.high, exact.tensors[name].high, atol=0.05 * span, rtol=0)


def memory(seen: Observations) -> int:
    """Bytes of all arrays."""
    tensors = [array for tensor in seen.tensors.values() for array in (tensor.low, tensor.high, tensor.values)]
    grams = [array for gram in seen.layers.values() for array in (*gram.moments, gram.total, *gram.sample)]
    return sum(array.nbytes for array in (*tensors, *grams))


@pytest.mark.parametrize("network", ["unet", "attention"])
def test_memory_does_not_grow_with_the_windows(network: str, tmp_path: Path) -> None:
    model = graph(NETWORKS[network](tmp_path / "n.onnx"))
    few, many = (memory(observed(model, images=[w[None] for w in windows(number)])) for number in (4, 64))
    assert many == pytest.approx(few, rel=0.1)


def test_no_window_is_an_error(tmp_path: Path) -> None:
    model = graph(NETWORKS["meshnet"](tmp_path / "n.onnx"))
    with pytest.raises(CalibrationError, match="no calibration window"):
        observe(model, planning.place(model, TARGETS["openvino"]), [], 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_by_tensor(bad: float, tmp_path: Path) -> None:
    model = graph(NETWORKS["unet"](tmp_path / "n.onnx"))
    observer = Observer(model, planning.place(model, TARGETS["openvino"]), 1)
    (values,) = [dict(one) for one in watch(model, observer.tensors, IMAGES[:1])]
    values["relu_1_out"] = values["relu_1_out"].copy()
    values["relu_1_out"][0, 3, 1, 2, 3] = bad
    with pytest.raises(CalibrationError, match=r"tensor 'relu_1_out' has no finite range: 1 of .* --keep"):
        observer.see(values)


@pytest.mark.parametrize("target", TARGETS)
def test_an_activation_that_is_always_zero_is_quantized(target: str, tmp_path: Path) -> None:
    b = Builder(11)
    x = b.conv("image", 1, 5)
    b.weights[1].raw_data = np.full(5, -1e3, np.float32).tobytes()
    dead = b.add("Relu", x)
    y = b.add("Relu", b.conv(b.add("Concat", dead, b.add("Relu", b.conv("image", 1, 3)), axis=1), 8, 4))
    b.conv(b.add("Concat", y, b.conv(dead, 5, 2), axis=1), 6, 3, kernel=1)
    model = graph(b.save(tmp_path / "n.onnx", "logits", 3))
    seen = observed(model, target)
    assert not seen.tensors[dead].high.any()
    exact = outputs(model, tmp_path / "exact.onnx")
    for method in RANGE_METHODS:
        made = quantize_graph(model, seen, Recipe(target, calibration_method=method))
        assert all(np.isfinite(scale.step).all() and (scale.step > 0).all() for scale in made.plan.activations.values())
    found = outputs(made.model, tmp_path / "q.onnx")
    assert np.abs(found - exact).max() < 0.1 * np.ptp(exact)


@pytest.mark.parametrize("network", ["unet", "attention"])
def test_one_window_is_enough_to_go_on_with(network: str, tmp_path: Path) -> None:
    model = graph(NETWORKS[network](tmp_path / "n.onnx"))
    made = quantize_graph(model, observed(model, images=IMAGES[:1]), Recipe())
    exact = outputs(model, tmp_path / "exact.onnx")
    found = outputs(made.model, tmp_path / "q.onnx")
    assert np.sqrt(np.mean((found - exact) ** 2)) < 0.02 * np.ptp(exact)


@pytest.mark.parametrize("network", NETWORKS)
def test_what_was_seen_scales_with_the_channels(network: str, tmp_path: Path) -> None:
    """Nothing needs a second pass: scaled observations are those of the scaled graph."""
    model = graph(NETWORKS[network](tmp_path / "n.onnx"))
    before = observed_exactly(model)
    scale = smoothing.smooth if network == "attention" else equalization.equalize
    logits = outputs(model, tmp_path / "before.onnx")
    done = scale(model, planning.place(model, TARGETS["openvino"]), before.tensors)
    assert np.abs(outputs(model, tmp_path / "after.onnx") - logits).max() <= 1e-5 * np.abs(logits).max()
    scaled, again = before.scaled(done.tensors, done.layers), observed_exactly(model)
    assert done.tensors
    assert done.layers
    assert set(scaled.tensors) >= set(again.tensors)  # a tensor behind which a factor was put is kept as well
    assert set(scaled.layers) == set(again.layers)

    def close(found: np.ndarray, wanted: np.ndarray) -> None:
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max() + 1e-30, rtol=0)

    for name, wanted in again.tensors.items():
        close(scaled.tensors[name].low, wanted.low)
        close(scaled.tensors[name].high, wanted.high)
        close(scaled.tensors[name].values, wanted.values)
    for name, gram in scaled.layers.items():
        other = again.layers[name]
        assert gram.number == other.number
        close(gram.mean(), other.mean())
        close(gram.some_rows(), other.some_rows())
        for (block, correlation), (place, wanted) in zip(gram.correlations(), other.correlations(), strict=True):
            assert block == place
            close(correlation, wanted)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("limit", [1, 40_000, 1 << 40])
def test_a_large_network_is_seen_in_parts_that_add_up_to_the_whole(
    network: str, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Extremes, means and moments do not know how often the network ran; only the sampled positions are others."""
    model = graph(NETWORKS[network](tmp_path / "n.onnx"))
    placement = planning.place(model, TARGETS["openvino"])
    monkeypatch.setattr(calibration, "OBSERVED", "fp32")  # what is fused differs, and with it where bfloat16 rounds
    whole = calibration.observe(model, placement, iter(IMAGES), len(IMAGES))
    observer = Observer(model, placement, len(IMAGES))
    parts = observer.parts(limit)
    assert sorted(name for part in parts for name in part.tensors) == sorted(observer.whole.tensors)
    assert [name for part in parts for name in part.layers] == list(observer.whole.layers)
    assert (len(parts) == 1) == (limit > 1 << 20)
    monkeypatch.setattr(calibration, "AT_ONCE", limit)
    seen = calibration.observe(model, placement, iter(IMAGES), len(IMAGES))
    for name, tensor in whole.tensors.items():
        np.testing.assert_allclose(seen.tensors[name].low, tensor.low, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(seen.tensors[name].high, tensor.high, rtol=1e-4, atol=1e-5)
        assert seen.tensors[name].values.shape == tensor.values.shape
    for name, gram in whole.layers.items():
        assert seen.layers[name].number == gram.number
        assert [block.shape for block in seen.layers[name].moments] == [block.shape for block in gram.moments]
