"""A dense model as a mixture of experts: the units of each MLP shared out, and a router that chooses among them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shearing.late import late

if TYPE_CHECKING:
    from shearing.pruning.experts.make import make_experts
    from shearing.pruning.experts.recipe import MoeRecipe, moe_recipe_of

__all__ = ["MoeRecipe", "make_experts", "moe_recipe_of"]

__getattr__ = late(__name__, {"MoeRecipe": "recipe", "make_experts": "make", "moe_recipe_of": "recipe"})
