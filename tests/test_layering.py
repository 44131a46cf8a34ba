"""The rules that keep the rooms apart. Each rule is shown to fire on a planted violation."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import operators

ROOT = Path(__file__).resolve().parents[1]
CPP = {".h", ".cpp", ".cuh", ".cu"}
SHARED = {"core", "torch_glue"}  # the folders of csrc that are not rooms
SPEAKS_TORCH = re.compile(
    r"module\.cpp|torch_glue/.*"
    r"|(?!core/)[^/]+/(torch\.cpp|torch_operators\.(cpp|h)|binding\.h|torch/.*)"
)
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"\n]+)', re.MULTILINE)
TORCH = re.compile(
    r"^[ \t]*#[ \t]*include[ \t]*[<\"](?:torch|ATen|c10|caffe2|pybind11|Python)\b[^\n]*"
    r"|\b(?:at|torch|c10|caffe2|pybind11|py)::\w*"
    r"|\b(?:TORCH|AT|C10|PYBIND11)_[A-Z]\w*",
    re.MULTILINE,
)
MARKER = re.compile(r"\b(?:TODO|FIXME|XXX)\b")
MACHINE_PATH = re.compile(r"(?<![\w.:/-])(?:/(?:home|root|Users|work|mnt)/|[A-Z]:\\)\w[^\s\"']*")


def cpp_files(root: Path) -> list[Path]:
    return sorted(f for f in (root / "csrc").rglob("*") if f.suffix in CPP)


def rooms(root: Path) -> set[str]:
    return set(operators.listed(root))


def folder(file: Path, root: Path) -> str:
    """The folder of csrc that holds file; '' for csrc's own files."""
    inside = file.relative_to(root / "csrc")
    return inside.parts[0] if len(inside.parts) > 1 else ""


def speaks_torch(file: Path, root: Path) -> bool:
    return SPEAKS_TORCH.fullmatch(file.relative_to(root / "csrc").as_posix()) is not None


def code(file: Path) -> str:
    """The file's text with its comments blanked out, line for line."""
    return COMMENT.sub(lambda found: "\n" * found[0].count("\n"), file.read_text())


def found_at(file: Path, root: Path, text: str, offset: int) -> str:
    return f"{file.relative_to(root)}:{text.count(chr(10), 0, offset) + 1}"


def torch_in_kernels(root: Path) -> Iterator[str]:
    """Torch stops at a room's torch.cpp and binding.h, at torch_glue and at module.cpp."""
    for file in cpp_files(root):
        if not speaks_torch(file, root):
            text = code(file)
            for hit in TORCH.finditer(text):
                yield f"{found_at(file, root, text, hit.start())} names torch: {hit[0].strip()}"


def unlisted_folders(root: Path) -> Iterator[str]:
    """The folders of csrc are the shared ones and those that tests/operators.txt lists."""
    found = {folder(file, root) for file in cpp_files(root)} - SHARED - {""}
    for name in sorted(found ^ rooms(root)):
        where = "is not in tests/operators.txt" if name in found else "holds no sources"
        yield f"csrc/{name} {where}"


def clashing_stems(root: Path) -> Iterator[str]:
    """Two sources of one folder with one stem would be compiled into the same object file."""
    first: dict[Path, Path] = {}
    for file in cpp_files(root):
        if file.suffix in (".cpp", ".cu"):
            other = first.setdefault(file.with_suffix(""), file)
            if other != file:
                yield f"{file.relative_to(root)} has the stem of {other.name}"


def foreign_includes(root: Path) -> Iterator[str]:
    """A room includes itself and core; its torch.cpp also torch_glue; module.cpp everything."""
    csrc = root / "csrc"
    for file in cpp_files(root):
        allowed = {folder(file, root), "core"}
        if speaks_torch(file, root):
            allowed |= SHARED
        if file == csrc / "module.cpp":
            allowed |= SHARED | rooms(root)
        text = code(file)
        for include in INCLUDE.finditer(text):
            bracket, name = include.groups()
            beside, below = file.parent / name, csrc / name
            where = found_at(file, root, text, include.start())
            if not beside.is_file() and not below.is_file():
                if bracket == '"':
                    yield f'{where} includes "{name}", which is not there'
                continue
            target = Path(os.path.normpath(beside if beside.is_file() else below))
            if not target.is_relative_to(csrc):
                yield f"{where} reaches out of csrc: {name}"
            elif folder(target, root) not in allowed:
                yield f"{where} reaches into another room: {name}"
            elif speaks_torch(target, root) and not speaks_torch(file, root):
                yield f"{where} reaches for torch: {name}"
            elif target.suffix == ".cuh" and file.suffix not in (".cu", ".cuh"):
                yield f"{where} reaches for device code: {name}"


def unlisted_tests(root: Path) -> Iterator[str]:
    """Files of tests that are listed exist, and those named after an operator are listed."""
    for room, tests in sorted(operators.listed(root).items()):
        named = {f"tests/{f.name}" for f in (root / "tests").glob(f"test_{room}*.py")}
        for file in sorted(named - set(tests)):
            yield f"{file} is not in tests/operators.txt"
        for file in tests:
            if not (root / file).is_file():
                yield f"{file} is in tests/operators.txt, but not there"


def foreign_imports(root: Path) -> Iterator[str]:
    """The package needs the standard library and torch, and nothing else of this repository."""
    allowed = sys.stdlib_module_names | {"torch", "fusedstep"}
    for file in sorted((root / "pyext").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            for name in names:
                if name.partition(".")[0] not in allowed:
                    yield f"{file.relative_to(root)}:{node.lineno} imports {name}"


def stray_text(root: Path) -> Iterator[str]:
    """No marker of unfinished work and no path that only one machine has, in any text file."""
    files = [f for f in root.iterdir() if f.is_file() and f.name != ".git"]
    for name in ("csrc", "pyext", "benchmarks", "tests", "docs", ".ci", ".github"):
        files += [f for f in (root / name).rglob("*") if f.is_file()]
    for file in sorted(files):
        if file == Path(__file__):  # it holds the examples
            continue
        try:
            text = file.read_text()
        except UnicodeDecodeError:
            continue
        for pattern in (MARKER, MACHINE_PATH):
            for hit in pattern.finditer(text):
                yield f"{found_at(file, root, text, hit.start())} says {hit[0]}"


def compiler_imports(root: Path) -> Iterator[str]:
    """Importing the package must not import torch's compiler, which takes seconds."""
    script = (
        "import sys, torch; before = set(sys.modules); import fusedstep\n"
        "print(*sorted(set(sys.modules) - before), sep='\\n')"
    )
    beside = [] if root == ROOT else [str(root / "pyext")]  # this project's is installed
    path = os.pathsep.join([*beside, os.environ.get("PYTHONPATH", "")])
    loaded = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": path},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    for name in loaded:
        if name in ("torch._dynamo", "torch._inductor"):
            yield f"import fusedstep imports {name}"


WAITS = {"communicate", "join", "poll", "wait"}


def limited_waits(root: Path) -> Iterator[str]:
    """No test waits for so many seconds only: on a busy machine that would decide its verdict."""
    for file in sorted((root / "tests").rglob("*.py")):
        if file.parent.name == "gpu":  # whose parts have limits, by a clock that its tests replace
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            limits = [
                arg
                for arg in node.args
                if name in WAITS
                and isinstance(arg, ast.Constant)
                and not isinstance(arg.value, str)
            ]
            limits += [
                word.value
                for word in node.keywords
                if word.arg == "timeout" and ast.unparse(word.value) != "None"
            ]
            if limits:
                yield f"{file.relative_to(root)}:{node.lineno} waits with a limit"


# A small tree that keeps every rule, and per rule the files that break it and what is said of them.
CLEAN = {
    "csrc/module.cpp": '#include <torch/extension.h>\n#include "sums/binding.h"\n',
    "csrc/core/dtype.h": "// as at::Tensor has it\n#include <cstdint>\n",
    "csrc/torch_glue/dtype.h": '#include <ATen/core/Tensor.h>\n#include "core/dtype.h"\n',
    "csrc/sums/binding.h": "#include <ATen/core/Tensor.h>\n",
    "csrc/sums/sums.h": '#include "core/dtype.h"\nint format::sum(); std::atomic<int> at;\n',
    "csrc/sums/cpu.cpp": '#include "sums/sums.h"\n#include "sums.h"\n/* torch::Tensor */\n',
    "csrc/sums/rows.cuh": '#include "sums/sums.h"\n',
    "csrc/sums/cuda.cu": '#include "sums/rows.cuh"\n',
    "csrc/sums/torch.cpp": '#include <torch/library.h>\n#include "torch_glue/dtype.h"\n',
    "csrc/dots/torch.cpp": "TORCH_LIBRARY(dots, m) {}\n",
    "csrc/dots/dots.h": "#pragma once\n",
    "pyext/fusedstep/__init__.py": "import math\nimport torch.nn\nfrom . import functional\n",
    "pyext/fusedstep/functional.py": "from fusedstep import nn\n",
    "pyext/fusedstep/nn.py": "",
    "tests/test_sums.py": "import numpy\nthread.join(), ' '.join(x), process.wait(timeout=None)\n",
    "tests/gpu/check.py": "process.wait(60)\n",
    "tests/test_dots.py": "",
    "tests/operators.txt": "# folders\nsums tests/test_sums.py\ndots tests/test_dots.py\n",
    "README.md": "Methodology: https://example.org/home/of/work/ and ./work/x, /usr/bin/env.\n",
}
BOTH = "sums tests/test_sums.py\ndots tests/test_dots.py\n"
Rule = Callable[[Path], Iterator[str]]
VIOLATIONS: list[tuple[Rule, str, str, str]] = [
    (torch_in_kernels, "csrc/sums/cpu.cpp", "\n#include <ATen/ATen.h>", "csrc/sums/cpu.cpp:2"),
    (torch_in_kernels, "csrc/sums/cpu.cpp", '#include "c10/util/Half.h"', "c10/util/Half.h"),
    (torch_in_kernels, "csrc/core/dtype.h", "#include <pybind11/pybind11.h>", "pybind11"),
    (torch_in_kernels, "csrc/core/dtype.h", "void f(at::Tensor x);", "at::Tensor"),
    (torch_in_kernels, "csrc/sums/cuda_rows.cu", "using torch::Tensor;", "torch::Tensor"),
    (torch_in_kernels, "csrc/sums/cpu.cpp", "c10::Half x;", "c10::Half"),
    (torch_in_kernels, "csrc/sums/rows.cuh", "/* a\n b */ TORCH_CHECK(x);", "rows.cuh:2"),
    (torch_in_kernels, "csrc/core/torch.cpp", "TORCH_LIBRARY(core, m) {}", "TORCH_LIBRARY"),
    (unlisted_folders, "csrc/lost/lost.h", "", "csrc/lost is not in"),
    (unlisted_folders, "tests/operators.txt", "sums tests/test_sums.py", "csrc/dots is not in"),
    (unlisted_folders, "tests/operators.txt", f"{BOTH}gone tests/test_sums.py", "csrc/gone holds"),
    (clashing_stems, "csrc/sums/cpu.cu", "", "cpu.cu has the stem of cpu.cpp"),
    (foreign_includes, "csrc/sums/cpu.cpp", '#include "dots/dots.h"', "another room: dots/dots.h"),
    (foreign_includes, "csrc/sums/cpu.cpp", "#include <dots/dots.h>", "another room: dots/dots.h"),
    (foreign_includes, "csrc/sums/torch.cpp", '#include "dots/dots.h"', "another room"),
    (foreign_includes, "csrc/sums/cpu.cpp", '#include "torch_glue/dtype.h"', "another room"),
    (foreign_includes, "csrc/core/dtype.h", '#include "../sums/sums.h"', "another room"),
    (foreign_includes, "csrc/torch_glue/dtype.h", '#include "sums/sums.h"', "another room"),
    (foreign_includes, "csrc/sums/cpu.cpp", '#include "binding.h"', "reaches for torch"),
    (foreign_includes, "csrc/sums/sums.h", '#include "rows.cuh"', "device code: rows.cuh"),
    (foreign_includes, "csrc/sums/cpu.cpp", '#include "../../README.md"', "out of csrc"),
    (foreign_includes, "csrc/module.cpp", '#include "sums/gone.h"', "which is not there"),
    (
        unlisted_tests,
        "tests/operators.txt",
        f"sums tests/test_gone.py {BOTH[5:]}",
        "tests/test_gone.py is in",
    ),
    (unlisted_tests, "tests/test_sums_twice.py", "", "tests/test_sums_twice.py is not in"),
    (foreign_imports, "pyext/fusedstep/nn.py", "def f():\n    import numpy.linalg", "nn.py:2"),
    (foreign_imports, "pyext/fusedstep/nn.py", "from tests.reference import x", "tests.reference"),
    (foreign_imports, "pyext/fusedstep/nn.py", "import benchmarks", "imports benchmarks"),
    (stray_text, "README.md", "\n# TODO: more", "README.md:2"),
    (stray_text, "tests/test_sums.py", "# FIXME", "says FIX"),
    (stray_text, "csrc/sums/sums.h", "// XXX", "says XX"),
    (stray_text, "benchmarks/run.py", "open('/home/me/data')", "home/me/data"),
    (stray_text, ".ci/run", "cd /work/checkout", "work/checkout"),
    (limited_waits, "tests/clients/test_dots.py", "\nx.run(timeout=limit)", "test_dots.py:2 waits"),
    (limited_waits, "tests/test_sums.py", "thread.join(60)", "test_sums.py:1 waits"),
    (compiler_imports, "pyext/fusedstep/nn.py", "import torch._dynamo", "torch._dynamo"),
]
RULES: list[Rule] = list(dict.fromkeys(rule for rule, *_ in VIOLATIONS))


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule: Rule) -> None:
    assert list(rule(ROOT)) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_accepts_a_clean_tree(rule: Rule, tmp_path: Path) -> None:
    assert list(rule(plant(tmp_path, CLEAN))) == []


@pytest.mark.parametrize(
    ("rule", "file", "text", "complaint"),
    VIOLATIONS,
    ids=[f"{rule.__name__}-{i}" for i, (rule, *_) in enumerate(VIOLATIONS)],
)
def test_rule_fires(rule: Rule, file: str, text: str, complaint: str, tmp_path: Path) -> None:
    said = list(rule(plant(tmp_path, CLEAN | {file: text})))
    assert any(complaint in sentence for sentence in said), said
    assert len({sentence.partition(" ")[0] for sentence in said}) == 1


def test_an_empty_list_of_operators_is_an_error(tmp_path: Path) -> None:
    for text in ("", "# nothing\n", "sums\n"):
        with pytest.raises(ValueError, match=r"operators\.txt"):
            operators.listed(plant(tmp_path, {"tests/operators.txt": text}))


def test_the_rules_saw_the_sources() -> None:
    assert {"core", "cross_entropy", "optim"} <= {folder(file, ROOT) for file in cpp_files(ROOT)}
    assert {"cross_entropy", "optim"} <= rooms(ROOT)
