"""Which worker a process is: what torchrun, srun and job arrays say."""

import pytest

from mmcache.errors import ArgumentError
from mmcache.system.launcher import Rank, find_rank

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SRUN = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}
ARRAY = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "6"}


@pytest.mark.parametrize(
    ("environ", "rank"),
    [
        ({}, Rank()),
        (TORCHRUN, Rank(5, 8, 1, "torchrun", leads=False)),
        (TORCHRUN | {"RANK": "0"}, Rank(0, 8, 1, "torchrun")),
        (SRUN, Rank(2, 4, 0, "srun", leads=False)),
        # torchrun started on each node by srun: torchrun has counted all of them already.
        (SRUN | TORCHRUN, Rank(5, 8, 1, "torchrun", leads=False)),
        (ARRAY, Rank(2, 6, 0, "a job array")),
        (ARRAY | SRUN, Rank(2 * 4 + 2, 24, 0, "srun in a job array", leads=False)),
        (ARRAY | TORCHRUN, Rank(2 * 8 + 5, 48, 1, "torchrun in a job array", leads=False)),
        # A batch script that runs by itself is told how many tasks it might start.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, Rank()),
        # --array=0-20:4
        (
            {
                "SLURM_ARRAY_TASK_ID": "8",
                "SLURM_ARRAY_TASK_MIN": "0",
                "SLURM_ARRAY_TASK_COUNT": "6",
                "SLURM_ARRAY_TASK_STEP": "4",
            },
            Rank(2, 6, 0, "a job array"),
        ),
        # --array=1,50: its numbers say nothing of how many there are before.
        (
            {"SLURM_ARRAY_TASK_ID": "50", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "2"},
            Rank(1, 2, 0, "a job array"),
        ),
        ({"RANK": "0"}, Rank()),
    ],
)
def test_the_environment_says_which_worker_this_is(environ, rank):
    assert find_rank(environ) == rank


@pytest.mark.parametrize("number", [{"RANK": "8"}, {"RANK": "-1"}, {"WORLD_SIZE": "0"}])
def test_a_rank_that_cannot_be_is_refused(number):
    with pytest.raises(ArgumentError, match="torchrun says that this is worker"):
        find_rank(TORCHRUN | number)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_what_is_no_number_is_named(name):
    with pytest.raises(ArgumentError, match=f"the environment's {name} is 'x': expected a whole number"):
        find_rank(TORCHRUN | {name: "x"})


def test_this_process_has_an_environment_of_its_own(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert find_rank().number == 5
