"""One page about a run: a self-contained HTML file that opens offline."""

from shearing.report.page import write_report

__all__ = ["write_report"]
