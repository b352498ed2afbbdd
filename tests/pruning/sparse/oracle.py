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


def ria_scores(weight: Tensor, inputs: Tensor) -> Tensor:
    """(|w| / sum of its row + |w| / sum of its column) times the root of its input's norm."""
    W = weight.double().abs()
    scores = torch.empty_like(W)
    for j in range(W.shape[1]):
        norm = float(inputs[..., j].double().square().sum() / len(inputs)) ** 0.5
        for i in range(W.shape[0]):
            scores[i, j] = (W[i, j] / sum(W[i].tolist()) + W[i, j] / sum(W[:, j].tolist())) * norm**0.5
    return scores


def isc_scores(weight: Tensor, inputs: Tensor) -> Tensor:
    """w² (H_jj + 1 / [H⁻¹]_jj)."""
    H = damped(hessian(inputs))
    return weight.double().square() * (H.diagonal() + 1 / torch.linalg.inv(H).diagonal())


def sparsegpt_scores(weight: Tensor, inputs: Tensor) -> Tensor:
    """w² / [H⁻¹]_jj, all other columns making up for it."""
    return weight.double().square() / torch.linalg.inv(damped(hessian(inputs))).diagonal()


def gblm_scores(weight: Tensor, inputs: Tensor, gradients: Tensor, *, length: int) -> Tensor:
    """|w| ‖x‖ + |w| G, G the root of 128 samples' squares of 100 times a gradient of this root mean square.

    100 is for samples of 2,048 tokens, and here in proportion.
    """
    G = torch.zeros(weight.shape, dtype=torch.float64)
    for _ in range(128):
        G += (100 * length / 2048 * gradients.double()).square()
    return wanda_scores(weight, inputs) + weight.double().abs() * G.sqrt()


def dsnot(weight: Tensor, mask: Tensor, inputs: Tensor, *, group: int | None, cycles: int = 50) -> Tensor:
    """Pairs exchanged in each row until the mean of its output is what it was; of all masks on the way, the best."""
    x = inputs.flatten(0, -2).double()
    mean, variance = x.mean(0), x.var(0, unbiased=False)
    scores = wanda_scores(weight, inputs)
    threshold = 0.1 / inputs.shape[1]
    result = mask.clone()
    for i, row in enumerate(weight.double()):
        effect = row * mean
        kept, used = mask[i].tolist(), set()
        error = sum(float(effect[j]) for j in range(len(row)) if not kept[j])
        best, least = list(kept), abs(error)
        for _ in range(cycles):
            if abs(error) <= threshold:
                break
            sign = 1 if error > 0 else -1
            going = [j for j in range(len(row)) if kept[j] and j not in used and sign * effect[j] < 0]
            coming = [j for j in range(len(row)) if not kept[j] and j not in used and sign * effect[j] > 0]
            if group is not None:
                coming = [j for j in coming if any(k // group == j // group for k in going)]
            if not coming:
                break
            up = max(coming, key=lambda j: sign * float(effect[j] / variance[j]))
            going = [j for j in going if group is None or j // group == up // group]
            if not going:
                break
            down = min(going, key=lambda j: float(scores[i, j]))
            kept[up], kept[down] = True, False
            used |= {up, down}
            error += float(effect[down] - effect[up])
            if abs(error) < least:
                best, least = list(kept), abs(error)
        result[i] = torch.tensor(best)
    return result


def admm(weight: Tensor, inputs: Tensor, *, mask: object, iterations: int = 20) -> Tensor:
    """ADMM of min ‖WX − ŴX‖², weights [I, O] as the paper has them; `mask(iteration, Ŵ [O, I])` says what stays."""
    x = inputs.flatten(0, -2).double()
    norms = x.square().sum(0).sqrt()
    A = (x / norms).T @ (x / norms)
    A += 0.1 * A.diagonal().mean() * torch.eye(len(A), dtype=A.dtype)
    V = (weight.double() * norms).T
    inverse = torch.linalg.inv(A + torch.eye(len(A), dtype=A.dtype))
    Y, U = V.clone(), torch.zeros_like(V)
    for iteration in range(iterations):
        M = mask(iteration, (Y + U).T / norms).T  # type: ignore[operator]
        Z = (Y + U) * M
        U = U + Y - Z
        Y = inverse @ (A @ V + Z - U)
    return ((Y + U) * M).T / norms


def removed_at_once(weight: Tensor, mask: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """δw = -w_P ([H⁻¹]_PP)⁻¹ [H⁻¹]_P: for each row, and the loss ½ w_P ([H⁻¹]_PP)⁻¹ w_Pᵀ of each."""
    inverse = torch.linalg.inv(damped(hessian(inputs)))
    W, losses = weight.double().clone(), []
    for i in range(len(W)):
        P = (~mask[i]).nonzero().flatten()
        w_P = W[i, P].clone()
        solved = torch.linalg.solve(inverse[P][:, P], w_P)
        W[i] -= solved @ inverse[P]
        W[i, P] = 0.0
        losses.append(0.5 * w_P @ solved)
    return W, torch.stack(losses)


def alps(weight: Tensor, inputs: Tensor, *, first: Tensor, keep: object) -> tuple[Tensor, Tensor]:
    """The search for the support with a growing penalty, every inverse computed anew; then the optimum on it."""
    x = inputs.flatten(0, -2).double()
    norms = x.square().sum(0).sqrt()
    A = (x / norms).T @ (x / norms) * 1.0
    A += 0.01 * A.diagonal().mean() * torch.eye(len(A), dtype=A.dtype)
    W = (weight.double() * norms).T
    rho, grown, restarts, before, M = 0.1, False, 0, first.T, first.T
    D, V = W * first.T, torch.zeros_like(W)
    for iteration in range(1, 301):
        B = torch.linalg.solve(A + rho * torch.eye(len(A), dtype=A.dtype), A @ W - V + rho * D)
        M = keep((B + V / rho).abs().T).T  # type: ignore[operator]
        D = (B + V / rho) * M
        V = V + rho * (B - D)
        if iteration % 3 == 0:
            share = int((before != M).sum()) / int(M.sum())
            before = M
            if share > 0:
                rho *= 1.3 if share > 0.1 else 1.2 if share > 0.005 else 1.1
                grown = True
            elif grown or restarts == 5:
                break
            else:
                rho, restarts = rho / 5, restarts + 1
                D, V, before = W * first.T, torch.zeros_like(W), first.T
    result = torch.zeros_like(W)
    for column in range(W.shape[1]):
        K = M[:, column].nonzero().flatten()
        result[K, column] = torch.linalg.solve(A[K][:, K], (A @ W)[K, column])
    return result.T / norms, M.T
