"""A MONAI bundle: network, weights, transforms and inferer of its folder. Its configuration is read, its code is never run."""

from __future__ import annotations

import inspect
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptq3d.errors import CheckpointError, FileError, OptionError
from ptq3d.models import build_network
from ptq3d.models.archives import unpack
from ptq3d.models.bundle_config import Config, read_config
from ptq3d.models.monai_inference import Window, require_argmax, sliding_of
from ptq3d.models.monai_transforms import preprocessing_of
from ptq3d.models.pretrained import Pretrained
from ptq3d.models.programs import from_torchscript
from ptq3d.models.sources import check_fit, load_state
from ptq3d.volumes.preprocessing import Preprocessing

if TYPE_CHECKING:
    from torch import nn

NETWORKS = "monai.networks.nets"
NEUTRAL = {
    "pretrained": False,
    "use_checkpoint": False,
}  # all weights come from the file; checkpointing is for training
DROPPED = {"SwinUNETR": ("img_size",)}  # arguments that MONAI took once and that never changed the answer


@dataclass(frozen=True)
class Known:
    """A network that bundles bring code for and that the zoo has.

    Attributes:
        architecture: its name in `ptq3d.models.ARCHITECTURES`.
        arguments: that the zoo's network was made with.
    """

    architecture: str
    arguments: Mapping[str, Any]


ZOO: Mapping[str, Known] = {
    "scripts.networks.unest_base_patch_4.UNesT": Known(
        "unest", {"patch_size": 4, "depths": [2, 2, 8], "embed_dim": [128, 256, 512], "num_heads": [4, 8, 16]}
    )
}


def from_bundle(
    path: Path,
    *,
    config: str | None = None,
    preprocessing: Preprocessing | None = None,
    window: Window | None = None,
) -> Pretrained:
    """The network of a MONAI bundle with all that its configuration says of its use.

    Args:
        path: the bundle's folder, or a zip archive of it.
        config: its configuration, configs/<config>.json or .yaml; None takes "inference".
        preprocessing: instead of what its transforms say, which are then not read.
        window: (X, Y, Z) voxels, instead of what its inferer says.

    Raises:
        FileError: the folder, its configuration or weights are missing or not readable; an archive that unpacks elsewhere.
        CheckpointError: a network that is not MONAI's, an expression that needs code, weights of another network.
        OptionError: a transform, inferer or labelling that cannot be said here, by name.
        UnavailableError: MONAI is not installed.
    """
    if path.is_dir():
        return _read(path, config or "inference", preprocessing, window)
    if path.suffix.lower() != ".zip":
        raise FileError(
            f"{path}: no such folder. Name a bundle's folder, with configs/ and models/ in it, or its .zip."
        )
    with tempfile.TemporaryDirectory() as scratch:
        unpack(path, Path(scratch))
        folders = [
            folder for folder in (Path(scratch), *sorted(Path(scratch).iterdir())) if (folder / "configs").is_dir()
        ]
        if not folders:
            raise FileError(f"{path}: no bundle, there is no folder configs/ in it. Name the archive of a bundle.")
        return replace(_read(folders[0], config or "inference", preprocessing, window), files=(path,))


def _read(folder: Path, name: str, preprocessing: Preprocessing | None, window: Window | None) -> Pretrained:
    config, metadata = read_config(_config_file(folder, name)), _metadata(folder)
    require_argmax(config)
    weights = folder / "models" / "model.pt"
    script = weights.with_suffix(".ts")
    if weights.is_file() or not script.is_file():
        found = _with_weights(config, metadata, weights)
    else:
        found = from_torchscript(script, in_channels=_channels(metadata))
    sliding = sliding_of(config, patch=_said(metadata, "inputs", "image", "spatial_shape"), window=window)
    if preprocessing is None:
        prepared = preprocessing_of(config, in_channels=found.in_channels)
        preprocessing = replace(prepared, outside=sliding.outside)
    return replace(
        found,
        files=(*found.files, config.path),
        window=sliding.window,
        labels=_labels(metadata, folder),
        preprocessing=preprocessing,
        overlap=sliding.overlap,
        blending=sliding.blending,
    )


def _config_file(folder: Path, name: str) -> Path:
    for suffix in ("json", "yaml", "yml"):
        path = folder / "configs" / f"{name}.{suffix}"
        if path.is_file():
            return path
    there = ", ".join(sorted(path.name for path in folder.glob("configs/*"))) or "nothing"
    raise FileError(
        f"{folder}: no bundle with a configuration configs/{name}.json or .yaml ({there} in configs/). "
        "Name a bundle's folder, or another of its configurations with --configuration."
    )


def _metadata(folder: Path) -> Mapping[str, Any]:
    path = folder / "configs" / "metadata.json"
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileError(f"{path}: no readable JSON ({error}). It may be truncated; copy it again.") from error
    return content if isinstance(content, dict) else {}


def _said(metadata: Mapping[str, Any], *path: str) -> Any:
    """What the metadata says of the network's data, None where it says nothing."""
    found: Any = metadata.get("network_data_format")
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _channels(metadata: Mapping[str, Any]) -> int | None:
    found = _said(metadata, "inputs", "image", "num_channels")
    return found if isinstance(found, int) else None


def _labels(metadata: Mapping[str, Any], folder: Path) -> tuple[str, ...] | None:
    classes = _said(metadata, "outputs", "pred", "channel_def")
    if not isinstance(classes, dict) or not classes:
        return None
    if sorted(classes) != sorted(map(str, range(len(classes)))):
        raise FileError(
            f"{folder}: the classes in configs/metadata.json, {sorted(classes)}, do not count from 0. Mend it."
        )
    return tuple(str(classes[str(index)]) for index in range(len(classes)))


def _with_weights(config: Config, metadata: Mapping[str, Any], weights: Path) -> Pretrained:
    """The network of `network_def` with the weights of models/model.pt."""
    where = "network_def" if "network_def" in config else "network"
    definition = config.item(where)
    if not isinstance(definition, dict) or not isinstance(definition.get("_target_"), str):
        raise OptionError(
            f"{config.path}: it has no 'network_def' with a '_target_', so nothing says which network it is."
        )
    target = definition["_target_"]
    arguments = {
        key: config.plain(value, f"{where}::{key}")
        for key, value in definition.items()
        if key not in ("_target_", "_desc_")
    }
    if target in ZOO:
        network, name = _zoo_network(config, target, arguments), ZOO[target].architecture
    else:
        network, name = _monai_network(config, target, arguments), f"monai-{target.rpartition('.')[2].lower()}"
    in_channels = _in_channels(type(network), arguments) or _channels(metadata)
    if in_channels is None:
        raise OptionError(f"{config.path}: '{where}' does not say its 'in_channels'. Write them there.")
    state = load_state(weights)
    check_fit(state, network.state_dict(), path=weights, name=name)
    network.load_state_dict(state, strict=False)  # see `load_network`
    return Pretrained(network.eval(), name, in_channels, (weights,))


def _zoo_network(config: Config, target: str, arguments: Mapping[str, Any]) -> nn.Module:
    known = ZOO[target]
    for key, value in arguments.items():
        if key not in ("in_channels", "out_channels") and known.arguments.get(key) != value:
            raise CheckpointError(
                f"{config.path}: '{target}' with '{key}' {value!r}; ptq3d builds it with {known.arguments.get(key)!r} only. "
                "Export that network to ONNX with its own code."
            )
    channels, classes = arguments.get("in_channels", 1), arguments.get("out_channels")
    if not isinstance(channels, int) or not isinstance(classes, int):
        raise OptionError(f"{config.path}: '{target}' does not say its 'out_channels'. Write them there.")
    return build_network(known.architecture, in_channels=channels, num_classes=classes)


def _monai_network(config: Config, target: str, arguments: dict[str, Any]) -> nn.Module:
    """A freshly made network of `monai.networks.nets`."""
    kind = _network_class(config, target)
    given = {key: value for key, value in arguments.items() if key not in DROPPED.get(kind.__name__, ())}
    given |= {key: value for key, value in NEUTRAL.items() if key in given}
    known = inspect.signature(kind).parameters
    unknown = [key for key in given if key not in known]
    if unknown and not any(one.kind is one.VAR_KEYWORD for one in known.values()):
        raise CheckpointError(
            f"{config.path}: {kind.__name__} of the MONAI that is installed takes no '{unknown[0]}'. "
            "Install the version that the bundle names, or leave the argument out."
        )
    try:
        network: nn.Module = kind(**given)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise CheckpointError(f"{config.path}: {kind.__name__} cannot be made from its arguments ({error}).") from error
    if given.get("spatial_dims", 3) != 3:
        raise OptionError(
            f"{config.path}: a network of {given['spatial_dims']} dimensions. ptq3d deploys 3D networks only."
        )
    return network


def _network_class(config: Config, target: str) -> type[nn.Module]:
    """A class that `monai.networks.nets` names, and nothing else: any other name could run any code."""
    from monai.networks import nets
    from torch import nn

    package, _, name = target.rpartition(".")
    mine = not package or package == NETWORKS or package.startswith(f"{NETWORKS}.")
    found = getattr(nets, name, None) if mine else None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise CheckpointError(
            f"{config.path}: the network is '{target}': refused, it needs code. ptq3d builds networks of {NETWORKS} and of its own "
            f"zoo ({', '.join(ZOO)}), and runs nothing of a bundle. Export that network to ONNX with its own code."
        )
    return found


def _in_channels(kind: type[nn.Module], arguments: Mapping[str, Any]) -> int | None:
    default = inspect.signature(kind).parameters.get("in_channels")
    found = arguments.get("in_channels", None if default is None else default.default)
    return found if isinstance(found, int) else None
