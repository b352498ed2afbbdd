"""Asks a model what it says of rows, in the form in which that is kept.

Shapes: B sequences, S positions, N = B * S tokens, C tokens of a chunk, V vocabulary, R random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from shearing.data.documents import Inputs
from shearing.models.anatomy import backbone, head_of
from shearing.objectives.chunked import chunked_logits, sum_dtype
from shearing.objectives.divergences import inner
from shearing.objectives.teacher_cache.form import Form
from shearing.objectives.teacher_cache.said import Said


class Observer:
    """A teacher that is asked, without gradients, in its own precision; it is no module.

    Args:
        model: the teacher; frozen here.
        form: what is kept.
        chunk_tokens: tokens whose logits exist at the same time.
    """

    def __init__(self, model: PreTrainedModel, *, form: Form, chunk_tokens: int) -> None:
        self.model = model.requires_grad_(False).eval()
        self._form, self._chunk_tokens = form, chunk_tokens

    @torch.no_grad()
    def said(self, inputs: Inputs, *, following_BS: Tensor, places: Sequence[tuple[str, int]]) -> list[Said]:
        """What it says of rows.

        Args:
            inputs: [B, S].
            following_BS: the token after each, whether it counts or not.
            places: domain and row of each of the B.
        """
        head = head_of(self.model)
        device, positions = head.weight.device, following_BS.shape[1]
        with torch.autocast(device.type, enabled=False):
            hidden_BSD = backbone(self.model)(**inputs.keywords()).last_hidden_state
        noise = [self._form.noise(domain, row, positions=positions) for domain, row in places]
        noise_NR = torch.from_numpy(np.concatenate(noise)).to(device)
        following_N1 = following_BS.reshape(-1, 1)
        found: list[tuple[Tensor, ...]] = []
        for tokens, _, logits_CV in chunked_logits(hidden_BSD, head, chunk_tokens=self._chunk_tokens):
            log_p_CV = logits_CV.log_softmax(-1, dtype=sum_dtype(logits_CV))
            p_CV = log_p_CV.exp()
            losses_C, entropies_C = -log_p_CV.gather(1, following_N1[tokens])[:, 0], -inner(p_CV, log_p_CV)
            found.append((losses_C, entropies_C, *self._form.taken(p_CV, log_p_CV, noise_NR[tokens])))
        losses, entropies, ids, values, rest = (
            torch.cat(parts).cpu().numpy().reshape(len(places), positions, *parts[0].shape[1:])
            for parts in zip(*found, strict=True)
        )
        return [
            Said(losses[row], entropies[row], *self._form.sorted_out(ids[row], values[row]), rest[row])
            for row in range(len(places))
        ]
