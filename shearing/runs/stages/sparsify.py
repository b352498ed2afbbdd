"""One-shot sparsity inside a run: of the source, or of what was cut from it."""

from __future__ import annotations

from typing import Any

from shearing.errors import named
from shearing.pruning.sparse.one_shot import sparsify as make_sparse
from shearing.pruning.sparse.stored.manifest import read_manifest
from shearing.runs.context import RunContext
from shearing.runs.names import ONE_SHOT_NAMES
from shearing.runs.recipe import one_shot_recipe


def sparsify(context: RunContext) -> dict[str, Any]:
    """Write run_dir/sparsify/model: the sparse model, its masks and its manifest.

    Continues behind the last layer that was finished.

    Args:
        context: of a run with the section `sparsify`, whose stage `compact`, if it has one, is complete.

    Returns:
        The content of sparsify/complete.json: the manifest's `budget`.

    Raises:
        ShearingError: something that the user can mend, by the keys of the run.
    """
    recipe, run = context.recipe, context.directory
    if "compact" in recipe.stages:
        run.read_complete("compact")
    one_shot = one_shot_recipe(recipe)
    # Of the whole corpus, whichever domains the run trains on.
    own = one_shot.calibration == [recipe.data.corpus] and recipe.data.domains is None
    with named(ONE_SHOT_NAMES):
        make_sparse(
            one_shot,
            console=context.console,
            tokenizer=context.tokenizer if one_shot.needs_text else None,
            corpus=context.corpus if own else None,
            documents=context.document_rules,
        )
    complete = {"budget": read_manifest(run.sparse)["budget"]}
    run.mark_complete("sparsify", complete)
    return complete
