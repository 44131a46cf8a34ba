"""How kernels are launched: pure functions of sizes and limits, tested on devices of every kind."""

from __future__ import annotations

import ctypes
import itertools
from ctypes import POINTER, Structure, byref, c_bool, c_int, c_int64
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emulator import build

WALKS = ("lanes", "warp", "block", "stream", "stream_column", "stream_strided")
WARP = 32
VECTOR_BYTES = 16
MAX_THREADS = 512
# What a kernel may declare itself, and what a device keeps for each block.
STATIC_BYTES, RESERVED_BYTES = 2048, 1024


class Limits(Structure):
    _fields_ = [
        ("multiprocessors", c_int),
        ("compute_capability", c_int),
        ("shared_per_block", c_int),
        ("shared_per_multiprocessor", c_int),
    ]


class Shape(Structure):
    _fields_ = [(name, c_int64) for name in ("blocks", "threads", "shared_bytes", "cluster")]


class Plan(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("walk", "group", "stage_pieces")),
        ("shape", Shape),
    ]


# From the CUDA programming guide's table of compute capabilities: multiprocessors of a common
# device, and its shared memory for a block and in all.
DEVICES = {
    "T4": Limits(40, 75, 64 << 10, 64 << 10),
    "A100": Limits(108, 80, 163 << 10, 164 << 10),
    "RTX 3060": Limits(28, 86, 99 << 10, 100 << 10),
    "RTX 4090": Limits(128, 89, 99 << 10, 100 << 10),
    "H200": Limits(132, 90, 227 << 10, 228 << 10),
    "H200, a seventh": Limits(16, 90, 227 << 10, 228 << 10),
    "B200": Limits(148, 100, 227 << 10, 228 << 10),
    "RTX 5090": Limits(170, 120, 99 << 10, 100 << 10),
    "one multiprocessor": Limits(1, 90, 227 << 10, 228 << 10),
}
# Blocks that a multiprocessor holds at most, by the same table.
MOST_BLOCKS = {75: 16, 80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 120: 24}
# Borders of every choice, and numbers between them.
COUNTS = sorted(
    {
        *(
            n + d
            for n in (0, 4, 32, 128, 512, 1000, 2048, 4096, 32768, 1 << 17)
            for d in (-1, 0, 1)
        ),
        *(10, 50257, 262144, 10**6, 2**31 + 5),
    }
    - {-1}
)


@pytest.fixture(scope="module")
def plans() -> ctypes.CDLL:
    library = build.OUT / "launch_plans.so"
    build.build_program([Path(__file__).with_name("launch_plans.cpp")], library, ["-shared"])
    loaded = ctypes.CDLL(str(library))
    loaded.cross_entropy_plan.argtypes = [
        c_int64, c_int64, c_bool, c_bool, c_int, POINTER(Limits), POINTER(Plan),
    ]  # fmt: skip
    loaded.sgd_shape.argtypes = [c_int64, POINTER(Limits), POINTER(Shape)]
    loaded.sgd_entries_in_parameters.argtypes = [c_int64]
    loaded.sgd_entries_in_parameters.restype = c_int64
    return loaded


def is_resident(shape: Shape, item_size: int, device: Limits) -> bool:
    """Whether all blocks run at once, as a grid that waits for itself needs: by the registers that
    the compiler may take (64 a thread, 128 for 64-bit values, of 65,536), by shared memory and by
    how many blocks a multiprocessor has at most."""
    registers = 128 if item_size == 8 else 64
    by_registers = 65536 // (registers * shape.threads)
    each = shape.shared_bytes + STATIC_BYTES + RESERVED_BYTES
    by_shared = device.shared_per_multiprocessor // each
    fit = min(by_registers, by_shared, MOST_BLOCKS[device.compute_capability])
    return bool(shape.blocks <= device.multiprocessors * fit)


@pytest.mark.parametrize("item_size", [2, 4, 8])
@pytest.mark.parametrize("name", DEVICES)
def test_every_cross_entropy_plan_can_run(plans: ctypes.CDLL, name: str, item_size: int) -> None:
    device = DEVICES[name]
    taken = set()
    for rows, classes, (adjacent, vectors) in itertools.product(
        COUNTS, COUNTS[1:], ((True, True), (True, False), (False, False))
    ):
        plan = Plan()
        plans.cross_entropy_plan(rows, classes, adjacent, vectors, item_size, device, byref(plan))
        shape, walk = plan.shape, WALKS[plan.walk]
        taken.add(walk)
        case = f"{rows} x {classes}: {walk}"
        assert is_resident(shape, item_size, device), case
        assert shape.blocks >= 1, case
        assert WARP <= shape.threads <= MAX_THREADS and shape.threads % WARP == 0, case
        assert shape.threads % plan.group == 0, case
        assert shape.shared_bytes == shape.threads * plan.stage_pieces * VECTOR_BYTES, case
        assert shape.shared_bytes + STATIC_BYTES <= device.shared_per_block, case
        assert 1 <= shape.cluster <= 8 and shape.blocks % shape.cluster == 0, case
        if shape.cluster > 1:
            assert walk == "block" and device.compute_capability >= 90, case
        if walk in ("lanes", "warp", "stream_column"):
            assert plan.group <= WARP and WARP % plan.group == 0, case
        else:
            assert plan.group == shape.threads, case
        if walk == "lanes":
            assert classes <= 4 * plan.group, case
        if walk in ("warp", "block"):
            kept = plan.group * shape.cluster * plan.stage_pieces * VECTOR_BYTES
            assert kept >= classes * item_size // VECTOR_BYTES * VECTOR_BYTES, case
        if walk in ("warp", "block", "stream"):
            assert adjacent and vectors, case
        groups = shape.blocks // shape.cluster * (shape.threads // plan.group)
        assert shape.blocks <= shape.cluster or groups < rows + shape.threads // plan.group, case
    assert taken == set(WALKS)


@given(
    rows=st.integers(0, 2**40),
    classes=st.integers(1, 2**33),
    adjacent=st.booleans(),
    vectors=st.booleans(),
    item_size=st.sampled_from([2, 4, 8]),
    name=st.sampled_from(sorted(DEVICES)),
)
def test_no_size_is_too_large_to_plan(
    plans: ctypes.CDLL,
    rows: int,
    classes: int,
    adjacent: bool,
    vectors: bool,
    item_size: int,
    name: str,
) -> None:
    plan, device = Plan(), DEVICES[name]
    plans.cross_entropy_plan(rows, classes, adjacent, vectors, item_size, device, byref(plan))
    assert is_resident(plan.shape, item_size, device)
    assert plan.shape.blocks >= 1 and WARP <= plan.shape.threads <= MAX_THREADS


@pytest.mark.parametrize(
    ("rows", "classes", "item_size", "walk", "cluster"),
    [
        (64, 10, 4, "lanes", 1),
        (256, 1000, 4, "warp", 1),
        (1024, 1000, 4, "warp", 1),
        (8192, 4096, 2, "block", 1),
        (4096, 32000, 2, "block", 1),
        (4096, 50257, 2, "block", 1),
        (4096, 32000, 4, "block", 2),
        (4096, 128256, 2, "block", 4),
        (4096, 128256, 4, "block", 8),
        (64, 10**6, 4, "stream", 1),
    ],
)
def test_well_known_sizes_on_hopper(
    plans: ctypes.CDLL, rows: int, classes: int, item_size: int, walk: str, cluster: int
) -> None:
    plan = Plan()
    plans.cross_entropy_plan(rows, classes, True, True, item_size, DEVICES["H200"], byref(plan))
    assert (WALKS[plan.walk], plan.shape.cluster) == (walk, cluster)


def test_few_rows_take_one_block(plans: ctypes.CDLL) -> None:
    """A grid of one block waits for nobody."""
    for rows, classes in ((1, 10), (64, 10), (512, 10), (64, 1000), (32, 100)):
        plan = Plan()
        plans.cross_entropy_plan(rows, classes, True, True, 4, DEVICES["H200"], byref(plan))
        assert plan.shape.blocks == 1


@pytest.mark.parametrize("name", DEVICES)
def test_every_sgd_step_is_one_grid(plans: ctypes.CDLL, name: str) -> None:
    device = DEVICES[name]
    for chunks in COUNTS[1:]:
        shape = Shape()
        plans.sgd_shape(chunks, device, byref(shape))
        assert 1 <= shape.blocks <= min(chunks, 2**31 - 1)
        assert shape.threads <= MAX_THREADS and shape.shared_bytes == 0 and shape.cluster == 1


def test_tensors_that_travel_in_the_parameters_of_a_launch(plans: ctypes.CDLL) -> None:
    most = [plans.sgd_entries_in_parameters(groups) for groups in (1, 2, 10, 100)]
    assert most == sorted(most, reverse=True)
    assert most[0] > 500  # every parameter of a ResNet or of a language model with 7e9 of them
