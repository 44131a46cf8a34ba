"""The device under test, seeds and thread counts that every test shares.

``--device cpu`` tests the CPU kernels. ``--device emulator`` tests the CUDA kernels and the CUDA
side of each torch.cpp on the emulated device, whose tensors are torch's CPU tensors. ``--device
cuda`` tests them on a GPU: tensors that a test makes without naming a device are made there.
"""

from __future__ import annotations

import os
import shlex
import sys
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import checks
import inventory
import operators

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

# What trains in tests/clients. Without them `make test` leaves that folder out and says so.
CLIENTS = ("accelerate", "lightning", "torchmetrics", "transformers")
missing_clients = [name for name in CLIENTS if find_spec(name) is None]
collect_ignore = ["clients"] if missing_clients else []

Launches = Callable[[], AbstractContextManager[list[str]]]
launched_by_module: Counter[str] = Counter()
launched_by_kernel: Counter[str] = Counter()
EMULATED = pytest.StashKey[Any]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, default=0, help="draw other random inputs in every test")
    parser.addoption(
        "--device",
        choices=("cpu", "emulator", "cuda"),
        default="cpu",
        help="the CPU's kernels, CUDA's on the emulator, or CUDA's on a card",
    )
    parser.addoption(
        "--explore",
        type=float,
        default=0,
        metavar="SECONDS",
        help="try each property on ever new inputs for so long, not on a fixed few",
    )
    parser.addoption(
        "--inventory",
        metavar="FILE",
        help="write which tests passed and how often each kernel ran, for tests/inventory.py",
    )
    parser.addoption(
        "--record", action="store_true", help="keep what passed in checks.json, for the pages"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--record") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(config))
    if (file := config.getoption("--inventory")) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(inventory.Inventory(Path(file), launched_by_kernel))
    device = config.getoption("--device")
    if device == "emulator":
        use_emulated_package(config)
    elif device == "cuda":
        import fusedstep  # noqa: F401  (registers the operator asked about)

        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: torch sees no card")
        if not torch._C._dispatch_has_kernel_for_dispatch_key(
            "fusedstep::cross_entropy_forward", "CUDA"
        ):
            raise pytest.UsageError("--device cuda: this build of fusedstep is without CUDA")
        # Networks beside which ours are compared compute the same each time, in float32.
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = False


class Recorder:
    """Keeps in checks.json what a run without a failure found in each file: by test what it reports
    with `record_property`, or else how many tests passed and in how many seconds."""

    def __init__(self, config: pytest.Config) -> None:
        given = [option for option in config.invocation_params.args if option != "--record"]
        self.command = shlex.join(["pytest", *map(str, given)])
        self.passed: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.reported: defaultdict[str, dict[str, Any]] = defaultdict(dict)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        path, _, test = report.nodeid.partition("::")
        if report.when == "call" and report.passed:
            self.passed[path] += Counter(passed=1, seconds=round(report.duration))
        if report.when == "teardown" and report.user_properties:
            self.reported[path][test] = dict(report.user_properties)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.OK:
            for path, passed in self.passed.items():
                checks.record(path, self.command, self.reported.get(path, {"": passed}))


def use_emulated_package(config: pytest.Config) -> None:
    """Make ``import fusedstep`` mean the build whose device is the emulator's."""
    from emulator import Emulator, build

    is_worker = hasattr(config, "workerinput")
    try:
        if not is_worker:  # whose controller has built it
            build.build_package()
    except RuntimeError as error:
        raise pytest.UsageError(str(error)) from error
    paths = [str(build.OUT), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    sys.path.insert(0, str(build.OUT))
    import fusedstep

    library = Path(fusedstep._C.__file__)
    if not library.is_relative_to(build.OUT):
        raise pytest.UsageError(f"the emulated fusedstep should be imported, not {library}")
    config.stash[EMULATED] = Emulator(library)


def pytest_report_header(config: pytest.Config) -> list[str]:
    device = config.getoption("--device")
    names = {
        "cpu": lambda: f"CPU, {torch.backends.cpu.get_cpu_capability()}",
        "emulator": lambda: (
            "emulated CUDA, compute capability "
            + os.environ.get("EMULATOR_COMPUTE_CAPABILITY", "9.0")
        ),
        "cuda": lambda: torch.cuda.get_device_name(),
    }
    lines = [f"device: {names[device]()}"]
    if missing_clients:
        lines.append(f"without tests/clients, for want of {', '.join(missing_clients)}")
    return lines


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        option = metafunc.config.getoption("--device")
        metafunc.parametrize("device", ["cuda" if option == "cuda" else "cpu"])


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Every test draws its own inputs, the same in each run; pytest shows the seed on failure."""
    base = request.config.getoption("--seed")
    value = zlib.crc32(f"{base}:{request.node.nodeid.rpartition('/')[2]}".encode())
    torch.manual_seed(value)
    if emulated := request.config.stash.get(EMULATED, None):
        emulated.seed(value)
    print(f"torch.manual_seed({value}), from --seed {base}")
    return value


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """One thread, so that parallel test workers share the cores; tests of threading set more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def default_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """New tensors lie on the device under test.

    The default tensor type, unlike torch.set_default_device(), is no mode around every function
    call: under such a mode calls go to torch's own operators.
    """
    if request.config.getoption("--device") == "cuda":
        set_default_type("torch.cuda.FloatTensor")
        yield
        set_default_type("torch.FloatTensor")
    else:
        yield


def set_default_type(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated for set_default_device()
        torch.set_default_tensor_type(name)


@pytest.fixture
def on_cuda(request: pytest.FixtureRequest) -> bool:
    """Whether CUDA's kernels are under test, on a card or on the emulator."""
    return bool(request.config.getoption("--device") != "cpu")


@pytest.fixture
def card(request: pytest.FixtureRequest) -> str:
    """The device of a test that the emulator cannot stand in for."""
    if request.config.getoption("--device") != "cuda":
        pytest.skip("needs a card")
    return "cuda"


@pytest.fixture
def cpu_only(on_cuda: bool) -> None:
    if on_cuda:
        pytest.skip("about the CPU's kernels or memory")


@pytest.fixture
def launches(request: pytest.FixtureRequest) -> Launches:
    """``with launches() as kernels`` lists the names of fusedstep's kernels launched inside.

    The list is complete behind the block. A test that asks for it is skipped on the CPU.
    """
    if emulated := request.config.stash.get(EMULATED, None):
        return emulated.launches
    if request.config.getoption("--device") == "cuda":
        return profiled_launches
    pytest.skip("counts launches of CUDA kernels")


@contextmanager
def profiled_launches() -> Iterator[list[str]]:
    from torch.profiler import ProfilerActivity, profile

    kernels: list[str] = []
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        yield kernels
        torch.cuda.synchronize()
    kernels += [event.name for event in profiler.events() if "fusedstep::" in event.name]


# ------------------------------------------------------------------ was CUDA code run at all?


@pytest.fixture(autouse=True)
def count_launches(request: pytest.FixtureRequest) -> Iterator[None]:
    """Counts what ran on the emulator, by test file and by kernel."""
    emulated = request.config.stash.get(EMULATED, None)
    before = emulated.launch_count() if emulated else 0
    yield
    if emulated:
        launched = emulated.launched_since(before)
        launched_by_module[request.path.name] += len(launched)
        launched_by_kernel.update(launched)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    output = getattr(node, "workeroutput", {})
    launched_by_module.update(output.get("launches", {}))
    launched_by_kernel.update(output.get("kernels", {}))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["launches"] = dict(launched_by_module)
        session.config.workeroutput["kernels"] = dict(launched_by_kernel)
    elif session.config.getoption("--device") == "emulator" and idle_modules():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.getoption("--device") == "emulator":
        for module, launched in sorted(launched_by_room().items()):
            terminalreporter.write_line(f"{module}: {launched} launches on the emulator")
        for module in idle_modules():
            terminalreporter.write_line(f"ERROR {module} launched no kernel", red=True)


def launched_by_room() -> dict[str, int]:
    """What the first file of tests of each operator launched."""
    files = (Path(tests[0]).name for tests in operators.listed().values())
    return {file: n for file in files if (n := launched_by_module.get(file)) is not None}


def idle_modules() -> list[str]:
    return [module for module, launched in launched_by_room().items() if launched == 0]
