"""``python -m fusedstep info``: what this installation was built for and what it will use."""

from __future__ import annotations

import argparse
import json

import torch

import fusedstep
from fusedstep import _C, _build_info


def info() -> dict[str, str | bool | None]:
    """Facts of this build and this machine, by name."""
    return {
        "fusedstep": fusedstep.__version__,
        "built for torch": _build_info.torch_version,
        "running torch": torch.__version__,
        "compiler": _build_info.compiler,
        "machine": _build_info.machine,
        "CPU level": _C.cpu_capability(),
        "CUDA kernels": _build_info.cuda,
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m fusedstep", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("info", help="what was built, for which torch, CPU level")
    show.add_argument("--json", action="store_true", help="print as JSON")
    arguments = parser.parse_args()
    facts = info()
    if arguments.json:
        print(json.dumps(facts))
        return
    for name, value in facts.items():
        print(f"{name:16} {'no' if value is None else value}")


if __name__ == "__main__":
    main()
