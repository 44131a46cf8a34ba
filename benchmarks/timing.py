"""Times several callables against each other, in turns.

In each round every candidate gets one block of calls, in a new random order, so that a drift of the
machine's speed affects all of them alike. Ratios are taken within a round, between blocks that are
milliseconds apart. Results are medians over the rounds, with the quartiles as their spread.
"""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from time import perf_counter
from typing import TypeVar

import numpy as np
import torch

T = TypeVar("T")
Call = Callable[[], object]

# On CUDA a block begins on an idle GPU, and what passes until its first kernel must weigh little.
BLOCK_SECONDS = {"cpu": 2e-3, "cuda": 10e-3}
MAX_BUFFER_SETS = 64
LEAST_ROUNDS = 5
CLEARLY_LONG = 10  # blocks: no disturbance stretches a short call so far


@dataclass(frozen=True)
class Spread:
    """The quartiles of a sample."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, sample: Sequence[float]) -> Spread:
        low, median, high = np.quantile(sample, [0.25, 0.5, 0.75]).tolist()
        return cls(median, low, high)

    def scaled(self, factor: float) -> Spread:
        return Spread(factor * self.median, factor * self.low, factor * self.high)


@dataclass(frozen=True)
class Measurement:
    """Seconds per call of each candidate, one entry a round."""

    seconds: Mapping[str, Sequence[float]]

    def time(self, name: str) -> Spread:
        return Spread.of(self.seconds[name])

    def ratios(self, numerator: str, denominator: str) -> list[float]:
        pairs = zip(self.seconds[numerator], self.seconds[denominator], strict=True)
        return [above / below for above, below in pairs]

    def ratio(self, numerator: str, denominator: str) -> Spread:
        return Spread.of(self.ratios(numerator, denominator))


def timed(call: Callable[[], T], device: str) -> tuple[T, float]:
    """What `call` returns and the seconds it takes, the work it leaves on the GPU included.

    The first event meets an idle GPU and passes at once. Where the GPU waits for the host to launch
    the next kernel, the time between the events is therefore the host's, as in a training loop.
    """
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        result = call()
        end.record()
        end.synchronize()
        return result, start.elapsed_time(end) / 1e3
    begin = perf_counter()
    result = call()
    return result, perf_counter() - begin


def buffer_sets(nbytes: int, device: str) -> int:
    """How many copies of `nbytes` of operands calls must rotate through to read device memory.

    On CUDA together they exceed the L2 cache twice over. Operands so small that MAX_BUFFER_SETS of
    them still fit are timed by their launches, not by their memory. A CPU benchmark wants the
    operands where training leaves them, in its cache if they fit: one set.
    """
    if device != "cuda":
        return 1
    cache = torch.cuda.get_device_properties().L2_cache_size
    return min(math.ceil(2 * cache / nbytes) + 1, MAX_BUFFER_SETS)


def measure(
    candidates: Mapping[str, Call | Sequence[Call]],
    device: str,
    rounds: int,
    seconds: float = math.inf,
    agreed: Callable[[float], float] = lambda seconds: seconds,
) -> Measurement:
    """Times `candidates`; one given as several calls takes turns through them.

    Rounds that would together take longer than `seconds` are left out, but for LEAST_ROUNDS. What a
    block took is what `agreed` makes of it: processes that make their calls together, and must make
    equally many, agree on one number.
    """
    blocks = {
        name: Block([calls] if callable(calls) else calls, device, agreed)
        for name, calls in candidates.items()
    }
    order = list(blocks)
    shuffle = random.Random(0).shuffle
    samples: dict[str, list[float]] = {name: [] for name in order}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for block in blocks.values():
            block.warm_up()
        affordable = seconds / sum(block.seconds for block in blocks.values())
        for _ in range(int(min(rounds, max(affordable, LEAST_ROUNDS)))):
            shuffle(order)
            for name in order:
                samples[name].append(blocks[name].seconds_per_call())
    finally:
        if collecting:
            gc.enable()
    return Measurement(samples)


class Block:
    """So many calls of one candidate that they fill BLOCK_SECONDS, or one longer call."""

    def __init__(
        self, calls: Sequence[Call], device: str, agreed: Callable[[float], float]
    ) -> None:
        self._turns = cycle(calls)
        self._device = device
        self._agreed = agreed
        self._calls = len(calls)
        self.seconds = 0.0
        """What a block takes, known when it is warm."""

    def warm_up(self) -> None:
        self._took()  # each call once: it makes the state and memory that later turns find
        self._calls = 1
        while (seconds := self._least()) < BLOCK_SECONDS[self._device]:
            self._calls *= 2
        self.seconds = seconds

    def seconds_per_call(self) -> float:
        return self._took() / self._calls

    def _least(self) -> float:
        first = self._took()
        if first > CLEARLY_LONG * BLOCK_SECONDS[self._device]:
            return first
        return min(first, self._took(), self._took())

    def _took(self) -> float:
        _, seconds = timed(self._run, self._device)
        return self._agreed(seconds)

    def _run(self) -> None:
        for call in islice(self._turns, self._calls):
            call()
