"""Steps that PyTorch runs in FP16: operators without a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ptq3d.engines.operators import NUMBERS, OPERATORS
from ptq3d.engines.triton.place import Place
from ptq3d.engines.triton.steps import Float, View
from ptq3d.errors import EngineError


def prepare_float(step: Float, place: Place) -> Callable[[], None]:
    """The run of an operator on real values, in FP16.

    Raises:
        EngineError: an operator that PyTorch has no function for here.
    """
    if step.op not in OPERATORS:
        raise EngineError(f"the triton engine has no {step.op}, which '{step.name}' is. Use another --engine.")
    operator, attributes = OPERATORS[step.op], dict(step.attributes)
    numbers = NUMBERS.get(step.op, ())
    inputs = [_input(value, place, number=place_ in numbers) for place_, value in enumerate(step.inputs)]
    out, precise = place.view(step.out), step.out.dtype == "fp32"

    def run() -> None:
        values = [value() if callable(value) else value for value in inputs]
        with torch.inference_mode():
            _leave(operator(attributes, *values), out, step.out, precise=precise)

    return run


def _input(value: View | npt.NDArray[Any] | None, place: Place, *, number: bool) -> Any:
    """What an operator takes: a function that reads a view, a constant, or numbers."""
    if value is None:
        return None
    if isinstance(value, View):
        tensor, (step, zero) = place.view(value), value.scale
        return (lambda: ((tensor.float() - zero) * step).half()) if value.dtype == "int8" else (lambda: tensor.half())
    if number:
        return np.asarray(value).reshape(-1).tolist()
    constant = place.constant(value)
    return constant.half() if constant.is_floating_point() else constant


def _leave(values: Tensor, out: Tensor, view: View, *, precise: bool) -> None:
    """Real values into a view."""
    if view.dtype == "int8":
        values = torch.round(values.float() / view.step).add_(view.zero).clamp_(-128, 127)
    out.copy_(values.float() if precise else values)
