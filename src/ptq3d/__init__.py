"""ptq3d: real INT8 engines for 3D medical image segmentation networks, with the evidence. Research use, not a medical device."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ptq3d.version import __version__

if TYPE_CHECKING:
    from ptq3d.artefacts import build
    from ptq3d.compare import compare
    from ptq3d.demo import demo
    from ptq3d.deployment import deploy
    from ptq3d.exporting import export
    from ptq3d.inspection import inspect
    from ptq3d.options import (
        BuildOptions,
        CalibrateOptions,
        CompareOptions,
        DemoOptions,
        DeployOptions,
        EvaluateOptions,
        ExportOptions,
        InspectOptions,
        QuantizeOptions,
        SensitivityOptions,
        TrainOptions,
    )
    from ptq3d.pipeline import calibrate, train
    from ptq3d.scoring import evaluate
    from ptq3d.verification import quantize, sensitivity

# public name -> module; loaded on first use, so that `import ptq3d` loads no torch, openvino or monai
_MODULES = {
    "BuildOptions": "options",
    "CalibrateOptions": "options",
    "CompareOptions": "options",
    "DemoOptions": "options",
    "DeployOptions": "options",
    "EvaluateOptions": "options",
    "ExportOptions": "options",
    "InspectOptions": "options",
    "QuantizeOptions": "options",
    "SensitivityOptions": "options",
    "TrainOptions": "options",
    "build": "artefacts",
    "calibrate": "pipeline",
    "compare": "compare",
    "demo": "demo",
    "deploy": "deployment",
    "evaluate": "scoring",
    "export": "exporting",
    "inspect": "inspection",
    "quantize": "verification",
    "sensitivity": "verification",
    "train": "pipeline",
}

__all__ = [
    "BuildOptions",
    "CalibrateOptions",
    "CompareOptions",
    "DemoOptions",
    "DeployOptions",
    "EvaluateOptions",
    "ExportOptions",
    "InspectOptions",
    "QuantizeOptions",
    "SensitivityOptions",
    "TrainOptions",
    "__version__",
    "build",
    "calibrate",
    "compare",
    "demo",
    "deploy",
    "evaluate",
    "export",
    "inspect",
    "quantize",
    "sensitivity",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"ptq3d.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'ptq3d' has no attribute '{name}'")
