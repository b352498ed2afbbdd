from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from shearing.models.loading import skeleton
from tests.models.tiny import CONFIGS


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize("tied", [False, True])
def test_a_skeleton_has_all_of_a_model_but_its_weights(family: str, tied: bool) -> None:
    config = CONFIGS[family](tie_word_embeddings=tied)
    model, bones = AutoModelForCausalLM.from_config(config, dtype=torch.float32), skeleton(config)
    assert {n: p.shape for n, p in bones.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert sum(parameter.untyped_storage().nbytes() for parameter in bones.parameters()) <= 4 * len(
        list(bones.parameters())
    )
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, bones.get_buffer(name)), name
    assert (bones.get_output_embeddings().weight is bones.get_input_embeddings().weight) == tied
