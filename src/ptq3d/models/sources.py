"""Where weights come from: checkpoints of our training and of the seed, plain state dicts; no file that needs code."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ptq3d.errors import CheckpointError, FileError, OptionError, line_of
from ptq3d.models import build_network, find_architecture
from ptq3d.models.pretrained import Pretrained
from ptq3d.volumes.preprocessing import Preprocessing

if TYPE_CHECKING:
    from torch import Tensor, nn

CONTAINERS = ("model_state_dict", "state_dict", "model", "network_weights")
PREFIXES = ("module.", "network.", "net.")  # DistributedDataParallel, our training, many Lightning modules
DESCRIPTION = "ptq3d"
NUMBERS = ("bool", "int32", "int64", "float32", "float64")  # NumPy types in the checkpoints of others


def load_state(path: Path) -> dict[str, Tensor]:
    """The weights in a checkpoint: tensor by name, on the CPU, without the prefixes that trainers add.

    Args:
        path: a file of `torch.save`: a state dict, or a dict that holds one under a name of `CONTAINERS`.

    Raises:
        FileError: there is no such file.
        CheckpointError: the file is truncated, needs code to load, or holds no weights.
    """
    return weights_of(read_checkpoint(path), path)


def read_description(path: Path) -> dict[str, Any] | None:
    """What our training wrote beside the weights, None for a checkpoint of someone else.

    Returns:
        `architecture`, `in_channels`, `num_classes`, `channels`, `labels`, `preprocessing`, `window` and `overlap`.

    Raises:
        FileError: there is no such file.
        CheckpointError: the file is truncated or needs code to load.
    """
    return _description(read_checkpoint(path))


def from_checkpoint(
    path: Path,
    name: str | None = None,
    *,
    num_classes: int | None = None,
    classes: tuple[int, ...] | None = None,
    window: tuple[int, int, int] | None = None,
) -> Pretrained:
    """The network of a checkpoint, with what our training wrote beside its weights.

    Args:
        path: the checkpoint.
        name: architecture by name or alias; None takes the one the checkpoint describes.
        num_classes: wanted classes with the background; None takes those of the checkpoint.
        classes, window: see `load_network`.

    Raises:
        FileError, CheckpointError: see `load_network`.
        OptionError: neither `name` nor the file says which network it is.
    """
    content = read_checkpoint(path)
    described = _description(content) or {}
    if name is None and "architecture" not in described:
        raise OptionError(f"{path} does not say which network it is. Name it with --net, for example --net unet.")
    network, architecture, in_channels = _network(
        content, path, name, num_classes=num_classes, classes=classes, window=window
    )
    rules, labels, seen = (described.get(key) for key in ("preprocessing", "labels", "window"))
    return Pretrained(
        network,
        architecture,
        in_channels,
        (path,),
        window=None if seen is None else (int(seen[0]), int(seen[1]), int(seen[2])),
        labels=None if labels is None else tuple(labels),
        preprocessing=None if rules is None else Preprocessing.from_dict(rules),
        overlap=described.get("overlap"),
    )


def load_network(
    path: Path,
    name: str | None = None,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    classes: tuple[int, ...] | None = None,
    window: tuple[int, int, int] | None = None,
) -> nn.Module:
    """The network of a checkpoint with its weights, in evaluation mode on the CPU.

    Sizes come from the checkpoint's description where it has one, else from the shapes of its weights.

    Args:
        path: the checkpoint.
        name: architecture by name or alias; None takes the one the checkpoint describes.
        num_classes: wanted classes with the background; None takes those of the checkpoint.
        in_channels: wanted channels of the image; None takes those of the checkpoint.
        classes: prompts of the foreground classes, for a network that is told its classes.
        window: (X, Y, Z) voxels that it will see; None takes those of the checkpoint, else the published ones.

    Raises:
        FileError: there is no such file.
        CheckpointError: it is the checkpoint of another network, or cannot be loaded.
        OptionError: `name` is no network, or the file does not say which one it holds and `name` is None.
        ShapeError: the network cannot halve the window at each of its levels.
    """
    content = read_checkpoint(path)
    return _network(
        content, path, name, num_classes=num_classes, in_channels=in_channels, classes=classes, window=window
    )[0]


def _network(
    content: Mapping[str, Any],
    path: Path,
    name: str | None,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    classes: tuple[int, ...] | None = None,
    window: tuple[int, int, int] | None = None,
) -> tuple[nn.Module, str, int]:
    """(network in evaluation mode, name of its architecture, channels of its image) of a checkpoint's content."""
    state = weights_of(content, path)
    described = _description(content)
    sizes = {} if described is None else _sizes_described(described, path)
    name = _agree(path, "architecture", name and find_architecture(name)[0], sizes.pop("architecture", None))
    architecture = find_architecture(name)[1]
    state = {key: value for key, value in state.items() if not key.startswith(architecture.unused)}
    sizes = sizes or _sizes_of_weights(state, path, name)
    if architecture.prompts:
        sizes["num_classes"] = _prompted(sizes["num_classes"], num_classes, architecture.prompts, classes)
    sizes["num_classes"] = _agree(path, "num_classes", num_classes, sizes.get("num_classes"))
    sizes["in_channels"] = _agree(path, "in_channels", in_channels, sizes.get("in_channels"))
    sizes["window"] = window or sizes.get("window")
    network = build_network(name, **sizes, classes=classes)
    check_fit(state, network.state_dict(), path=path, name=name)
    network.load_state_dict(state, strict=False)  # only counters of BatchNorm, which inference ignores, can be missing
    return network.eval(), name, int(sizes["in_channels"])


def read_checkpoint(path: Path) -> dict[str, Any]:
    """All that is in a checkpoint, on the CPU; nothing in it is run.

    Raises:
        FileError: there is no such file.
        CheckpointError: the file is truncated, needs code to load, or holds no dict.
    """
    import torch

    if not path.is_file():
        raise FileError(f"{path}: no such checkpoint. Train one with `ptq3d train`, or name an existing file.")
    try:
        with torch.serialization.safe_globals(_allowed()):
            content = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))  # the rest of torch's message advises to run it all the same
        reason = wanted.group(1) if wanted else "no such file format"
        raise CheckpointError(
            f"{path}: refused, it needs code to load or is no file of torch.save ({reason}). "
            "Save only its weights, torch.save(network.state_dict(), path), where the file comes from."
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a readable checkpoint ({line_of(error).split('. ')[0]}). It may be truncated; copy it again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: a dict of weights is wanted, the file holds a {type(content).__name__}.")
    return content


def _allowed() -> list[Any]:
    """What `torch.load` may take beside tensors: the parts of a NumPy number, which nnU-Net keeps its losses as.

    They only put bytes into a number. A pickle names the rebuilding function by the NumPy that wrote it, 1 or 2.
    """
    rebuild: Any = np.float64(0).__reduce__()[0]
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")
    return [np.dtype, *(type(np.dtype(name)) for name in NUMBERS), *((rebuild, f"{one}.scalar") for one in modules)]


def _description(content: Mapping[str, Any]) -> dict[str, Any] | None:
    description = content.get(DESCRIPTION)
    return dict(description) if isinstance(description, Mapping) else None


def weights_of(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The weights in what `read_checkpoint` gave, without the prefixes that trainers add.

    Raises:
        CheckpointError: it holds no weights.
    """
    import torch

    inner = next((content[name] for name in CONTAINERS if isinstance(content.get(name), Mapping)), content)
    others = [str(name) for name, value in inner.items() if not isinstance(value, torch.Tensor)]
    if others or not inner:
        found = f"'{others[0]}' is no tensor" if others else "it is empty"
        raise CheckpointError(
            f"{path}: holds no state dict at its top or under {', '.join(CONTAINERS)} ({found}). "
            "Save the network's state_dict() there."
        )
    return _strip(dict(inner))


def _strip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`module.network.head.weight` -> `head.weight`, where every name has the prefix."""
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in state):
            return _strip({name.removeprefix(prefix): value for name, value in state.items()})
    return state


def _sizes_described(description: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Arguments of `build_network`, and the architecture, as our training wrote them."""
    try:
        return {
            "architecture": str(description["architecture"]),
            "in_channels": int(description["in_channels"]),
            "num_classes": int(description["num_classes"]),
            "channels": tuple(int(width) for width in description["channels"]),
            "window": tuple(int(side) for side in description["window"]),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: its 'ptq3d' description is damaged ({error!r}). Train or copy it again."
        ) from error


def _sizes_of_weights(state: Mapping[str, Tensor], path: Path, name: str) -> dict[str, Any]:
    """Sizes off one weight of each level and the head, whose names the table of networks knows."""
    architecture = find_architecture(name)[1]
    names = _level_names(architecture.levels, state)
    head = architecture.head and architecture.head.format(above=len(names) - 2)
    missing = [one for one in (*names, *([head] if head else ())) if one not in state]
    if missing or not names:
        nnunet = any(one.startswith("decoder.seg_layers.") for one in state)
        mend = (
            "Give the folder of nnU-Net results it lies in"
            if nnunet
            else "Name its architecture, or export it to ONNX with its own code"
        )
        wanted = missing[0] if missing else architecture.levels[0].format(level=0)
        raise CheckpointError(
            f"{path}: weights of another network than {name}: it has no '{wanted}' "
            f"(its first tensor is '{next(iter(state), None)}'). {mend}."
        )
    return {
        "in_channels": int(state[names[0]].shape[1]),
        "num_classes": int(state[head].shape[0]) if head else None,
        "channels": tuple(int(state[one].shape[0]) for one in names),
    }


def _level_names(patterns: tuple[str, ...], state: Mapping[str, Tensor]) -> list[str]:
    """The weights that show a network's levels; the last pattern may stand for any number of them."""
    *fixed, last = patterns
    further = (last.format(level=level, above=level - 1) for level in count(len(fixed)))
    return [*fixed, *(takewhile(state.__contains__, further) if "{" in last else [last])]


def _prompted(described: int | None, wanted: int | None, prompts: int, classes: tuple[int, ...] | None) -> int:
    """The classes of a network that is told them: as told, as described, as wanted, or all it knows."""
    return 1 + len(classes) if classes is not None else described or wanted or 1 + prompts


def _agree(path: Path, what: str, wanted: Any, found: Any) -> Any:
    if wanted is None and found is None:
        raise CheckpointError(f"{path}: the file does not say its {what}. Name it.")
    if None not in (wanted, found) and wanted != found:
        raise CheckpointError(f"{path}: {what} {wanted} is wanted, the checkpoint has {found}. Name the one it has.")
    return found if wanted is None else wanted


def check_fit(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, path: Path, name: str) -> None:
    """Refuse weights that are not those of a network.

    Args:
        state: the weights.
        wanted: the network's own state dict.
        path: of the checkpoint, for the message.
        name: of the network, for the message.

    Raises:
        CheckpointError: names the first tensor that is missing, unknown or of another shape.
    """
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    extra = [key for key in state if key not in wanted]
    shapes = [key for key in wanted if key in state and state[key].shape != wanted[key].shape]
    if not (missing or extra or shapes):
        return
    if shapes:
        reason = (
            f"'{shapes[0]}' is {tuple(state[shapes[0]].shape)} there and {tuple(wanted[shapes[0]].shape)} in {name}"
        )
    elif missing:
        reason = f"it has no '{missing[0]}'"
    else:
        reason = f"it has '{extra[0]}', which {name} has not"
    raise CheckpointError(
        f"{path}: weights of another network than {name}: {reason} "
        f"({len(missing)} tensors missing, {len(extra)} unknown, {len(shapes)} of another shape). "
        "Name the architecture and sizes it was trained with."
    )
