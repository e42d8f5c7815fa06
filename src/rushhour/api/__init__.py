"""The Python API: the verbs of the command line as functions. Text or objects in, typed results out, nothing printed.

    train      a network and data -> a trained bundle
    import     a model file -> a bundle, and what was understood of it: `rushhour.import_model`
    compress   a bundle -> a smaller, faster bundle inside an accuracy budget
    tune       a network or bundle, an SLO and an accuracy budget -> a Plan: how to serve it
    serve      a run, plan or bundle -> a running server
    load       a server under open-loop load -> whether, or up to which rate, it keeps an SLO
    compare    two or more servers on the same arrivals -> ratios with confidence intervals
    report     a run, training or compression -> an HTML file
    export     a run -> a container context, a compose file, manifests for KServe
    deploy     a run -> replicas on a Ray cluster, updated without a lost request
    size       a run and a rate -> how many machines, processes, cores and watts it takes (`rushhour plan`)

`load_module` is the way back: a bundle -> its torch module.

`rushhour.train` is `rushhour.api.train`, and so with the others. Long work reports to a `rushhour.progress.Progress`.
No function installs signal handlers; each may run in a thread or beside a running event loop.
"""

from rushhour.api.comparison import CompareResult, compare
from rushhour.api.compression import CompressResult, compress
from rushhour.api.deploying import Deployed, deploy, deployed
from rushhour.api.exporting import ExportResult, export
from rushhour.api.importing import ImportResult, import_model
from rushhour.api.loading import ClosedLoopResult, LoadResult, load
from rushhour.api.modules import load_module
from rushhour.api.reporting import ReportResult, report
from rushhour.api.serving import Server, serve
from rushhour.api.sizing import size
from rushhour.api.stop import Stop
from rushhour.api.training import TrainResult, train
from rushhour.api.tuning import TuneResult, tune

__all__ = [
    "ClosedLoopResult",
    "CompareResult",
    "CompressResult",
    "Deployed",
    "ExportResult",
    "ImportResult",
    "LoadResult",
    "ReportResult",
    "Server",
    "Stop",
    "TrainResult",
    "TuneResult",
    "compare",
    "compress",
    "deploy",
    "deployed",
    "export",
    "import_model",
    "load",
    "load_module",
    "report",
    "serve",
    "size",
    "train",
    "tune",
]
