"""What a Python does that a run has started, with a torch and a fusedstep that do nothing.

The interpreter is of an environment in which nothing is installed, so that it finds these two.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fusedstep

pytestmark = pytest.mark.usefixtures("cpu_only")  # about no device
BOOTSTRAP = Path(fusedstep.__file__).parent / "_bootstrap"

TORCH = "value = 1"
FUSEDSTEP = {
    "__init__": "import torch\ntorch.begun = True",
    "_run": "import torch\ndef join():\n    torch.patched = torch.begun",
}
SHOWS = """
import sys, torch
print(getattr(torch, "patched", False), *sys.argv[1:])
"""


class Python:
    """An interpreter beside a folder ``path``, which PYTHONPATH names behind that of a run."""

    def __init__(self, executable: Path, folder: Path) -> None:
        self.executable, self.folder = executable, folder
        self.path = folder / "path"
        self.write("path/torch.py", TORCH)
        for name, text in FUSEDSTEP.items():
            self.write(f"path/fusedstep/{name}.py", text)
        self.write("shows.py", SHOWS)

    def write(self, name: str, text: str) -> None:
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def __call__(
        self, *arguments: str, first: Path | None = BOOTSTRAP, command: list[str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        paths = [str(path) for path in (first, self.path) if path is not None]
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return subprocess.run(
            [*(command or [str(self.executable)]), *arguments],
            cwd=self.folder,
            env=kept | {"PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="session")
def executable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return folder / "bin" / "python"


@pytest.fixture
def python(executable: Path, tmp_path: Path) -> Python:
    return Python(executable, tmp_path)


EXECUTES = "import os, sys; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
CHILD = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"


@pytest.mark.parametrize(
    "arguments",
    [
        ["shows.py"],
        ["-m", "shows"],
        ["-c", SHOWS],
        ["-s", "-B", "-O", "-X", "utf8", "shows.py"],
        ["-c", CHILD, "shows.py"],
        ["-c", CHILD, "-c", CHILD, "-m", "shows"],
        ["-c", EXECUTES, "shows.py"],
        ["-c", "import fusedstep, runpy; runpy.run_path('shows.py')"],
    ],
    ids=lambda arguments: " ".join(arguments)[:40],
)
def test_is_patched(arguments: list[str], python: Python) -> None:
    done = python(*arguments, "--", "a b")
    shown = done.stdout.strip()
    assert shown.startswith("True") and shown.endswith("-- a b") and done.stderr == ""


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ([], ["-I"]),
        ([], ["-E"]),
        ([], ["-S"]),
        (["env", "-i"], []),
        (["env", "PYTHONPATH="], []),
        (["env", "-u", "PYTHONPATH"], []),
    ],
    ids=str,
)
def test_is_not_reached(command: list[str], arguments: list[str], python: Python) -> None:
    """As the documentation says; nothing is said of it."""
    python.write("shows.py", f"import sys; sys.path.append({str(python.path)!r})\n{SHOWS}")
    done = python(*arguments, "shows.py", command=[*command, str(python.executable)])
    assert (done.stdout, done.stderr) == ("False\n", "")


MODULES = """
import sys
modules = {name: None for name in sys.modules}
from importlib.util import find_spec
find_spec("torch").name, find_spec("fusedstep").name
print(*modules, sep="\\n")
print(*sys.path, sep="\\n", file=sys.stderr)
"""


def test_without_torch_next_to_nothing_is_imported(python: Python) -> None:
    """Looking for it imports nothing. The path is that of an interpreter outside a run."""
    inside, outside = python("-c", MODULES), python("-c", MODULES, first=None)
    more = set(inside.stdout.split()) - set(outside.stdout.split())
    cheap = {"importlib", "importlib._bootstrap", "importlib._bootstrap_external", "warnings"}
    assert more <= cheap | {"sitecustomize", "__future__", "importlib.machinery"}
    assert inside.stderr == outside.stderr


@pytest.mark.parametrize("named", ["fusedstep", "torch"])
def test_what_is_imported_first(named: str, python: Python) -> None:
    """Where fusedstep imports torch, it is patched when all of fusedstep is there."""
    python.write("path/fusedstep/__init__.py", f"{FUSEDSTEP['__init__']}\nprint('imported')")
    done = python("-c", f"import {named}\n{SHOWS}")
    assert (done.stdout, done.stderr) == ("imported\nTrue\n", "")


THREADS = """
import importlib, sys, threading
barrier = threading.Barrier(4)
def load(name):
    barrier.wait()
    importlib.import_module(name)
threads = [threading.Thread(target=load, args=[n]) for n in ["torch", "fusedstep"] * 2]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""


def test_threads_that_import_both(python: Python) -> None:
    """Each of the two waits for the other."""
    python.write("path/torch.py", f"import time\ntime.sleep(0.05)\n{TORCH}")
    package = f"import time\ntime.sleep(0.02)\n{FUSEDSTEP['__init__']}"
    python.write("path/fusedstep/__init__.py", package)
    for _ in range(5):
        done = python("-c", f"{THREADS}\n{SHOWS}")
        assert (done.stdout, done.stderr) == ("True\n", "")


# ---- Beside a sitecustomize of the user ----


@pytest.mark.parametrize(
    "text",
    [
        "import sys; print(__file__, sys.path, __name__ in sys.modules)",
        "import torch; print(torch.value)",
        "import gone",
        "raise KeyError('why')",
        "raise ImportError('why', name='sitecustomize')",
    ],
)
def test_the_users_own_sitecustomize_runs(text: str, python: Python) -> None:
    """And says what it says outside a run."""
    show = f"import sys; print(getattr(sys.modules.get('sitecustomize'), 'own', 0))\n{SHOWS}"
    python.write("path/sitecustomize.py", f"own = 1\n{text}")
    inside, outside = python("-c", show), python("-c", show, first=None)
    assert inside.stdout == outside.stdout.replace("False", "True")
    assert inside.stderr == outside.stderr


def test_another_sitecustomize_in_front_that_calls_ours(python: Python) -> None:
    """As other tools that start so call the next one."""
    python.write(
        "front/sitecustomize.py",
        "import sys\n"
        "sys.path.remove(__file__.rpartition('/')[0])\n"
        "del sys.modules['sitecustomize']\n"
        "import sitecustomize\n"
        "print('in front')",
    )
    paths = map(str, (python.folder / "front", BOOTSTRAP, python.path))
    environment = ["env", f"PYTHONPATH={os.pathsep.join(paths)}"]
    done = python("shows.py", command=[*environment, str(python.executable)])
    assert (done.stdout, done.stderr) == ("in front\nTrue\n", "")


# ---- Where it cannot be patched ----

USES = """
import importlib, sys, threading
threads = [threading.Thread(target=importlib.import_module, args=["torch"]) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
import torch
importlib.reload(torch)
print(torch.value)
"""


@pytest.mark.parametrize("warnings", ["default", "ignore", "error"])
@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        (None, "", "No module named 'fusedstep'"),
        ("__init__", "raise ImportError('built for another Python')", "built for another Python"),
        ("_run", "import torch; torch.gone", "module 'torch' has no attribute 'gone'"),
    ],
)
def test_one_warning_where_fusedstep_does_not_fit(
    file: str | None, text: str, reason: str, warnings: str, python: Python
) -> None:
    if file is None:
        (python.path / "fusedstep").rename(python.path / "other")
    else:
        python.write(f"path/fusedstep/{file}.py", text)
    done = python("-W", warnings, "-c", USES)
    assert done.stdout == "1\n"
    said = [line for line in done.stderr.splitlines() if "does not patch" in line]
    if warnings == "ignore":
        assert done.stderr == ""
    else:
        assert len(said) == 1 and str(python.executable) in said[0] and reason in said[0]
