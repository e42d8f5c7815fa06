"""Reference networks, how they are named and built, and their way to a bundle and back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from rushhour.bundle import Bundle, Preprocessing, Source, TensorSpec
from rushhour.errors import BundleError, ModelError, TaskError
from rushhour.models import article, build, export, load_deployed, mlp, residual, source_for
from rushhour.task import Task

TASK = Task.classification(("cat", "dog", "owl", "emu"))
PICTURES = Preprocessing(1 / 255, (0.3,), (0.4,), "NHWC->NCHW")


def pictures(n: int = 5, size: int = 10) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 1), dtype=np.uint8)


def sealed(
    network: nn.Module, path: Path, *, source: Source | None = None, samples: np.ndarray | None = None
) -> Bundle:
    samples = pictures() if samples is None else samples
    return export(
        network,
        name="tiny",
        task=TASK,
        sample_spec=TensorSpec("image", "uint8", samples.shape[1:]),
        preprocessing=PICTURES,
        source=source,
        lineage=(),
        samples=samples,
        path=path,
    )


def tiny() -> nn.Module:
    torch.manual_seed(3)
    return article(input_size=10, channels=1, classes=4, width=0.25, dense=16)


TINY = Source("rushhour.models:article", {"input_size": 10, "channels": 1, "classes": 4, "width": 0.25, "dense": 16})


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(("shape", "scales"), [((140, 1), 5), ((140,), 5), ((500, 3), 6), ((9, 1), 1)])
def test_kernels_take_signals_of_any_length(shape: tuple[int, ...], scales: int) -> None:
    network = build(source_for("kernels", shape, TASK)).eval()
    assert len(network.scales) == scales  # up to the largest dilation that fits into the signal
    assert network(torch.randn(3, *shape)).shape == (3, 4)
    for scale in network.scales:
        assert float(scale.kernels.weight.detach().mean(dim=2).abs().max()) < 1e-6, "a constant is no pattern"


def test_kernels_need_a_signal() -> None:
    with pytest.raises(ModelError, match="at least 9 steps"):
        build(source_for("kernels", (8, 1), TASK))
    with pytest.raises(ModelError, match="model kernels cannot take"):
        source_for("kernels", (8, 8, 3), TASK, PICTURES)


def test_the_article_network_has_the_article_s_parameters() -> None:
    with torch.device("meta"):
        assert parameters(article()) == 103_339_528


@pytest.mark.parametrize("size", [4, 10, 11, 15])
def test_the_article_network_takes_sizes_that_do_not_halve(size: int) -> None:
    network = article(input_size=size, channels=2, classes=3, width=0.1, dense=8)
    assert network(torch.zeros(2, 2, size, size)).shape == (2, 3)


@pytest.mark.parametrize("size", [8, 33, 96])
def test_residual_takes_any_picture(size: int) -> None:
    network = residual(size, channels=3, classes=5, width=4, blocks=1).eval()
    assert network(torch.zeros(2, 3, size, size // 2)).shape == (2, 5)


def test_residual_20_has_its_published_size() -> None:
    with torch.device("meta"):
        assert 0.26e6 < parameters(residual(32, channels=3, classes=10)) < 0.28e6


def test_mlp_is_deep_and_uniform_and_takes_any_shape() -> None:
    network = mlp(12, 2, hidden=16, depth=8)
    assert sum(isinstance(layer, nn.Linear) for layer in network) == 9
    assert network(torch.zeros(5, 3, 4)).shape == (5, 2)
    signal = mlp(64, 8, hidden=256, depth=8)(torch.randn(256, 64))
    assert 0.3 < float(signal.detach().std()) < 5, "the signal neither dies nor explodes on its way"


@pytest.mark.parametrize("factory", [article, residual, mlp])
def test_sizes_that_cannot_be_are_refused(factory: object) -> None:
    with pytest.raises(ModelError, match="cannot build"):
        factory(0, 1, 1)  # type: ignore[operator]


@pytest.mark.parametrize(("model", "shape"), [("article", (12, 12, 3)), ("residual", (9, 14, 1)), ("mlp", (7,))])
def test_our_models_fit_the_data(model: str, shape: tuple[int, ...]) -> None:
    network = build(source_for(model, shape, TASK)).eval()
    wire = torch.zeros(2, *shape)
    assert network(wire.permute(0, 3, 1, 2) if len(shape) == 3 else wire).shape == (2, 4)


def test_models_that_do_not_fit_the_data_are_refused() -> None:
    with pytest.raises(ModelError, match="article, residual, signal, kernels, mlp"):
        source_for("resnet", (8, 8, 3), TASK)
    with pytest.raises(ModelError, match="needs pictures"):
        source_for("residual", (8,), TASK)
    with pytest.raises(ModelError, match="square"):
        source_for("article", (8, 9, 3), TASK)
    assert source_for("mine:net", (8,), TASK) == Source("mine:net")


@pytest.mark.parametrize(
    "factory",
    [
        "os:system",
        "subprocess:call",
        "rushhour.models:build",
        "rushhour.models.source:importlib",
        "rushhour.models:article.__init__",
        "rushhour.models.article:article",
        "rushhour.models",
        "builtins:exec",
        ":",
        "",
    ],
)
def test_a_hostile_factory_is_not_even_imported(factory: str) -> None:
    with pytest.raises(ModelError, match="will not import"):
        build(Source(factory, {"command": "touch /tmp/pwned"}))


def test_a_hostile_bundle_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w').close()\nnet = None\n")
    bundle = sealed(tiny(), tmp_path / "bundle", source=Source("evil:net"))
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(ModelError, match="will not import"):
            load_deployed(bundle)
    finally:
        sys.path.remove(str(tmp_path))
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Source("nowhere_to_be_found:net"), "cannot import"),
        (Source("json:nothing"), "no function or class 'nothing'"),
        (Source("json:__name__"), "no function or class"),
        (Source("json:dumps", {"obj": 1}), "returned a str"),
        (Source("json:dumps", {"colour": 1}), "arguments do not fit|returned a str|TypeError"),
        (Source("json:loads", {"s": "{"}), "JSONDecodeError"),
        (Source("json"), "module:factory"),
    ],
)
def test_a_trusted_factory_that_gives_no_model_is_explained(source: Source, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build(source, trusted=(source.factory,))


NETS = """
import functools
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, dtype=None):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4, dtype=dtype), nn.ReLU())
        self.head = nn.Linear(4, 2, dtype=dtype)
    def forward(self, x):
        return self.head(self.body(x))

net = Net()
compiled = lambda: torch.compile(Net())
replicated = lambda: nn.DataParallel(torch.compile(Net()))
def partly():
    made = Net()
    made.body = torch.compile(made.body)
    made.head.compile()
    return made
scripted = lambda: torch.jit.script(Net())
def meta():
    with torch.device("meta"):
        return Net()
double = lambda: Net(torch.float64)
half = lambda: Net().half()
shared = lambda: net
cached = functools.cache(Net)
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "nets_of_all_kinds.py").write_text(NETS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "nets_of_all_kinds", raising=False)
    return "nets_of_all_kinds"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch about its own parts
@pytest.mark.parametrize("name", ["compiled", "replicated", "partly"])
def test_wrappers_are_taken_off(nets: str, name: str) -> None:
    """Compiled, a network would be compiled again for each number of samples."""
    factory = f"{nets}:{name}"
    network = build(Source(factory), trusted=(factory,))
    assert list(network.state_dict()) == ["body.0.weight", "body.0.bias", "head.weight", "head.bias"]
    assert all(module._compiled_call_impl is None for module in network.modules())
    assert network(torch.zeros(2, 3)).shape == (2, 2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit is no longer recommended
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("net", "it is a network, not a function.*name its class"),
        ("scripted", "TorchScript"),
        ("meta", "its weights have no values"),
        ("double", r"its weights are float64.*\.float\(\)"),
        ("half", "its weights are float16"),
    ],
)
def test_a_network_of_a_kind_that_cannot_be_trained_is_explained(nets: str, name: str, message: str) -> None:
    factory = f"{nets}:{name}"
    with pytest.raises(ModelError, match=message):
        build(Source(factory), trusted=(factory,))


@pytest.mark.parametrize("name", ["shared", "cached"])
def test_a_factory_that_returns_one_network_again_is_explained(nets: str, name: str) -> None:
    """What one training learnt would be where the next one starts."""
    factory = f"{nets}:{name}"
    build(Source(factory), trusted=(factory,))
    with pytest.raises(ModelError, match="the same network twice"):
        build(Source(factory), trusted=(factory,))


def test_arguments_that_do_not_fit_are_explained() -> None:
    with pytest.raises(ModelError, match=r"arguments do not fit.*colour"):
        build(Source("rushhour.models:article", {"colour": 3}))
    with pytest.raises(ModelError, match="cannot build"):
        build(Source("rushhour.models:article", {"input_size": "large"}))


def test_a_trusted_factory_is_built() -> None:
    source = Source("torch.nn:Linear", {"in_features": 3, "out_features": 2})
    assert isinstance(build(source, trusted=("torch.nn:Linear",)), nn.Linear)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny network's, for tests that leave it as it is."""
    return sealed(tiny(), tmp_path_factory.mktemp("models") / "bundle", source=TINY)


def test_a_bundle_answers_as_torch_does(bundle: Bundle) -> None:
    again = Bundle.open(bundle.path)
    assert again.manifest.parameters == parameters(tiny())
    assert np.array_equal(again.samples()["image"], pictures())
    session = onnxruntime.InferenceSession(again.model, providers=["CPUExecutionProvider"])
    deployed = load_deployed(again)
    assert not deployed.training
    for size in (1, 2, 7):
        wire = pictures(size)
        (answer,) = session.run(["probabilities"], {"image": wire})
        by_hand = (wire.transpose(0, 3, 1, 2) / 255 - 0.3) / 0.4
        with torch.inference_mode():
            expected = torch.softmax(tiny().eval()(torch.from_numpy(by_hand).float()), 1).numpy()
            assert np.allclose(deployed(torch.from_numpy(wire)), expected, atol=1e-5)
        assert np.allclose(answer, expected, atol=1e-5)


def test_loading_leaves_the_caller_s_seed_alone(bundle: Bundle) -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    load_deployed(bundle)
    assert torch.rand(1) == expected


@pytest.mark.slow
def test_equal_weights_give_an_equal_bundle_in_any_process(bundle: Bundle, tmp_path: Path) -> None:
    here = bundle.manifest.hash
    sealed(residual(10, 1, 4, width=4, blocks=1), tmp_path / "other")  # counters of the exporter move on
    assert sealed(tiny(), tmp_path / "again", source=TINY).manifest.hash == here
    code = (
        "import sys, pathlib; sys.path.insert(0, 'tests/models'); import test_models as t; "
        "print(t.sealed(t.tiny(), pathlib.Path(sys.argv[1]), source=t.TINY).manifest.hash)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "there")],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert ran.stdout == f"{here}\n", "equal, and the exporter prints nothing"
    assert ran.stderr == ""


def test_a_graph_names_nothing_of_this_machine(bundle: Bundle) -> None:
    content = bundle.model.read_bytes()
    for trace in (b"site-packages", b"stack_trace", b".py", bytes(Path.home()) + b"/", bytes(bundle.path)):
        assert trace not in content
    graph = onnx.load_from_string(content)
    onnx.checker.check_model(graph)
    assert not graph.metadata_props


def test_a_network_that_does_not_fit_the_task_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="tiny does not fit"):
        sealed(article(10, 1, classes=3, width=0.1, dense=8), tmp_path / "bundle")
    with pytest.raises(ModelError, match="cannot take samples of shape"):
        sealed(article(20, 1, classes=4, width=0.1, dense=8), tmp_path / "bundle")
    with pytest.raises(ModelError, match="cannot export tiny with samples of float64"):
        sealed(tiny(), tmp_path / "bundle", samples=pictures().astype(np.float64))
    assert list(tmp_path.iterdir()) == []


class _Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(100, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(x)
        return nn.functional.dropout(out, 0.5, training=True)


def test_a_graph_that_answers_otherwise_is_not_sealed(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"does not answer as its torch module|cannot export"):
        sealed(_Noisy(), tmp_path / "bundle")
    broken = tiny()
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(ModelError, match="does not answer as its torch module"):
        sealed(broken, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_bundle_without_a_torch_module_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no torch module"):
        load_deployed(sealed(tiny(), tmp_path / "bundle"))


def test_weights_that_do_not_fit_the_model_are_explained(tmp_path: Path) -> None:
    source = Source(TINY.factory, {**TINY.arguments, "dense": 17})
    with pytest.raises(ModelError, match="weights of tiny do not fit"):
        load_deployed(sealed(tiny(), tmp_path / "bundle", source=source))


def test_a_regression_bundle_gives_values(tmp_path: Path) -> None:
    samples = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    bundle = export(
        mlp(6, 2, hidden=8, depth=2),
        name="table",
        task=Task("regression", outputs=2),
        sample_spec=TensorSpec("input", "float32", (6,)),
        preprocessing=Preprocessing(mean=(0.5,) * 6, std=(2.0,) * 6),
        source=Source("rushhour.models:mlp", {"inputs": 6, "outputs": 2, "hidden": 8, "depth": 2}),
        lineage=(),
        samples=samples,
        path=tmp_path / "bundle",
    )
    assert bundle.manifest.signature.outputs == (TensorSpec("values", "float32", (2,)),)
    with torch.inference_mode():
        assert load_deployed(bundle)(torch.from_numpy(samples)).shape == (4, 2)


def test_a_standard_deviation_of_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="standard deviations"):
        export(
            tiny(),
            name="tiny",
            task=TASK,
            sample_spec=TensorSpec("image", "uint8", (10, 10, 1)),
            preprocessing=Preprocessing(1.0, (0.0,), (0.0,), "NHWC->NCHW"),
            source=None,
            lineage=(),
            samples=pictures(),
            path=tmp_path / "bundle",
        )


def test_a_damaged_bundle_is_not_loaded(tmp_path: Path) -> None:
    bundle = sealed(tiny(), tmp_path / "bundle", source=TINY)
    assert bundle.weights is not None
    bundle.weights.write_bytes(bundle.weights.read_bytes()[:-1])
    with pytest.raises(BundleError, match="damaged"):
        Bundle.open(bundle.path)
    with pytest.raises(ModelError, match="do not fit"):
        load_deployed(bundle)
