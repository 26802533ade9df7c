"""The report of a run: a page and pictures, made from the run's folder alone."""

from .log import read_log
from .page import write_evaluation_page, write_page, write_report

__all__ = ["read_log", "write_evaluation_page", "write_page", "write_report"]
