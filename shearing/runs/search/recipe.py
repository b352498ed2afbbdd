"""Recipe section `search`: which shapes there may be, and how they are raced."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from shearing.errors import ShearingError
from shearing.models.recipe import TargetRecipe, target_contradictions
from shearing.settings.quantities import Duration, ParameterCount, format_count, parse_bytes
from shearing.settings.section import Fraction, Positive, Section

_ROUND = re.compile(r"(?P<candidates>\d+)\s*[x×]\s*(?P<tokens>\S+?)(?:\s*tokens)?")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
ROUND_FORM = "'16 x 10K': so many candidates, each trained on so many tokens in all"
BUDGETS = ("parameters", "memory", "latency")


@dataclass(frozen=True)
class Round:
    """One round of a search.

    Attributes:
        candidates: that take part, the best of the round before.
        tokens: of each of them in all, those of the rounds before included.
    """

    candidates: int
    tokens: int

    @classmethod
    def parse(cls, text: str) -> Round:
        """Read a round as recipes write it: "16 x 10K".

        Raises:
            ValueError: anything else.
        """
        found = _ROUND.fullmatch(text.strip())
        tokens = None
        if found is not None:
            tokens = Duration.parse(f"{found['tokens']} tokens").tokens
        if found is None or not tokens or not int(found["candidates"]):
            raise ValueError(f"{text!r} is no round; write {ROUND_FORM}")
        return cls(candidates=int(found["candidates"]), tokens=tokens)

    def __str__(self) -> str:
        return f"{self.candidates} x {format_count(self.tokens)}"


def _round_text(text: str) -> str:
    return str(Round.parse(text))


def _bytes_text(text: str | None) -> str | None:
    if text is not None:
        parse_bytes(text)
    return text


def _as_text(value: object) -> object:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class SearchRecipe(Section):
    """`shear search`: shapes at a budget are cut, trained a little and raced by halving. A run does not read it."""

    parameters: ParameterCount | None = Field(
        None,
        description="Budget: parameters (64M, 1.3B), embeddings included. Of the three budgets at most one is given; "
        "without any, it is the parameters of `target`.",
    )
    memory: Annotated[str | None, BeforeValidator(_as_text), AfterValidator(_bytes_text)] = Field(
        None,
        description="Budget: bytes ('500 MB') of the weights and of the KV cache of `batch_size` sequences of "
        "`context` tokens, in `dtype`.",
    )
    latency: Positive | None = Field(
        None, description="Budget: milliseconds on this device, predicted from a table of layer times measured on it."
    )
    latency_of: Literal["prompt", "next_token"] = Field(
        "next_token",
        description="What `latency` is of: prompt: reading `context` tokens; next_token: one more token after them.",
    )
    context: int = Field(512, ge=1, description="Tokens of a prompt, and in the KV cache of each sequence.")
    batch_size: int = Field(1, ge=1, description="Sequences in the KV cache that `memory` counts; times are of one.")
    dtype: Literal["bf16", "fp16", "fp32"] = Field(
        "bf16", description="Of weights and cache where the model is used: what `memory` counts and times are of."
    )
    tolerance: Fraction = Field(0.02, description="Share of the budget that a candidate may leave unused.")
    multiple_of: int = Field(
        8, ge=1, description="hidden_size and intermediate_size of candidates are multiples of it; 64 suits most GPUs."
    )
    keep_heads: bool = Field(False, description="Whether candidates keep all query heads and KV groups of the source.")
    layers: tuple[Fraction, Fraction] = Field(
        (0.3, 1.0), description="Least and most layers, as shares of the source's."
    )
    hidden: tuple[Fraction, Fraction] = Field((0.3, 1.0), description="The same of hidden_size.")
    mlp: tuple[Fraction, Fraction] = Field((0.3, 1.0), description="The same of intermediate_size.")
    heads: tuple[Fraction, Fraction] = Field((0.5, 1.0), description="The same of query heads and of KV groups.")
    candidates: dict[str, TargetRecipe] = Field(
        {},
        description="Shapes to race by name, each like `target`, in place of those that the keys above would give.",
    )
    rounds: list[Annotated[str, AfterValidator(_round_text)]] = Field(
        ["16 x 10K", "8 x 50K", "4 x 100K", "2 x 200K"],
        min_length=1,
        description="Rounds of the race: how many candidates, the best of the round before, and how many tokens each "
        "is trained on in all; it goes on from where the round before left it.",
    )
    decay: Duration = Field(
        Duration(fraction=0.2),
        description="Last stretch of the last round, in which the learning rate falls; before it, it is constant after "
        "the warm-up. 0: it never falls.",
    )

    @property
    def parsed_rounds(self) -> list[Round]:
        """`rounds` as values."""
        return [Round.parse(text) for text in self.rounds]

    @property
    def bytes(self) -> int | None:
        """`memory` as a number."""
        return None if self.memory is None else parse_bytes(self.memory)


def search_contradictions(search: SearchRecipe) -> Iterator[ShearingError]:
    """Values that do not go together; fields are named without the section."""
    given = [name for name in BUDGETS if getattr(search, name) is not None]
    if len(given) > 1 or (given and search.candidates):
        yield ShearingError(
            given[0],
            value=getattr(search, given[0]),
            allowed="one budget, or candidates by name without any",
            mend=f"set {' and '.join(f'search.{name}=null' for name in given[1:]) or 'search.candidates={}'}",
        )
    for name in ("layers", "hidden", "mlp", "heads"):
        least, most = getattr(search, name)
        if least > most:
            yield ShearingError(
                name, value=[least, most], allowed="least and most, in this order", mend=f"write [{most}, {least}]"
            )
    for name, target in search.candidates.items():
        yield from _candidate_contradictions(name, target)
    yield from _round_contradictions(search)


def _candidate_contradictions(name: str, target: TargetRecipe) -> Iterator[ShearingError]:
    field = f"candidates.{name}"
    if not _NAME.fullmatch(name):
        yield ShearingError(
            "candidates",
            value=name,
            allowed="names of letters, digits, '.', '_' and '-': folders are called so",
            mend="rename it",
        )
    if target.parameters is not None or target.vocab_size is not None:
        yield ShearingError(
            field,
            value="parameters or vocab_size",
            allowed="sizes by name, as num_hidden_layers and hidden_size",
            mend="give the sizes; a budget is search.parameters",
        )
        return
    for error in target_contradictions(target):
        yield ShearingError(f"{field} ({error.field})", value=error.value, allowed=error.allowed, mend=error.mend)


def _round_contradictions(search: SearchRecipe) -> Iterator[ShearingError]:
    rounds = search.parsed_rounds
    for before, after in pairwise(rounds):
        if after.candidates > before.candidates or after.tokens <= before.tokens:
            yield ShearingError(
                "rounds",
                value=search.rounds,
                allowed="rounds of ever more tokens, and never more candidates than before: tokens are of a candidate "
                f"in all; '{after}' does not follow '{before}'",
                mend="correct the list, as [16 x 10K, 8 x 50K]",
            )
    if len(search.candidates) > rounds[0].candidates:
        yield ShearingError(
            "rounds",
            value=search.rounds,
            allowed=f"a first round for all {len(search.candidates)} candidates",
            mend=f"begin with '{Round(len(search.candidates), rounds[0].tokens)}'",
        )
