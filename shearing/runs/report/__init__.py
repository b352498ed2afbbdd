"""One page about a run: a self-contained HTML file that opens offline."""

from __future__ import annotations

from shearing.runs.report.page import write_report

__all__ = ["write_report"]
