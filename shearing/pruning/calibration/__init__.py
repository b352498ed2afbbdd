"""What pruning learns from text: which text, the walk through the layers, and the statistics of their inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shearing.late import late

if TYPE_CHECKING:
    from shearing.pruning.calibration.inverse import InverseFactor
    from shearing.pruning.calibration.places import Matrix, Place, matrices_of, places_of
    from shearing.pruning.calibration.statistics import InputStatistics
    from shearing.pruning.calibration.text import Calibration, load_calibration
    from shearing.pruning.calibration.walk import layer_calls, run_layer

__all__ = [
    "Calibration",
    "InputStatistics",
    "InverseFactor",
    "Matrix",
    "Place",
    "layer_calls",
    "load_calibration",
    "matrices_of",
    "places_of",
    "run_layer",
]

__getattr__ = late(
    __name__,
    {
        "Calibration": "text",
        "InputStatistics": "statistics",
        "InverseFactor": "inverse",
        "Matrix": "places",
        "Place": "places",
        "layer_calls": "walk",
        "load_calibration": "text",
        "matrices_of": "places",
        "places_of": "places",
        "run_layer": "walk",
    },
)
