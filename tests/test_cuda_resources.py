"""What the compiler made of the hot CUDA kernels: no local memory, accesses of 16 bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from cuda_kernels import Kernels, built_kernels, read_dump, short_name
from fusedstep import _build_info

# The kernels that training spends its time in, by name; and those of them whose arrays are read and
# written 16 bytes at a time. Template arguments: the type of the logits, whether the target vector
# has a dense part, whether a row is read in vectors.
HOT = (
    r"cross_entropy::forward_kernel<(float|bfloat16|float16), false, .*>",
    r"cross_entropy::backward_kernel<(float|bfloat16|float16), false, .*>",
    r"scale_kernel<.*>",
    r"pointwise_loss::forward_kernel<.*>",
    r"pointwise_loss::backward_kernel<.*>",
    r"optim::update_kernel<.*>",
)
VECTORISED = (
    r"cross_entropy::forward_kernel<(float|bfloat16|float16), false, true, .*>",
    r"cross_entropy::backward_kernel<(float|bfloat16|float16), false, true>",
    r"scale_kernel<.*>",
    r"pointwise_loss::forward_kernel<.*, true>",
    r"pointwise_loss::backward_kernel<.*, true>",
    r"optim::update_kernel<.*>",
)
# From and to memory that is global, or through a pointer that the compiler knows nothing of.
WIDE = {"loads": r"LD(G|GSTS)?\b.*\.128\b.*", "stores": r"STG?\b.*\.128\b.*"}
LOCAL = r"(LDL|STL)\b.*"


def complaints(kernels: Kernels) -> Iterator[str]:
    """What is wrong with the hot kernels, and which pattern no kernel has."""
    for architecture in sorted({architecture for _, architecture in kernels}):
        here = {name: kernel for (name, at), kernel in kernels.items() if at == architecture}
        for pattern in dict.fromkeys(HOT + VECTORISED):
            if not any(re.fullmatch(pattern, name) for name in here):
                yield f"{architecture}: no kernel is called {pattern}"
        for name, kernel in here.items():
            where = f"{architecture}: {name}"
            if any(re.fullmatch(pattern, name) for pattern in HOT):
                for memory in ("STACK", "LOCAL"):
                    used = kernel.resources.get(memory)
                    if used is None:
                        yield f"{where}: no report of {memory}"
                    elif used:
                        yield f"{where}: {memory} is {used} bytes"
                if accesses := kernel.count(LOCAL):
                    yield f"{where}: {accesses} accesses to local memory"
            if any(re.fullmatch(pattern, name) for pattern in VECTORISED):
                for access, opcode in WIDE.items():
                    if not kernel.count(opcode):
                        yield f"{where}: no 16-byte {access}"


@pytest.mark.skipif(_build_info.cuda is None, reason="this build has no CUDA")
def test_hot_kernels_stay_in_registers_and_access_16_bytes() -> None:
    kernels = built_kernels()
    machine_code = {
        "sm_" + name.removesuffix("+PTX").replace(".", "")
        for name in _build_info.cuda_architectures
    }
    assert {architecture for _, architecture in kernels} == machine_code
    said = list(complaints(kernels))
    assert not said, "\n".join(said)


# What cuobjdump says of one good kernel, shortened, for each of the two dumps.
RESOURCE_USAGE = """
Fatbin elf code:
================
arch = sm_90
compile_size = 64bit

Resource usage:
 Common:
  GLOBAL:0
 Function _Z1kv:
  REG:40 STACK:0 SHARED:656 LOCAL:0 CONSTANT[0]:1000 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
	code for sm_90
	.target	sm_90

		Function : _Z1kv
	.headerflags	@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;        /* 0x00000a00ff017b82 */
                                                                 /* 0x000ff00000000800 */
        /*0050*/              @!P0 BRA 0x1d0 ;                   /* 0x00000000005c8947 */
        /*00a0*/             @!UP0 LDG.E.128.CONSTANT R4, desc[UR8][R2.64] ;  /* 0x08028981 */
        /*0fb0*/               @P0 STG.E.128 desc[UR8][R2.64], R4 ;  /* 0x0000000802060981 */
"""
GOOD_NAMES = [
    "void fusedstep::cross_entropy::(anonymous namespace)::forward_kernel<float, false, true, 8, "
    "fusedstep::cross_entropy::(anonymous namespace)::Group>(fusedstep::ForwardArgs, int)",
    "void fusedstep::cross_entropy::(anonymous namespace)::backward_kernel<float, false, true>()",
    "void fusedstep::(anonymous namespace)::scale_kernel<float>()",
    "void fusedstep::pointwise_loss::(anonymous namespace)::forward_kernel<double, true>()",
    "void fusedstep::pointwise_loss::(anonymous namespace)::backward_kernel<double, true>()",
    "void fusedstep::optim::(anonymous namespace)::update_kernel<fusedstep::optim::Table<4ul> >()",
]


def complaints_about(resource_usage: str, sass: str, names: list[str]) -> list[str]:
    """What is said where all kernels of these names are as the dumps say."""
    dumped: Kernels = {}
    read_dump(resource_usage.splitlines(keepends=True), dumped)
    read_dump(sass.splitlines(keepends=True), dumped)
    (((_, architecture), kernel),) = dumped.items()
    return list(complaints({(short_name(name), architecture): kernel for name in names}))


def test_good_kernels_are_accepted() -> None:
    assert complaints_about(RESOURCE_USAGE, SASS, GOOD_NAMES) == []


@pytest.mark.parametrize(
    ("good", "planted", "said"),
    [
        ("STACK:0", "STACK:72", "STACK is 72 bytes"),
        ("LOCAL:0", "LOCAL:8", "LOCAL is 8 bytes"),
        ("STACK:0", "", "no report of STACK"),
        ("LDC R1", "STL.64 [R1], R4", "1 accesses to local memory"),
        ("LDC R1", "LDL.LU R4, [R1+0x8]", "1 accesses to local memory"),
        ("LDG.E.128.CONSTANT", "LDG.E.64.CONSTANT", "no 16-byte loads"),
        ("STG.E.128", "STG.E", "no 16-byte stores"),
    ],
)
def test_a_planted_fault_is_found_in_every_kernel(good: str, planted: str, said: str) -> None:
    assert good in RESOURCE_USAGE + SASS
    found = complaints_about(
        RESOURCE_USAGE.replace(good, planted), SASS.replace(good, planted), GOOD_NAMES
    )
    assert len(found) == len(GOOD_NAMES)
    assert all(said in complaint for complaint in found)


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_a_missing_kernel_is_told(name: str) -> None:
    found = complaints_about(RESOURCE_USAGE, SASS, [good for good in GOOD_NAMES if good != name])
    assert found
    assert all("sm_90: no kernel is called" in complaint for complaint in found)


def test_kernels_that_are_not_hot_may_use_memory() -> None:
    cold = "void fusedstep::cross_entropy::(anonymous namespace)::forward_kernel<float, true>()"
    found = complaints_about(RESOURCE_USAGE.replace("STACK:0", "STACK:72"), SASS, [cold])
    assert not any("bytes" in complaint for complaint in found)
