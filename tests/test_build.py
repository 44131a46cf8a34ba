"""What setup.py, the installed package and its command say about the build."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fusedstep
from fusedstep import __main__ as command
from fusedstep import _build_info
from test_layering import ROOT, cpp_files, speaks_torch

CXX = os.environ.get("CXX", "g++")
KERNELS = [f for f in cpp_files(ROOT) if f.suffix == ".cpp" and not speaks_torch(f, ROOT)]
REBUILD = "pip install --no-build-isolation"


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of the installed package that a test may break."""
    original = Path(fusedstep.__file__).parent
    return shutil.copytree(
        original, tmp_path / "fusedstep", ignore=shutil.ignore_patterns("__pycache__")
    )


def import_error(package: Path) -> str:
    """The last line, the error's own, of importing this copy of the package."""
    result = python("-c", "import fusedstep", PYTHONPATH=str(package.parent))
    assert result.returncode != 0
    return result.stderr.strip().splitlines()[-1]


def release(patch: str) -> str:
    """The version of the torch running here with another patch release."""
    return ".".join([*torch.__version__.split(".")[:2], patch])


def test_version_is_the_projects() -> None:
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    assert fusedstep.__version__ == declared[1]


def test_info_names_the_build() -> None:
    facts = json.loads(python("-m", "fusedstep", "info", "--json").stdout)
    assert facts["fusedstep"] == fusedstep.__version__
    assert facts["built for torch"] == _build_info.torch_version
    assert facts["running torch"] == torch.__version__
    assert facts["CPU level"] in ("default", "avx2", "avx512")
    assert facts["torch's CUDA"] == torch.version.cuda
    assert len(facts["GPUs"]) == torch.cuda.device_count()
    if facts["CUDA kernels"]:
        assert facts["nvcc"] == _build_info.cuda
        assert facts["architectures"] == list(_build_info.cuda_architectures) != []
    else:
        assert facts["why no CUDA"] == _build_info.why_no_cuda
        assert {"nvcc", "architectures"}.isdisjoint(facts)
    lines = python("-m", "fusedstep", "info").stdout.splitlines()
    assert len(lines) == len(facts)
    for line, (name, value) in zip(lines, facts.items(), strict=True):
        assert line.split(name)[1].strip() == command.text(value)


def test_info_tells_a_cuda_build_and_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build_info, "cuda", "13.0")
    monkeypatch.setattr(_build_info, "cuda_architectures", ("8.0", "9.0+PTX"))
    cards = [("Old", (7, 5)), ("Ada", (8, 9)), ("Later", (12, 1))]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: cards[index][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: cards[index][1])
    facts = command.info()
    assert command.text(facts["CUDA kernels"]) == "yes"
    assert "why no CUDA" not in facts
    assert facts["nvcc"] == "13.0"
    assert command.text(facts["architectures"]) == "8.0, 9.0+PTX"
    assert facts["GPUs"] == [
        "Old (compute capability 7.5; this build has nothing for it)",
        "Ada (compute capability 8.9; this build has machine code for it)",
        "Later (compute capability 12.1; this build has PTX for it)",
    ]


@pytest.mark.parametrize(
    ("capability", "architectures", "holds"),
    [
        ((8, 0), ["8.0"], "machine code"),
        ((8, 9), ["8.0", "9.0"], "machine code"),
        ((8, 0), ["8.6"], "nothing"),
        ((9, 0), ["8.0"], "nothing"),
        ((9, 0), ["8.0+PTX"], "PTX"),
        ((8, 6), ["8.0+PTX"], "machine code"),
        ((9, 0), ["9.0a"], "machine code"),
        ((9, 1), ["9.0a"], "nothing"),
        ((10, 0), ["9.0a+PTX"], "nothing"),
        ((10, 3), ["9.0", "10.0", "12.0+PTX"], "machine code"),
        ((12, 1), ["12.0+PTX"], "machine code"),
        ((13, 0), ["9.0", "12.0+PTX"], "PTX"),
        ((9, 0), [], "nothing"),
    ],
)
def test_info_knows_which_gpus_a_build_is_for(
    capability: tuple[int, int], architectures: list[str], holds: str
) -> None:
    assert command.code_for(capability, architectures) == holds


def test_info_follows_the_level_asked_for() -> None:
    info = python("-m", "fusedstep", "info", "--json", ATEN_CPU_CAPABILITY="default")
    assert json.loads(info.stdout)["CPU level"] == "default"


def test_an_unknown_command_is_refused_in_one_line() -> None:
    result = python("-m", "fusedstep", "inform")
    assert result.returncode == 2
    assert "invalid choice: 'inform'" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_run_without_a_script_asks_for_one() -> None:
    result = python("-m", "fusedstep", "run")
    assert result.returncode == 2
    assert result.stderr.endswith("the following arguments are required: script\n")


def test_another_torch_is_refused_by_name(package: Path) -> None:
    (package / "_build_info.py").write_text("torch_version = '1.13.1+cu117'\n")
    error = import_error(package)
    assert error.startswith("ImportError: ")
    for part in ("torch 1.13.1+cu117", f"torch {torch.__version__}", REBUILD):
        assert part in error


def test_another_patch_release_of_torch_is_accepted(package: Path) -> None:
    facts = (package / "_build_info.py").read_text().replace(torch.__version__, release("99+any"))
    (package / "_build_info.py").write_text(facts)
    info = python("-m", "fusedstep", "info", "--json", PYTHONPATH=str(package.parent))
    assert json.loads(info.stdout)["built for torch"] == release("99+any")


def test_a_missing_symbol_of_torch_is_told_as_another_torch(package: Path) -> None:
    (core,) = package.glob("_C*.so")
    source = package / "core.cpp"
    source.write_text('extern "C" { void gone(); void* PyInit__C() { gone(); return nullptr; } }\n')
    subprocess.run([CXX, "-shared", "-fPIC", str(source), "-o", str(core)], check=True)
    error = import_error(package)
    assert error.startswith("ImportError: fusedstep was built for torch ")
    assert REBUILD in error


def test_a_missing_library_of_torch_is_told_as_another_torch(package: Path) -> None:
    (core,) = package.glob("_C*.so")
    absent, source = package / "libc10_absent.so", package / "core.cpp"
    source.write_text('extern "C" { void gone() {} void* PyInit__C() { gone(); return nullptr; } }')
    subprocess.run([CXX, "-shared", "-fPIC", str(source), "-o", str(absent)], check=True)
    link = ["-Wl,--no-as-needed", f"-L{package}", "-lc10_absent"]
    subprocess.run([CXX, "-shared", "-fPIC", str(source), "-o", str(core), *link], check=True)
    absent.unlink()
    error = import_error(package)
    assert error.startswith("ImportError: fusedstep was built for torch ")
    assert REBUILD in error


def test_an_unbuilt_package_says_how_to_build_it(package: Path) -> None:
    (package / "_build_info.py").unlink()
    error = import_error(package)
    assert error.startswith("ImportError: fusedstep is not built")
    assert REBUILD in error


def test_a_core_for_another_python_is_told_as_not_built(package: Path) -> None:
    (core,) = package.glob("_C*.so")
    core.rename(package / "_C.cpython-39-x86_64-linux-gnu.so")
    error = import_error(package)
    python_version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert error.startswith(f"ImportError: fusedstep is not built for Python {python_version}")
    assert REBUILD in error


def test_setup_without_torch_stops_with_one_sentence() -> None:
    without_torch = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path('setup.py')"
    result = subprocess.run(
        [sys.executable, "-c", without_torch], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 1
    (sentence,) = result.stderr.splitlines()
    assert "install torch, then `pip install --no-build-isolation .`" in sentence


def test_a_build_without_a_compiler_stops_with_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={tmp_path}"]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"CXX": "no-such-compiler -pipe", "FUSEDSTEP_CUDA": "0"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    *_, sentence = result.stderr.splitlines()
    assert "needs a C++20 compiler and no-such-compiler -pipe is not on PATH" in sentence
    assert not list(tmp_path.iterdir())


def test_a_python_without_headers_stops_with_one_sentence(
    setup: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = setup(None, None)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(SystemExit) as stopped:
        names["require_headers"]()
    assert f"there is no {tmp_path / 'Python.h'}: install python3-dev" in sentence(stopped)


# nvcc 13.0's own order.
LIST_GPU_ARCH = "\n".join(
    f"compute_{n}" for n in (75, 80, 86, 87, 88, 89, 90, 100, 110, 103, 120, 121)
)

FAKE_NVCC = """#!/bin/sh
case $1 in
    --version) echo "Cuda compilation tools, release {release}, V{release}.9" ;;
    --list-gpu-arch) echo "{list_gpu_arch}" ;;
    -dryrun) echo '#$ INCLUDES="-I/headers of/nvcc"' ;;
esac
"""


@pytest.fixture
def setup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str | None, str | None], dict[str, Any]]:
    """setup.py's names, as it would build with torch of one CUDA release and nvcc of another."""

    def load(torch_cuda: str | None, nvcc: str | None) -> dict[str, Any]:
        home = tmp_path / "cuda"
        (home / "bin").mkdir(parents=True)
        if nvcc is not None:
            script = home / "bin" / "nvcc"
            script.write_text(FAKE_NVCC.format(release=nvcc, list_gpu_arch=LIST_GPU_ARCH))
            script.chmod(0o755)
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", str(home))
        monkeypatch.chdir(ROOT)
        return runpy.run_path("setup.py")

    for name in ("FUSEDSTEP_CUDA", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    return load


def sentence(stopped: pytest.ExceptionInfo[SystemExit]) -> str:
    text = str(stopped.value.code)
    assert "\n" not in text
    return text


def test_cuda_is_built_where_torch_and_nvcc_have_it(
    setup: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAX_JOBS", "2")
    names = setup("13.0", "13.2")
    assert names["ARCHITECTURES"] == ["7.5", "8.0", "9.0", "10.0", "11.0", "12.0+PTX"]
    facts: dict[str, Any] = {}
    exec(names["build_info"](), facts)
    assert (facts["cuda"], facts["why_no_cuda"]) == ("13.2", None)
    assert facts["cuda_architectures"] == tuple(names["ARCHITECTURES"])
    extension = names["extension"]()
    assert {Path(source).suffix for source in extension.sources} == {".cpp", ".cu"}
    assert "-DFUSEDSTEP_CUDA" in extension.extra_compile_args["cxx"]
    assert "-gencode=arch=compute_90,code=sm_90" in extension.extra_compile_args["nvcc"]
    assert "--threads=1" in extension.extra_compile_args["nvcc"]
    assert "/headers of/nvcc" in extension.include_dirs
    assert "c10_cuda" in extension.libraries


def test_a_cuda_build_without_a_compiler_stops_with_one_sentence(
    setup: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    names = setup("13.0", "13.0")
    with pytest.raises(SystemExit) as stopped:
        names["extension"]()
    assert "needs a C++20 compiler and no-such-compiler is not on PATH" in sentence(stopped)


def test_an_nvcc_that_fails_is_told_in_its_own_words(
    setup: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    names = setup("13.0", "13.0")
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho nvcc fatal: no host >&2\necho compiler\nexit 1\n")
    with pytest.raises(SystemExit) as stopped:
        names["extension"]()
    said = (
        f"{shlex.quote(str(nvcc))} -dryrun -c -x cu /dev/null failed: nvcc fatal: no host compiler"
    )
    assert sentence(stopped) == said


def test_named_architectures_are_the_ones_built(
    setup: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 9.0a;12.0+PTX")
    names = setup("13.0", "13.0")
    assert names["ARCHITECTURES"] == ["8.6", "9.0a", "12.0+PTX"]
    assert names["code_flags"](names["ARCHITECTURES"]) == [
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("8.0;Hopper", "Hopper is not an architecture"),
        ("7.0;7.5", "written for 7.5 and newer; leave 7.0 out"),
        ("6.1+PTX", "leave 6.1+PTX out"),
    ],
)
def test_an_architecture_without_kernels_is_refused_by_name(
    setup: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, asked: str, said: str
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    with pytest.raises(SystemExit) as stopped:
        setup("13.0", "13.0")
    assert said in sentence(stopped)


@pytest.mark.parametrize(
    ("list_gpu_arch", "architectures"),
    [
        (LIST_GPU_ARCH, ["7.5", "8.0", "9.0", "10.0", "11.0", "12.0+PTX"]),
        ("compute_50\ncompute_72\ncompute_75\ncompute_80\ncompute_90", ["7.5", "8.0", "9.0+PTX"]),
        ("compute_90\ncompute_90a\ncompute_86\ncompute_87", ["8.6", "9.0+PTX"]),
        ("compute_80", ["8.0+PTX"]),
    ],
)
def test_default_architectures_are_the_first_of_each_major(
    setup: Callable[..., dict[str, Any]], list_gpu_arch: str, architectures: list[str]
) -> None:
    assert setup(None, None)["default_architectures"](list_gpu_arch) == architectures


@pytest.mark.parametrize(
    ("asked", "torch_cuda", "nvcc", "reason"),
    [
        ("0", "13.0", "13.0", "FUSEDSTEP_CUDA=0"),
        ("0", "13.0", "12.8", "FUSEDSTEP_CUDA=0"),
        ("", None, "13.0", "has no CUDA; install a torch"),
        ("", "13.0", None, "there is no nvcc; install the CUDA 13.0 toolkit"),
    ],
)
def test_a_build_without_cuda_says_why(
    setup: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
    torch_cuda: str | None,
    nvcc: str | None,
    reason: str,
) -> None:
    monkeypatch.setenv("FUSEDSTEP_CUDA", asked)
    names = setup(torch_cuda, nvcc)
    facts: dict[str, Any] = {}
    exec(names["build_info"](), facts)
    assert reason in facts["why_no_cuda"]
    assert (facts["cuda"], facts["cuda_architectures"]) == (None, ())
    extension = names["extension"]()
    assert not [source for source in extension.sources if source.endswith(".cu")]
    assert "-DFUSEDSTEP_CUDA" not in extension.extra_compile_args["cxx"]


@pytest.mark.parametrize(
    ("asked", "torch_cuda", "nvcc", "parts"),
    [
        ("1", None, "13.0", ["FUSEDSTEP_CUDA=1", "has no CUDA; install a torch"]),
        ("1", "13.0", None, ["FUSEDSTEP_CUDA=1", "no nvcc", "13.0 toolkit", "CUDA_HOME"]),
        ("1", "13.0", "12.8", ["CUDA 12.8", "CUDA 13.0", "CUDA_HOME", "FUSEDSTEP_CUDA=0"]),
        ("", "12.6", "13.0", ["CUDA 13.0", "CUDA 12.6", "CUDA_HOME", "FUSEDSTEP_CUDA=0"]),
        ("yes", "13.0", "13.0", ["FUSEDSTEP_CUDA=yes", "1 builds with CUDA, 0 without"]),
    ],
)
def test_an_impossible_cuda_build_stops_with_one_sentence(
    setup: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
    torch_cuda: str | None,
    nvcc: str | None,
    parts: list[str],
) -> None:
    monkeypatch.setenv("FUSEDSTEP_CUDA", asked)
    with pytest.raises(SystemExit) as stopped:
        setup(torch_cuda, nvcc)
    for part in parts:
        assert part in sentence(stopped)


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_runs_the_callers_python_where_there_is_a_venv(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    for folder in (tmp_path / "callers", tmp_path / ".venv" / "bin"):
        folder.mkdir(parents=True)
        (folder / "python3").write_text(f"#!/bin/sh\necho ran {folder}\n")
        (folder / "python3").chmod(0o755)
    result = subprocess.run(
        ["make", "gpu-check"],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path / 'callers'}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"ran {tmp_path / 'callers'}" in result.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_says_that_the_cuda_build_needs_nvcc(tmp_path: Path) -> None:
    # PYTHON=false: were nvcc not missed, nothing would be installed.
    command = [str(shutil.which("make")), "cuda-build", f"CUDA_VENV={tmp_path}", "PYTHON=false"]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env={"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "The CUDA build needs nvcc" in result.stdout


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda f: f.relative_to(ROOT / "csrc").as_posix())
def test_kernels_compile_without_torch(kernel: Path) -> None:
    command = [CXX, "-std=c++20", "-fsyntax-only", "-w", "-Icsrc", str(kernel)]
    subprocess.run(command, cwd=ROOT, check=True)


def test_there_are_kernels_without_torch() -> None:
    assert {"core", "cross_entropy", "optim"} <= {kernel.parent.name for kernel in KERNELS}
