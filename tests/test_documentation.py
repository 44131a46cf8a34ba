"""What can be checked about the pages: they are complete, and their links lead somewhere.

pytest itself runs the examples in `docs/`, but for those that a process must end after as
`process_group.run_rank` does.
"""

from __future__ import annotations

import importlib
import inspect
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fusedstep
from test_layering import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
FOR_DEVELOPERS = [
    *ROOT.glob("benchmarks/*.md"),
    *ROOT.glob("csrc/*.md"),
    *ROOT.glob("tests/*/*.md"),
]
API = (ROOT / "docs" / "api.md").read_text()
WHOLE_MODULES = re.findall(r"automodule:: ([\w.]+)", API)
SINGLE_NAMES = re.findall(r"auto(?:function|class):: ([\w.]+)", API)
PUBLIC = ["fusedstep", *WHOLE_MODULES]


def public(module: str) -> Iterator[tuple[str, Any]]:
    names = importlib.import_module(module).__all__
    return ((name, getattr(importlib.import_module(module), name)) for name in names)


def test_every_public_module_is_in_the_reference() -> None:
    folder = Path(fusedstep.__file__).parent
    files = [*folder.glob("[!_]*.py"), *(f.parent for f in folder.glob("[!_]*/__init__.py"))]
    modules = {f"fusedstep.{file.stem}" for file in files}
    assert modules - {"fusedstep.fakes"} == set(WHOLE_MODULES)  # registers, and has no names


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_in_the_reference(module: str) -> None:
    in_reference = [value for whole in WHOLE_MODULES for _, value in public(whole)]
    for name, value in public(module):
        if isinstance(value, ModuleType):
            assert value.__name__ in WHOLE_MODULES
        elif not any(value is documented for documented in in_reference):
            assert f"{module}.{name}" in SINGLE_NAMES


def test_every_name_of_the_reference_is_public() -> None:
    for name in SINGLE_NAMES:
        module, _, own = name.rpartition(".")
        assert module in PUBLIC and own in importlib.import_module(module).__all__, name


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_has_a_docstring_of_its_own(module: str) -> None:
    assert importlib.import_module(module).__doc__
    for name, value in public(module):
        assert vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__, name
        if inspect.isclass(value):
            for method, function in vars(value).items():
                if inspect.isfunction(function) and not method.startswith("_"):
                    assert function.__doc__, f"{name}.{method}"


def reasons_in_the_sources() -> set[str]:
    reasons: set[str] = set()
    for file in (ROOT / "csrc").rglob("*"):
        if file.suffix in (".cpp", ".h"):
            reasons.update(re.findall(r'not_covered\(\s*"([^"]+)"', file.read_text()))
    for file in (ROOT / "pyext").rglob("*.py"):
        call = r'count_fallback\([^"]*(?:"\w+",\s)?[^"]*"([^"]+)"'
        reasons.update(re.findall(call, file.read_text()))
    return reasons


def test_every_reason_of_a_fallback_is_explained() -> None:
    page = (ROOT / "docs" / "fallback.md").read_text()
    explained = set(re.findall(r"^\| (?!reason|--)(.+?) \|", page, re.MULTILINE))
    assert explained == reasons_in_the_sources()
    assert len(explained) > 40


def listed_on_the_map(text: str) -> Iterator[tuple[str, str]]:
    """What a map of folders and files lists: (folder, pattern). `x.h, .cpp` are two files, `<x>` in
    a name is anything; a folder's files are indented by two."""
    folders: list[str] = []
    for line in text.splitlines():
        entry = re.match(r"(  )?((?:[^\s,]+, )*[^\s,]+)(?:  |$)", line)
        if not entry:  # a description goes on
            continue
        names = entry[2].split(", ")
        if not entry[1] and names[0].endswith("/"):
            folders = [name.rstrip("/") for name in names]
            continue
        for folder in folders if entry[1] else [""]:
            for name in names:
                stem = names[0].partition(".")[0] if name.startswith(".") else ""
                yield folder, re.sub("<room>", folder, stem + name).replace("<walk>", "*")


def test_the_map_of_the_sources_names_every_file() -> None:
    text = (ROOT / "csrc" / "README.md").read_text().split("```\n")[1]
    listed = list(listed_on_the_map(text))
    files = [f.relative_to(ROOT / "csrc") for f in (ROOT / "csrc").rglob("*") if f.is_file()]
    for file in files:
        if file.suffix != ".md":
            assert any(
                file.parent.as_posix() == (folder or ".") and fnmatch(file.name, pattern)
                for folder, pattern in listed
            ), f"csrc/README.md does not list {file}"
    for _, pattern in listed:
        assert any(fnmatch(file.name, pattern) for file in files), f"there is no {pattern}"


def test_every_page_is_in_the_table_of_contents() -> None:
    toctree = (ROOT / "docs" / "index.md").read_text().partition("```{toctree}")[2]
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}
    assert set(re.findall(r"^(\w+)$", toctree, re.MULTILINE)) == pages


@pytest.mark.parametrize(
    "page", [*PAGES, *FOR_DEVELOPERS], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_links_lead_to_files(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_make_help_names_every_target_of_the_pages() -> None:
    targets = set(re.findall(r"^([a-z-]+):.* ## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    workflows = [*(ROOT / ".github" / "workflows").iterdir()]
    for file in [*PAGES, *FOR_DEVELOPERS, *workflows, ROOT / ".ci" / "run"]:
        text = re.sub(r"^\s*#.*", "", file.read_text(), flags=re.MULTILINE)
        named = re.findall(r"(?:`|^|run: )make ([a-z-]+)", text, re.MULTILINE)
        assert set(named) <= targets, file


def test_wheels_are_built_for_every_torch_of_the_page() -> None:
    page = (ROOT / "docs" / "install.md").read_text()
    workflow = (ROOT / ".github" / "workflows" / "wheels.yml").read_text()
    tried = set(re.findall(r"^\| 3\.[^|]+\| (\d+\.\d+\.\d+)\+", page, re.MULTILINE))
    assert len(tried) > 4 and tried == set(re.findall(r'"(2\.\d+\.\d+)"', workflow))


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"momentum": 0.9, "lr": torch.tensor(0.1)},
        {"momentum": 0.9, "master_weights": True},
        {"momentum": 0.9, "stochastic_rounding": True},
    ],
    ids=["momentum", "tensor lr", "master weights", "stochastic rounding"],
)
def test_checkpoints_are_loaded_without_running_programs(
    cpu_only: None, options: dict[str, Any]
) -> None:
    net = torch.nn.Linear(40, 10).bfloat16()
    criterion = fusedstep.CrossEntropyLoss(torch.rand(10))
    optimizer = fusedstep.SGD(net.parameters(), **{"lr": 0.1, **options})
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for _ in range(2):
        criterion(net(torch.randn(128, 40).bfloat16()).float(), torch.arange(128) % 10).backward()
        optimizer.step()
        scheduler.step()
    parts = {"net": net, "loss": criterion, "optimizer": optimizer, "scheduler": scheduler}
    file = io.BytesIO()
    torch.save({name: part.state_dict() for name, part in parts.items()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    fresh = fusedstep.SGD(net.parameters(), **{"lr": 0.2, **options})
    fresh.load_state_dict(loaded["optimizer"])
    for param in net.parameters():
        for key, value in optimizer.state[param].items():
            found = fresh.state[param][key]
            assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value
    torch.optim.SGD(net.parameters(), lr=0.1).load_state_dict(loaded["optimizer"])


IN_A_PROCESS = """
import doctest, sys
sys.path.insert(0, BENCHMARKS)
from process_group import run_rank

def examples():
    result = doctest.testfile(PAGE, module_relative=False)
    sys.exit(result.failed > 0 or result.attempted == 0)

run_rank(examples)
"""


def test_the_examples_of_a_process_group() -> None:
    paths = {"BENCHMARKS": ROOT / "benchmarks", "PAGE": ROOT / "docs" / "distributed.md"}
    code = IN_A_PROCESS
    for name, path in paths.items():
        code = code.replace(name, repr(str(path)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
