"""Fluctuation and Wanda over structures, from their formulas."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shearing.data.documents import Inputs
from shearing.models.shape import Shape
from shearing.pruning.structured.importance.inputs.fluctuation import Fluctuation, standardised
from shearing.pruning.structured.importance.inputs.wanda import StructuredWanda
from shearing.pruning.structured.importance.metric import Evidence
from tests.models.tiny import tiny_ids, tiny_model

TEXT = [Inputs(tiny_ids(sequences=2, seed=0)), Inputs(tiny_ids(sequences=1, seed=1))]


def inputs_of(model: nn.Module, name: str) -> Tensor:
    """All tokens that a linear layer reads [T, I], fp64."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, 1).double()))
    with torch.no_grad():
        for batch in TEXT:
            model(batch.tokens)
    handle.remove()
    return torch.cat(seen)


def z_scores(values: list[float]) -> list[float]:
    mean = sum(values) / len(values)
    deviation = (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5
    return [(value - mean) / deviation for value in values]


def test_fluctuation_is_the_variance_times_the_squared_column_in_standard_deviations_of_a_layer() -> None:
    model = tiny_model("llama")
    source = Shape.of(model.config)
    scores = Fluctuation().scores(model, evidence=Evidence(text=TEXT))
    dh, G = source.head_dim, source.query_heads_per_group
    for layer in range(4):
        values = {}
        for name, power in (("self_attn.o_proj", 2), ("mlp.down_proj", 1)):
            x = inputs_of(model, f"model.layers.{layer}.{name}")
            weight = model.get_submodule(f"model.layers.{layer}.{name}").weight.detach().double()
            values[name] = z_scores(
                [
                    float(((x[:, j] - x[:, j].mean()) ** 2).mean() * (weight[:, j] ** 2).sum()) ** power
                    for j in range(x.shape[1])
                ]
            )
        torch.testing.assert_close(
            scores["intermediate"][layer], torch.tensor(values["mlp.down_proj"]), rtol=1e-5, atol=1e-6
        )
        for group in range(source.num_key_value_heads):
            heads = []
            for g in range(G):
                first = (group * G + g) * dh
                heads.append(sum(values["self_attn.o_proj"][first : first + dh]) / dh)
            torch.testing.assert_close(scores["query_heads"][layer, group], torch.tensor(heads), rtol=1e-5, atol=1e-6)
            assert abs(float(scores["kv_groups"][layer, group]) - sum(heads) / G) < 1e-5


def test_wanda_is_the_mean_size_of_a_column_times_the_norm_of_its_input() -> None:
    model = tiny_model("llama")
    source = Shape.of(model.config)
    scores = StructuredWanda().scores(model, evidence=Evidence(text=TEXT))
    for layer in range(4):
        found = {}
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            x = inputs_of(model, f"model.layers.{layer}.{name}")
            weight = model.get_submodule(f"model.layers.{layer}.{name}").weight.detach().double()
            norms = [float((x[:, j] ** 2).sum() / 3) ** 0.5 for j in range(x.shape[1])]
            found[name] = torch.tensor(
                [sum(abs(float(w)) for w in weight[:, j]) / len(weight) * norms[j] for j in range(x.shape[1])]
            )
        torch.testing.assert_close(scores["intermediate"][layer], found["mlp.down_proj"], rtol=1e-5, atol=1e-6)
        heads = found["self_attn.o_proj"].view(3, 2, source.head_dim).mean(-1)
        torch.testing.assert_close(scores["query_heads"][layer], heads, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(scores["kv_groups"][layer], heads.mean(-1), rtol=1e-5, atol=1e-6)


def test_what_does_not_vary_goes_first_however_large_it_is() -> None:
    model = tiny_model("llama-biases")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[5] = 0.0
            layer.mlp.gate_proj.weight[5] = 0.0
            layer.mlp.up_proj.bias[5] = layer.mlp.gate_proj.bias[5] = 30.0
    fluctuation = Fluctuation().scores(model, evidence=Evidence(text=TEXT))
    wanda = StructuredWanda().scores(model, evidence=Evidence(text=TEXT))
    assert (fluctuation["intermediate"].argmin(-1) == 5).all()
    assert (wanda["intermediate"].argmax(-1) == 5).all()


def test_what_is_all_the_same_deviates_by_nothing() -> None:
    assert standardised(torch.full((4,), 2.5)).tolist() == [0.0] * 4
