"""Taylor importance against its formulas, written as loops over one unit after the other."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from shearing.data.documents import DocumentRules, Inputs
from shearing.errors import ShearingError
from shearing.models.shape import Shape
from shearing.pruning.structured.importance.gradients.matrix_gradients import RowGradients, kept_bytes
from shearing.pruning.structured.importance.gradients.taylor import fisher_information
from shearing.pruning.structured.importance.magnitude import Magnitude
from shearing.pruning.structured.importance.metric import Evidence, Scores
from shearing.pruning.structured.importance.registry import metric_of
from tests.models.tiny import CONFIGS, tiny_ids, tiny_model

TEXT = [Inputs(tiny_ids(sequences=2, seed=0)), Inputs(tiny_ids(sequences=1, seed=1))]
ROWS = [row for batch in TEXT for row in batch.tokens]


def scores_of(name: str, model: PreTrainedModel) -> Scores:
    return metric_of(name).scores(model, evidence=Evidence(text=TEXT, seed=5))


def gradient_of_row(model: PreTrainedModel, row: Tensor) -> dict[str, Tensor]:
    """Of the mean cross-entropy of one row, by torch alone."""
    model.zero_grad()
    logits = model(row[None]).logits[0]
    F.cross_entropy(logits[:-1], row[1:]).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return gradients


def lines_of(source: Shape, *, unit: str, layer: int, index: tuple[int, ...]) -> list[tuple[str, int, int]]:
    """Rows (axis 0) and columns (axis 1) of matrices of a Llama that a unit is coupled with: (name, axis, place)."""
    prefix, dh, G = f"model.layers.{layer}.", source.head_dim, source.query_heads_per_group
    if unit == "intermediate":
        (u,) = index
        found = [("mlp.gate_proj", 0, u), ("mlp.up_proj", 0, u), ("mlp.down_proj", 1, u)]
    elif unit == "query_heads":
        head = index[0] * G + index[1]
        channels = range(head * dh, (head + 1) * dh)
        found = [(f"self_attn.{name}", axis, c) for c in channels for name, axis in (("q_proj", 0), ("o_proj", 1))]
    else:
        (group,) = index
        channels = range(group * dh, (group + 1) * dh)
        own = [(f"{prefix}self_attn.{name}.weight", 0, c) for c in channels for name in ("k_proj", "v_proj")]
        heads = [line for g in range(G) for line in lines_of(source, unit="query_heads", layer=layer, index=(group, g))]
        return own + heads
    return [(f"{prefix}{name}.weight", axis, place) for name, axis, place in found]


def lines_of_hidden(model: PreTrainedModel, d: int) -> list[tuple[str, int, int]]:
    found = []
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            found.append((name, 0 if writes else 1, d))
    return found


def expected(form: str, weights: dict[str, Tensor], rows: list[dict[str, Tensor]], lines: list) -> float:
    total = 0.0
    for name, axis, place in lines:
        w = weights[name].select(axis, place).double()
        of_rows = [gradients[name].select(axis, place).double() for gradients in rows]
        mean = sum(of_rows) / len(of_rows)
        if form == "taylor":
            total += float(sum(abs(w_k * g_k) for w_k, g_k in zip(w, mean, strict=True)))
        elif form == "taylor_second":
            information = sum(g**2 for g in of_rows) / len(of_rows)
            total += sum(
                abs(float(w_k * g_k - 0.5 * w_k**2 * f_k)) for w_k, g_k, f_k in zip(w, mean, information, strict=True)
            )
        else:
            total += sum(abs(float((w * g).sum())) for g in of_rows) / len(of_rows)
    return total


@pytest.mark.parametrize("form", ["taylor", "taylor_second", "taylor_vector"])
@pytest.mark.parametrize("tied", [True, False])
def test_each_form_is_its_formula_for_every_kind_of_unit(form: str, tied: bool) -> None:
    model = tiny_model("llama", tied=tied)
    source = Shape.of(model.config)
    scores = scores_of(form, model)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    rows = [gradient_of_row(model, row) for row in ROWS]
    for layer in range(source.num_hidden_layers):
        for index in ((0,), (7,), (39,)):
            lines = lines_of(source, unit="intermediate", layer=layer, index=index)
            assert float(scores["intermediate"][layer][index]) == pytest.approx(
                expected(form, weights, rows, lines), rel=1e-4
            )
        for group in range(source.num_key_value_heads):
            lines = lines_of(source, unit="kv_groups", layer=layer, index=(group,))
            assert float(scores["kv_groups"][layer, group]) == pytest.approx(
                expected(form, weights, rows, lines), rel=1e-4
            )
        lines = lines_of(source, unit="query_heads", layer=layer, index=(2, 1))
        assert float(scores["query_heads"][layer, 2, 1]) == pytest.approx(
            expected(form, weights, rows, lines), rel=1e-4
        )
    for d in (0, 20, 35):
        assert float(scores["hidden"][d]) == pytest.approx(
            expected(form, weights, rows, lines_of_hidden(model, d)), rel=1e-4
        )
    # A sub-layer has what its units have; each entry of an MLP belongs to one unit.
    torch.testing.assert_close(scores["mlp"], scores["intermediate"].sum(-1))
    torch.testing.assert_close(scores["attention"], scores["kv_groups"].sum(-1))
    torch.testing.assert_close(scores["layers"], scores["attention"] + scores["mlp"])


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_layer_by_layer_are_those_of_the_whole_graph(family: str, tied: bool) -> None:
    model = tiny_model(family, tied=tied)
    model.requires_grad_(False)
    gradients = RowGradients(model, [Inputs(ROWS[0][None])])
    by_id = {}
    for place in gradients.places():
        (found,) = place.of_rows
        by_id |= {id(matrix): gradient for matrix, gradient in zip(place.parameters, found, strict=True)}
    (count,) = gradients.counts
    assert count == len(ROWS[0]) - 1
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    model.requires_grad_(True)
    whole = gradient_of_row(model, ROWS[0])
    matrices = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 2}
    assert by_id.keys() == {id(parameter) for parameter in matrices.values()}
    for name, parameter in matrices.items():
        largest = max(1.0, float(whole[name].abs().max()))
        torch.testing.assert_close(by_id[id(parameter)] / count, whole[name], rtol=1e-4, atol=5e-6 * largest)


@pytest.mark.parametrize("form", ["taylor", "taylor_second", "taylor_vector", "taylor_distillation"])
def test_what_nothing_reads_scores_zero_and_scales_that_undo_each_other_change_nothing(form: str) -> None:
    model, scaled = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        for each in (model, scaled):
            each.model.layers[1].mlp.down_proj.weight[:, 6] = 0.0
        scaled.model.layers[2].mlp.up_proj.weight[4] *= 8.0
        scaled.model.layers[2].mlp.down_proj.weight[:, 4] /= 8.0
    scores, others = scores_of(form, model), scores_of(form, scaled)
    assert float(scores["intermediate"][1, 6]) == 0.0
    assert (scores["intermediate"][1].argsort()[0]) == 6
    torch.testing.assert_close(others["intermediate"], scores["intermediate"], rtol=1e-4, atol=0.0)
    before, after = (Magnitude().scores(each, evidence=Evidence())["intermediate"] for each in (model, scaled))
    assert float(after[2, 4]) > 2 * float(before[2, 4])


@pytest.mark.parametrize("form", ["taylor", "taylor_second", "taylor_vector", "taylor_distillation"])
@pytest.mark.parametrize("batched", [True, False])
def test_labels_of_other_documents_do_not_count_and_rows_may_come_together(form: str, batched: bool) -> None:
    """The first document of each row alone is as the row whose second document's loss is left out."""
    model, tokens = tiny_model("llama"), tiny_ids(sequences=2, length=12)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 6], [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 0, 1, 2]])
    rules = DocumentRules(attention_within=False, loss_across=False)
    documents = rules.documents(positions, device=torch.device("cpu"))
    text = [Inputs(tokens, documents)]
    text = text if batched else text[0].rows()
    scores = metric_of(form).scores(model, evidence=Evidence(text=text, seed=1))
    if form == "taylor":
        model.zero_grad()
        logits = model(tokens).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(2, 11)
        counts = positions[:, 1:-1] != 0
        (losses * counts).sum().div(counts.sum()).backward()
        mlp = model.model.layers[0].mlp
        products = [(p.weight * p.weight.grad).abs() for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
        wanted = products[0].sum(1) + products[1].sum(1) + products[2].sum(0)
        torch.testing.assert_close(scores["intermediate"][0], wanted, rtol=1e-4, atol=1e-7)
    else:
        everywhere = metric_of(form).scores(model, evidence=Evidence(text=[Inputs(tokens)], seed=1))
        assert not torch.allclose(scores["intermediate"], everywhere["intermediate"], rtol=1e-3)


@pytest.mark.parametrize("form", ["taylor", "taylor_second", "taylor_vector", "taylor_distillation", "structural"])
def test_text_without_a_label_that_counts_is_refused(form: str) -> None:
    rules = DocumentRules(loss_across=False)
    documents = rules.documents(torch.zeros(1, 5, dtype=torch.int64), device=torch.device("cpu"))
    text = [Inputs(tiny_ids(sequences=1, length=4), documents)]
    with pytest.raises(ShearingError, match="calibration_tokens"):
        metric_of(form).scores(tiny_model("llama"), evidence=Evidence(text=text))


def test_vectors_do_not_cancel_between_rows() -> None:
    """Two rows whose gradients are opposite say nothing together, and a lot one by one."""
    model = tiny_model("llama")
    first = scores_of("taylor_vector", model)
    one_by_one = [metric_of("taylor_vector").scores(model, evidence=Evidence(text=[Inputs(row[None])])) for row in ROWS]
    for name, values in first.items():
        torch.testing.assert_close(values, sum(scores[name] for scores in one_by_one) / len(ROWS), rtol=1e-4, atol=1e-8)


def distance(model: PreTrainedModel, wanted: Tensor, row: Tensor) -> Tensor:
    """Mean over tokens of KL(source ‖ model)."""
    log_probabilities = model(row[None]).logits[0].log_softmax(-1)
    return (wanted.exp() * (wanted - log_probabilities)).sum(-1).mean()


def information_of(model: PreTrainedModel, evidence: Evidence) -> dict[Tensor, Tensor]:
    found = {}
    for _, of_place in fisher_information(model, evidence=evidence):
        found |= of_place
    return found


def test_at_the_source_the_distance_has_no_first_order_and_its_curvature_is_the_fisher_information() -> None:
    model, row = tiny_model("llama").double(), tiny_ids(sequences=1, length=12)[0]
    model.set_attn_implementation("eager")  # the others have no second derivative
    with torch.no_grad():
        wanted = model(row[None]).logits[0].log_softmax(-1)
    layer = model.model.layers[3]
    matrices = [layer.mlp.down_proj.weight, layer.self_attn.v_proj.weight]
    gradients = torch.autograd.grad(distance(model, wanted, row), matrices, create_graph=True)
    assert all(float(gradient.detach().abs().max()) < 1e-12 for gradient in gradients)
    information = information_of(model, Evidence(text=[Inputs(row[None])] * 150, seed=0))
    for matrix, gradient in zip(matrices, gradients, strict=True):
        places = [(i, j) for i in range(0, matrix.shape[0], 6) for j in range(0, matrix.shape[1], 7)]
        curvature = torch.stack(
            [torch.autograd.grad(gradient[i, j], matrix, retain_graph=True)[0][i, j] for i, j in places]
        )
        found = torch.stack([information[matrix][i, j] for i, j in places]).double()
        assert float((found.sum() / curvature.sum() - 1).abs()) < 0.1
        assert float(torch.corrcoef(torch.stack([found, curvature]))[0, 1]) > 0.95


def test_the_distance_is_scored_by_half_the_squared_weights_times_the_fisher_information() -> None:
    model = tiny_model("llama")
    scores = scores_of("taylor_distillation", model)
    information = information_of(model, Evidence(text=TEXT, seed=5))
    mlp = model.model.layers[1].mlp
    wanted = torch.zeros(40)
    for unit in range(40):
        for line, of_line in (
            (mlp.gate_proj.weight.detach()[unit], information[mlp.gate_proj.weight][unit]),
            (mlp.up_proj.weight.detach()[unit], information[mlp.up_proj.weight][unit]),
            (mlp.down_proj.weight.detach()[:, unit], information[mlp.down_proj.weight][:, unit]),
        ):
            wanted[unit] += 0.5 * sum(float(w) ** 2 * float(f) for w, f in zip(line, of_line, strict=True))
    torch.testing.assert_close(scores["intermediate"][1], wanted, rtol=1e-4, atol=1e-8)


def bytes_alive(shape: tuple[int, ...]) -> int:
    gc.collect()
    tensors = [found for found in gc.get_objects() if issubclass(type(found), Tensor)]
    return sum({found.data_ptr(): found.nbytes for found in tensors if found.shape == shape}.values())


def test_what_stays_on_the_host_is_what_is_said() -> None:
    """Counted among all tensors that are alive, by the one shape that states of a row have."""
    model = tiny_model()
    source, length = Shape.of(model.config), ROWS[0].shape[0]
    expected = metric_of("taylor").cost(source, evidence=Evidence(text=TEXT)).kept_bytes
    assert expected == kept_bytes(source, tokens=len(ROWS) * length)
    gradients = RowGradients(model, [Inputs(row[None]) for row in ROWS])
    for place in gradients.places():
        for _ in place.of_rows:
            pass
        assert bytes_alive((1, length, source.hidden_size)) == expected
