from __future__ import annotations

import torch

from shearing.training.callbacks.figures import read_scalars, step_line


def test_scalars_of_any_type_are_read_and_stand_under_their_kind() -> None:
    figures = {
        "loss": torch.tensor(1.5),
        "loss_max": torch.tensor(2.0, dtype=torch.float64),
        "grad_norm": torch.tensor(0.25),
        "skipped": torch.tensor(True),
        "expected/hidden": torch.tensor(7),
        "spread/hidden": torch.tensor(3.0),
    }
    (read,) = read_scalars([figures], device=torch.device("cpu"))
    assert read == {name: float(value) for name, value in figures.items()}
    line = step_line({"step": 4, "tokens": 64, "learning_rate": 0.1, "weights": {"web": 1.0}}, read)
    assert (line["step"], line["loss"], line["skipped"]) == (4, 1.5, 1)
    assert line["expected"] == {"hidden": 7.0}
    assert line["spread"] == {"hidden": 3.0}
    assert line["violation"] == {}
