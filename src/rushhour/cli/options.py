"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rushhour.cli.command import C, option, options
from rushhour.cli.places import Named

# Only what options need is imported at the top of the command line's modules: training takes seconds to import, and
# `rushhour serve` has to start fast.

slo_option = option(
    "--slo",
    default="p99<50ms",
    show_default=True,
    metavar="SLO",
    help="The latency limit: a percentile, '<' and a time. In quotes, because the shell reads '<'.",
)

accuracy_option = option(
    "--max-accuracy-drop",
    default="1%",
    show_default=True,
    metavar="PERCENT",
    help="The accuracy budget in percentage points: with 1%, 90% may become 89%.",
)

cold_option = option(
    "--cold",
    is_flag=True,
    help="Ignore what earlier runs on this machine measured: they are a start, which a run's own measurements replace.",
)

cluster_option = option(
    "--cluster",
    is_flag=False,
    flag_value="auto",
    metavar="[HOST:PORT]",
    help="Have the nodes of this Ray cluster make the bundles, one recipe each at a time; without an address, of the "
    "Ray that runs on this machine. All else is measured here (extra: cluster).",
)

force_option = option(
    "--force",
    is_flag=True,
    help="Replace the bundle or run that another command wrote there. Nothing else is ever replaced.",
)

name_option = option(
    "--name",
    metavar="NAME",
    help="The model's name, which it keeps through compression and tuning. By default that of the folder it is first "
    "written to.",
)

trust_option = option(
    "--trust",
    multiple=True,
    metavar="MODULE:FACTORY",
    help="A factory of yours that may be imported to build a bundle's network, or the path of a model file whose code "
    "may run. May be repeated.",
)


def _of_data(*, required: bool) -> Callable[[C], C]:
    return options(
        option(
            "--data",
            required=required,
            type=Named(),
            metavar="DATA",
            help="fashion-mnist, a folder with one folder of pictures per class, a .npz file, a table (.csv, .parquet, "
            "or a folder of them), or module:factory.",
            section="Data",
        ),
        option(
            "--size",
            metavar="HxW",
            help="Bring the pictures of a folder to this height and width. A bundle knows its own.",
            section="Data",
        ),
        option(
            "--skip-corrupt",
            is_flag=True,
            help="Leave out pictures that cannot be read, and name them.",
            section="Data",
        ),
        option(
            "--target",
            "targets",
            multiple=True,
            metavar="COLUMN",
            help="The column of a table that is to be predicted; several for values that belong together.",
            section="Data",
        ),
        option(
            "--group",
            metavar="COLUMN",
            help="Rows of a table with equal values here, such as a person, stay in one part; intervals are of groups.",
            section="Data",
        ),
        option(
            "--time",
            metavar="COLUMN",
            help="Split a table in time: the last tenth for testing, the tenth before it for validation.",
            section="Data",
        ),
        option(
            "--category",
            "categories",
            multiple=True,
            metavar="COLUMN",
            help="A column of numbers that are names, such as a postal code. May be repeated.",
            section="Data",
        ),
        option(
            "--leave-out",
            multiple=True,
            metavar="COLUMN",
            help="A column that the model does not see. May be repeated.",
            section="Data",
        ),
        option(
            "--task",
            metavar="KIND",
            help="What targets in a .npz file or a table are, where that cannot be seen: classification (one label), "
            "multilabel (each label holds or not), ranking (0 or 1, judged by AUC), regression (values), "
            "segmentation (class maps), detection (boxes), tagging (a label for each token), or a class of your own, "
            "module:Class.",
            section="Data",
        ),
    )


data_options, optional_data_options = _of_data(required=True), _of_data(required=False)
"""How data is named and read."""

_OF_COLUMNS = {
    "targets": "target",
    "group": "group",
    "time": "time",
    "categories": "categories",
    "leave_out": "leave_out",
}


def with_columns(given: dict[str, Any]) -> dict[str, Any]:
    """The options, with those of a table's columns as one value, as the API takes them."""
    rest = {name: value for name, value in given.items() if name not in _OF_COLUMNS}
    columns = {ours: given[name] for name, ours in _OF_COLUMNS.items() if given.get(name)}
    return {**rest, "columns": columns or None}


training_options = options(
    option(
        "--epochs",
        type=int,
        metavar="N",
        help="Passes over the training data. 3 by default; with little data, as many as give 600 steps.",
        section="Training",
    ),
    option(
        "--batch",
        type=int,
        metavar="N",
        help="Samples in one optimizer step. 128 by default; fewer with little data.",
        section="Training",
    ),
    option(
        "--lr",
        type=float,
        metavar="RATE",
        help="The largest learning rate. 0.002 by default; less for smaller batches.",
        section="Training",
    ),
    option(
        "--seed",
        default=0,
        show_default=True,
        metavar="N",
        help="Seed of the weights, the order of the data and augmentation.",
        section="Training",
    ),
    option(
        "--channels-last/--no-channels-last",
        default=True,
        show_default=True,
        help="Let pictures lie channels-last in memory, where that is safe and faster.",
        section="Training",
    ),
)
"""Those of every command that trains."""
