"""The networks taken from elsewhere: published sizes and names, the same answers as their sources, plain exported graphs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from monai.apps.vista3d.transforms import VistaPostTransformd
from monai.networks import nets
from monai.networks.nets.segresnet_ds import SegResNetDS2
from monai.networks.nets.swin_unetr import compute_mask
from monai.networks.nets.vista3d import ClassMappingClassify
from small import NAMES, SMALL
from torch import Tensor, nn

import ptq3d.models
from ptq3d.errors import CheckpointError, GraphError, OptionError, ShapeError, UnavailableError
from ptq3d.exporting import export
from ptq3d.graphs.export import export_network, relative_error
from ptq3d.graphs.files import save_graph
from ptq3d.graphs.split_head import split_head
from ptq3d.models import ARCHITECTURES, build_network, check_window, read_classes
from ptq3d.models.sources import load_network
from ptq3d.models.stunet import Upsample
from ptq3d.models.swinunetr import shift_masks
from ptq3d.models.unest import Attention, NestLevel
from ptq3d.models.vista3d import VISTA3D
from ptq3d.options import ExportOptions

MEGABYTES = {"unest": 349.41, "swinunetr": 247.96, "segresnet": 170.44}  # of arXiv 2501.17343, in either kind of MB
CLASSES = {"unest": 133}
DYNAMIC = {
    "If",
    "Loop",
    "Scan",
    "Shape",
    "NonZero",
    "ConstantOfShape",
    "Range",
    "ScatterND",
    "ScatterElements",
    "Where",
}


def parameters(name: str) -> int:
    with torch.device("cpu" if name == "swinunetr" else "meta"):  # MONAI's SwinUNETR asks for values as it is built
        network = build_network(name, num_classes=CLASSES.get(name, 105))
    return sum(parameter.numel() for parameter in network.parameters())


def shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def small(name: str, **changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_network(name, **{**SMALL[name], **changes}).eval()


def image_for(name: str) -> Tensor:
    return torch.randn(1, 1, *SMALL[name]["window"], generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MEGABYTES)
def test_size_is_within_six_percent_of_the_seed(name: str) -> None:
    size = 4 * parameters(name)
    assert min(abs(size / unit / MEGABYTES[name] - 1) for unit in (1e6, 2**20)) < 0.06


@pytest.mark.parametrize(
    ("name", "millions"), [("stunet_s", 14.60), ("stunet_b", 58.26), ("stunet_l", 440.30), ("stunet_h", 1457.33)]
)
def test_stunets_have_the_published_parameters(name: str, millions: float) -> None:
    assert round(parameters(name) / 1e6, 2) == pytest.approx(millions, abs=0.006)


def test_vista3d_has_the_parameters_of_monai_but_for_the_points() -> None:
    with torch.device("meta"):
        peer = nets.vista3d.vista3d132()
        ours = build_network("vista3d", num_classes=105)
    unused = ARCHITECTURES["vista3d"].unused
    assert shapes(ours) == {name: shape for name, shape in shapes(peer).items() if not name.startswith(unused)}


def residual_block(name: str, before: int, after: int) -> dict[str, tuple[int, ...]]:
    weights = {"conv1": (after, before, 3, 3, 3), "conv2": (after, after, 3, 3, 3), "conv3": (after, before, 1, 1, 1)}
    kept = [conv for conv in weights if conv != "conv3" or before != after]
    return {f"{name}.{conv}.conv.weight": weights[conv] for conv in kept}


def linear(name: str, after: int, before: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (after, before), f"{name}.bias": (after,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def unest_names() -> dict[str, tuple[int, ...]]:
    """Written from the sources of the bundle: embed_dim 128-256-512, depths 2-2-8, feature_size 16, 96^3 windows."""
    vit = "nestViT"
    names = {f"{vit}.patch_embed.proj.weight": (128, 1, 4, 4, 4), f"{vit}.patch_embed.proj.bias": (128,)}
    for level, (width, depth, blocks) in enumerate(((128, 2, 64), (256, 2, 8), (512, 8, 1))):
        at = f"{vit}.levels.{level}"
        names[f"{at}.pos_embed"] = (1, blocks, 6**3, width)
        if level:
            names |= {f"{at}.pool.conv.weight": (width, width // 2, 3, 3, 3), f"{at}.pool.conv.bias": (width,)}
            names |= norm(f"{at}.pool.norm", width)
        for layer in (f"{at}.transformer_encoder.{index}" for index in range(depth)):
            names |= norm(f"{layer}.norm1", width) | norm(f"{layer}.norm2", width)
            names |= linear(f"{layer}.attn.qkv", 3 * width, width) | linear(f"{layer}.attn.proj", width, width)
            names |= linear(f"{layer}.mlp.fc1", 4 * width, width) | linear(f"{layer}.mlp.fc2", width, 4 * width)
    names |= norm(f"{vit}.norm", 512)
    names |= residual_block("encoder1.layer", 1, 32)
    names |= {
        "encoder2.transp_conv_init.conv.weight": (128, 64, 2, 2, 2),
        "encoder2.blocks.0.conv.weight": (64, 64, 1, 1, 1),
    }
    names |= residual_block("encoder3.layer", 128, 128) | residual_block("encoder4.layer", 256, 256)
    for number, width in ((5, 512), (4, 256), (3, 128), (2, 64), (1, 32)):
        names[f"decoder{number}.transp_conv.conv.weight"] = (2 * width, width, 2, 2, 2)
        names |= residual_block(f"decoder{number}.conv_block", 2 * width, width)
    names |= {
        "encoder10.conv.weight": (1024, 512, 3, 3, 3),
        "encoder10.conv.bias": (1024,),
        "encoder10.adn.A.weight": (1,),
    }
    return names | {"out.conv.conv.weight": (133, 32, 1, 1, 1), "out.conv.conv.bias": (133,)}


def test_unest_has_the_names_of_the_bundle() -> None:
    with torch.device("meta"):
        network = build_network("unest", num_classes=133)
    assert shapes(network) == unest_names()
    assert 87.0e6 < parameters("unest") < 87.6e6


def test_stunet_has_the_names_of_its_checkpoints() -> None:
    with torch.device("meta"):
        names = shapes(build_network("stunet_l", num_classes=105))
    assert names["conv_blocks_context.0.0.conv1.weight"] == (64, 1, 3, 3, 3)
    assert names["conv_blocks_context.5.1.conv2.bias"] == (1024,)
    assert names["conv_blocks_context.3.1.norm2.weight"] == (512,)
    assert names["upsample_layers.0.conv.weight"] == (1024, 1024, 1, 1, 1)
    assert names["conv_blocks_localization.4.0.conv3.weight"] == (64, 128, 1, 1, 1)
    assert names["seg_outputs.4.weight"] == (105, 64, 1, 1, 1)
    assert "conv_blocks_context.1.1.conv3.weight" not in names
    assert {name.split(".")[0] for name in names} == {
        *("conv_blocks_context", "upsample_layers", "conv_blocks_localization", "seg_outputs")
    }


def test_unest_attends_as_the_published_layer() -> None:
    """q, k, v of one product, softmax(q k^T / sqrt(d)) v in blocks, the head as the fastest index of the answer."""
    torch.manual_seed(0)
    attention, heads, each = Attention(64, 2), 2, 32
    tokens = torch.randn(3, 5, 64)
    with torch.no_grad():
        q, k, v = attention.qkv(tokens).reshape(3, 5, 3, heads, each).unbind(2)
        weights = (torch.einsum("bihd,bjhd->bhij", q, k) / each**0.5).softmax(-1)
        mixed = torch.einsum("bhij,bjhd->bidh", weights, v).reshape(3, 5, 64)
        torch.testing.assert_close(attention(tokens), attention.proj(mixed), rtol=1e-5, atol=1e-5)


def test_unest_attends_within_blocks() -> None:
    """What changes in one cube of tokens stays in it; cubes lie where they were cut."""
    torch.manual_seed(0)
    level = NestLevel(None, 16, 0, (3, 2, 1)).eval()
    grid = torch.randn(1, 16, 12, 8, 4)
    changed = grid.clone()
    changed[..., 3:6, 2:4, 1:2] += torch.randn(3, 2, 1)
    with torch.no_grad():
        moved = (level(changed) - level(grid)).abs().amax(1)[0] > 0
    assert moved[3:6, 2:4, 1:2].all()
    assert moved.sum() == 6


def test_upsampling_first_or_last_is_the_same() -> None:
    torch.manual_seed(0)
    layer = Upsample(6, 3)
    x = torch.randn(1, 6, 2, 3, 4)
    with torch.no_grad():
        published = layer.conv(nn.functional.interpolate(x, scale_factor=2, mode="nearest"))
        torch.testing.assert_close(layer(x), published, rtol=1e-5, atol=1e-6)


def monai_vista3d(classes: tuple[int, ...]) -> tuple[nn.Module, VISTA3D]:
    """MONAI's own network of a small size, and ours with its weights."""
    torch.manual_seed(0)
    encoder = SegResNetDS2(
        in_channels=1, blocks_down=(1, 2, 2), norm="instance", out_channels=8, init_filters=8, dsdepth=1
    )
    head = ClassMappingClassify(n_classes=512, feature_size=8, use_mlp=True)
    peer = nets.VISTA3D(image_encoder=encoder, class_head=head, point_head=nn.Linear(2, 2)).eval()
    ours = VISTA3D(1, (8, 16, 32), classes)
    unused = ARCHITECTURES["vista3d"].unused
    ours.load_state_dict({name: value for name, value in peer.state_dict().items() if not name.startswith(unused)})
    return peer, ours.eval()


@pytest.mark.parametrize("classes", [(1, 3, 14), (132,), tuple(range(1, 41))])
def test_vista3d_equals_monai(classes: tuple[int, ...]) -> None:
    peer, ours = monai_vista3d(classes)
    image = torch.randn(1, 1, 16, 8, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = peer(image, class_vector=torch.tensor(classes)[:, None], transpose=True)
        found = ours(image)
    torch.testing.assert_close(found[:, 1:], wanted, rtol=1e-4, atol=1e-4)
    assert not found[:, 0].any()
    labels = VistaPostTransformd("pred")({"pred": found[0, 1:].clone()})["pred"][0]
    assert torch.equal(labels.long(), found.argmax(1)[0])
    assert len(labels.unique()) > 1


def test_segresnet_is_monais() -> None:
    network = small("segresnet")
    peer = nets.SegResNet(init_filters=8, out_channels=6, blocks_down=(1, 2, 2), blocks_up=(1, 1)).eval()
    peer.load_state_dict(network.state_dict())
    with torch.no_grad():
        assert torch.equal(network(image_for("segresnet")), peer(image_for("segresnet")))


@pytest.mark.parametrize("normalize", [True, False])
def test_swinunetr_equals_monai(normalize: bool) -> None:
    """The same names and the same values; MONAI's masks and turning of axes need einops, ours do not."""
    pytest.importorskip("einops")
    network = small("swinunetr")
    peer = nets.SwinUNETR(1, 6, feature_size=12, normalize=normalize).eval()
    network.normalize = normalize  # type: ignore[assignment]
    peer.load_state_dict(network.state_dict())
    with torch.no_grad():
        assert torch.equal(network(image_for("swinunetr")), peer(image_for("swinunetr")))


@pytest.mark.parametrize(
    ("grid", "window", "shift"),
    [
        ((12, 8, 4), (4, 4, 4), (2, 2, 0)),
        ((16, 8, 8), (7, 7, 7), (3, 3, 3)),
        ((14, 7, 7), (7, 7, 7), (3, 0, 0)),
        ((6, 6, 6), (6, 6, 6), (0, 0, 0)),
    ],
)
def test_masks_of_shifted_windows_are_monais(
    grid: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...]
) -> None:
    padded = [-(-size // side) * side for size, side in zip(grid, window, strict=True)]
    masks, where = shift_masks(grid, window, shift)
    assert len(masks) <= 8
    assert torch.equal(torch.from_numpy(masks[where]), compute_mask(padded, window, shift, "cpu"))


def constant_only(node: ir.Node) -> bool:
    return all(value is None or value.const_value is not None for value in node.inputs)


@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated")
@pytest.mark.parametrize(
    "name", [name for name in NAMES if name not in ("unet", "transunet", "stunet_b", "stunet_h", "stunet_s")]
)
def test_export_is_plain_and_equals_pytorch(name: str, tmp_path: Path) -> None:
    import onnxruntime

    exported = export_network(small(name), channels=1, window=SMALL[name]["window"])
    save_graph(exported.model, tmp_path / "network.onnx")
    nodes = list(exported.model.graph)
    assert not DYNAMIC & {node.op_type for node in nodes}
    assert all(node.domain == "" for node in nodes)
    assert all(node.op_type == "Gather" for node in nodes if constant_only(node))
    session = onnxruntime.InferenceSession(tmp_path / "network.onnx", providers=["CPUExecutionProvider"])
    (answer,) = session.run(None, {session.get_inputs()[0].name: exported.window})
    assert relative_error(answer, exported.logits) < 1e-4
    assert (answer.argmax(1) == exported.logits.argmax(1)).mean() >= 0.9999
    if name in ("swinunetr", "unest"):
        layers = 8 if name == "swinunetr" else 12
        assert sum(node.op_type == "Softmax" for node in nodes) == layers
        assert sum(node.op_type == "LayerNormalization" for node in nodes) >= 2 * layers
    if name in ("unest", "vista3d", "stunet_l"):
        assert split_head(exported.model).head is not None


@pytest.mark.parametrize("name", NAMES)
def test_weights_come_back_from_a_plain_state_dict(name: str, tmp_path: Path) -> None:
    network = small(name)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    loaded = load_network(tmp_path / "weights.pt", name, num_classes=6, window=SMALL[name]["window"])
    with torch.no_grad():
        assert torch.equal(loaded(image_for(name)), network(image_for(name)))
    with pytest.raises(CheckpointError, match="another network"):
        load_network(tmp_path / "weights.pt", "unet" if name != "unet" else "unest", num_classes=6)


def test_a_checkpoint_of_vista3d_is_told_its_classes(tmp_path: Path) -> None:
    peer, ours = monai_vista3d((1, 3, 14))
    torch.save({"model": peer.state_dict()}, tmp_path / "vista.pt")
    image = torch.randn(1, 1, 16, 8, 12)
    loaded = load_network(tmp_path / "vista.pt", "vista3d", classes=(1, 3, 14), window=(16, 8, 12))
    everything = load_network(tmp_path / "vista.pt", "vista3d", window=(16, 8, 12))
    with torch.no_grad():
        assert torch.equal(loaded(image), ours(image))
        torch.testing.assert_close(everything(image)[:, [0, 1, 3, 14]], ours(image), rtol=1e-5, atol=1e-6)
    assert everything(image).shape[1] == 133


@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated")
def test_export_fixes_the_classes_of_vista3d(tmp_path: Path) -> None:
    peer, _ = monai_vista3d((1,))
    torch.save(peer.state_dict(), tmp_path / "vista.pt")
    options = ExportOptions(
        checkpoint=tmp_path / "vista.pt",
        net="vista3d",
        classes="1,3,14",
        window=(16, 8, 12),
        preprocessing="btcv",
        output=tmp_path / "vista.onnx",
    )
    assert export(options).facts["classes"] == ["background", "class 1", "class 2", "class 3"]
    with pytest.raises(ShapeError, match="multiple of 4"):
        export(replace(options, window=(16, 8, 10)))


@pytest.mark.parametrize(
    ("classes", "message"),
    [((1, 1), "different"), ((1, 2, 3), "2 different"), ((0, 1), "1 to 132"), ((1, 133), "1 to 132")],
)
def test_prompts_that_cannot_be_are_refused(classes: tuple[int, ...], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        small("vista3d", num_classes=3, classes=classes)


def test_other_networks_are_not_told_their_classes() -> None:
    with pytest.raises(OptionError, match="Leave out --classes"):
        small("unet", classes=(1, 2, 3, 4, 5))


def test_classes_of_the_command_line() -> None:
    assert read_classes(None) is None
    assert read_classes("1,3, 14") == (1, 3, 14)
    with pytest.raises(OptionError, match="liver"):
        read_classes("1,liver")


@pytest.mark.parametrize("name", ["swinunetr", "unest", "stunet_b"])
def test_a_window_off_the_stride_names_one_that_fits(name: str) -> None:
    with pytest.raises(
        ShapeError, match=r"multiple of 32, the window given is 100x96x20\. Choose for example 96x96x32"
    ):
        check_window(name, (100, 96, 20))


def test_a_network_in_the_wrong_window_is_an_error_of_the_graph() -> None:
    with pytest.raises(GraphError, match=r"takes sides that are multiples of 4: try --window 16 8 12\."):
        export_network(small("vista3d"), channels=1, window=(16, 8, 10))


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("segresnet", (8, 16, 48)),
        ("segresnet", (4, 8)),
        ("swinunetr", (12, 24, 48, 96, 192, 384)),
        ("swinunetr", (8, 8, 16, 32, 64, 128)),
        ("unest", (32, 64, 128)),
        ("unest", (4, 8, 16, 48, 64, 8)),
        ("vista3d", (8, 16, 16)),
        ("vista3d", (2, 4, 8, 16, 32, 64)),
    ],
)
def test_widths_a_network_cannot_have_are_refused(name: str, channels: tuple[int, ...]) -> None:
    with pytest.raises(OptionError, match=name):
        small(name, channels=channels, window=(64, 64, 64))


@pytest.mark.parametrize("name", [name for name, entry in ARCHITECTURES.items() if entry.needs])
def test_a_missing_library_says_how_to_get_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ptq3d.models, "find_spec", lambda _: None)
    with pytest.raises(UnavailableError, match=r"monai: pip install 'ptq3d\[train\]'"):
        small(name)


@pytest.mark.parametrize("name", NAMES)
def test_training_reaches_every_weight_that_inference_reads(name: str) -> None:
    network = small(name).train()
    network(image_for(name)).square().mean().backward()
    idle = [key for key, value in network.named_parameters() if value.grad is None]
    assert all("seg_outputs." in key or "seg_layers." in key for key in idle), idle  # heads of deep supervision


def test_the_smallest_answer_is_not_a_constant() -> None:
    """Freshly initialised networks tell voxels apart, so that what is measured on them means something."""
    for name in ("segresnet", "stunet_l", "unest", "vista3d"):
        with torch.no_grad():
            logits = small(name)(image_for(name)).numpy()
        assert len(np.unique(logits.argmax(1))) > 1
