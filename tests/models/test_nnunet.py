"""Our nnU-Net is the real one: same weights, same logits, each weight once; and exports like any other network."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nnunet_results import COMMON, ISOTROPIC, architecture, real_network
from ptq3d.errors import OptionError
from ptq3d.graphs.export import export_network
from ptq3d.models.nnunet import Layout, NnUNet, build, standard_layout, without_repeats
from ptq3d.models.nnunet_plans import layout_of

ANISOTROPIC: dict[str, Any] = {
    "n_stages": 4,
    "features_per_stage": [4, 6, 8, 8],
    "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]],
    "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 1]],
    "n_conv_per_stage": [1, 3, 2, 2],
    "n_conv_per_stage_decoder": [2, 1, 3],
}
BATCH = {"norm_op": "torch.nn.modules.batchnorm.BatchNorm3d", "norm_op_kwargs": {"eps": 1e-3}}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": architecture(),
    "anisotropic": architecture(**ANISOTROPIC),
    "batch": architecture(**BATCH, conv_bias=False, nonlin="torch.nn.ReLU"),
    "first": architecture(nonlin_first=True),
    "one number": architecture(kernel_sizes=3, strides=[1, 2, 2], n_conv_per_stage=2, n_conv_per_stage_decoder=1),
    "residual": architecture("ResidualEncoderUNet", n_conv_per_stage=[1, 3, 2]),
    "residual anisotropic": architecture("ResidualEncoderUNet", **ANISOTROPIC),
    "residual batch": architecture("ResidualEncoderUNet", **BATCH, conv_bias=False),
    "residual same width": architecture("ResidualEncoderUNet", features_per_stage=[4, 4, 8]),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("channels", [1, 2])
def test_equal_weights_give_equal_logits(setting: str, channels: int) -> None:
    theirs = real_network(SETTINGS[setting], channels=channels)
    ours = NnUNet(layout_of({"architecture": SETTINGS[setting]}, in_channels=channels, num_classes=3)).eval()
    state = without_repeats(theirs.state_dict())
    assert state.keys() == ours.state_dict().keys()
    ours.load_state_dict(state)
    image = torch.randn(2, channels, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = theirs(image)
        assert wanted.std() > 0.1
        torch.testing.assert_close(ours(image), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("setting", ["plain", "residual"])
def test_the_real_state_holds_more_names_than_ours(setting: str) -> None:
    theirs = real_network(SETTINGS[setting]).state_dict()
    assert len(theirs) > 2 * len(without_repeats(theirs))
    distinct = {value.data_ptr() for value in theirs.values()}
    assert len(without_repeats(theirs)) == len(distinct)


def test_the_default_network_is_as_large_as_nnunets() -> None:
    network = build(1, 105, (32, 64, 128, 256, 320, 320), (96, 96, 96))
    mebibytes = sum(weight.numel() for weight in network.parameters()) * 4 / 2**20
    assert abs(mebibytes / 119.3 - 1) < 0.01
    assert network.layout.stride == (32, 32, 32)


def test_a_new_network_starts_with_useful_weights() -> None:
    torch.manual_seed(0)
    network = build(1, 3, (4, 8, 8), (16, 16, 16)).eval()
    with torch.no_grad():
        logits = network(torch.randn(1, 1, 16, 16, 16))
    assert logits.shape == (1, 3, 16, 16, 16)
    assert 0.05 < float(logits.std()) < 20


@pytest.mark.parametrize("setting", ["anisotropic", "residual"])
def test_it_exports(setting: str) -> None:
    network = NnUNet(layout_of({"architecture": SETTINGS[setting]}, in_channels=1, num_classes=3))
    exported = export_network(network, channels=1, window=(8, 16, 16))
    assert exported.logits.shape == (1, 3, 8, 16, 16)
    assert not {node.op_type for node in exported.model.graph} - {
        "Conv", "ConvTranspose", "InstanceNormalization", "LeakyRelu", "Concat", "Add", "AveragePool",
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"features": (4,)},
        {"strides": ((2, 2, 2), (2, 2, 2), (2, 2, 2))},
        {"decoder": (2, 2, 2)},
        {"encoder": (2, 2)},
    ],
)
def test_stages_that_do_not_fit_together_are_refused(changes: dict[str, Any]) -> None:
    layout = vars(standard_layout(1, 2, (4, 8, 8)))
    with pytest.raises(OptionError, match="stages"):
        Layout(**{**layout, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network_class_name": "somewhere.else.PlainConvUNet"}, "somewhere.else"),
        (
            {"network_class_name": "dynamic_network_architectures.architectures.unet.ResidualUNet"},
            "known here are Plain",
        ),
        ({"arch_kwargs": {**COMMON, **ISOTROPIC, "norm_op": "torch.nn.GroupNorm"}}, "GroupNorm"),
        ({"arch_kwargs": {**COMMON, **ISOTROPIC, "norm_op": None}}, "layer None"),
        ({"arch_kwargs": {**COMMON, **ISOTROPIC, "nonlin": "my.code.LeakyReLU"}}, "my.code"),
        ({"arch_kwargs": {**COMMON, **ISOTROPIC, "conv_op": "torch.nn.modules.conv.Conv2d"}}, "Conv2d"),
        ({"arch_kwargs": {**COMMON, **ISOTROPIC, "squeeze_excitation": True}}, "squeeze_excitation"),
    ],
)
def test_networks_that_are_not_known_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        layout_of({"architecture": {**architecture(), **changes}}, in_channels=1, num_classes=3)
