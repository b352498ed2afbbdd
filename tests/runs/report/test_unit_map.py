"""The map of kept units: every unit is drawn, in the state it has."""

from __future__ import annotations

import re

import torch

from shearing.runs.report.unit_map import UnitMap, unit_map


def masks(*, layers: int = 4, groups: int = 2, per_group: int = 3, intermediate: int = 100) -> dict[str, torch.Tensor]:
    return {
        "hidden": torch.tensor([1.0] * 30 + [0.0] * 10),
        "attention": torch.tensor([1.0] * (layers - 1) + [0.0]),
        "mlp": torch.tensor([1.0] * (layers - 1) + [0.0]),
        "kv_groups": torch.ones(layers, groups),
        "query_heads": torch.ones(layers, groups, per_group),
        "intermediate": torch.ones(layers, intermediate),
    }


def drawn(masks: dict[str, torch.Tensor]) -> UnitMap:
    found = unit_map(masks)
    assert found is not None
    return found


def cells(svg: str) -> dict[str, int]:
    """Cells by state: "gone", or the opacity of what is kept."""
    found = {}
    for path in re.findall(r"<path[^>]*>", svg):
        opacity = re.search(r'opacity="([^"]*)"', path)
        found[opacity[1] if opacity else "gone"] = path.count("M")
    return found


def test_layers_and_hidden_dimensions_are_counted() -> None:
    found = drawn(masks())

    assert (found.layers, found.num_layers, found.hidden, found.num_hidden) == (3, 4, 30, 40)


def test_a_dropped_layer_has_no_kept_unit() -> None:
    only_heads = {name: mask for name, mask in masks().items() if name in ("attention", "kv_groups", "query_heads")}
    bins = 4 * 64  # without a mask of intermediate units a layer's strip is whole

    assert cells(drawn(only_heads).svg) == {"1.00": 3 * 6 + bins, "gone": 6}


def test_a_group_that_is_gone_takes_its_heads_along() -> None:
    of_groups = {"kv_groups": torch.tensor([[1.0, 0.0]]), "query_heads": torch.ones(1, 2, 3)}

    assert cells(drawn(of_groups).svg)["gone"] == 3


def test_a_single_kept_unit_in_a_bin_is_seen() -> None:
    intermediate = torch.zeros(1, 6400)
    intermediate[0, 0] = 1.0

    assert cells(drawn({"intermediate": intermediate}).svg) == {"0.17": 1, "gone": 63}


def test_a_map_of_a_large_model_stays_small() -> None:
    large = masks(layers=80, groups=8, per_group=8, intermediate=28_672)

    assert len(drawn(large).svg) < 250_000


def test_nothing_with_layers_gives_no_map() -> None:
    assert unit_map({"hidden": torch.ones(4), "log_alpha/mlp": torch.ones(4)}) is None
