"""A whole run on a family of which nearly every part differs from Llama's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from shearing.data.corpus.corpus import Corpus
from shearing.runs.recipe import load_recipe
from shearing.runs.stages.run import run
from tests.models.tiny import CONFIGS


def test_gemma_is_cut_refitted_taught_and_judged_by_its_own_logits(
    tiny_recipe: Path, tiny_inputs: Path, tmp_path: Path
) -> None:
    """Capped scores and logits, norms of 1 + w on both sides, an embedding that its width scales, windows."""
    source = shutil.copytree(tiny_inputs / "model", tmp_path / "source")
    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = CONFIGS["gemma2"](vocab_size=vocabulary, final_logit_softcapping=0.5, pad_token_id=None, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(source)
    recipe = load_recipe(
        tiny_recipe,
        overrides=[
            f"model.source={source}",
            "prune.initial_masks=reconstruction",
            "prune.sparsity_warmup=0 steps",
            "prune.compensate=true",
            "distill={}",
        ],
    )
    made = run(recipe)
    assert json.loads((made.compact / "shape.json").read_text())["relative_logit_difference"] < 1e-5
    model = AutoModelForCausalLM.from_pretrained(made.model, dtype=torch.float32).eval()
    assert model.config.final_logit_softcapping == 0.5
    measured = json.loads((made.path / "evaluation.json").read_text())["models"]["final"]
    for domain, found in measured["domains"].items():
        batches = Corpus.open(recipe.data.corpus).heldout_batches(
            domain, split="test", sequence_length=16, tokens=64, micro_batch_size=2
        )
        with torch.no_grad():
            losses = [F.cross_entropy(model(each[:, :-1]).logits.mT, each[:, 1:]) for each in batches]
        assert found["loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
