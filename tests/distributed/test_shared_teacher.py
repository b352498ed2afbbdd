"""A model whose layers are shared out, as a teacher, says to the bit what a whole one says, beside every engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shearing.models.anatomy import backbone, decoder_layers
from shearing.models.loading import load_paged, load_source
from shearing.models.stored.paging.shared_out import passes_of_all, share_out_layers
from shearing.processes.processes import Processes
from tests.distributed import runs
from tests.distributed.harness import spawn

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")


@pytest.mark.parametrize("engine", ["torch", "fsdp2"])
def test_a_run_that_listens_to_it_is_the_same_to_the_bit(engine: str, tiny_inputs: Path, tmp_path: Path) -> None:
    for placement in ("replicate", "shard"):
        recipe = runs.recipe(tiny_inputs, run_dir=tmp_path / placement, engine=engine, steps=8, listening=True)
        assert recipe.distill is not None
        distill = recipe.distill.model_copy(update={"placement": placement})
        recipe = recipe.model_copy(update={"distill": distill})
        spawn(runs.train, recipe, ("prune",), size=2, folder=tmp_path / f"out-{placement}")
    whole, shared = (dict(runs.contents(tmp_path / each, "prune")) for each in ("replicate", "shard"))
    assert whole.keys() == shared.keys()
    assert all(whole[name] == shared[name] for name in whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_each_process_has_its_rows_and_layers_are_whole_while_they_run(
    dtype: torch.dtype, tiny_inputs: Path, tmp_path: Path
) -> None:
    spawn(_runs_shared_out, tiny_inputs / "model", dtype, size=3, folder=tmp_path / "out")


def _runs_shared_out(folder: Path, dtype: torch.dtype) -> None:
    with Processes.start(device="cpu") as processes:
        whole, shared = load_source(str(folder), dtype=dtype), load_paged(str(folder))
        share_out_layers(shared, device=CPU, dtype=dtype, processes=processes)
        held = torch.tensor([sum(each.to_local().numel() for each in decoder_layers(shared).parameters())])
        share = int(held)
        numel = sum(each.numel() for each in decoder_layers(whole).parameters())
        assert int(processes.sum(held)) == numel
        # Rows are shared out, which three processes cannot do equally.
        assert share <= 1.15 * numel / 3
        assert not any(each.requires_grad for each in shared.parameters())
        for seed in range(2):
            tokens = torch.randint(0, 18, (2, 16), generator=torch.Generator().manual_seed(seed))
            with torch.no_grad():
                expected, found = (backbone(model)(input_ids=tokens).last_hidden_state for model in (whole, shared))
            assert torch.equal(found, expected)
            again = sum(each.to_local().numel() for each in decoder_layers(shared).parameters())
            assert again == share


def test_each_process_passes_its_own_text_as_often_as_it_likes(tiny_inputs: Path, tmp_path: Path) -> None:
    spawn(_passes, tiny_inputs / "model", size=3, folder=tmp_path / "out")


def _passes(folder: Path) -> None:
    with Processes.start(device="cpu") as processes:
        whole, shared = load_source(str(folder)), load_paged(str(folder))
        share_out_layers(shared, device=CPU, dtype=torch.float32, processes=processes)
        tokens = torch.randint(0, 18, (2, 5 + processes.rank), generator=torch.Generator().manual_seed(processes.rank))
        for turn in range(2):
            with passes_of_all(shared, processes=processes), torch.no_grad():
                # The last process has none in the first turn, the first one most.
                for _ in range((2 - processes.rank) * (2 - turn)):
                    assert torch.equal(shared(input_ids=tokens).logits, whole(input_ids=tokens).logits)
                if processes.rank != turn:
                    found, expected = (
                        model.generate(
                            tokens,
                            attention_mask=torch.ones_like(tokens),
                            max_new_tokens=3 + processes.rank,
                            do_sample=False,
                        )
                        for model in (shared, whole)
                    )
                    assert torch.equal(found, expected)
            assert processes.gather(processes.rank) == [0, 1, 2]
        if processes.rank == 1:
            for other in (whole, torch.nn.Linear(1, 1)):
                with passes_of_all(other, processes=processes):
                    pass  # not shared out: nobody waits
