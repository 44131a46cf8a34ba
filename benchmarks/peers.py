"""What fusedstep is measured against: torch's own implementations, torch.compile and peers.

Peers are called by the interface of liger-kernel 0.8.5 and quack-kernels 0.6.5, and by the public
functions of apex, flash-attn, cut-cross-entropy and TransformerEngine; all of them need CUDA.
Each implementation runs with its default settings, except where its name says otherwise, and its
results are checked: one that is called wrongly is reported, not timed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import SGD

from correctness import WrongResult

Function = Callable[..., Any]

# Of other implementations, some of which round intermediate results.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.bfloat16: 2e-2,
    torch.float16: 4e-3,
}


NOT_A_CLASS = -100  # the index that apex leaves out of the loss; its default is 0


class Unmeasured(Exception):
    """An implementation has no part in a case; the message says why."""


def why(error: Exception) -> str:
    """One line; what precedes its colon fits a table."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, Unmeasured):
        return text
    kinds = {ImportError: "absent", WrongResult: "wrong", torch.OutOfMemoryError: "no memory"}
    kind = next((kinds[known] for known in kinds if isinstance(error, known)), "failed")
    return f"{kind}: {type(error).__name__}: {text}"


@dataclass(frozen=True)
class Other:
    load: Callable[[], Function]
    package: str = "torch"
    compiles: bool = False
    """It takes seconds at each new shape or dtype."""
    plain_matrices_only: bool = False
    """Class indices for (N, C) logits, with the default settings."""
    overwrites_logits: bool = False


def compiled(function: Function) -> Function:
    # The number of threads is in the generated code: it belongs to what the cache is asked for.
    threads: dict[str, str | int | bool | Callable[..., Any]] = {
        "cpp.threads": torch.get_num_threads()
    }
    call: Function = torch.compile(
        lambda *arguments, **settings: function(*arguments, **settings),
        dynamic=False,
        fullgraph=True,
        options=threads,
    )
    return call


def liger_loss() -> Function:
    function = importlib.import_module("liger_kernel.ops.cross_entropy").LigerCrossEntropyFunction
    return lambda x, y: function.apply(x, y, None)[0]


def quack_loss() -> Function:
    function: Function = importlib.import_module("quack.cross_entropy").cross_entropy
    return function


def apex_loss() -> Function:
    function = importlib.import_module("apex.contrib.xentropy").SoftmaxCrossEntropyLoss
    return lambda x, y: function.apply(x, y, 0.0, NOT_A_CLASS).mean()


def flash_attention_loss() -> Function:
    module = importlib.import_module("flash_attn.ops.triton.cross_entropy")
    return lambda x, y: module.cross_entropy_loss(x, y)[0].mean()


def cut_cross_entropy() -> Function:
    function = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda hidden, weight, y: function(hidden, weight, y)


def liger_linear_loss() -> Function:
    module = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    function = module.LigerFusedLinearCrossEntropyFunction
    return lambda hidden, weight, y: function.apply(hidden, weight, y)[0]


LOSSES = {
    "native": Other(lambda: F.cross_entropy),
    "compile": Other(lambda: compiled(F.cross_entropy), compiles=True),
    "Liger": Other(
        liger_loss,
        "liger-kernel",
        compiles=True,
        plain_matrices_only=True,
        overwrites_logits=True,
    ),
    "quack": Other(quack_loss, "quack-kernels", compiles=True, plain_matrices_only=True),
    "apex": Other(apex_loss, "apex", plain_matrices_only=True),
    "flash-attention": Other(
        flash_attention_loss, "flash-attn", compiles=True, plain_matrices_only=True
    ),
}


def linear_loss(hidden: Tensor, weight: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), y)


def chunked_linear_loss() -> Function:
    options = torch.nn.LinearCrossEntropyOptions()
    return partial(F.linear_cross_entropy, options=options)


LINEAR_LOSSES = {
    "native": Other(lambda: linear_loss),
    "compile": Other(lambda: compiled(linear_loss), compiles=True),
    "F.linear_cross_entropy": Other(lambda: F.linear_cross_entropy),
    "F.linear_cross_entropy (chunked)": Other(chunked_linear_loss),
    "Liger": Other(liger_linear_loss, "liger-kernel", compiles=True),
    "Apple CCE": Other(cut_cross_entropy, "cut-cross-entropy", compiles=True),
}


def compiled_sgd(*arguments: Any, **settings: Any) -> SGD:
    optimizer = SGD(*arguments, **settings)
    optimizer.step = torch.compile(optimizer.step, dynamic=False)  # type: ignore[method-assign]
    return optimizer


def apex_sgd() -> Function:
    function: Function = importlib.import_module("apex.optimizers").FusedSGD
    return function


def transformer_engine_sgd() -> Function:
    function: Function = importlib.import_module("transformer_engine.pytorch.optimizers").FusedSGD
    return function


OPTIMIZERS = {
    "for-loop": Other(lambda: partial(SGD, foreach=False)),
    "foreach": Other(lambda: partial(SGD, foreach=True)),
    "fused": Other(lambda: partial(SGD, fused=True)),
    "compile": Other(lambda: compiled_sgd, compiles=True),
    "apex": Other(apex_sgd, "apex"),
    "TransformerEngine": Other(transformer_engine_sgd, "transformer-engine"),
}
# fusedstep's optimizer in a training loop without its options.
WITHOUT_OPTIONS = {
    "step()": Other(lambda: importlib.import_module("fusedstep").SGD, "fusedstep"),
}
DEFAULT_OPTIMIZER = {"cpu": "for-loop", "cuda": "foreach"}
ALL = {**LOSSES, **LINEAR_LOSSES, **OPTIMIZERS, **WITHOUT_OPTIONS}


def load(others: Mapping[str, Other], device: str) -> dict[str, str]:
    """Of each, its package's version, or why it is absent."""
    found = {}
    for name, other in others.items():
        if other.package not in ("torch", "fusedstep") and device != "cuda":
            found[name] = "absent: it needs CUDA"
            continue
        try:
            other.load()
        except Exception as error:  # of any kind: these are other people's packages
            found[name] = why(error)
        else:
            found[name] = version_of(other.package)
    return found


def present(found: Mapping[str, str]) -> Iterable[str]:
    return (name for name, what in found.items() if not what.startswith(("absent", "failed")))


def version_of(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:  # imported from a plain folder
        return package
