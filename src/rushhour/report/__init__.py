"""The report: one offline HTML file that shows what was found and why, and the table that ends `rushhour demo`."""

from rushhour.report.page import write_report
from rushhour.report.summary import summary_table

__all__ = ["summary_table", "write_report"]
