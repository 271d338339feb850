"""The recipe of a task for a model of any size.

The authors published DeBERTaV3's recipes of all sizes for MNLI, and those of large for the other
tasks. Where a size has none, it takes large's with the rate that MNLI's suggest: 4.5e-5 for xsmall
and small, 1.5e-5 for base and 7e-6 for large. These lie between 0.14 and 0.21 over layers x width;
a size that the authors do not have takes 0.2 over layers x width in their place.
"""

from dataclasses import dataclass, replace
from typing import Any

from pipeline.evaluate.declaration import Recipe, TaskSpec

_SIZES = {(12, 384): "xsmall", (6, 768): "small", (12, 768): "base", (24, 1024): "large"}
_MNLI_RATES = {"xsmall": 4.5e-5, "small": 4.5e-5, "base": 1.5e-5, "large": 7e-6}
RATE_TIMES_SIZE = 0.2
"""Rate x layers x hidden size, where nobody published a rate."""


@dataclass(frozen=True)
class Overrides:
    """What the user says in place of a recipe's values; None leaves them."""

    learning_rate: float | None = None
    epochs: int | None = None
    batch_size: int | None = None
    max_length: int | None = None


def choose_recipe(
    spec: TaskSpec, num_layers: int, hidden_size: int, overrides: Overrides = Overrides()
) -> Recipe:
    """Choose how to fine-tune a model on a task.

    Args:
        spec: The task.
        num_layers: Of the encoder.
        hidden_size: Of the encoder.
        overrides: The user's values.

    Returns:
        The recipe; its source says where the values come from.
    """
    size = _SIZES.get((num_layers, hidden_size), "")
    recipe = spec.recipes.get(size, spec.recipe)
    if size not in spec.recipes and size != "large":
        rate = _MNLI_RATES.get(size, RATE_TIMES_SIZE / (num_layers * hidden_size))
        scaled = recipe.learning_rate * rate / _MNLI_RATES["large"]
        source = f"{recipe.source}, of large; rate scaled as MNLI's"
        recipe = replace(recipe, learning_rate=scaled, source=source)
    given: dict[str, Any] = {k: v for k, v in vars(overrides).items() if v is not None}
    if not given:
        return recipe
    source = f"{recipe.source}; {', '.join(given)} of the command line"
    return replace(recipe, **given, source=source)
