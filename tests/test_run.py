"""``python -m fusedstep run``: a script runs as under python itself, and on our kernels."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def unless_emulated(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--device") == "emulator":
        pytest.skip("about processes, which know no emulator")


SCRIPTS = Path(__file__).parent / "scripts"
PYTHON = [sys.executable]
OURS = [sys.executable, "-m", "fusedstep", "run"]

FACTS = """
import json, os, sys
main = sys.modules["__main__"]
facts = {
    "script": os.path.abspath(sys.argv[0]),
    "arguments": sys.argv[1:],
    "path": sys.path[0],
    "name": __name__,
    "file": os.path.abspath(__file__),
    "package": __package__,
    "spec": __spec__ and __spec__.name,
    "is main": main.__dict__ is globals(),
    "loader": type(__loader__).__name__,
    "doc": __doc__,
}
print(json.dumps(facts))
sys.exit(int(sys.argv[2]))
"""


def run(
    command: Sequence[object],
    cwd: Path,
    code: int | None = 0,
    device: str = "cpu",
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder; where the device is the CPU, it sees no other."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    always = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | always | hidden | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert code is None or done.returncode == code, done.stderr
    return done


def write(folder: Path, **files: str) -> None:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)


# ---- As under python itself ----


@pytest.mark.parametrize(
    "target", ["folder/facts.py", "-m folder.facts", "folder"], ids=["script", "module", "folder"]
)
def test_a_script_finds_what_python_gives(target: str, tmp_path: Path) -> None:
    write(tmp_path / "folder", facts=FACTS, __main__=FACTS)
    arguments = [*target.split(), "--", "3", "--stats", "-m", "--", "x y"]
    ours = run([*OURS, *arguments], tmp_path, code=3)
    assert json.loads(ours.stdout) == json.loads(run([*PYTHON, *arguments], tmp_path, 3).stdout)
    assert ours.stderr == ""


LASTING = """
import atexit, pickle, threading, time

class Mine:
    pass

def later():
    time.sleep(0.2)
    print(pickle.loads(pickle.dumps(Mine())).__class__ is Mine)

atexit.register(later)
threading.Thread(target=later).start()
"""


@pytest.mark.parametrize("target", ["folder/lasts.py", "-m folder.lasts", "folder"])
def test_a_script_is_the_main_module_until_the_end(target: str, tmp_path: Path) -> None:
    """Its threads and exit handlers find it when its last line has run."""
    write(tmp_path / "folder", lasts=LASTING, __main__=LASTING)
    done = run([*OURS, *target.split()], tmp_path)
    assert (done.stdout.split(), done.stderr) == (["True", "True"], "")


@pytest.mark.parametrize(
    "text",
    ["def f():\n    raise KeyError('why')\n\nf()\n", "import json\nx = (\n"],
    ids=["error", "syntax error"],
)
def test_tracebacks(text: str, tmp_path: Path) -> None:
    write(tmp_path, fails=text)
    ours = run([*OURS, "fails.py"], tmp_path, code=1)
    python = run([*PYTHON, "fails.py"], tmp_path, code=1)
    assert (ours.stdout, ours.stderr) == (python.stdout, python.stderr)


def test_a_script_that_is_not_there(tmp_path: Path) -> None:
    ours = run([*OURS, "gone.py"], tmp_path, code=2)
    assert ours.stderr == run([*PYTHON, "gone.py"], tmp_path, code=2).stderr


@pytest.mark.parametrize("name", ["gone", "gone.too", "json.gone", "xml", "there.py"])
def test_a_module_that_is_not_there(name: str, tmp_path: Path) -> None:
    write(tmp_path, there="")
    ours = run([*OURS, "-m", name], tmp_path, code=1)
    assert ours.stderr == run([*PYTHON, "-m", name], tmp_path, code=1).stderr


def test_a_module_that_imports_what_is_not_there(tmp_path: Path) -> None:
    write(tmp_path, there="import gone")
    ours = run([*OURS, "-m", "there"], tmp_path, code=1)
    python = run([*PYTHON, "-m", "there"], tmp_path, code=1)
    assert ours.stderr.startswith("Traceback")
    assert ours.stderr.splitlines()[-1] == python.stderr.splitlines()[-1]


# ---- In every process ----


LEARN = """
import torch, torch.multiprocessing as mp
from torch.nn import CrossEntropyLoss
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

data = TensorDataset(torch.randn(16, 4), torch.randint(3, (16,)))

def learn(rank, workers=0):
    net = torch.nn.Linear(4, 3)
    optimizer = SGD(net.parameters(), lr=0.1)
    context = "METHOD" if workers else None
    for x, y in DataLoader(data, 8, num_workers=workers, multiprocessing_context=context):
        CrossEntropyLoss()(net(x), y).backward()
        optimizer.step()

if __name__ == "__main__":
    learn(0, workers=1)
    mp.start_processes(learn, args=(), nprocs=1, start_method="METHOD")
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_processes_of_multiprocessing(method: str, tmp_path: Path) -> None:
    write(tmp_path, learns=LEARN.replace("METHOD", method))
    done = run([*OURS, "--stats", "learns.py"], tmp_path)
    counts = re.findall(r"^(cross_entropy|SGD) +cpu +(\d+) +(\d+)", done.stderr, re.MULTILINE)
    # The worker of the DataLoader has nothing to tell.
    assert sorted(counts) == sorted([("cross_entropy", "2", "0"), ("SGD", "4", "0")] * 2)


# ---- In every Python that the script starts: see also test_bootstrap.py ----

WHICH = """
import sys, torch
x = torch.randn(2, 3, requires_grad=True)
node = torch.nn.functional.cross_entropy(x, torch.ones(2).long()).grad_fn
sys.stdout.write(" ".join([type(node).__name__, *sys.argv[1:]]) + "\\n")
sys.exit(3)
"""
STARTS = """
import os, subprocess, sys
import torch
command = [sys.executable, "which.py", "--", "a b"]
print(subprocess.run(command).returncode, flush=True)
os.execv(sys.executable, command)
"""


def test_a_python_that_the_script_starts(tmp_path: Path) -> None:
    write(tmp_path, which=WHICH, starts=STARTS)
    done = run([*OURS, "starts.py"], tmp_path, code=3)
    said = "CrossEntropyBackward0 -- a b"
    assert done.stdout.splitlines() == [said, "3", said]
    assert done.stderr == ""


LOKY = """
import joblib

def learn(_):
    import torch
    x = torch.randn(2, 3, requires_grad=True)
    return type(torch.nn.functional.cross_entropy(x, torch.ones(2).long()).grad_fn).__name__

if __name__ == "__main__":
    print(*joblib.Parallel(n_jobs=2)(joblib.delayed(learn)(i) for i in range(2)))
"""


def test_workers_of_joblib(tmp_path: Path) -> None:
    pytest.importorskip("joblib")
    write(tmp_path, jobs=LOKY)
    assert run([*OURS, "jobs.py"], tmp_path).stdout.split() == ["CrossEntropyBackward0"] * 2


# ---- Ranks ----

RANK = """
import atexit, os, sys, torch, torch.distributed as dist
dist.init_process_group("gloo")
net = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 3))
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
loss = torch.nn.CrossEntropyLoss()(net(torch.randn(8, 4)), torch.randint(3, (8,)))
loss.backward()
optimizer.step()
line = " ".join([str(dist.get_rank()), type(loss.grad_fn).__name__, *sys.argv[1:]])
sys.stdout.write(line + "\\n")  # at once, beside the other rank's
dist.destroy_process_group()
atexit._run_exitfuncs()  # one of which prints the counts
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)  # gloo's threads may abort an interpreter that ends
"""


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.mark.parametrize(
    "command",
    [[*PYTHON, *TORCHRUN, "-m", "fusedstep", "run", "--stats"], [*OURS, "--stats", *TORCHRUN]],
    ids=["around run", "inside run"],
)
def test_torchrun(command: list[str], tmp_path: Path) -> None:
    """Each rank's table says whose it is; torchrun itself has none."""
    write(tmp_path, rank=RANK)
    ours = "ignore,default::RuntimeWarning"
    done = run([*command, "rank.py", "--x"], tmp_path, PYTHONWARNINGS=ours)
    lines = sorted(done.stdout.splitlines())
    assert lines == [f"{rank} CrossEntropyBackward0 --x" for rank in range(2)]
    tables = re.findall(r"^fusedstep in process \d+(.*):\noperator ", done.stderr, re.MULTILINE)
    assert sorted(tables) == [f", rank {rank} of 2" for rank in range(2)]
    assert len(re.findall(r"^SGD +cpu +2 +0$", done.stderr, re.MULTILINE)) == 2
    assert done.stderr.count("patched:") == 2 and "RuntimeWarning" not in done.stderr


UNUSED = """
import torch
w = torch.randn(4, 3, requires_grad=True)
optimizers = [torch.optim.Adadelta([w]), torch.optim.Adam([w])]  # of which one steps
torch.nn.NLLLoss()(w.log_softmax(1), torch.zeros(4, dtype=torch.long)).backward()
optimizers[0].step()
"""


def test_a_script_that_uses_no_kernel_is_told_what_it_uses(tmp_path: Path) -> None:
    write(tmp_path, unused=UNUSED)
    done = run([*OURS, "--stats", "unused.py"], tmp_path)
    first, second, third = done.stderr.splitlines()
    assert re.fullmatch(r"fusedstep in process \d+:", first)
    used = "this script used nll_loss and Adadelta, which fusedstep does not replace"
    assert second == f"none of its kernels ran: {used}"
    assert third.startswith("patched: torch.nn.functional.")


# ---- Unmodified scripts ----


def trained(
    device: str, out: Path, *commands: Sequence[object]
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The weights and metrics that a script leaves in a folder."""
    out.mkdir(exist_ok=True)
    for command in commands:
        done = run(command, out, device=device)
        if "--stats" in command:
            assert_all_fused(done.stderr, device)
    return torch.load(out / "net.pt", map_location="cpu"), json.loads(
        (out / "metrics.json").read_text()
    )


def assert_all_fused(stats: str, device: str) -> None:
    for operator in ("cross_entropy", "SGD"):
        found = re.search(rf"^{operator} +{device} +(\d+) +(\d+)$", stats, re.MULTILINE)
        assert found and int(found[1]) > 0 and int(found[2]) == 0, stats
    assert "patched: torch.nn.functional" in stats


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest relative distance between two weights of one name."""
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k]).norm() / b[k].double().norm()) for k in a)


def test_image_classification_with_checkpoints(device: str, tmp_path: Path) -> None:
    script = SCRIPTS / "classify_digits.py"
    first, rest = ["--out", ".", "--stop-after", 2], ["--out", ".", "--resume"]
    stats = [*OURS, "--stats"]
    torchs, expected = trained(device, tmp_path / "torch", [*PYTHON, script, "--out", "."])
    whole, _ = trained(device, tmp_path / "whole", [*stats, script, "--out", "."])
    (tmp_path / "halves").mkdir()
    run([*stats, script, *first], tmp_path / "halves", device=device)
    shutil.copytree(tmp_path / "halves", tmp_path / "mixed")
    halves, metrics = trained(device, tmp_path / "halves", [*stats, script, *rest])
    mixed, _ = trained(device, tmp_path / "mixed", [*PYTHON, script, *rest])
    # A checkpoint loses nothing: the same bits as without a stop.
    assert all(torch.equal(halves[k], whole[k]) for k in whole)
    # Roundings of the loss in float32, which 96 steps amplify.
    assert distance(whole, torchs) < 1e-3 and distance(mixed, torchs) < 1e-3
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert metrics["accuracy"] == pytest.approx(expected["accuracy"], abs=1 / 297)
    assert expected["accuracy"] > 0.85


def test_segmentation_with_ignored_pixels(device: str, tmp_path: Path) -> None:
    script = SCRIPTS / "segment_shapes.py"
    torchs, expected = trained(device, tmp_path / "torch", [*PYTHON, script, "."])
    ours, metrics = trained(device, tmp_path / "ours", [*OURS, "--stats", script, "."])
    assert distance(ours, torchs) < 1e-4  # roundings of the loss in float32, amplified by 40 steps
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert metrics["mean_iou"] == pytest.approx(expected["mean_iou"], rel=1e-3)
    assert expected["mean_iou"] > 0.8


def test_language_model_with_mixed_precision(device: str, tmp_path: Path) -> None:
    script = SCRIPTS / "language_model.py"
    torchs, expected = trained(device, tmp_path / "torch", [*PYTHON, script, "."])
    ours, metrics = trained(device, tmp_path / "ours", [*OURS, "--stats", script, "."])
    # bfloat16 has 8 bits: the gradient of the logits is rounded elsewhere, to within 2^-9, in every
    # one of 60 steps.
    assert distance(ours, torchs) < 2e-2
    assert metrics["first"] == pytest.approx(expected["first"], rel=1e-6)
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=2e-3)
    assert metrics["scale"] == expected["scale"]
    assert expected["loss"] < 0.5 * expected["first"]
