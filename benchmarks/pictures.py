"""Pictures of the documents, drawn from `records/`: nothing is measured.

python benchmarks/pictures.py [--output docs]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from shearing.files.durable import read_json
from shearing.runs.race.results.picture import draw_race

RECORDS = Path(__file__).parent / "records"


def race(path: Path) -> None:
    """The race at 31 k tokens, seed 0, all refitted."""
    records = [read_json(file) for file in sorted((RECORDS / "race-135m/rows").glob("*seed0-30steps.json"))]
    rows = [
        {
            "method": record["method"],
            "title": record["title"].removesuffix(", refitted"),
            "seeds": [0],
            "mean": record["losses"]["final"]["mean"],
            "standard_deviation": None,
            "outside_mean": record["losses"]["final"]["outside_mean"],
        }
        for record in records
    ]
    budget = {"tokens": records[0]["tokens"], "equal_tokens": {"rows": rows}}
    draw_race({"budgets": [budget], "own_forms": []}, path=path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs"), help="folder")
    race(parser.parse_args().output / "race-135m.svg")


if __name__ == "__main__":
    main()
