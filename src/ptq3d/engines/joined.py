"""Engines made of engines: windows mirrored and averaged, several networks averaged. Both are linear, so late heads stay exact."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ptq3d.engines.base import Engine, EngineSpec, LayerReport, Windows
from ptq3d.errors import OptionError
from ptq3d.head import Classifier, Head


class Mirrored:
    """The mean of an engine's answers to a window and to its mirror images, mirrored back.

    Args:
        engine: closed with this one.
        axes: of "xyz"; all their combinations are mirrored, the window itself included.

    Source: nnU-Net's test-time augmentation: the mean of logits over all combinations of the mirror axes.
    """

    def __init__(self, engine: Engine, axes: str) -> None:
        places = ["xyz".index(axis) + 1 for axis in axes]
        self._engine = engine
        self._flips = [
            flip for number in range(len(places) + 1) for flip in itertools.combinations(sorted(places), number)
        ]

    @property
    def spec(self) -> EngineSpec:
        """The engine's."""
        return self._engine.spec

    @property
    def head(self) -> Head:
        """The engine's."""
        return self._engine.head

    @property
    def device(self) -> torch.device:
        """The engine's."""
        return self._engine.device

    def __call__(self, windows: Windows) -> Windows:
        """Features of windows; see `Engine`."""
        return _answers(self, windows)

    def stream(self, windows: Iterable[Tensor]) -> Iterator[Tensor]:
        """One mean for each window; see `Engine`."""
        answers = self._engine.stream(window.flip(flip).contiguous() for window in windows for flip in self._flips)
        for first in answers:
            total = first.float().clone()
            for flip, answer in zip(self._flips[1:], answers, strict=False):
                total += answer.flip(flip)
            yield total / len(self._flips)

    @property
    def beside(self) -> int:
        """The engine's."""
        return self._engine.beside

    def classifier(self, head: Head) -> Classifier:
        """The engine's."""
        return self._engine.classifier(head)

    def layers(self) -> tuple[LayerReport, ...]:
        """The engine's."""
        return self._engine.layers()

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Ensemble:
    """Several networks whose logits are averaged.

    Their features stand side by side and their heads are joined: mean_i(W_i f_i + b_i) = [W_1 .. W_n] / n [f_1 .. f_n] + mean b_i.

    Args:
        engines: of one window, channels, classes and device; closed with this one.

    Raises:
        OptionError: they differ in one of these.
    """

    def __init__(self, engines: Sequence[Engine]) -> None:
        first = engines[0]
        for engine in engines[1:]:
            wanted, found = (
                (one.spec.channels, one.spec.window, one.head.classes, one.device) for one in (first, engine)
            )
            if found != wanted:
                raise OptionError(
                    f"engines to average must agree in channels, window, classes and device: {wanted} and {found}."
                )
        self._engines = tuple(engines)
        heads = [engine.head for engine in engines]
        joined = np.concatenate([head.matrix() for head in heads], axis=1) / len(heads)
        bias = np.mean([head.bias for head in heads], axis=0)
        self._head = Head(joined.astype(np.float32), bias.astype(np.float32))
        self._spec = EngineSpec(first.spec.channels, first.spec.window, self._head.features)

    @property
    def spec(self) -> EngineSpec:
        """Its features are those of all engines."""
        return self._spec

    @property
    def head(self) -> Head:
        """The joined one."""
        return self._head

    @property
    def device(self) -> torch.device:
        """The engines'."""
        return self._engines[0].device

    def __call__(self, windows: Windows) -> Windows:
        """Features of windows; see `Engine`."""
        return _answers(self, windows)

    def stream(self, windows: Iterable[Tensor]) -> Iterator[Tensor]:
        """The features of all engines side by side; see `Engine`."""
        copies = itertools.tee(windows, len(self._engines))
        streams = [engine.stream(copy) for engine, copy in zip(self._engines, copies, strict=True)]
        for answers in zip(*streams, strict=True):
            yield torch.cat([answer.movedim(0, -1).float() for answer in answers], dim=-1).movedim(-1, 0)

    @property
    def beside(self) -> int:
        """The fewest that one of them leaves."""
        return min((engine.beside for engine in self._engines if engine.beside), default=0)

    def classifier(self, head: Head) -> Classifier:
        """The first engine's."""
        return self._engines[0].classifier(head)

    def layers(self) -> tuple[LayerReport, ...]:
        """Those of all engines."""
        return tuple(layer for engine in self._engines for layer in engine.layers())

    def close(self) -> None:
        """Close all engines."""
        for engine in self._engines:
            engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _answers(engine: Engine, windows: Windows) -> Windows:
    pieces = (torch.from_numpy(window).to(engine.device) for window in windows)
    return np.stack([answer.cpu().numpy() for answer in engine.stream(pieces)])
