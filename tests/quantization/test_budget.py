"""Laws of the search: within the budget with as few layers in floating point as the order allows, and honest where none is enough."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptq3d.quantization.budget import (
    FEWER,
    Search,
    Sensitivity,
    Trial,
    by_worth,
    fewest_terms,
    guard,
    keeping,
    kept_since,
    search,
)
from ptq3d.quantization.quantizer import Recipe

NAMES = [f"layer{index}" for index in range(12)]


def found(errors: dict[str, float], budget: float, *, terms: float = 1.0) -> tuple[Search, list[Recipe]]:
    """A network whose squared errors add up; more second terms multiply them by `terms`."""
    asked: list[Recipe] = []

    def judge(recipe: Recipe) -> Trial:
        asked.append(recipe)
        floating = set(recipe.keep)
        gain = terms if recipe.second_terms > Recipe().second_terms else 1.0
        left = sum(error**2 for name, error in errors.items() if name not in floating)
        return Trial(gain * left**0.5, 1 - len(floating) / len(errors))

    order = by_worth([Sensitivity(name, 100, error) for name, error in errors.items()])
    return search(Recipe(), order, judge, budget), asked


@given(st.lists(st.floats(1e-4, 0.1), min_size=2, max_size=12), st.floats(1e-4, 0.2))
def test_the_fewest_layers_leave_int8(errors: list[float], budget: float) -> None:
    result, _ = found(dict(zip(NAMES, errors, strict=False)), budget)
    descending = sorted(errors, reverse=True)
    needed = next((n for n in range(len(errors)) if sum(e**2 for e in descending[n:]) ** 0.5 <= budget), len(errors))
    assert result.met == (needed < len(errors))
    if result.met:
        assert len(result.recipe.keep) == needed


def test_a_plain_recipe_that_is_good_enough_is_the_only_one_tried() -> None:
    result, asked = found({"a": 0.001, "b": 0.002}, 0.01)
    assert result.met
    assert asked == [Recipe()] == [result.recipe]


def test_second_terms_come_before_floating_point() -> None:
    result, _ = found({"a": 0.01, "b": 0.02, "c": 0.01}, 0.01, terms=0.3)
    assert result.met
    assert result.recipe.keep == ()
    assert result.recipe.second_terms > Recipe().second_terms


def test_the_search_is_logarithmic_and_reported() -> None:
    errors = dict.fromkeys(NAMES, 0.01)
    result, asked = found(errors, 0.02)
    assert result.met
    assert len(asked) <= 3 + 5
    assert len(result.steps) == len(asked)
    assert result.steps[0].why == "the plain recipe"


def test_where_nothing_is_enough_the_best_is_given_and_not_called_enough() -> None:
    result, _ = found({"a": 0.5, "b": 0.4}, 1e-9)
    assert not result.met
    assert min(step.trial.disagreement for step in result.steps) == pytest.approx(0.4)


def test_names_with_brackets_are_names_not_patterns() -> None:
    assert keeping(Recipe(), ["conv[0]"]).keep == ("conv[[]0]",)


def test_the_layers_that_a_search_kept_are_named_again() -> None:
    names = ["conv[0]", "conv0", "a*", "ab", "c?", "cd", "[[]", "plain"]
    before = Recipe(keep=("*d",))
    for name in names:
        assert kept_since(before, keeping(before, [name]), names) == (name,)
    assert kept_since(before, keeping(keeping(before, ["ab"]), ["a*"]), names) == ("a*", "ab")
    assert kept_since(before, before, names) == ()


def test_a_layer_leaves_int8_only_where_the_engine_gets_faster() -> None:
    slow = {"thin": 0.9, "other": 1.05}

    def faster(candidate: Recipe, current: Recipe) -> float:
        return slow[(set(candidate.keep) - set(current.keep)).pop()]

    recipe, ratios = guard(Recipe(), {"thin": 1, "other": 2}, faster)
    assert recipe.keep == ("thin",)
    assert ratios == slow


@given(st.lists(st.floats(0, 1), min_size=len(FEWER) + 1, max_size=len(FEWER) + 1), st.sampled_from([0.0, 0.03, 0.2]))
def test_the_fewest_second_terms_that_are_about_as_good_are_taken(errors: list[float], most: float) -> None:
    shares = [*FEWER, most]
    worth = dict(zip(shares, errors, strict=True))
    found = fewest_terms(Recipe(second_terms=most), lambda recipe: worth[recipe.second_terms])
    good = [share for share in FEWER if share < most and worth[share] <= 1.25 * worth[most]]
    assert found.recipe == Recipe(second_terms=min([*good, most]))
    assert all(worth[share] == error for share, error in found.tried.items())


def test_windows_that_say_nothing_leave_all_second_terms() -> None:
    assert fewest_terms(Recipe(), lambda recipe: float("nan")).recipe == Recipe()


def test_a_user_who_wants_no_second_terms_gets_none() -> None:
    def judge(recipe: Recipe) -> Trial:
        assert recipe.second_terms == 0
        return Trial(0.1 / (1 + len(recipe.keep)), 1 - len(recipe.keep) / len(NAMES))

    start = Recipe(second_terms=0)
    assert search(start, NAMES, judge, 0.02, terms=()).recipe.second_terms == 0
