"""Measures the rounding errors of fusedstep beside torch's on the same inputs, as a Markdown table.

    python tests/error_measure.py                    # prints the table
    python tests/error_measure.py docs/numerics.md   # writes it between the page's two markers

The exact results come from numpy's long double, which has 11 more bits than float64. An error is
divided by the size of the terms that its result is the sum of, and by eps of its dtype: a result
that is rounded once, and that is not the small difference of large terms, has an error of at most
0.5. The mean is over all elements (for a reduced loss over the draws), the largest is their
largest.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as native
from torch import Tensor

import fusedstep
import fusedstep.functional as fused

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BEGIN, END = "<!-- errors: begin -->", "<!-- errors: end -->"
Array: TypeAlias = np.ndarray[Any, Any]
Results: TypeAlias = dict[str, Tensor]
Exact: TypeAlias = dict[str, tuple[Array, Array]]
"""For each result its exact value, and the size of the terms it is the sum of."""


@dataclass(frozen=True)
class Row:
    op: str
    result: str
    dtype: str
    size: str
    ours_mean: float
    torchs_mean: float
    ours_largest: float
    torchs_largest: float
    count: int
    """How many errors the means are of."""

    @property
    def is_not_worse(self) -> bool:
        return self.ours_mean <= self.torchs_mean and self.ours_largest <= self.torchs_largest

    @property
    def is_within_luck(self) -> bool:
        """The draws decide how far errors of one distribution come out. The mean of `count` of them
        is off by about 0.75 / sqrt(count) of itself, so that two means differ by more than 3 /
        sqrt(count) in one of 200 rows; the largest ones differ by up to 15 % more."""
        luck = 3 / math.sqrt(self.count)
        return (
            self.ours_mean <= (1 + luck) * self.torchs_mean + 1e-12
            and self.ours_largest <= (1.15 + luck) * self.torchs_largest + 1e-12
        )


def exact_array(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy().astype(np.longdouble)


# ------------------------------------------------------------------ what is measured


@dataclass(frozen=True)
class Operation:
    name: str
    sizes: tuple[tuple[int, ...], ...]
    draw: Callable[[tuple[int, ...], torch.dtype], dict[str, Tensor]]
    run: Callable[[Any, dict[str, Tensor]], Results]
    exact: Callable[[dict[str, Tensor]], Exact]


def loss_and_gradient(call: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    loss = call(leaf)
    loss.sum().backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def cross_entropy(name: str, kind: str = "index", smoothing: float = 0.0) -> Operation:
    def draw(size: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
        inputs = {"x": (3 * torch.randn(size, dtype=torch.float64)).to(dtype)}
        if kind == "probability":
            inputs["t"] = torch.randn(size, dtype=torch.float64).softmax(1).to(dtype)
        else:
            inputs["t"] = torch.randint(size[1], size[:1])
        if kind == "weighted":
            inputs["w"] = (0.25 + torch.rand(size[1], dtype=torch.float64)).to(dtype)
        return inputs

    def run(functions: Any, inputs: dict[str, Tensor]) -> Results:
        results: Results = {}
        for reduction in ("none", "mean"):

            def call(x: Tensor, reduction: str = reduction) -> Tensor:
                loss: Tensor = functions.cross_entropy(
                    x,
                    inputs["t"],
                    inputs.get("w"),
                    reduction=reduction,
                    label_smoothing=smoothing,
                )
                return loss

            loss, gradient = loss_and_gradient(call, inputs["x"])
            results[f"loss, {reduction}"] = loss
            results[f"gradient, {reduction}"] = gradient
        return results

    def exact(inputs: dict[str, Tensor]) -> Exact:
        x = exact_array(inputs["x"])
        n, classes = x.shape
        w = exact_array(inputs["w"]) if "w" in inputs else np.ones(classes, np.longdouble)
        eps = np.longdouble(smoothing)
        if kind == "probability":
            t = exact_array(inputs["t"])
            divisor = np.longdouble(n)
        else:
            index = inputs["t"].numpy()
            t = np.zeros_like(x)
            t[np.arange(n), index] = 1
            divisor = w[index].sum()
        u = w * (t * (1 - eps) + eps / classes)
        shifted = x - x.max(1, keepdims=True)
        e = np.exp(shifted)
        total = e.sum(1, keepdims=True)
        p, log_total = e / total, np.log(total)
        mass = u.sum(1, keepdims=True)
        loss = (u * (log_total - shifted)).sum(1)
        loss_size = (u * (log_total + np.abs(shifted) + 1)).sum(1)
        gradient = p * mass - u
        gradient_size = p * (1 + np.abs(shifted)) * mass + u
        return {
            "loss, none": (loss, loss_size),
            "gradient, none": (gradient, gradient_size),
            "loss, mean": (loss.sum() / divisor, loss_size.sum() / divisor),
            "gradient, mean": (gradient / divisor, gradient_size / divisor),
        }

    sizes = ((64, 10), (4096, 10), (256, 1000), (16, 8191), (1, 128256))
    return Operation(name, sizes, draw, run, exact)


def pointwise(name: str, **options: float) -> Operation:
    def draw(size: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
        x = (3 * torch.randn(size, dtype=torch.float64)).to(dtype)
        t = torch.rand(size, dtype=torch.float64).to(dtype)
        return {"x": x, "t": t}

    def run(functions: Any, inputs: dict[str, Tensor]) -> Results:
        results: Results = {}
        for reduction in ("none", "mean"):

            def call(x: Tensor, reduction: str = reduction) -> Tensor:
                function = getattr(functions, name)
                loss: Tensor = function(x, inputs["t"], reduction=reduction, **options)
                return loss

            loss, gradient = loss_and_gradient(call, inputs["x"])
            results[f"loss, {reduction}"] = loss
            results[f"gradient, {reduction}"] = gradient
        return results

    def exact(inputs: dict[str, Tensor]) -> Exact:
        x, t = exact_array(inputs["x"]), exact_array(inputs["t"])
        d = x - t
        size = np.abs(d)
        if name == "l1_loss":
            loss, gradient = size, np.sign(d)
        elif name == "mse_loss":
            loss, gradient = d * d, 2 * d
        elif name == "smooth_l1_loss":
            beta = options["beta"]
            loss = np.where(size < beta, d * d / (2 * beta), size - beta / 2)
            gradient = np.where(size < beta, d / beta, np.sign(d))
        elif name == "huber_loss":
            delta = options["delta"]
            loss = np.where(size <= delta, d * d / 2, delta * (size - delta / 2))
            gradient = np.where(size <= delta, d, delta * np.sign(d))
        else:
            softplus = np.log1p(np.exp(-np.abs(x))) + np.maximum(-x, 0)
            p = 1 / (1 + np.exp(-x))
            loss, gradient = (1 - t) * x + softplus, p - t
            loss_size, gradient_size = np.abs((1 - t) * x) + softplus, p + t
            return results(loss, loss_size, gradient, gradient_size)
        return results(loss, np.abs(loss), gradient, np.abs(gradient))

    def results(loss: Array, loss_size: Array, gradient: Array, gradient_size: Array) -> Exact:
        n = loss.size
        return {
            "loss, none": (loss, loss_size),
            "gradient, none": (gradient, gradient_size),
            "loss, mean": (loss.sum() / n, loss_size.sum() / n),
            "gradient, mean": (gradient / n, gradient_size / n),
        }

    return Operation(name, ((100,), (10_000,), (100_003,)), draw, run, exact)


def sgd(name: str, **options: Any) -> Operation:
    """One step from a parameter, a gradient and, with momentum, a buffer as they are stored."""

    def draw(size: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
        return {key: torch.randn(size, dtype=torch.float64).to(dtype) for key in ("p", "g", "b")}

    def run(implementation: Any, inputs: dict[str, Tensor]) -> Results:
        param = torch.nn.Parameter(inputs["p"].clone())
        param.grad = inputs["g"].clone()
        if implementation is fused:
            optimizer: torch.optim.SGD = fusedstep.SGD([param], lr=0.1, **options)
        else:
            optimizer = torch.optim.SGD([param], lr=0.1, foreach=False, **options)
        buffer = inputs["b"].clone()
        if "momentum" in options:
            optimizer.state[param]["momentum_buffer"] = buffer
        optimizer.step()
        results = {"parameter": param.detach()}
        return {**results, "momentum buffer": buffer} if "momentum" in options else results

    def exact(inputs: dict[str, Tensor]) -> Exact:
        p, g, b = (exact_array(inputs[key]) for key in ("p", "g", "b"))
        decay, momentum = options.get("weight_decay", 0.0), options.get("momentum", 0.0)
        step = g + decay * p
        size = np.abs(g) + decay * np.abs(p)
        exact: Exact = {}
        if momentum:
            kept, kept_size = momentum * b + step, momentum * np.abs(b) + size
            exact["momentum buffer"] = (kept, kept_size)
            nesterov = options.get("nesterov", False)
            step = step + momentum * kept if nesterov else kept
            size = size + momentum * kept_size if nesterov else kept_size
        exact["parameter"] = (p - 0.1 * step, np.abs(p) + 0.1 * size)
        return exact

    return Operation(name, ((100,), (100_003,)), draw, run, exact)


OPERATIONS = (
    cross_entropy("cross_entropy"),
    cross_entropy("cross_entropy, label smoothing", smoothing=0.1),
    cross_entropy("cross_entropy, class weights", kind="weighted"),
    cross_entropy("cross_entropy, probabilities", kind="probability"),
    pointwise("l1_loss"),
    pointwise("mse_loss"),
    pointwise("smooth_l1_loss", beta=0.7),
    pointwise("huber_loss", delta=0.7),
    pointwise("binary_cross_entropy_with_logits"),
    sgd("SGD"),
    sgd("SGD, momentum", momentum=0.9, weight_decay=0.01),
    sgd("SGD, Nesterov", momentum=0.9, weight_decay=0.01, nesterov=True),
)


# ------------------------------------------------------------------ the measurement


def errors(results: Results, exact: Exact, dtype: torch.dtype) -> dict[str, Array]:
    eps = torch.finfo(dtype).eps
    found = {}
    for name, result in results.items():
        value, size = exact[name]
        off = np.abs(exact_array(result) - value)
        found[name] = np.atleast_1d((off / (size + np.longdouble(1e-300)) / eps).astype(float))
    return found


def rows_of(
    operation: Operation, size: tuple[int, ...], dtype: torch.dtype, numbers: int = 2_000_000
) -> Iterator[Row]:
    """Draws inputs until there are about so many numbers; from 60 to 300 times (a
    reduced loss is one number a draw)."""
    draws = min(300, max(60, numbers // math.prod(size)))
    pooled: dict[str, tuple[list[Array], list[Array]]] = {}
    for seed in range(draws):
        torch.manual_seed(seed)
        inputs = operation.draw(size, dtype)
        exact = operation.exact(inputs)
        both = [errors(operation.run(f, inputs), exact, dtype) for f in (fused, native)]
        for name in both[0]:
            ours, torchs = pooled.setdefault(name, ([], []))
            ours.append(both[0][name].ravel())
            torchs.append(both[1][name].ravel())
    for name, (ours, torchs) in sorted(pooled.items()):
        a, b = np.concatenate(ours), np.concatenate(torchs)
        yield Row(
            operation.name,
            name,
            str(dtype).removeprefix("torch."),
            " × ".join(map(str, size)),
            *(float(f(v)) for f in (np.mean, np.max) for v in (a, b)),
            count=a.size,
        )


def all_rows(operations: tuple[Operation, ...] = OPERATIONS) -> Iterator[Row]:
    for operation in operations:
        for dtype in DTYPES:
            for size in operation.sizes:
                yield from rows_of(operation, size, dtype)


def table(rows: list[Row]) -> str:
    lines = [
        "| operation | result | dtype | size | mean error, fusedstep | torch | "
        "largest, fusedstep | torch |",
        "|---|---|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        figures = (row.ours_mean, row.torchs_mean, row.ours_largest, row.torchs_largest)
        cells = (row.op, row.result, row.dtype, row.size, *(f"{figure:.3g}" for figure in figures))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(rows: list[Row]) -> str:
    """How many rows are larger than torch's, and by how much at most."""
    worse = [row for row in rows if not row.is_not_worse]
    text = f"Of the {len(rows)} rows {len(rows) - len(worse)} are no larger than torch's in either "
    if not worse:
        return text + "figure."
    mean, largest = (
        max(ours / max(torchs, 1e-12) for ours, torchs in pairs)
        for pairs in (
            [(row.ours_mean, row.torchs_mean) for row in worse],
            [(row.ours_largest, row.torchs_largest) for row in worse],
        )
    )
    return text + (
        f"figure. In the others the mean is at most {mean:.2f} times torch's, the largest error at "
        f"most {largest:.2f} times."
    )


def write(page: Path, text: str) -> None:
    """Puts the text between the markers of the page."""
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    rows = list(all_rows())
    text = f"{summary(rows)}\n\n{table(rows)}"
    if arguments:
        write(Path(arguments[0]), text)
    else:
        print(text)
    worse = [row for row in rows if not row.is_not_worse]
    print(f"{len(rows)} rows; larger than torch's in {len(worse)}", file=sys.stderr)
    for row in worse:
        print(row, file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
