"""The methods again, from the papers, in plain loops: slow, and independent of the package."""

from __future__ import annotations

import torch
from torch import Tensor


def wanda_scores(weight: Tensor, inputs: Tensor) -> Tensor:
    """|W_ij| ‖X_j‖₂ with inputs [sequences, tokens, I]."""
    scores = torch.empty(weight.shape, dtype=torch.float64)
    for j in range(weight.shape[1]):
        norm = 0.0
        for sequence in inputs:
            norm += float(sequence[:, j].double().square().sum())
        norm = (norm / len(inputs)) ** 0.5
        for i in range(weight.shape[0]):
            scores[i, j] = abs(float(weight[i, j])) * norm
    return scores


def magnitude_scores(weight: Tensor) -> Tensor:
    return weight.double().abs()


def lowest(scores: list[float], count: int) -> set[int]:
    """Indices of the lowest scores, which have to be distinct."""
    assert len(set(scores)) == len(scores)
    return set(sorted(range(len(scores)), key=scores.__getitem__)[:count])


def mask_per_row(scores: Tensor, *, sparsity: float) -> Tensor:
    mask = torch.ones(scores.shape, dtype=torch.bool)
    for i, row in enumerate(scores.tolist()):
        for j in lowest(row, int(len(row) * sparsity)):
            mask[i, j] = False
    return mask


def mask_per_layer(scores: Tensor, *, sparsity: float) -> Tensor:
    flat = scores.flatten().tolist()
    mask = torch.ones(len(flat), dtype=torch.bool)
    for j in lowest(flat, int(len(flat) * sparsity)):
        mask[j] = False
    return mask.view(scores.shape)


def mask_kept_of(scores: Tensor, *, kept: int, of: int) -> Tensor:
    mask = torch.ones(scores.shape, dtype=torch.bool)
    for i, row in enumerate(scores.tolist()):
        for start in range(0, len(row), of):
            for j in lowest(row[start : start + of], of - kept):
                mask[i, start + j] = False
    return mask


def mask_cumulative(scores: Tensor, *, sparsity: float) -> Tensor:
    """The bisection of alpha in Wanda's variant."""
    rows = scores.tolist()

    def masks(alpha: float) -> tuple[Tensor, float]:
        mask = torch.ones(scores.shape, dtype=torch.bool)
        for i, row in enumerate(rows):
            cumulative = 0.0
            for j in sorted(range(len(row)), key=row.__getitem__):
                cumulative += row[j]
                if cumulative > alpha * sum(row):
                    break
                mask[i, j] = False
        return mask, float((~mask).double().mean())

    alpha, low, high = 0.4, 0.0, 0.8
    mask, reached = masks(alpha)
    while abs(reached - sparsity) > 0.001 and high - low >= 0.001:
        if reached > sparsity:
            alpha, high = (alpha + low) / 2, alpha
        else:
            alpha, low = (alpha + high) / 2, alpha
        mask, reached = masks(alpha)
    return mask


def hessian(inputs: Tensor) -> Tensor:
    """Mean over sequences of 2 XᵀX, fp64."""
    total = torch.zeros(inputs.shape[-1], inputs.shape[-1], dtype=torch.float64)
    for sequence in inputs.double():
        for token in sequence:
            total += 2 * torch.outer(token, token)
    return total / len(inputs)


def damped(H: Tensor, *, damping: float = 0.01) -> Tensor:
    H = H.clone()
    for j in range(len(H)):
        if H[j, j] == 0:
            H[j, j] = 1.0
    return H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


def sparsegpt(
    weight: Tensor, H: Tensor, choose: object, *, groups: int, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Optimal Brain Surgeon, column by column, with the inverse of what is left computed anew at each column.

    Args:
        weight: [O, I].
        H: not damped.
        choose: scores [O, groups] -> mask; asked at each column that `groups` divides.
        groups: columns chosen together.
        mask: chosen beforehand, in place of asking.

    Returns:
        Weights fp64, mask.
    """
    W = weight.double().clone()
    W[:, H.diagonal() == 0] = 0.0
    H = damped(H)
    columns = W.shape[1]
    inverses = [torch.linalg.inv(H[j:, j:]) for j in range(columns)]
    chosen = torch.ones(W.shape, dtype=torch.bool) if mask is None else mask.clone()
    for j in range(columns):
        if mask is None and j % groups == 0:
            end = min(j + groups, columns)
            scores = torch.stack([W[:, k].square() / inverses[k][0, 0] for k in range(j, end)], dim=1)
            chosen[:, j:end] = choose(scores)  # type: ignore[operator]
        for i in range(W.shape[0]):
            if not chosen[i, j]:
                W[i, j:] -= W[i, j].clone() / inverses[j][0, 0] * inverses[j][0]
                W[i, j] = 0.0
    return W, chosen


def output_error(dense: Tensor, pruned: Tensor, inputs: Tensor) -> float:
    """Squared error of a layer's output, summed over tokens."""
    x = inputs.flatten(0, -2).double()
    return float((x @ (dense.double() - pruned.double()).T).square().sum())
