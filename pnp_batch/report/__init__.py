"""The report of a run: one HTML page that shows every result beside its source."""

from pnp_batch.report.html import write_report

__all__ = ["write_report"]
