"""The networks of the zoo have the published sizes, equal their peers, and export to plain operators."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import NAMES
from small import SMALL as SMALLEST
from torch import nn

from ptq3d.errors import OptionError, ShapeError
from ptq3d.models import ALIASES, ARCHITECTURES, build_network, check_window, find_architecture
from ptq3d.models.transunet import Block

SMALL = {"channels": (4, 8, 16), "num_classes": 3, "window": (16, 8, 12)}
PLAIN_OPERATORS = {
    *("Conv", "ConvTranspose", "BatchNormalization", "Relu", "Concat"),
    *("MatMul", "Gemm", "Softmax", "LayerNormalization", "Gelu", "Add", "Mul", "Reshape", "Transpose"),
}


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_unet_has_the_parameters_of_the_seed() -> None:
    assert parameters(build_network("unet", num_classes=14)) == 5_646_606


def test_transunet_has_the_parameters_of_the_seed() -> None:
    with torch.device("meta"):
        assert parameters(build_network("transunet", num_classes=14)) == 91_588_622


def test_importing_the_table_loads_no_torch() -> None:
    code = "import sys, ptq3d.models; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", NAMES)
def test_every_name_builds(name: str) -> None:
    network, window = build_network(name, **SMALLEST[name]).eval(), SMALLEST[name]["window"]
    with torch.no_grad():
        assert network(torch.zeros(2, 1, *window)).shape == (2, 6, *window)


def test_every_network_has_a_small_one_and_every_alias_a_network() -> None:
    assert SMALLEST.keys() == ARCHITECTURES.keys()
    assert {find_architecture(alias)[0] for alias in ALIASES} <= ARCHITECTURES.keys()


@given(
    channels=st.lists(st.integers(1, 6), min_size=2, max_size=4).map(tuple),
    steps=st.tuples(*[st.integers(1, 3)] * 3),
    in_channels=st.integers(1, 3),
    classes=st.integers(2, 5),
)
@settings(max_examples=15, deadline=None)
def test_unet_answers_on_the_grid_of_any_window_it_can_halve(
    channels: tuple[int, ...], steps: tuple[int, int, int], in_channels: int, classes: int
) -> None:
    stride = ARCHITECTURES["unet"].stride(channels)
    x, y, z = (step * stride for step in steps)
    check_window("unet", (x, y, z), channels)
    network = build_network("unet", in_channels=in_channels, num_classes=classes, channels=channels).eval()
    assert network(torch.zeros(1, in_channels, x, y, z)).shape == (1, classes, x, y, z)


def test_unet_moves_with_its_image() -> None:
    """Away from the border, an image moved by the stride of the network gives the answer moved by as much."""
    torch.manual_seed(0)
    network = build_network("unet", num_classes=2, channels=(4, 6)).eval()
    image = torch.zeros(1, 1, 32, 32, 32)
    image[..., 12:16, 12:16, 12:16] = torch.rand(4, 4, 4)
    with torch.no_grad():
        moved = network(image.roll(2, 4))
        torch.testing.assert_close(moved[..., 8:24, 8:24, 8:24], network(image).roll(2, 4)[..., 8:24, 8:24, 8:24])


def test_skips_reach_the_output() -> None:
    """Without its coarse levels the network still tells voxels apart: the finest skip is joined, not lost."""
    torch.manual_seed(0)
    network = build_network("unet", num_classes=2, channels=(4, 6)).eval()
    nn.init.zeros_(network.decoder.ups[0].weight)
    image = torch.rand(1, 1, 8, 8, 8)
    with torch.no_grad():
        logits = network(image)
    assert logits.std(dim=(2, 3, 4)).min() > 1e-3


def test_block_equals_the_encoder_layer_of_pytorch() -> None:
    """The written-out attention is torch.nn.TransformerEncoderLayer(norm_first=False, activation="gelu")."""
    torch.manual_seed(0)
    block = Block(24, 12, 96).eval()
    peer = nn.TransformerEncoderLayer(24, 12, 96, dropout=0.0, activation="gelu", batch_first=True).eval()
    attention = block.attention
    parts = (attention.query, attention.key, attention.value)
    names = {
        "self_attn.in_proj_weight": torch.cat([part.weight for part in parts]),
        "self_attn.in_proj_bias": torch.cat([part.bias for part in parts]),
        "self_attn.out_proj.weight": attention.out.weight,
        "self_attn.out_proj.bias": attention.out.bias,
        "linear1.weight": block.mlp[0].weight,
        "linear1.bias": block.mlp[0].bias,
        "linear2.weight": block.mlp[2].weight,
        "linear2.bias": block.mlp[2].bias,
    }
    for norm in ("norm1", "norm2"):
        for kind in ("weight", "bias"):
            value = nn.init.normal_(getattr(getattr(block, norm), kind))
            names[f"{norm}.{kind}"] = value
    peer.load_state_dict(names)
    tokens = torch.randn(2, 10, 24)
    with torch.no_grad():
        torch.testing.assert_close(block(tokens), peer(tokens), rtol=1e-5, atol=1e-5)


def test_positions_tell_equal_tokens_apart() -> None:
    """Over a constant image only the learned positions differ from token to token."""
    torch.manual_seed(0)
    network = build_network("transunet", **SMALL).eval()
    seen: list[torch.Tensor] = []
    network.blocks.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        nn.init.zeros_(network.embedding.weight)
        network(torch.zeros(1, 1, 16, 8, 12))
        nn.init.zeros_(network.positions)
        network(torch.zeros(1, 1, 16, 8, 12))
    assert seen[0].std(dim=1).max() > 1e-3
    assert seen[1].std(dim=1).max() < 1e-5


def test_a_seed_gives_the_same_weights() -> None:
    torch.manual_seed(3)
    first = build_network("transunet", **SMALL).state_dict()
    torch.manual_seed(3)
    second = build_network("transunet", **SMALL).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated")
@pytest.mark.parametrize("name", ["unet", "transunet"])
def test_export_has_plain_operators_and_the_same_answer(name: str, tmp_path: Path) -> None:
    import onnxruntime

    torch.manual_seed(0)
    network = build_network(name, **SMALL).eval()
    image = torch.rand(1, 1, 16, 8, 12)
    program = torch.onnx.export(network, (image,), dynamo=True, opset_version=20, verbose=False)
    program.save(tmp_path / "network.onnx")
    graph = onnx.load(tmp_path / "network.onnx").graph
    assert {node.op_type for node in graph.node} <= PLAIN_OPERATORS
    assert all(node.domain == "" for node in graph.node)
    if name == "transunet":
        assert sum(node.op_type == "Softmax" for node in graph.node) == 12
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx", providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(answer, network(image).numpy(), rtol=1e-4, atol=1e-4)


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(OptionError, match=r"'vnet'.*transunet, unest, unet, unet3d, vista3d"):
        find_architecture("vnet")


@pytest.mark.parametrize("window", [(96, 96, 90), (0, 16, 16), (8, 16, 16), (16, 16)])
def test_a_window_that_cannot_be_halved_is_refused(window: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="multiple of 16"):
        check_window("unet", window)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "sizes", [{"num_classes": 1}, {"in_channels": 0}, {"channels": (16,)}, {"channels": (4, 0)}, {"channels": (4, 6)}]
)
def test_sizes_a_network_cannot_have_are_refused(sizes: dict[str, object]) -> None:
    with pytest.raises(OptionError):
        build_network("transunet", **{**SMALL, **sizes})  # type: ignore[arg-type]


def test_transunet_refuses_windows_without_learned_positions() -> None:
    network = build_network("transunet", **SMALL)
    with pytest.raises(ShapeError, match=r"16x8x12.*got 16x16x12"):
        network(torch.zeros(1, 1, 16, 16, 12))
