"""The loss of a language model: next-token cross-entropy, summed over tokens, and the balance of experts if any.

Shapes: B sequences, T = S + 1 tokens of a row (S inputs and the last label).
"""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import Self

from shearing.data.documents import IGNORED_LABEL, Documents, Inputs
from shearing.data.mixture.origins import Origins
from shearing.models.anatomy import backbone, head_of
from shearing.models.families.experts.balance import RouterBalance
from shearing.objectives.cross_entropy import causal_lm_loss
from shearing.objectives.objective import Losses, Objective, Parts


class LanguageModelLoss(Objective):
    """Cross-entropy of the next token, with respect to the text.

    While a model with experts is trained, the total has the load-balancing loss of its routers beside it
    (`RouterBalance`), that of a sequence once for each of its labels.

    Args:
        model: see `Objective`.
        chunk_tokens: tokens whose logits exist at the same time.
    """

    def __init__(self, model: PreTrainedModel, *, chunk_tokens: int) -> None:
        super().__init__(model)
        self.chunk_tokens = chunk_tokens
        self._balance = RouterBalance.of(model)  # no module: its routers are the model's

    @classmethod
    def of(cls, parts: Parts) -> Self:
        """See `Objective.of`."""
        return cls(parts.model, chunk_tokens=parts.chunk_tokens)

    def forward(self, tokens_BT: Tensor, documents: Documents | None = None, origins: Origins | None = None) -> Losses:
        """See `Objective.forward`."""
        del origins  # all domains are alike to it
        inputs = Inputs(tokens_BT[:, :-1], documents)
        hidden_BSD, balance_B = self.hidden_states(inputs)
        labels_BS = tokens_BT[:, 1:] if documents is None else documents.labels(tokens_BT)
        total, losses_BS = self.head_pass(
            hidden_BSD,
            compute=lambda hidden_BSD: causal_lm_loss(
                hidden_BSD, head_of(self.model), labels_BS, chunk_tokens=self.chunk_tokens
            ),
        )
        rows_B, labels_B = losses_BS.sum(1), (labels_BS != IGNORED_LABEL).sum(1)
        total = with_balance(total, balance_B, labels_B=labels_B)
        return Losses(total, rows_B, labels_B, rows_B.new_zeros(len(rows_B), len(self.measures)))

    def hidden_states(self, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        """After the final norm [B, S, D]; and while training, how unbalanced the experts of each row were, weighed [B].

        None where there are no experts.
        """
        if self._balance is None or not self.training:
            hidden_BSD: Tensor = backbone(self.model)(**inputs.keywords()).last_hidden_state
            return hidden_BSD, None
        with self._balance.listening() as heard:
            hidden_BSD = backbone(self.model)(**inputs.keywords()).last_hidden_state
        return hidden_BSD, self._balance.weighed(heard, sequences=len(inputs.tokens))


def with_balance(total: Tensor, balance_B: Tensor | None, *, labels_B: Tensor) -> Tensor:
    """A sum of losses over labels, and the balance of each row for each of its labels; None: the sum alone."""
    return total if balance_B is None else total + (balance_B * labels_B).sum()
