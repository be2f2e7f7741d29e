"""Plans that the repository offers: accepted, and what they say they are."""

from dataclasses import replace
from pathlib import Path

import pytest

from fedkola import plan, server
from fedkola.evaluation import demo

pytestmark = pytest.mark.integration

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_is_a_plan_that_can_start(path: Path) -> None:
    server.check(plan.load(path))


def test_the_recipe_of_the_hospitals_is_the_plan_of_the_demo() -> None:
    found = plan.load(RECIPES / "hospitals" / "plan.toml")
    assert found == replace(demo.plan(), run=found.run)
    assert found.run.seed == demo.plan().run.seed
