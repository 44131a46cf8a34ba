"""Calls as a training step makes them, counted by callgrind: Python, autograd and kernel together.

python tests/native/count_calls.py counter.so    (under callgrind, by budget.py)
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable

import torch

import fusedstep

CALLS = 8


def count(counter: ctypes.CDLL, name: str, call: Callable[[], object]) -> None:
    """Counts a few calls after as many that fill caches."""
    for _ in range(CALLS):
        call()
    counter.start_counting()
    for _ in range(CALLS):
        call()
    counter.stop_counting(f"{name}|{CALLS}".encode())


def main() -> None:
    counter = ctypes.CDLL(sys.argv[1])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    gc.disable()
    logits = torch.randn(8, 10, requires_grad=True)
    target = torch.randint(10, (8,))
    other = torch.randn(8, 10)

    def loss() -> None:
        logits.grad = None
        fusedstep.functional.cross_entropy(logits, target).backward()

    def mse() -> None:
        logits.grad = None
        fusedstep.functional.mse_loss(logits, other).backward()

    count(counter, "cross_entropy and backward", loss)
    count(counter, "mse_loss and backward", mse)
    for tensors in (1, 20):
        params = [torch.randn(8, requires_grad=True) for _ in range(tensors)]
        for param in params:
            param.grad = torch.randn(8)
        optimizer = fusedstep.SGD(params, lr=0.1, momentum=0.9)
        count(counter, f"SGD.step of {tensors}", optimizer.step)


main()
