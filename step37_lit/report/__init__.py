"""`write_report`: one HTML page about a run, while it is going on or after it."""

from step37_lit.report.page import write_report

__all__ = ["write_report"]
