"""What a process reads from Slurm's variables."""

import pytest

from neuroal_jax.errors import UserError
from neuroal_jax.machine import slurm

STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "2", "SLURM_NTASKS": "4", "SLURM_PROCID": "3"}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[07-09,12],login", "gpu07"),
        ("gpu[3,5]", "gpu3"),
        ("rack[1-2]-ib,other", "rack1-ib"),
        ("rack[1-2]n[03-4,7],other", "rack1n03"),
        ("n01.cluster.org", "n01.cluster.org"),
    ],
)
def test_the_first_node_of_a_list(nodes, first):
    assert slurm.first_host(nodes) == first


def test_all_processes_of_a_step_meet_at_one_place():
    places = {slurm.group({**STEP, "SLURM_PROCID": str(rank), "SLURM_STEP_NODELIST": "a[1-2]"}) for rank in range(4)}
    assert len({place[:3] for place in places}) == 1
    assert {place[3] for place in places} == {0, 1, 2, 3}
    assert next(iter(places))[0] == "a1"
    assert slurm.group({**STEP, "SLURM_JOB_NODELIST": "b3"})[0] == "b3"
    other = slurm.group({**STEP, "SLURM_JOB_ID": "8", "SLURM_STEP_NODELIST": "a1"})
    assert 1024 < other[1] < 2**16
    assert other[1] != next(iter(places))[1]


@pytest.mark.parametrize(
    "wrong", [{"SLURM_PROCID": "4"}, {"SLURM_NTASKS": "many"}, {"SLURM_STEP_NODELIST": ""}, {"SLURM_JOB_ID": ""}]
)
def test_no_step_is_refused_with_what_was_found(wrong):
    with pytest.raises(UserError, match=r"--distributed auto reads SLURM_JOB_ID.*srun"):
        slurm.group({**STEP, "SLURM_STEP_NODELIST": "a1", **wrong})
    with pytest.raises(UserError, match="found none of them"):
        slurm.group({})


@pytest.mark.parametrize(
    ("counts", "node", "local", "expected"),
    [
        ("1(x2)", 1, 0, (0, 1)),
        ("8(x2)", 1, 5, (5, 8)),
        ("4(x2),3", 2, 1, (1, 3)),
        ("2", 0, 1, (1, 2)),
        ("2", 0, 7, (0, 1)),
        ("2", 5, 0, (0, 1)),
        ("two", 0, 1, (0, 1)),
        ("", 0, 1, (0, 1)),
    ],
)
def test_processes_of_a_node(counts, node, local, expected):
    environment = {"SLURM_STEP_TASKS_PER_NODE": counts, "SLURM_NODEID": str(node), "SLURM_LOCALID": str(local)}
    assert slurm.neighbours(environment) == expected


@pytest.mark.parametrize(
    ("tasks", "local", "more", "own"),
    [
        ("1", 0, {"SLURM_GPUS_ON_NODE": "4"}, None),  # one process: all of its node
        ("4", 2, {"SLURM_GPUS_ON_NODE": "4"}, [2]),  # one process for each
        ("2", 1, {"SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, [1, 3]),
        ("4", 2, {"SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "2"}, None),  # Slurm bound one to each
        ("4", 2, {}, None),  # a node without
    ],
)
def test_accelerators_of_a_process(tasks, local, more, own):
    environment = {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": "0", "SLURM_LOCALID": str(local), **more}
    assert slurm.own_accelerators(environment) == own
