"""fusedstep's command line.

``python -m fusedstep run`` runs an unchanged script on fusedstep's losses and SGD;
``python -m fusedstep info`` says what this installation was built for and what it will use.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from typing import TypeAlias

import torch

import fusedstep
from fusedstep import _C, _build_info
from fusedstep._run import run

Fact: TypeAlias = "str | bool | list[str] | None"


def code_for(capability: tuple[int, int], architectures: Iterable[str]) -> str:
    """What a build for these architectures holds for a GPU of this compute capability.

    Args:
        capability: major and minor.
        architectures: names as in ``TORCH_CUDA_ARCH_LIST``, such as ``"8.0"`` and ``"12.0+PTX"``.

    Returns:
        ``"machine code"``, which runs on the release it is for and on later ones of the same major
        (made for ``"9.0a"`` and its like, on that one alone); ``"PTX"``, which the driver compiles
        at first use; or ``"nothing"``.
    """
    holds = "nothing"
    for name in architectures:
        number, _, ptx = name.partition("+")
        major, minor = map(int, number.rstrip("af").split("."))
        special = number[-1] in "af"
        if capability == (major, minor):
            return "machine code"
        if not special and (major, minor) < capability < (major + 1, 0):
            return "machine code"
        if ptx and not special and (major, minor) < capability:
            holds = "PTX"
    return holds


def gpus() -> list[str]:
    """The GPUs that torch sees, and what this build holds for each."""
    seen = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        holds = code_for((major, minor), _build_info.cuda_architectures)
        name = torch.cuda.get_device_name(index)
        seen.append(f"{name} (compute capability {major}.{minor}; this build has {holds} for it)")
    return seen


def info() -> dict[str, Fact]:
    """Facts of this build and this machine, by name."""
    facts: dict[str, Fact] = {
        "fusedstep": fusedstep.__version__,
        "built for torch": _build_info.torch_version,
        "running torch": torch.__version__,
        "torch's CUDA": torch.version.cuda,
        "compiler": _build_info.compiler,
        "machine": _build_info.machine,
        "CPU level": _C.cpu_capability(),
        "CUDA kernels": _build_info.cuda is not None,
    }
    if _build_info.cuda is None:
        facts["why no CUDA"] = _build_info.why_no_cuda
    else:
        facts["nvcc"] = _build_info.cuda
        facts["architectures"] = list(_build_info.cuda_architectures)
    return facts | {"GPUs": gpus()}


def text(fact: Fact) -> str:
    """A fact in words."""
    if isinstance(fact, bool):
        return "yes" if fact else "no"
    if isinstance(fact, list):
        return ", ".join(fact) or "none"
    return "none" if fact is None else fact


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m fusedstep")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("info", help="what was built, for which torch, CUDA, CPU level")
    show.add_argument("--json", action="store_true", help="print as JSON")
    script = commands.add_parser(
        "run",
        help="run an unchanged script, in which torch's losses and SGD mean fusedstep's",
        usage="%(prog)s [--stats] (script | -m module) [argument ...]",
    )
    script.add_argument(
        "--stats", action="store_true", help="at exit, print what ran and what fell back, and why"
    )
    script.add_argument("-m", "--module", action="store_true", help="the script is a module's name")
    script.add_argument("script")
    rest = script.add_argument("argument", nargs=argparse.REMAINDER)
    rest.required = False  # as it is from Python 3.13 on: there may be no argument
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(
            arguments.script,
            sys.argv[sys.argv.index(arguments.script, 2) + 1 :],  # argparse drops a first "--"
            is_module=arguments.module,
            with_stats=arguments.stats,
        )
        return
    facts = info()
    if arguments.json:
        print(json.dumps(facts))
        return
    for name, fact in facts.items():
        print(f"{name:16} {text(fact)}")


if __name__ == "__main__":
    main()
