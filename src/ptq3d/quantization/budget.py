"""The fewest multiplications that must leave INT8 so that the answer stays within a budget, and those that leave it for speed.

Nothing here runs a network: what a recipe is worth is asked of a judge, which builds the engine and runs it.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from ptq3d.quantization.quantizer import Recipe
from ptq3d.quantization.targets import get_target

TERMS = (0.2, 0.3, 0.6)  # second terms cost time but keep layers in INT8, so more of them are tried first
FEWER = (0.0, 0.02, 0.05)  # second terms that are tried in place of more, the fewest first
FASTER = 0.98  # a layer leaves INT8 for speed if the engine then takes at most this much of its time


@dataclass(frozen=True)
class Trial:
    """What one recipe was worth.

    Args:
        disagreement: 1 - fidelity, or the loss of mean Dice.
        int8_mac_share: as the built engine reports it.
    """

    disagreement: float
    int8_mac_share: float


@dataclass(frozen=True)
class Sensitivity:
    """What INT8 in one layer alone does to the answer.

    Args:
        layer: its name.
        macs: its multiplications.
        disagreement: of the network with only this layer in INT8.
    """

    layer: str
    macs: int
    disagreement: float


@dataclass(frozen=True)
class Step:
    """One recipe that was tried.

    Args:
        why: what it tried.
        second_terms: of the recipe.
        floating: layers that were kept in floating point.
        trial: what it was worth.
    """

    why: str
    second_terms: float
    floating: tuple[str, ...]
    trial: Trial

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)


@dataclass(frozen=True)
class Search:
    """What a search found.

    Args:
        recipe: the one with the largest INT8 share that keeps the budget; the best one where none does.
        met: whether it keeps the budget.
        steps: all that was tried, in order.
    """

    recipe: Recipe
    met: bool
    steps: tuple[Step, ...]


Judge = Callable[[Recipe], Trial]


@dataclass(frozen=True)
class FewestTerms:
    """What `fewest_terms` found.

    Args:
        recipe: with the second terms that are worth their time.
        tried: second terms -> disagreement; empty where there was nothing to choose.
    """

    recipe: Recipe
    tried: Mapping[float, float]

    def __str__(self) -> str:
        """What was tried, and what came of it."""
        told = {terms: "unknown" if math.isnan(lost) else f"{1 - lost:.4f}" for terms, lost in self.tried.items()}
        tried = ", ".join(f"{terms:g}: {kept}" for terms, kept in told.items())
        return f"second terms {self.recipe.second_terms:g} ({f'labels kept with {tried}' if tried else 'nothing to choose'})"


def fewest_terms(start: Recipe, disagreement: Callable[[Recipe], float]) -> FewestTerms:
    """The recipe with the fewest second terms that is about as good as `start`.

    What a layer's noise does to the labels differs between networks, so it is asked of the labels.

    Args:
        start: with the most second terms that may be spent.
        disagreement: 1 - fidelity of a recipe, NaN where the windows say nothing: then `start` stays.
    """
    prices, tried = get_target(start.target).mending, {start.second_terms: disagreement(start)}
    as_good = 1.0 if prices is None else prices.as_good
    for terms in (terms for terms in FEWER if terms < start.second_terms):
        recipe = replace(start, second_terms=terms)
        tried[terms] = disagreement(recipe)
        if tried[terms] <= as_good * tried[start.second_terms]:
            return FewestTerms(recipe, tried)
    return FewestTerms(start, tried)


def by_worth(found: Sequence[Sensitivity]) -> tuple[str, ...]:
    """Layers in the order in which they leave INT8: most squared disagreement for a multiplication first.

    Errors of layers are independent, so their squares add up.
    """
    ordered = sorted(found, key=lambda one: one.disagreement**2 / max(one.macs, 1), reverse=True)
    return tuple(one.layer for one in ordered)


def search(
    start: Recipe, order: Sequence[str], judge: Judge, budget: float, *, terms: Sequence[float] = TERMS
) -> Search:
    """The recipe that keeps the budget with the fewest layers in floating point.

    First more second terms, which leave the layers in INT8; then the shortest beginning of `order` that is enough, by bisection.

    Args:
        start: the plain recipe.
        order: layers, from `by_worth`.
        judge: tells what a recipe is worth.
        budget: the largest disagreement that is accepted.
        terms: second terms that may be tried where `start` is not enough; those that it has already are left out.
    """
    steps: list[Step] = []

    def enough(recipe: Recipe, floating: tuple[str, ...], why: str) -> bool:
        trial = judge(keeping(recipe, floating))
        steps.append(Step(why, recipe.second_terms, floating, trial))
        return trial.disagreement <= budget

    if enough(start, (), "the plain recipe"):
        return Search(start, True, tuple(steps))
    more = [share for share in terms if share > start.second_terms and (get_target(start.target).mending is not None)]
    for share in more:
        if enough(replace(start, second_terms=share), (), "more second terms"):
            return Search(replace(start, second_terms=share), True, tuple(steps))
    best = min(steps, key=lambda step: step.trial.disagreement)
    recipe = replace(start, second_terms=best.second_terms)
    low, high = 0, max(len(order) - 1, 0)  # `low` layers are too few
    while high - low > 1:
        middle = (low + high) // 2
        names = tuple(order[:middle])
        low, high = (low, middle) if enough(recipe, names, f"the first {middle} layers float") else (middle, high)
    if not any(step.floating == tuple(order[:high]) for step in steps):
        enough(recipe, tuple(order[:high]), f"the first {high} layers float")
    return _best(start, steps, budget)


def _best(start: Recipe, steps: Sequence[Step], budget: float) -> Search:
    within = [step for step in steps if step.trial.disagreement <= budget]
    chosen = (
        max(within, key=lambda step: step.trial.int8_mac_share)
        if within
        else min(steps, key=lambda step: step.trial.disagreement)
    )
    recipe = keeping(replace(start, second_terms=chosen.second_terms), chosen.floating)
    return Search(recipe, bool(within), tuple(steps))


def keeping(recipe: Recipe, floating: Sequence[str]) -> Recipe:
    """The recipe with further layers, by name, in floating point."""
    return replace(recipe, keep=(*recipe.keep, *(glob.escape(name) for name in floating)))


def kept_since(before: Recipe, after: Recipe, layers: Iterable[str]) -> tuple[str, ...]:
    """The layers that `keeping` added to a recipe: its patterns as names again.

    Args:
        before: the recipe that was given to `keeping`, once or again and again.
        after: the recipe that came out.
        layers: the names to choose from.
    """
    patterns = after.keep[len(before.keep) :]
    return tuple(name for name in layers if any(fnmatchcase(name, pattern) for pattern in patterns))


def guard(
    start: Recipe, macs: Mapping[str, int], faster: Callable[[Recipe, Recipe], float]
) -> tuple[Recipe, dict[str, float]]:
    """Layers whose INT8 costs time leave it, the thinnest tried first.

    Args:
        start: the recipe.
        macs: INT8 layer -> its multiplications.
        faster: (candidate, current) -> time of the first over that of the second, measured in turn.

    Returns:
        (recipe, layer -> ratio of times of every layer that was tried).
    """
    recipe, ratios = start, {}
    for name in sorted(macs, key=lambda name: macs[name]):
        candidate = keeping(recipe, (name,))
        ratios[name] = faster(candidate, recipe)
        if ratios[name] <= FASTER:
            recipe = candidate
    return recipe, ratios
