"""``python -m fusedstep run``: what starts processes in its own way starts patched ones."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fusedstep

SHARED = """
import hashlib, os, sys
import torch
from torch import nn

def learn(rank, steps=3):
    \"\"\"What computed the loss, and the weights after some steps on the same numbers.\"\"\"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5)).bfloat16()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        x, t = torch.randn(16, 20).bfloat16(), torch.randint(5, (16,))
        loss = nn.functional.cross_entropy(net(x), t)
        loss.backward()
        optimizer.step()
    return f"{rank} {loss.grad_fn.name()} {digest(net)}"

def digest(net):
    weights = b"".join(p.detach().float().numpy().tobytes() for p in net.parameters())
    return hashlib.sha1(weights).hexdigest()[:10]
"""

LIGHTNING = """
import logging, warnings
import lightning as L
from process_group import run_rank
from shared import *

logging.getLogger("lightning").setLevel(logging.ERROR)
warnings.filterwarnings("ignore")
warnings.filterwarnings("default", message=".*fusedstep")

class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 5))

    def training_step(self, batch, index):
        loss = nn.functional.cross_entropy(self.net(batch[0].bfloat16()), batch[1])
        self.computed_by = loss.grad_fn.name()
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)

def main():
    L.seed_everything(0)
    data = torch.utils.data.TensorDataset(torch.randn(256, 20), torch.randint(0, 5, (256,)))
    module = Module()
    L.Trainer(
        max_epochs=2, accelerator="cpu", devices=2, strategy="ddp", precision="bf16-true",
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, torch.utils.data.DataLoader(data, batch_size=32))
    line = f"{module.global_rank} {module.computed_by} {digest(module.net)}\\n"
    with open(f"rank{module.global_rank}", "w") as file:
        file.write(line)

run_rank(main)
"""

JOBLIB = """
import joblib
from shared import *

if __name__ == "__main__":
    print(*joblib.Parallel(n_jobs=2)(joblib.delayed(learn)(rank) for rank in range(2)), sep="\\n")
"""

SUBPROCESS = """
import subprocess
from shared import *

if len(sys.argv) > 1:
    print(learn(sys.argv[1]))
else:
    for rank in "01":
        subprocess.run([sys.executable, __file__, rank], check=True)
"""

XDIST = """
import pytest
from shared import *

@pytest.mark.parametrize("rank", [0, 1])
def test_learning(rank, testrun_uid, worker_id):
    assert worker_id != "master"
    with open(f"rank{rank}", "w") as file:
        file.write(learn(rank) + "\\n")
"""


@pytest.mark.parametrize(
    ("text", "command"),
    [
        (LIGHTNING, ["script.py"]),
        (JOBLIB, ["script.py"]),
        (SUBPROCESS, ["script.py"]),
        (XDIST, ["-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", "script.py"]),
    ],
    ids=["lightning", "joblib", "subprocess", "pytest-xdist"],
)
def test_children_are_patched(text: str, command: list[str], tmp_path: Path) -> None:
    """All end with the same weights, which are not those of torch; each that learned says so."""
    (tmp_path / "shared.py").write_text(SHARED)
    (tmp_path / "script.py").write_text(text)
    folder = Path(fusedstep.__file__).resolve().parents[1]
    benchmarks = Path(__file__).resolve().parents[2] / "benchmarks"
    path = {"PYTHONPATH": os.pathsep.join([str(folder), str(benchmarks)])}
    done = subprocess.run(
        [sys.executable, "-m", "fusedstep", "run", "--stats", *command],
        cwd=tmp_path,
        env=os.environ | path | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    written = "".join(file.read_text() for file in sorted(tmp_path.glob("rank?"))) or done.stdout
    lines = [line.split() for line in written.splitlines()]
    assert [line[:2] for line in lines] == [[r, "CrossEntropyBackward0"] for r in "01"], done.stderr
    assert lines[0][2] == lines[1][2]
    assert "not patched" not in done.stderr and "does not patch" not in done.stderr
    tables = re.findall(r"^fusedstep in process (\d+)", done.stderr, re.MULTILINE)
    assert len(tables) == len(set(tables))
    fused = re.findall(r"^SGD +cpu +(\d+) +0$", done.stderr, re.MULTILINE)
    # Of 4 parameters; in 2 × 4 batches of Lightning's, else in 3 steps.
    assert sum(map(int, fused)) == 2 * 4 * (8 if text is LIGHTNING else 3), done.stderr
