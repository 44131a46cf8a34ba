"""The emulator itself: its detectors find planted faults, and its primitives compute what CUDA's
do. The kernels it runs are in tests/emulator.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from emulator import Emulator, build

HERE = Path(build.__file__).parent
PLANTED = sorted((HERE / "faults").glob("*.cu"))

# What the launch's error says of each planted fault.
FAULTS = {
    # memory.cu
    "read_behind": "out of bounds: read of 4 bytes at .*, 0 bytes behind device memory",
    "write_in_front": "out of bounds: write of 4 bytes at .*, 4 bytes in front of device memory",
    "read_across_the_end": "out of bounds: read of 4 bytes",
    "copy_a_struct_across_the_end": "out of bounds: read of (4|20) bytes",
    "atomic_behind": "out of bounds: atomic access of 4 bytes at .*, 0 bytes behind device memory",
    "read_null": "out of bounds: read of 4 bytes at 0, far from device memory",
    "read_host_memory": "out of bounds: read of 4 bytes at .*, far from device memory",
    "write_constant": "out of bounds: write of 4 bytes at .*, far from device memory",
    "read_foreign_stack": "out of bounds: read of 4 bytes",
    "read_misaligned_vector": "misaligned access: 'const struct uint4'",
    "read_misaligned_elements": "misaligned access: 'const struct uint4'",
    "write_misaligned_double": "misaligned access: 'double'",
    "misaligned_atomic": "misaligned atomic",
    # shared.cu
    "shared_behind": "out of bounds of shared memory: write of 4 bytes at 0x200",
    "shared_in_the_next_array": r"out of bounds: index 64 of 'float \[64\]'",
    "dynamic_shared_behind": "out of bounds of shared memory: write of 4 bytes",
    "shared_never_written": "shared memory that was never written: read of 4 bytes at 0x7c",
    "shared_written_by_the_block_before": "shared memory that was never written",
    "read_without_barrier": "race|never written",
    "read_without_warp_barrier": "race|never written",
    "read_behind_the_wrong_barrier": "race|never written",
    "write_before_all_have_read": "race: shared memory",
    "two_writers": "race: shared memory .*: write",
    "two_writers_of_one_byte": "race: shared memory .*: write of 1 bytes",
    "atomic_and_ordinary_write": "race: shared memory .*: (atomic access|write)",
    "declared_twice": "shared memory declared twice",
    "copy_that_nobody_waited_for": "a copy is under way: read of 4 bytes at",
    "read_while_a_copy_is_under_way": "a copy is under way: read of 4 bytes at",
    "misaligned_copy": "misaligned copy",
    "read_of_the_cluster_without_barrier": "race|never written|out of bounds of shared",
    "read_of_a_block_that_has_ended": "shared memory of a block that has ended",
    "rank_beyond_the_cluster": "map_shared_rank",
    # waiting.cu
    "barrier_after_some_have_ended": "divergent barrier",
    "barrier_in_one_branch": "divergent barrier",
    "barriers_in_both_branches": "divergent barrier: the thread comes to waiting.cu:",
    "barrier_in_a_loop_of_uneven_length": "divergent barrier",
    "warp_and_block_wait_for_each_other": "deadlock: 16 threads at .*, 16 threads at waiting.cu:",
    "grid_barrier_in_an_ordinary_launch": "not cooperative",
    "grid_barrier_that_a_block_leaves_out": "divergent barrier",
    "cluster_barrier_that_a_block_leaves_out": "divergent barrier",
    "shuffle_after_some_have_ended": "divergent warp operation: .* lanes that have ended|deadlock",
    "shuffle_in_one_branch": "divergent warp operation",
    "shuffle_of_two_kinds": "divergent warp operation: the thread comes to waiting.cu:",
    "shuffle_from_a_lane_outside_the_mask": "reads lane 16, which takes no part",
    "vote_without_its_own_lane": "lacks the thread's lane",
}


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    """The planted faults and the primitives, in a library without torch."""
    library = build.OUT / "kernels.so"
    build.build_program([*PLANTED, HERE / "primitives.cu"], library, ["-shared"])
    emulator = Emulator(library)
    emulator.library.error_name.restype = ctypes.c_char_p
    emulator.library.new_memory.restype = ctypes.c_void_p
    emulator.library.new_memory.argtypes = [ctypes.c_size_t]
    emulator.library.delete_memory.argtypes = [ctypes.c_void_p]
    return emulator


# ------------------------------------------------------------------ the detectors


def test_every_planted_fault_is_expected() -> None:
    planted = [
        name for file in PLANTED for name in re.findall(r"^PLANT\((\w+)", file.read_text(), re.M)
    ]
    assert planted == list(FAULTS)


def result_of(emulator: Emulator, name: str, faulty: bool) -> str:
    plant = emulator.library[f"plant_{name}"]
    plant.restype = ctypes.c_char_p
    return plant(ctypes.c_bool(faulty)).decode()


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(name: str, emulator: Emulator) -> None:
    """In whatever order the threads run; with the place of the kernel in the message."""
    for seed in range(5):
        emulator.seed(seed)
        said = result_of(emulator, name, faulty=True)
        assert re.search(FAULTS[name], said), said
        assert re.search(rf"block \(\d, 0, 0\), thread \(\d+, 0, 0\) of .*\b{name}<true>", said)
        assert re.search(r"\.cu:\d+", said)


@pytest.mark.parametrize("name", FAULTS)
def test_correct_twin_passes(name: str, emulator: Emulator) -> None:
    for seed in range(20):
        emulator.seed(seed)
        assert result_of(emulator, name, faulty=False) == "cudaSuccess"


def test_a_fault_says_where_it_happened(emulator: Emulator) -> None:
    lines = (HERE / "faults" / "memory.cu").read_text().splitlines()
    line = 1 + next(i for i, text in enumerate(lines) if "kFloats - 1 + faulty];" in text)
    assert f"memory.cu:{line}" in result_of(emulator, "read_behind", faulty=True)


# ------------------------------------------------------------------ the primitives


@contextmanager
def device_array(emulator: Emulator, type_: Any, values: Sequence[Any]) -> Iterator[Any]:
    """A ctypes array in device memory."""
    array_type = type_ * len(values)
    memory = emulator.library.new_memory(ctypes.sizeof(array_type))
    array = array_type.from_address(memory)
    array[:] = values
    yield array
    emulator.library.delete_memory(memory)


def succeeded(emulator: Emulator, error: int) -> bool:
    return error_name(emulator, error) == "cudaSuccess"


def error_name(emulator: Emulator, error: int) -> str:
    return emulator.library.error_name(error).decode()


def shuffled(kind: int, values: Sequence[Any], operands: Sequence[int], width: int) -> list[Any]:
    """By the definition in the CUDA C++ programming guide."""
    result = []
    for lane, operand in enumerate(operands):
        first = lane // width * width
        source = (first + operand % width, lane - operand, lane + operand, lane ^ operand)[kind]
        inside = source >= first if kind == 1 else source < first + width
        result.append(values[source if inside else lane])
    return result


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("kind", range(4), ids=["index", "up", "down", "xor"])
@pytest.mark.parametrize(
    ("name", "type_"),
    [("float", ctypes.c_float), ("int64", ctypes.c_int64)],
    ids=["float", "int64"],
)
def test_shuffles(kind: int, width: int, name: str, type_: Any, emulator: Emulator) -> None:
    if type_ is ctypes.c_float:
        values: list[Any] = [lane + 0.5 for lane in range(32)]
    else:
        values = [(lane << 40) - lane for lane in range(32)]
    run = emulator.library[f"run_shuffle_{name}"]
    for operands in [[n] * 32 for n in (0, 1, 2, 3, 5, 8, 16, 31)] + [
        [7 * i % 32 for i in range(32)]
    ]:
        with (
            device_array(emulator, type_, values) as array,
            device_array(emulator, ctypes.c_int, operands) as operand_array,
        ):
            assert succeeded(emulator, run(array, operand_array, kind, width))
            assert list(array) == shuffled(kind, values, operands, width)


@pytest.mark.parametrize("predicates", [0, 1, 0xFFFFFFFF, 0x55555555, 0xAAAA5554, 0x80000001])
def test_votes(predicates: int, emulator: Emulator) -> None:
    with (
        device_array(
            emulator, ctypes.c_int, [8 * (predicates >> i & 1) for i in range(32)]
        ) as given,
        device_array(emulator, ctypes.c_uint, [9] * 96) as votes,
    ):
        assert succeeded(emulator, emulator.library.run_vote(given, votes))
        for lane in range(32):
            mask = 0x55555555 << lane % 2
            ballot = predicates & mask
            assert votes[3 * lane : 3 * lane + 3] == [ballot, ballot != 0, ballot == mask]


@pytest.mark.parametrize("shape", [(7, 1, 1, 40, 1, 1), (2, 3, 4, 5, 6, 2), (1, 1, 1, 1024, 1, 1)])
def test_every_thread_knows_its_place(shape: tuple[int, ...], emulator: Emulator) -> None:
    gx, gy, gz, bx, by, bz = shape
    count = gx * gy * gz * bx * by * bz
    with device_array(emulator, ctypes.c_uint, [99] * (6 * count)) as seen:
        assert succeeded(emulator, emulator.library.run_indices(seen, *shape))
        places = [tuple(seen[6 * i : 6 * i + 6]) for i in range(count)]
    assert places == [
        (i, j, k, x, y, z)
        for k in range(gz)
        for j in range(gy)
        for i in range(gx)
        for z in range(bz)
        for y in range(by)
        for x in range(bx)
    ]


@pytest.mark.parametrize(("blocks", "threads"), [(1, 32), (3, 1), (10, 512), (80, 64)])
def test_grid_barrier(blocks: int, threads: int, emulator: Emulator) -> None:
    with device_array(emulator, ctypes.c_longlong, [0] * blocks) as values:
        assert succeeded(emulator, emulator.library.run_grid_rounds(values, 3, blocks, threads))
        assert set(values) == {1 + blocks * (1 + blocks)}


@pytest.mark.parametrize(("blocks", "cluster"), [(1, 1), (2, 2), (12, 4), (24, 8), (15, 3)])
def test_cluster_shared_memory(blocks: int, cluster: int, emulator: Emulator) -> None:
    with device_array(emulator, ctypes.c_uint, [0] * blocks) as seen:
        assert succeeded(emulator, emulator.library.run_cluster_neighbours(seen, blocks, cluster))
        for block in range(blocks):
            rank = (block + 1) % cluster
            assert seen[block] == 100 * (block // cluster * cluster + rank) + rank


class Atomics(ctypes.Structure):
    _fields_ = [
        ("sum", ctypes.c_int),
        ("least", ctypes.c_int),
        ("most", ctypes.c_int),
        ("unsigned_most", ctypes.c_uint),
        ("swapped", ctypes.c_ulonglong),
    ]


def test_atomics(emulator: Emulator) -> None:
    with device_array(emulator, Atomics, [Atomics(0, 0, 0, 0, 0)]) as result:
        assert succeeded(emulator, emulator.library.run_atomics(result, 5, 70))
        values = range(-50, 300)
        assert result[0].sum == sum(values)
        assert (result[0].least, result[0].most) == (-50, 299)
        assert result[0].unsigned_most == 2**32 - 1
        assert result[0].swapped == 2 * len(values)


def test_order_is_drawn_and_repeatable(emulator: Emulator) -> None:
    def order() -> list[int]:
        with (
            device_array(emulator, ctypes.c_uint, [0] * 256) as tickets,
            device_array(emulator, ctypes.c_uint, [0]) as counter,
        ):
            assert succeeded(emulator, emulator.library.run_order(tickets, counter, 4, 64))
            assert sorted(tickets) == list(range(256))
            return list(tickets)

    emulator.seed(1)
    first, second = order(), order()
    emulator.seed(1)
    assert [order(), order()] == [first, second]
    emulator.seed(2)
    third = order()
    assert len({tuple(o) for o in (first, second, third, range(256))}) == 4
    blocks = [
        [o.index(min(o[b : b + 64])) // 64 for b in range(0, 256, 64)] for o in (first, third)
    ]
    assert blocks == [[0, 1, 2, 3]] * 2


def test_fresh_memory_is_nan(emulator: Emulator) -> None:
    memory = emulator.library.new_memory(100)
    assert ctypes.string_at(memory, 100) == b"\xff" * 100
    emulator.library.delete_memory(memory)


# ------------------------------------------------------------------ launches


def test_parameters_are_copied_whole(emulator: Emulator) -> None:
    with device_array(emulator, ctypes.c_int, [0]) as total:
        assert succeeded(emulator, emulator.library.run_large_parameters(total, 3))
        assert total[0] == 3 * (32764 - 8) * 128
    error = emulator.library.run_too_large_parameters()
    assert error_name(emulator, error) == "cudaErrorInvalidValue"


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 1, 1, False, 0), "cudaSuccess"),
        ((70000, 1, 1, False, 0), "cudaSuccess"),
        ((0, 32, 1, False, 0), "cudaErrorInvalidConfiguration"),
        ((1, 0, 1, False, 0), "cudaErrorInvalidConfiguration"),
        ((1, 1024, 1, False, 0), "cudaSuccess"),
        ((1, 1025, 1, False, 0), "cudaErrorInvalidConfiguration"),
        ((10, 512, 1, True, 0), "cudaSuccess"),
        ((11, 512, 1, True, 0), "cudaErrorCooperativeLaunchTooLarge"),
        ((80, 32, 1, True, 0), "cudaSuccess"),
        ((81, 32, 1, True, 0), "cudaErrorCooperativeLaunchTooLarge"),
        ((10, 32, 1, True, 48 << 10), "cudaSuccess"),
        ((11, 32, 1, True, 48 << 10), "cudaErrorCooperativeLaunchTooLarge"),
        ((16, 32, 8, False, 0), "cudaSuccess"),
        ((12, 32, 8, False, 0), "cudaErrorInvalidClusterSize"),
        ((16, 32, 16, False, 0), "cudaErrorInvalidClusterSize"),
        ((8, 1024, 8, False, 0), "cudaErrorInvalidClusterSize"),
        ((1, 32, 1, False, (48 << 10) + 1), "cudaErrorInvalidValue"),
    ],
)
def test_impossible_launches_are_refused(
    shape: tuple[Any, ...], expected: str, emulator: Emulator
) -> None:
    assert error_name(emulator, emulator.library.run_nothing(*shape)) == expected


def test_shared_memory_counts_for_residency(emulator: Emulator) -> None:
    assert succeeded(emulator, emulator.library.run_much_shared(10, True))
    error = emulator.library.run_much_shared(11, True)
    assert error_name(emulator, error) == "cudaErrorCooperativeLaunchTooLarge"
    assert succeeded(emulator, emulator.library.run_much_shared(11, False))


def test_more_shared_memory_has_to_be_asked_for(emulator: Emulator) -> None:
    library = emulator.library
    assert succeeded(emulator, library.allow_nothing_shared(64 << 10))
    assert succeeded(emulator, library.run_nothing(1, 32, 1, False, 64 << 10))
    error = library.run_nothing(1, 32, 1, False, (64 << 10) + 1)
    assert error_name(emulator, error) == "cudaErrorInvalidValue"
    assert error_name(emulator, library.allow_nothing_shared(100 << 10)) == "cudaErrorInvalidValue"
    assert succeeded(emulator, library.allow_nothing_shared(48 << 10))


def test_who_asks_for_less_shared_memory_takes_none_from_others(emulator: Emulator) -> None:
    """Threads launch one kernel with different sizes, and ask right before they launch."""
    error = emulator.library.run_nothing_after_another_asked(90 << 10, 60 << 10)
    assert succeeded(emulator, error)


@pytest.mark.parametrize(
    ("threads", "cluster", "expected"), [(512, 2, 5), (512, 8, 1), (32, 8, 10), (1024, 8, 0)]
)
def test_active_clusters(threads: int, cluster: int, expected: int, emulator: Emulator) -> None:
    assert emulator.library.active_clusters(threads, cluster) == expected


def test_launches_are_recorded_by_name(emulator: Emulator) -> None:
    with emulator.launches() as kernels:
        emulator.library.run_nothing(1, 1, 1, False, 0)
        emulator.library.run_nothing(0, 1, 1, False, 0)
        result_of(emulator, "two_writers", faulty=True)
    assert kernels == ["primitives::nothing()", "void planted::two_writers<true>(float*)"]


# ------------------------------------------------------------------ the tests of the rooms


def test_a_run_that_launches_nothing_fails(pytestconfig: pytest.Config) -> None:
    """Tests that pass without the CUDA code that they are run for prove nothing."""
    if pytestconfig.getoption("--device") != "emulator":
        pytest.skip("needs the emulated package")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--device", "emulator"]
    tests = Path(__file__).parent / "test_sgd.py"
    environment = {name: v for name, v in os.environ.items() if not name.startswith("PYTEST")}
    for test, code in (("worked_numbers", 1), ("fifty_steps and bfloat16 and plain", 0)):
        done = subprocess.run(
            [*command, str(tests), "-k", test], env=environment, capture_output=True, text=True
        )
        assert done.returncode == code, done.stdout
        assert ("ERROR test_sgd.py launched no kernel" in done.stdout) == (code == 1)


# ------------------------------------------------------------------ the package on the emulator

ON_AN_OLD_GPU = """
import torch, fusedstep
net = torch.nn.Linear(8, 4)
optimizer = fusedstep.SGD(net.parameters(), lr=0.1)
logits = net(torch.randn(6, 8))
loss = fusedstep.CrossEntropyLoss()(logits, torch.arange(6) % 4)
(loss + fusedstep.MSELoss()(logits, logits.detach())).backward()
optimizer.step()
stats = fusedstep.stats()
assert (stats.fused, stats.fell_back) == (0, 4), stats
reasons = {calls.operator: list(calls.fallbacks) for calls in stats.calls}
assert reasons["cross_entropy"] == reasons["mse_loss"] == ["a device without kernels"], stats
assert reasons["SGD"] == ["a device or a kind of tensor without kernels"], stats
"""


def test_a_gpu_older_than_the_kernels_is_left_to_torch(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--device") != "emulator":
        pytest.skip("asks the package that is built for the emulator")
    subprocess.run(
        [sys.executable, "-c", ON_AN_OLD_GPU],
        check=True,
        env={**os.environ, "EMULATOR_COMPUTE_CAPABILITY": "7.0"},
    )
