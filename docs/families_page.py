"""What docs/families.md and docs/extending.md take from the declarations.

`python docs/families_page.py` writes the table of families into the one and a family's file into the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from shearing.models.families import FAMILIES, LAYER, RMS_ONE_PLUS, Family, Norm, SubLayer
from shearing.models.families.axes import Parameter, always, never
from shearing.models.families.family import unscaled

ROOT = Path(__file__).parents[1]
SHOWN = "shearing/models/families/variations/olmo.py"
"""The family that docs/extending.md shows."""

SIZES = {
    "hidden": "hidden_size",
    "query_heads": "num_attention_heads",
    "kv_groups": "num_key_value_heads",
    "intermediate": "intermediate_size",
}
"""Unit of an axis -> the size that it is cut by."""


def table() -> Iterator[str]:
    """Lines of Markdown, a family each."""
    yield "| `model_type` | models | what is cut | matrices | biases | norms | scales and caps | goes with its layer |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, family in sorted(FAMILIES.items()):
        cells = (_cut, _matrices, _biases, _norms, _scales, _per_layer)
        yield f"| `{name}` | {family.models} | " + " | ".join(cell(family) for cell in cells) + " |"


def _parameters(family: Family) -> list[Parameter]:
    return [*family.attention.parameters, *family.mlp.parameters]


def _cut(family: Family) -> str:
    units = {unit for parameter in _parameters(family) for axis in parameter.axes for unit in axis.segments}
    sizes = [size for unit, size in SIZES.items() if unit in units]
    sizes += sorted(f"num_{unit}" for unit in units - SIZES.keys() - {"head", "vocabulary"})
    every = set(SIZES.values()) <= set(sizes)
    others = [size for size in sizes if not every or size not in SIZES.values()]
    return ", ".join(["every size" if every else "num_hidden_layers", *(f"`{size}`" for size in others)])


def _matrices(family: Family) -> str:
    if family.mlp.experts is not None:
        return "experts in stacks, else separate"
    fused = {p.name.split(".")[-2] for p in _parameters(family) if any(len(axis.segments) > 1 for axis in p.axes)}
    return ", ".join(f"fused `{name}`" for name in sorted(fused)) or "separate"


def _biases(family: Family) -> str:
    found = []
    for name, sublayer in family.sublayers.items():
        for who, linears in (("reads", sublayer.readers), ("write", (sublayer.write,))):
            kinds = {p.when for p in sublayer.linears if p.name in {f"{linear}.bias" for linear in linears}} - {never}
            if kinds:
                found.append(f"{name} {who}" + ("" if kinds == {always} else " if the config says so"))
    shown = ", ".join(found)
    for name in family.sublayers:
        both = f"{name} reads if the config says so, {name} write if the config says so"
        shown = shown.replace(both, f"{name} if the config says so")
    return shown or "none"


def _norms(family: Family) -> str:
    places = []
    for words, of in (("before", _before), ("after", _after)):
        norms = [of(sublayer) for sublayer in family.sublayers.values()]
        if all(norms):
            places.append(f"{words} each sub-layer")
    inside = family.attention.inside
    if inside:
        places.append("on queries and keys " + ("of each head" if inside[0].by_head else "of all heads together"))
    kind = {LAYER: "LayerNorm", RMS_ONE_PLUS: "RMS with gains of 1 + w"}.get(family.final_norm.kind, "RMS")
    return f"{kind}: {', '.join(places)}"


def _before(sublayer: SubLayer) -> Norm | None:
    return sublayer.before


def _after(sublayer: SubLayer) -> Norm | None:
    return sublayer.after


def _scales(family: Family) -> str:
    found = [] if family.embedding_scale is unscaled else ["embedding times √`hidden_size`"]
    found += [f"writes times `{family.residual_multiplier}`"] if family.residual_multiplier else []
    found += [f"logits by `{family.logits_divisor}`"] if family.logits_divisor else []
    found += [f"logits capped by `{family.logits_cap}`"] if family.logits_cap else []
    found += [f"scores capped by `{family.attention_cap}`"] if family.attention_cap else []
    return ", ".join(found)


def _per_layer(family: Family) -> str:
    return ", ".join(f"`{name}`" for name in family.per_layer)


def shown_file() -> Iterator[str]:
    """The file of a family as a block of Markdown, with the package's public names."""
    text = (ROOT / SHOWN).read_text(encoding="utf-8").rstrip("\n")
    beside = re.compile(r"from shearing\.models\.families\.\w+ import (.*)\n")
    names = sorted({name for found in beside.findall(text) for name in found.split(", ")}, key=_as_imports_are_sorted)
    first = beside.search(text)
    assert first is not None
    imported = "from shearing.models.families import (\n" + "".join(f"    {name},\n" for name in names) + ")\n"
    yield "```python"
    yield text[: first.start()] + imported + beside.sub("", text[first.start() :])
    yield "```"


def _as_imports_are_sorted(name: str) -> tuple[bool, bool, str]:
    return not name.isupper(), not name[0].isupper(), name


PARTS: dict[str, tuple[str, Callable[[], Iterator[str]]]] = {
    "docs/families.md": ("families: made by docs/families_page.py", table),
    "docs/extending.md": (f"family: {SHOWN}, put here by docs/families_page.py", shown_file),
}
"""Document -> what its part is called, and the part's lines."""


def written(document: str) -> str:
    """A document with its part as it is today."""
    name, lines = PARTS[document]
    begin, end = f"<!-- {name} -->", "<!-- /" + name.partition(":")[0] + " -->"
    before, found, rest = (ROOT / document).read_text(encoding="utf-8").partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise ValueError(f"no {begin} … {end} in {document}")
    return f"{before}{begin}\n\n" + "\n".join(lines()) + f"\n\n{end}{after}"


if __name__ == "__main__":
    for path in PARTS:
        (ROOT / path).write_text(written(path), encoding="utf-8")
