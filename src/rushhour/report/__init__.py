"""The report: one offline HTML file that shows what was found and why, and the table that ends `rushhour demo`.

`write_load_plot` draws what `rushhour load` measured, `write_training_report` how a training went,
`write_compression_report` what each step of a compression cost and bought.
"""

from rushhour.report.compression import write_compression_report
from rushhour.report.findings import read_plan
from rushhour.report.load import write_load_plot
from rushhour.report.page import write_report
from rushhour.report.summary import SummaryTable
from rushhour.report.training import write_training_report

__all__ = [
    "SummaryTable",
    "read_plan",
    "write_compression_report",
    "write_load_plot",
    "write_report",
    "write_training_report",
]
