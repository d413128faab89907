"""The report: claims, figures and datasets of a folder of results, on one offline page."""

from attnmarkov.report.render import render, write_outputs
from attnmarkov.report.result import Report, Result, evaluate

__all__ = ["Report", "Result", "evaluate", "render", "write_outputs"]
