"""What the functions under torch's names say of themselves, and what watches calls gets to see."""

from __future__ import annotations

import functools
import inspect
import pickle
import typing
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._prims.context import TorchRefsMode
from torch.overrides import TorchFunctionMode

import fusedstep
from fusedstep import functional
from numerics import pairwise

pytestmark = pytest.mark.usefixtures("cpu_only")  # names depend on no device
F = torch.nn.functional
TORCH = {name: getattr(F, name) for name in functional.stand_ins}
torch.optim.SGD([torch.empty(0)])  # the first one, with which torch prepares the class
METHODS = {name: getattr(torch.optim.SGD, name) for name in ("step", "zero_grad")}


@pytest.fixture
def patched() -> Iterator[None]:
    with fusedstep.patched():
        yield


def replaced() -> list[tuple[Callable[..., Any], Callable[..., Any]]]:
    """Each function under a name of torch, and torch's own."""
    functions = [(getattr(F, name), torchs) for name, torchs in TORCH.items()]
    methods = [(getattr(torch.optim.SGD, name), torchs) for name, torchs in METHODS.items()]
    assert all(ours is not torchs for ours, torchs in functions + methods)
    return functions + methods


# ------------------------------------------------------------------ names


@pytest.mark.usefixtures("patched")
def test_what_a_function_says_of_itself() -> None:
    for ours, torchs in replaced():
        for attribute in ("__name__", "__annotations__"):
            assert getattr(ours, attribute) == getattr(torchs, attribute)
        assert inspect.signature(ours) == inspect.signature(torchs)
        assert typing.get_type_hints(ours) == typing.get_type_hints(torchs)
        assert inspect.getdoc(ours)
        assert pickle.loads(pickle.dumps(ours)) is ours

        @functools.wraps(ours)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

        assert inspect.signature(wrapper) == inspect.signature(torchs)
        assert wrapper.__module__ == ours.__module__


def test_a_pickle_means_what_the_name_means() -> None:
    with fusedstep.patched():
        pickles = [pickle.dumps(ours) for ours, _ in replaced()]
        torchs = [torchs for _, torchs in replaced()]
    assert not any(b"fusedstep" in pickled for pickled in pickles)
    assert [pickle.loads(pickled) for pickled in pickles] == torchs


def public_functions() -> Iterator[Callable[..., Any]]:
    yield from (getattr(functional, name) for name in functional.__all__)
    for module in (fusedstep.nn, fusedstep.optim):
        for name in module.__all__:
            members = vars(getattr(module, name)).values()
            yield from (member for member in members if inspect.isfunction(member))


def test_annotations_are_types() -> None:
    for function in public_functions():
        assert function.__annotations__, function
        for annotation in function.__annotations__.values():
            assert not isinstance(annotation, str), function


# ------------------------------------------------------------------ function modes


class Calls(TorchFunctionMode):
    """Notes every call, in full."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append((func.__name__, types, args, kwargs))
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    """Notes every call that it is an operand of, in full, and computes with plain tensors."""

    seen: typing.ClassVar[list[Any]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            plain = [a.as_subclass(Tensor) if isinstance(a, cls) else a for a in args]
            if func.__name__ in TORCH:
                cls.seen.append((func.__name__, types, tuple(plain), kwargs))
            return func(*plain, **(kwargs or {}))


class AlikeOnlyIfTheSame:
    """Compares calls: tensors by identity or, where they are views made on the way, by memory."""

    def __init__(self, calls: list[Any]) -> None:
        self.calls = torch.utils._pytree.tree_map_only(
            Tensor, lambda t: (t.data_ptr(), t.shape), calls
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AlikeOnlyIfTheSame) and self.calls == other.calls

    def __repr__(self) -> str:
        return repr(self.calls)


WEIGHT = torch.tensor([0.5, 1.0, 1.5, 2.0])
OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "reduction": {"reduction": "sum"},
    "old names": {"size_average": False, "reduce": True},
    "an old name": {"reduce": False},
    "no weight": {"weight": None},
    "a weight": {"weight": WEIGHT},
    "positive weight": {"pos_weight": WEIGHT},
    "beta": {"beta": 0.0},
    "delta": {"delta": 2.0},
    "smoothing": {"label_smoothing": 0.1, "ignore_index": 1},
}
ROWS = [
    row
    for row in pairwise(
        {
            "name": list(TORCH),
            "options": list(OPTIONS),
            "who": ["patched", "imported"],
            "watcher": ["mode", "subclass", "default device"],
        },
        seed=0,
    )
    if OPTIONS[row["options"]].keys() <= inspect.signature(TORCH[row["name"]]).parameters.keys()
]


def test_every_loss_is_watched_for_everybody() -> None:
    for watcher in ("mode", "subclass"):
        watched = {(r["name"], r["who"]) for r in ROWS if r["watcher"] == watcher}
        assert {name for name, _ in watched} == TORCH.keys()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(row.values()))
@pytest.mark.filterwarnings("ignore:size_average and reduce:UserWarning")
def test_who_watches_sees_what_torch_passes(row: dict[str, str]) -> None:
    name = row["name"]
    options = dict(OPTIONS[row["options"]])
    x = torch.randn(3, 4)
    t = torch.tensor([0, 1, 2]) if name == "cross_entropy" else torch.rand(3, 4)
    if "weight" in options and options["weight"] is not None and name != "cross_entropy":
        options["weight"] = WEIGHT.expand(3, 4)
    results, seen = [], []
    for ours in (True, False):
        patch = fusedstep.patched() if ours and row["who"] == "patched" else nullcontext()
        with patch:
            function = getattr(functional if ours and row["who"] == "imported" else F, name)
            if row["watcher"] == "mode":
                with Calls() as mode:
                    results.append(function(x, t, **options))
                calls = mode.seen
            elif row["watcher"] == "subclass":
                Subclass.seen.clear()
                results.append(function(x.as_subclass(Subclass), t, **options))
                calls = list(Subclass.seen)
            else:
                with torch.device("cpu"):
                    results.append(function(x, t, **options))
                calls = []
        seen.append(AlikeOnlyIfTheSame(calls))
    torch.testing.assert_close(*results)
    if (name, row["who"], row["options"]) == ("l1_loss", "imported", "a weight"):
        return  # which torch's l1_loss does not name to who watches
    assert seen[0] == seen[1]


@pytest.mark.parametrize("who", ["patched", "imported"])
@pytest.mark.parametrize("name", TORCH)
def test_a_mode_sees_one_call_of_the_public_name(name: str, who: str) -> None:
    """Which computes with our kernels once the mode lets it through."""
    x, t = torch.randn(3, 4), torch.rand(3, 4)
    with fusedstep.patched() if who == "patched" else nullcontext():
        public = getattr(F if who == "patched" else functional, name)
        functions: list[Any] = []

        class Mode(TorchFunctionMode):
            def __torch_function__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                functions.append(func)
                return func(*args, **(kwargs or {}))

        fusedstep.reset_stats()
        with Mode():
            public(x, t)
        assert functions == [public]
        assert fusedstep.stats().fused == 1 and fusedstep.stats().fell_back == 0


WHERE = ("inside", "around", "default device")


@pytest.mark.parametrize(
    ("name", "where"),
    [(name, "inside") for name in TORCH]
    + [(name, where) for name in ("cross_entropy", "l1_loss") for where in WHERE[1:]],
)
def test_a_compiled_call(name: str, where: str) -> None:
    """Is ours in the graph, and a mode sees the public name and torch's arguments."""
    x, t = torch.randn(3, 4), torch.rand(3, 4)
    expected = TORCH[name](x, t)
    torchs = Calls()
    with torchs:
        TORCH[name](x, t)
    for who in ("patched", "imported"):
        graphs: list[torch.fx.Graph] = []

        def backend(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
            graphs.append(module.graph)  # noqa: B023
            return module.forward

        torch._dynamo.reset()
        with fusedstep.patched() if who == "patched" else nullcontext():
            mode = Calls()
            inside = mode if where == "inside" else nullcontext()
            around = {"around": mode, "default device": torch.device("cpu")}.get(where)

            def call(x: Tensor, t: Tensor) -> Tensor:
                with inside:  # noqa: B023
                    loss: Tensor = getattr(F if who == "patched" else functional, name)(x, t)  # noqa: B023
                return loss

            with around or nullcontext():
                loss = torch.compile(call, backend=backend, fullgraph=True)(x, t)
        torch.testing.assert_close(loss, expected)
        (graph,) = graphs
        called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
        assert len(called) == 1 and called[0].startswith("fusedstep.")
        seen = [(name, kwargs) for name, _, _, kwargs in mode.seen if name in TORCH]
        if where == "default device":
            assert not seen
        else:
            assert seen == [(name, kwargs) for name, _, _, kwargs in torchs.seen]


@pytest.mark.usefixtures("patched")
def test_torchs_references_take_the_arguments() -> None:
    x, t = torch.randn(3, 4), torch.rand(3, 4)
    for name in ("l1_loss", "smooth_l1_loss"):
        expected = TORCH[name](x, t)
        with TorchRefsMode():
            torch.testing.assert_close(getattr(F, name)(x, t), expected)


@pytest.mark.parametrize("name", TORCH)
def test_a_warning_of_old_names_comes_once(name: str) -> None:
    if name == "huber_loss":
        pytest.skip("takes no old names")
    x, t = torch.randn(3, 4), torch.rand(3, 4)
    for watch in (nullcontext, Calls):
        with watch(), pytest.warns(UserWarning, match="size_average and reduce") as warned:
            loss = getattr(functional, name)(x, t, reduce=False)
        torch.testing.assert_close(loss, TORCH[name](x, t, reduction="none"))
        assert len(warned) == 1
