"""Inputs that several tests share: a tiny model with its tokenizer, a tiny corpus, and a recipe over both."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, settings

# Continuous integration is slow and shared; hypothesis' own deadline would fail tests for a busy machine.
settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_xdist_auto_num_workers() -> Generator[None, int, int]:
    """`-n auto` is one more than there are cores: tests wait for disks, for signals and for each other."""
    cores = yield
    return cores + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first, so that none of them is left alone at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """What was imported stays: no collection of garbage, of which a run makes several, has to look at it again."""
    gc.collect()
    gc.freeze()


DOMAINS = {"letters": "abcdefgh", "digits": "0123456789"}


@pytest.fixture(scope="session")
def tiny_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model` (4 layers, hidden 32, 4 query heads on 2 KV heads) and `corpus` (two domains)."""
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = _write_model(folder / "model")
    _write_corpus(folder / "corpus", tokenizer=tokenizer)
    return folder


@pytest.fixture
def tiny_recipe(tiny_inputs: Path, tmp_path: Path) -> Path:
    """A recipe file over `tiny_inputs` that runs in seconds; its run_dir is new."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe_data(tiny_inputs, run_dir=tmp_path / "run"), sort_keys=False))
    return path


def tiny_recipe_data(inputs: Path, *, run_dir: Path) -> dict[str, Any]:
    """The content of `tiny_recipe`."""
    stage = {"batch_size": "2 sequences", "micro_batch_size": 2, "learning_rate": 1e-3}
    return {
        "name": "tiny",
        "run_dir": str(run_dir),
        "model": {"source": str(inputs / "model")},
        "data": {"corpus": str(inputs / "corpus"), "sequence_length": 16},
        "target": {
            "num_hidden_layers": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        },
        "mixture": {"interval": "3 steps", "pretrain_interval": "3 steps", "heldout_tokens": 64},
        "prune": {**stage, "duration": "6 steps", "freeze": "2 steps", "calibration_tokens": 64},
        "pretrain": {**stage, "duration": "4 steps"},
        "training": {"precision": "fp32", "device": "cpu", "log_interval": 1},
        "evaluation": {"tokens_per_domain": 64, "baselines": ["random"], "speed": False},
    }


def _write_model(folder: Path) -> Any:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "<end>", *"".join(DOMAINS.values())]
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="<end>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return tokenizer


def _write_corpus(folder: Path, *, tokenizer: Any) -> None:
    import random

    from shearing.data.corpus.format import tokenizer_fingerprint
    from shearing.data.corpus.writer import CorpusWriter

    draw = random.Random(0)
    writer = CorpusWriter(
        folder,
        vocab_size=len(tokenizer),
        separator_id=1,
        tokenizer="tiny",
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        validation_fraction=0.13,
        test_fraction=0.11,
    )
    for name, alphabet in DOMAINS.items():
        with writer.domain(name, sources=["made here"], inputs=name) as domain:
            for _ in range(60):
                text = "".join(draw.choices(alphabet, k=30))
                domain.add(text, token_ids=tokenizer.encode(text, add_special_tokens=False))
    writer.finish()
