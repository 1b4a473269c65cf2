"""Runs as one HTML file that needs nothing beside itself: found, measured, drawn, and written."""

from llmalign.report.collect import Run, collect
from llmalign.report.page import write_report

__all__ = ["Run", "collect", "write_report"]
