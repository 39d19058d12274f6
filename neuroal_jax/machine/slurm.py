"""What Slurm tells a process about the others of its step, and about the devices that it shares with them."""

import re
from collections.abc import Mapping

from neuroal_jax.errors import UserError
from neuroal_jax.machine.group import Group

_FIRST_PORT, _PORTS = 61440, 4096  # of the ports that no service has by custom


def group(environment: Mapping[str, str]) -> Group:
    """The processes of a step, and which of them this one is.

    Raises:
        UserError: If this is no step of Slurm's.
    """
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    try:
        job, step = int(environment["SLURM_JOB_ID"]), int(environment.get("SLURM_STEP_ID", 0))
        processes, rank = int(environment["SLURM_NTASKS"]), int(environment["SLURM_PROCID"])
        if not 0 <= rank < processes or not nodes:
            raise ValueError
    except (KeyError, ValueError):
        names = ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST")
        found = ", ".join(f"{name}={environment[name]}" for name in names if name in environment)
        raise UserError(
            f"--distributed auto reads {', '.join(names)} and found {found or 'none of them'}: start the processes "
            "with srun, or name them with --distributed HOST:PORT,PROCESSES,RANK"
        ) from None
    return Group(first_host(nodes), _FIRST_PORT + (97 * job + step) % _PORTS, processes, rank)


def first_host(nodes: str) -> str:
    """The first of a list of nodes such as `gpu[07-09,12],login`: `gpu07`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^,\]-]+)[^\]]*\]", r"\1", first[0]) if first else nodes


def neighbours(environment: Mapping[str, str]) -> tuple[int, int]:
    """Which of the processes of its node this one is, and how many they are; (0, 1) where Slurm does not say it."""
    counts = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or ""
    per_node: list[int] = []
    for item in filter(None, counts.split(",")):  # 4(x2),3: four on each of two nodes, three on the next
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item)
        if match is None:
            return 0, 1
        per_node += [int(match[1])] * int(match[2] or 1)
    try:
        here, local = per_node[int(environment["SLURM_NODEID"])], int(environment["SLURM_LOCALID"])
    except (KeyError, ValueError, IndexError):
        return 0, 1
    return (local, here) if 0 <= local < here else (0, 1)


def own_accelerators(environment: Mapping[str, str]) -> list[int] | None:
    """Numbers of the node's accelerators that are this process's own; None: all that it sees.

    It sees all of its node's unless Slurm binds some to each process, and then only those.
    """
    local, here = neighbours(environment)
    try:
        on_node = int(environment["SLURM_GPUS_ON_NODE"])
    except (KeyError, ValueError):
        return None
    visible = environment.get("CUDA_VISIBLE_DEVICES", environment.get("ROCR_VISIBLE_DEVICES"))
    seen = on_node if visible is None else len(list(filter(None, visible.split(","))))
    return list(range(local, seen, here)) if here > 1 and seen >= max(on_node, here) else None
