"""Training in two processes: losses and weights are those of one; one that ends is told, and gone on from."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import training

SCRIPT = Path(__file__).with_name("processes.py")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
ACCELERATE = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")


def started(launcher, case, folder, script=SCRIPT):
    """What a launcher of two processes said, and its exit status."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{SCRIPT.parents[1]}:{SCRIPT.parent}"}
    if launcher is ACCELERATE:
        environment |= {"ACCELERATE_USE_CPU": "true"}
        launcher = (*launcher, "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no")
    words = [sys.executable, *launcher, str(script), case, str(folder)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)


def told(launcher, case, folder):
    done = started(launcher, case, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("fit: ") > 0
    every = json.loads((folder / "told.json").read_text())
    assert [each["count"] for each in every] == [2, 2]
    assert every[0] == every[1], "both see the losses of all rows, and end with the same weights"
    return every[0]


def assert_alike(found, expected, rtol):
    for name in ("losses", "norms", "weights"):
        close = torch.tensor(found[name]).double(), torch.tensor(expected[name]).double()
        torch.testing.assert_close(*close, rtol=rtol, atol=rtol)
    for (step, loss), (other, value) in zip(found["validation"], expected["validation"], strict=True):
        assert step == other and loss == pytest.approx(value, rel=rtol)


def test_two_processes_train_as_one(tmp_path):
    expected = training("whole", torch.float64)
    assert len(expected["losses"]) == 9 and sum(expected["losses"][6:]) < sum(expected["losses"][:3])
    assert_alike(told(TORCHRUN, "whole", tmp_path), expected, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher, case, rtol",
    [
        (ACCELERATE, "whole", 1e-10),
        (TORCHRUN, "float32", 1e-5),
        (TORCHRUN, "compared", 1e-10),
        (TORCHRUN, "starts", 1e-10),
    ],
    ids=["accelerate", "float32", "rows that are compared", "starts that differ"],
)
def test_two_processes_train_as_one_however_they_are_started(tmp_path, launcher, case, rtol):
    expected = training("whole" if case == "starts" else case, torch.float32 if case == "float32" else torch.float64)
    assert_alike(told(launcher, case, tmp_path), expected, rtol)


@pytest.mark.slow
def test_a_process_that_ends_is_told_and_the_checkpoint_goes_on(tmp_path):
    done = started(TORCHRUN, "lost", tmp_path)
    assert done.returncode != 0 and "another process of this run has ended" in done.stderr
    settings = {"checkpoint": tmp_path / "run.ckpt", "epochs": 50}
    resumed = training("whole", torch.float64, **settings)
    assert len(resumed["losses"]) == 150
    assert_alike(resumed, training("whole", torch.float64, epochs=50), 1e-9)


def test_processes_without_a_group_are_warned_that_each_trains_all(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(UserWarning, match="no group of processes was made: each trains all rows by itself"):
        training("whole", torch.float64, epochs=1)
    training("whole", torch.float64, epochs=1, together=False)


def test_the_rows_of_a_step_are_dealt_out_once():
    from reftlens.cone.plans import Job
    from reftlens.training.processes import ALONE, Processes

    step = [[Job(0, (5, 1, 4)), Job(1, (2,))], [Job(0, (7,))]]
    assert ALONE.share(step, True) is step
    shares = [Processes(n, 2).share(step, True) for n in range(2)]
    assert shares == [[[Job(0, (5, 4)), Job(1, (2,))], [Job(0, (7,))]], [[Job(0, (1,))]]]
    assert [Processes(n, 2).share(step, False) for n in range(2)] == [[step[0]], [step[1]]]
    assert Processes(2, 3).share(step, False) == []
