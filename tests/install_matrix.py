"""Installs fusedstep as users do, in environments of its own, and reports what happened.

For every interpreter and torch asked for, an environment is made with pip; fusedstep is installed
into it in one way after another, used and removed. Where torch comes from, and so whether it is a
CPU or a CUDA build, depends on pip's settings (``PIP_INDEX_URL``, ``PIP_FIND_LINKS``). What this
machine cannot do is reported as not run, never as passed. Needs the standard library and git.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ["python3.10", "python3.11", "python3.12", "python3.13"]
TORCHES = ["2.10.*", "2.11.*", "2.13.*", "newest"]

# What an installation has to do, from a folder that holds nothing else.
USE = """
import torch, fusedstep
logits = torch.randn(64, 10, requires_grad=True)
optimizer = fusedstep.SGD([logits], lr=0.1, momentum=0.9)
before = logits.detach().clone()
loss = fusedstep.CrossEntropyLoss()(logits, torch.randint(10, (64,)))
assert loss.grad_fn.name() == "CrossEntropyBackward0", loss.grad_fn
loss.backward()
optimizer.step()
torch.testing.assert_close(logits.detach(), before - 0.1 * logits.grad)
calls = fusedstep.stats()
assert (calls.fused, calls.fell_back) == (2, 0), str(calls)
print(fusedstep.__file__)
"""


class NotRun(Exception):
    """This machine lacks what the case needs."""


class Failed(Exception):
    """The case did not end as it should."""


def run(*command: str | Path, cwd: Path | None = None, **environment: str) -> str:
    """What the command printed, both streams together.

    Raises:
        Failed: it exited with another status than 0; the output is the message.
    """
    result = subprocess.run(
        command,
        cwd=cwd,
        env=clean_environment() | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if result.returncode != 0:
        raise Failed(result.stdout)
    return result.stdout


def clean_environment() -> dict[str, str]:
    """Ours, without what would let an installation see another one."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}


class Environment:
    """A virtual environment with torch and what a build needs."""

    def __init__(self, folder: Path, python: str, torch: str) -> None:
        interpreter = shutil.which(python)
        if interpreter is None:
            raise NotRun(f"no {python} on PATH")
        self.folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        run(interpreter, "-m", "venv", folder)
        self.python = folder / "bin" / "python"
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        try:
            self.pip("install", "--no-compile", "setuptools>=77", "ninja", requirement(torch))
        except Failed as failure:
            raise NotRun(f"pip found no torch {torch}: {last_line(failure)}") from failure
        try:
            self.torch = self.execute("import torch; print(torch.__version__)")
        except Failed as failure:
            raise NotRun(f"torch {torch} cannot be imported: {last_line(failure)}") from failure
        self.bare = self.files()

    def pip(self, *arguments: str | Path, **environment: str) -> str:
        path = f"{self.python.parent}{os.pathsep}{os.environ['PATH']}"
        command = [self.python, "-m", "pip", "--disable-pip-version-check", *arguments]
        return run(*command, cwd=self.elsewhere, **{"PATH": path, **environment})

    def execute(self, program: str) -> str:
        return run(self.python, "-W", "ignore", "-c", program, cwd=self.elsewhere).strip()

    def install(self, *what: str | Path, **environment: str) -> str:
        """Build and install fusedstep.

        Raises:
            NotRun: nvcc is not the one for this torch, in setup.py's words.
            Failed: anything else.
        """
        build = ("-v", "--no-build-isolation", "--no-deps", "--no-cache-dir")
        try:
            return self.pip("install", *build, *what, **environment)
        except Failed as failure:
            for line in str(failure).splitlines():
                if line.strip().startswith("nvcc is of CUDA"):
                    raise NotRun(line.strip()) from failure
            raise

    def files(self) -> set[Path]:
        """Everything that is installed in the environment, without Python's caches."""
        everything = (self.folder / "lib").rglob("*")
        return {path for path in everything if "__pycache__" not in path.parts}

    def check_and_remove(self, home: Path | None = None) -> str:
        """Use what was installed, then uninstall it.

        Args:
            home: Where the package must lie; by default in this environment.

        Returns:
            What was built.
        """
        found = Path(self.execute(USE).splitlines()[-1])
        home = (home or self.folder).resolve()
        if not found.is_relative_to(home):
            raise Failed(f"{found} was imported, which is not in {home}")
        info = run(self.python, "-W", "ignore", "-m", "fusedstep", "info", cwd=self.elsewhere)
        self.pip("uninstall", "--yes", "fusedstep")
        has_cuda = re.search(r"^CUDA kernels +yes$", info, re.MULTILINE)
        return "CPU and CUDA kernels" if has_cuda else "CPU kernels"


def requirement(torch: str) -> str:
    return "torch" if torch == "newest" else f"torch=={torch}"


def last_line(failure: Failed) -> str:
    lines = [line for line in str(failure).splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no output"


class Source:
    """The sdist of this checkout, and unpacked copies of it."""

    def __init__(self, folder: Path, environment: Environment) -> None:
        self.folder = folder
        backend = f"import setuptools.build_meta as b; b.build_sdist({str(folder)!r})"
        folder.mkdir()
        # All sources are in it, whatever the nvcc of this machine is for.
        run(environment.python, "-c", backend, cwd=ROOT, FUSEDSTEP_CUDA="0")
        (self.sdist,) = folder.glob("fusedstep-*.tar.gz")

    def unpacked(self, name: str) -> Path:
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        with tarfile.open(self.sdist) as archive:
            archive.extractall(folder)
        (tree,) = folder.iterdir()
        return tree


# ------------------------------------------------------------------ the ways


def from_sdist(env: Environment, source: Source, _: str) -> str:
    env.install(source.sdist)
    return env.check_and_remove()


def from_git(env: Environment, source: Source, _: str) -> str:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        raise NotRun("not a git checkout, or no git")
    env.install(f"git+{ROOT.as_uri()}")
    return env.check_and_remove()


def from_a_path_with_spaces(env: Environment, source: Source, _: str) -> str:
    env.install(source.unpacked("a path with spaces"))
    return env.check_and_remove()


def editable(env: Environment, source: Source, _: str) -> str:
    tree = source.unpacked("editable")
    env.install("-e", tree)
    return env.check_and_remove(home=tree)


def without_ninja(env: Environment, source: Source, _: str) -> str:
    env.pip("uninstall", "--yes", "ninja")
    try:
        said = env.install(source.sdist, PATH=path_without("ninja", env.folder / "path"))
        if "ninja is not installed; building one file at a time" not in said:
            raise Failed(said)
        return env.check_and_remove()
    finally:
        env.pip("install", "ninja")


def path_without(name: str, folder: Path) -> str:
    """PATH, in which folders that hold a command of this name are replaced by links to the others.

    Args:
        folder: where the links are made.
    """
    path = []
    for number, directory in enumerate(os.environ["PATH"].split(os.pathsep)):
        if not Path(directory, name).exists():
            path.append(directory)
            continue
        links = folder / str(number)
        links.mkdir(parents=True)
        for command in Path(directory).iterdir():
            if command.name != name:
                (links / command.name).symlink_to(command)
        path.append(str(links))
    return os.pathsep.join(path)


def without_compiler(env: Environment, source: Source, _: str) -> str:
    return must_fail(
        "fusedstep needs a C++20 compiler and c++ is not on PATH",
        lambda: env.install(source.sdist, PATH=str(env.python.parent), CXX="c++"),
    )


def with_build_isolation(env: Environment, source: Source, _: str) -> str:
    return must_fail(
        "install torch, then `pip install --no-build-isolation .`",
        lambda: env.pip("install", "--no-deps", source.sdist),
    )


def under_another_torch(env: Environment, source: Source, other: str) -> str:
    if not other:
        raise NotRun("no other torch was named (--other)")
    env.install(source.sdist)
    try:
        env.pip("install", requirement(other))
        running = env.execute("import torch; print(torch.__version__)")
    except Failed as failure:
        raise NotRun(f"no torch {other}: {last_line(failure)}") from failure
    env.bare = {file for file in env.files() if "fusedstep" not in file.name}
    sentence = f"fusedstep was built for torch {env.torch}, but torch {running} is installed"
    said = must_fail(sentence, lambda: env.execute("import fusedstep"))
    env.pip("uninstall", "--yes", "fusedstep")
    return said


def must_fail(sentence: str, action: Callable[[], str]) -> str:
    """The sentence, if the action raises Failed and says it; else raises Failed."""
    try:
        action()
    except Failed as failure:
        if sentence not in str(failure):
            raise Failed(f"stopped without saying {sentence!r}:\n{failure}") from failure
        return f"says {sentence!r}"
    raise Failed(f"did not stop with {sentence!r}")


# Each returns what it found. The last replaces the environment's torch.
WAYS: dict[str, Callable[[Environment, Source, str], str]] = {
    "no compiler: says so": without_compiler,
    "build isolation: says what to do": with_build_isolation,
    "sdist": from_sdist,
    "path with spaces": from_a_path_with_spaces,
    "editable": editable,
    "git": from_git,
    "no ninja": without_ninja,
    "another torch afterwards: ImportError": under_another_torch,
}


def cell(way: str, env: Environment, source: Source, other: str, log: Path) -> str:
    """Install in one way; nothing may be left afterwards.

    Returns:
        ``"passed"``, or ``"not run"`` or ``"FAILED"`` with the reason.
    """
    start = time.monotonic()
    try:
        found = WAYS[way](env, source, other)
        if left := env.files() - env.bare:
            raise Failed("left behind: " + ", ".join(sorted(map(str, left))))
    except NotRun as reason:
        return f"not run: {reason}"
    except Failed as failure:
        log.write_text(str(failure))
        return f"FAILED: {last_line(failure)} ({log})"
    return f"passed: {found} ({time.monotonic() - start:.0f} s)"


def column(python: str, torch: str, ways: list[str], other: str, out: Path) -> Iterator[str]:
    """The rows of one interpreter and one torch, as they come."""
    name = f"{python}-torch-{torch}".replace("*", "x").replace("/", "-")
    try:
        env = Environment(out / name, python, torch)
    except NotRun as reason:
        yield f"| {Path(python).name} | {torch} | all | not run: {reason} |"
        return
    version = env.execute("import platform; print(platform.python_version())")
    source = Source(out / name / "sources", env)
    for way in ways:
        said = cell(way, env, source, other, out / f"{name}-{list(WAYS).index(way)}.log")
        yield f"| {version} | {env.torch} | {way} | {said} |"
    shutil.rmtree(out / name)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder for environments, logs and report.md")
    parser.add_argument("--python", nargs="+", default=PYTHONS, help="interpreters")
    parser.add_argument("--torch", nargs="+", default=TORCHES, help='versions, "newest" among them')
    parser.add_argument("--way", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument("--other", default="", help="the torch that is installed afterwards")
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    rows = ["| Python | torch | installed | result |", "|---|---|---|---|"]
    print(*rows, sep="\n")
    for python in arguments.python:
        for torch in arguments.torch:
            for row in column(python, torch, arguments.way, arguments.other, out):
                print(row, flush=True)
                rows.append(row)
    (out / "report.md").write_text("\n".join([*rows, ""]))
    if any("| FAILED" in row for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
