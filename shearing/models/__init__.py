"""Supported families, models under masks, and the exact cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shearing.late import late

if TYPE_CHECKING:
    from shearing.models.anatomy import Head, anatomy_of, backbone, decoder_layers, head_of, head_weight
    from shearing.models.attention import drop_attention_mask, keep_attention_within_documents
    from shearing.models.cutting import Selection, compact, compact_moments
    from shearing.models.families import FAMILIES
    from shearing.models.families.family import Family
    from shearing.models.loading import load_config, load_source
    from shearing.models.masked import MaskedModel, Masks
    from shearing.models.recipe import ModelRecipe, TargetRecipe
    from shearing.models.shape import Shape, config_for, resolve_target
    from shearing.models.stored.saving import save_model
    from shearing.models.stored.stored_model import open_source

__all__ = [
    "FAMILIES",
    "Family",
    "Head",
    "MaskedModel",
    "Masks",
    "ModelRecipe",
    "Selection",
    "Shape",
    "TargetRecipe",
    "anatomy_of",
    "backbone",
    "compact",
    "compact_moments",
    "config_for",
    "decoder_layers",
    "drop_attention_mask",
    "head_of",
    "head_weight",
    "keep_attention_within_documents",
    "load_config",
    "load_source",
    "open_source",
    "resolve_target",
    "save_model",
]

__getattr__ = late(
    __name__,
    {
        "FAMILIES": "families",
        "Family": "families.family",
        "Head": "anatomy",
        "MaskedModel": "masked",
        "Masks": "masked",
        "ModelRecipe": "recipe",
        "Selection": "cutting",
        "Shape": "shape",
        "TargetRecipe": "recipe",
        "anatomy_of": "anatomy",
        "backbone": "anatomy",
        "compact": "cutting",
        "compact_moments": "cutting",
        "config_for": "shape",
        "decoder_layers": "anatomy",
        "drop_attention_mask": "attention",
        "head_of": "anatomy",
        "head_weight": "anatomy",
        "keep_attention_within_documents": "attention",
        "load_config": "loading",
        "load_source": "loading",
        "open_source": "stored.stored_model",
        "resolve_target": "shape",
        "save_model": "stored.saving",
    },
)
