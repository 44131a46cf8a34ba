"""Programs of torch.export: they hold torch's operators alone, and need no fusedstep."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export._draft_export import draft_export

import fusedstep
from fusedstep import functional as F
from numerics import BF16, F32, F64, REDUCTIONS, identical, pairwise

pytestmark = [
    pytest.mark.usefixtures("cpu_only"),  # what is recorded depends on no device
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec:FutureWarning"),
]
CLASSES = 7

# The module, its arguments, and whether its target holds class indices.
MODULES: dict[str, tuple[type[nn.Module], dict[str, Any], bool]] = {
    "cross_entropy": (nn.CrossEntropyLoss, {"label_smoothing": 0.1}, True),
    "weighted": (nn.CrossEntropyLoss, {"weight": torch.arange(1.0, CLASSES + 1)}, True),
    "l1_loss": (nn.L1Loss, {}, False),
    "mse_loss": (nn.MSELoss, {}, False),
    "smooth_l1_loss": (nn.SmoothL1Loss, {"beta": 0.5}, False),
    "huber_loss": (nn.HuberLoss, {"delta": 0.5}, False),
    "binary_cross_entropy_with_logits": (nn.BCEWithLogitsLoss, {}, False),
}
EXPORTS: dict[str, Callable[..., ExportedProgram]] = {
    "not strict": partial(torch.export.export, strict=False),
    "strict": partial(torch.export.export, strict=True),
    "draft": draft_export,
}


def test_every_loss_that_torch_has_is_in_the_table() -> None:
    assert MODULES.keys() - {"weighted"} == F.stand_ins.keys()


@pytest.fixture(autouse=True)
def trace_anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def operands(name: str, rows: int = 9) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, CLASSES)
    return x, torch.randint(CLASSES, (rows,)) if MODULES[name][2] else torch.rand_like(x)


def operators(program: ExportedProgram) -> set[str]:
    """The namespaces of a program's operators."""
    found = {
        node.target.namespace
        for node in program.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
    }
    assert found
    return found


class Network(nn.Module):
    def __init__(self, criterion: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(CLASSES, CLASSES)
        self.criterion = criterion

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        loss: Tensor = self.criterion(self.linear(x), t)
        return loss


AXES = {"name": list(MODULES), "who": ["patched", "imported"], "how": list(EXPORTS)}


@pytest.mark.parametrize("row", pairwise(AXES, seed=0), ids=lambda row: "-".join(row.values()))
def test_a_program_holds_torchs_operators(row: dict[str, str]) -> None:
    """It computes, forward and backward, what torch's own does to the last bit."""
    name = row["name"]
    module, options, _ = MODULES[name]
    patched = row["who"] == "patched"
    criterion = (module if patched else getattr(fusedstep, module.__name__))(**options)
    network = Network(criterion)
    shapes = ({0: Dim("rows")}, {0: Dim("rows")})
    with fusedstep.patched() if patched else nullcontext():
        fusedstep.reset_stats()
        program = EXPORTS[row["how"]](network, operands(name), dynamic_shapes=shapes)
        assert not fusedstep.stats().calls
        assert type(network(*operands(name)).grad_fn).__module__ != "torch.autograd"
        assert fusedstep.stats().fused == 1  # eager calls are ours all the while
    assert operators(program) == {"aten"}
    torchs = Network(module(**options))
    torchs.linear = network.linear
    trained = program.module()
    x, t = operands(name, rows=17)
    trained(x, t).backward()
    expected = torchs(x, t)
    expected.backward()
    identical(trained(x, t), expected)
    identical(trained.linear.weight.grad, torchs.linear.weight.grad)  # type: ignore[union-attr]


class EveryLoss(nn.Module):
    """Each function of ours and, while they are patched, of torch's."""

    def forward(self, x: Tensor, index: Tensor, t: Tensor) -> dict[str, Tensor]:
        losses = {}
        for module in (torch.nn.functional, F):
            for name in F.stand_ins:
                target = index if name == "cross_entropy" else t
                losses[f"{module.__name__}.{name}"] = getattr(module, name)(x, target)
        losses["focal_loss"] = F.focal_loss(x, index, 1.5)
        losses["loss"], losses["lse"] = F.cross_entropy_with_lse(x, index, z_loss=0.1)
        return losses


WITHOUT_US = """
import sys, torch
sys.modules["fusedstep"] = None  # any import of it is an ImportError
program = torch.export.load(sys.argv[1])
torch.save(program.module()(*torch.load(sys.argv[2])), sys.argv[3])
"""


def test_a_program_is_loaded_without_us(tmp_path: Path) -> None:
    x = torch.randn(9, CLASSES)
    arguments = (x, torch.randint(CLASSES, (9,)), torch.rand_like(x))
    with fusedstep.patched():
        program = torch.export.export(EveryLoss(), arguments)
        expected = EveryLoss()(*arguments)
    assert operators(program) == {"aten"}
    assert operators(program.run_decompositions()) == {"aten"}
    files = [str(tmp_path / name) for name in ("program.pt2", "arguments.pt", "losses.pt")]
    torch.export.save(program, files[0])
    torch.save(arguments, files[1])
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_US, *files], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(files[2]), expected)


def test_compiled_code_is_ours_before_and_after() -> None:
    criterion = nn.CrossEntropyLoss()
    seen: list[str] = []

    def backend(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        seen.extend(str(n.target) for n in module.graph.nodes if n.op == "call_function")
        return module.forward

    arguments = operands("cross_entropy")
    with fusedstep.patched():
        for _ in range(2):
            torch._dynamo.reset()
            torch.compile(lambda x, t: criterion(x, t), backend=backend)(*arguments)
            torch.export.export(criterion, arguments, strict=True)
    assert seen == ["fusedstep.cross_entropy"] * 2


# ------------------------------------------------------------------ losses that torch has not


class Focal(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return F.focal_loss(x, t, 1.5, ignore_index=2)


class WithLse(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return F.cross_entropy_with_lse(x, t, label_smoothing=0.1, z_loss=0.1)


@pytest.mark.parametrize("how", EXPORTS)
@pytest.mark.parametrize("module", [Focal, WithLse])
def test_for_any_number_of_rows_and_classes(module: type[nn.Module], how: str) -> None:
    shapes = ({0: Dim("rows"), 1: Dim("classes")}, {0: Dim("rows")})
    program = EXPORTS[how](module(), operands("cross_entropy"), dynamic_shapes=shapes)
    assert operators(program) == {"aten"}
    x, t = torch.randn(17, 300), torch.randint(300, (17,))
    torch.testing.assert_close(program.module()(x, t), module()(x, t))


@contextmanager
def recorded(exporting: bool) -> Iterator[None]:
    """Ours are what torch.export would record, if it does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "_is_exporting_flag", exporting)
        yield


OPTIONS: dict[str, list[Any]] = {
    "dtype": [F32, F64, BF16],
    "target": ["int64", "uint8", "probabilities"],
    "shape": [(9, CLASSES), (CLASSES,), (3, CLASSES, 5)],
    "weight": [False, True],
    "reduction": list(REDUCTIONS),
    "autocast": [False, True],
    "parameter": [0.0, 1.5],
}


@pytest.mark.parametrize(
    "row", pairwise(OPTIONS, seed=0), ids=lambda row: "-".join(map(str, row.values()))
)
def test_of_torchs_operators(row: dict[str, Any]) -> None:
    """Losses, dtypes and gradients are those of the kernels; row 0 is ignored, where rows are."""
    dtype, shape, parameter = row["dtype"], row["shape"], row["parameter"]
    x = torch.randn(shape, dtype=dtype)
    rows = shape[1:] if len(shape) == 1 else (*shape[:1], *shape[2:])
    probabilities = row["target"] == "probabilities"
    if probabilities:
        t = torch.rand(shape, dtype=dtype)
    else:
        t = torch.randint(CLASSES, rows, dtype=getattr(torch, row["target"]))
        t.flatten()[:1] = 3
    weight = torch.rand(CLASSES, dtype=dtype) + 0.5 if row["weight"] else None
    ignored = -100 if probabilities or len(shape) == 1 else 3
    options = {"ignore_index": ignored, "reduction": row["reduction"]}
    calls: list[Callable[[Tensor], Any]] = [
        lambda x: F.cross_entropy_with_lse(
            x, t, weight, **options, label_smoothing=0.1, z_loss=parameter
        )
    ]
    if not probabilities:
        calls.append(lambda x: (F.focal_loss(x, t, parameter, weight, **options),))
    for call in calls:
        results = []
        for exporting in (False, True):
            leaf = x.clone().requires_grad_()
            with torch.autocast("cpu", enabled=row["autocast"]), recorded(exporting):
                outputs = call(leaf)
            (grad,) = torch.autograd.grad([o.sum() for o in outputs], leaf)
            results.append([*outputs, grad])
        # In 16 bits each sums gradients that it has rounded.
        close = {"rtol": 0.016, "atol": 2e-3} if dtype is BF16 else {}
        torch.testing.assert_close(*results, **close)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_rows_of_what_is_no_number(value: float, reduction: str) -> None:
    """Their gradient is 0, the first and the second."""
    t = torch.tensor([1, 3, 2, 3])
    other = torch.randn(4, CLASSES, dtype=F64)
    for gamma in (0.0, 1.5):
        x = torch.randn(4, CLASSES, dtype=F64)
        x[t == 3] = value
        x.requires_grad_()
        with recorded(True):
            focal = F.focal_loss(x, t, gamma, ignore_index=3, reduction=reduction)
            loss, lse = F.cross_entropy_with_lse(
                x, t, ignore_index=3, reduction=reduction, z_loss=gamma
            )
        total = focal.sum() + loss.sum() + lse.sum()
        (first,) = torch.autograd.grad(total, x, create_graph=True)
        (second,) = torch.autograd.grad((first * other).sum(), x)
        for grad in (first, second):
            assert (grad[t == 3] == 0).all() and grad.isfinite().all()
            assert (grad[t != 3] != 0).any()


def test_what_they_refuse() -> None:
    x, t = operands("cross_entropy")
    for call in (
        lambda: F.focal_loss(x, t, -1.0),
        lambda: F.focal_loss(x, t, float("nan")),
        lambda: F.focal_loss(x, x),
        lambda: F.focal_loss(x, t, reduction="median"),
        lambda: F.cross_entropy_with_lse(x, t, z_loss=float("inf")),
        lambda: F.cross_entropy_with_lse(x, t, reduction="median"),
    ):
        errors = []
        for exporting in (False, True):
            with recorded(exporting), pytest.raises((ValueError, RuntimeError)) as error:
                call()
            errors.append((error.type, str(error.value).partition(", but its dtype")[0]))
        assert errors[0] == errors[1]
