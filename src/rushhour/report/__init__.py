"""The reports: offline HTML files with the results and their evidence, and the table at the end of `rushhour demo`.

`write_report` shows a tuning run, `write_load_plot` the windows of `rushhour load`, `write_training_report` the course
of a training, `write_compression_report` what each step of a compression cost and gained.
"""

from rushhour.report.compression import write_compression_report
from rushhour.report.findings import read_plan
from rushhour.report.load import write_load_plot
from rushhour.report.summary import SummaryTable
from rushhour.report.training import write_training_report
from rushhour.report.tuning import write_report

__all__ = [
    "SummaryTable",
    "read_plan",
    "write_compression_report",
    "write_load_plot",
    "write_report",
    "write_training_report",
]
