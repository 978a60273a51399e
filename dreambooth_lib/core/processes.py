"""Join the group of processes that a launcher started to train together, on GPUs or CPUs."""

import os
from datetime import timedelta
from typing import TYPE_CHECKING

from dreambooth_lib.core.errors import KitError

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

#: How long processes wait for each other: one may validate or draw class images for hours. If one
#: of them dies, the launcher ends the others at once.
PATIENCE = timedelta(days=1)

#: Environment variables with the number of processes: torchrun's and MPI's.
_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


class LaunchError(KitError, ValueError):
    """The processes cannot form a group; the message says how to start them."""


def join_group() -> "PartialState":
    """Join the process group, once in each process; without a launcher it is a group of one.

    Raises :class:`LaunchError` if fewer processes would train than were asked for, or more than
    there are GPUs.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    asked = next((int(os.environ[name]) for name in _COUNTS if name in os.environ), 1)
    if asked == 1 and _started_alone():
        raise LaunchError(
            "accelerate started only one process, as it does when there is no GPU for each of "
            "them; start them with 'torchrun --standalone --nproc_per_node 2 -m "
            "dreambooth_lib ...', or set --num_processes to 1."
        )
    # Without cpu=True there is never a group on a CPU: each process would train by itself.
    cpu = asked > 1 and not torch.accelerator.is_available()
    cpu = cpu or parse_flag_from_env("ACCELERATE_USE_CPU")
    # A Mac's GPU has no 8-bit AdamW, and torch may read tensors there before they are copied.
    cpu = cpu or torch.backends.mps.is_available()
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if asked > 1 and not cpu and torch.cuda.is_available() and here > gpus:
        raise LaunchError(
            f"{here} processes were started for {gpus} GPU{'s' * (gpus > 1)}; start as many as "
            "there are GPUs, or set ACCELERATE_USE_CPU=true to train on the CPU."
        )
    state = PartialState(cpu, timeout=PATIENCE)
    if state.num_processes < asked:
        raise LaunchError(
            f"{asked} processes were started and cannot form a group on '{state.device.type}'; set "
            "ACCELERATE_USE_CPU=true to train on the CPU, or start one."
        )
    return state


def drawing_gpu() -> "torch.device | None":
    """Return the GPU to draw on; None without one, or where accelerate is told to use the CPU."""
    import torch

    device = join_group().device if torch.cuda.is_available() else None
    return None if device is None or device.type == "cpu" else device


def _started_alone() -> bool:
    """Return whether ``accelerate launch`` was asked for several processes and started one.

    It then says where they would meet, and nothing of who they are.
    """
    told = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ)
    return told and "LOCAL_RANK" not in os.environ
