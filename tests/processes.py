"""Several processes on one machine, as a group: started once, given one function, and gone within a time limit."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# processes are forked from one that has imported this, and nothing else has happened in: seconds less for each
mp.set_forkserver_preload(["siglip_lib.train.distributed", "siglip_lib.train.stored"])


def run_group(function: Callable, world: int, folder: Path, *args: object, limit: float) -> list:
    """Call ``function(folder, *args)`` in ``world`` processes of one gloo group; return each one's result, by rank.

    The function is importable, its results are what ``torch.save`` takes. An exception of one process is raised here.
    """
    context = mp.start_processes(
        _process,
        (function, world, folder, args),
        nprocs=world,
        join=False,
        start_method="forkserver",
    )
    end = time.monotonic() + limit
    try:
        while not context.join(timeout=1, grace_period=5):
            if time.monotonic() > end:
                raise TimeoutError(f"{function.__name__} took more than {limit} s")
    finally:
        for process in context.processes:
            process.kill()
            process.join()
    return [torch.load(folder / f"result{rank}.pt", weights_only=True) for rank in range(world)]


def _process(rank: int, function: Callable, world: int, folder: Path, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # not where the network could reach it
    meeting = (folder / "meeting").as_uri()
    dist.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=world, timeout=timedelta(seconds=30)
    )
    torch.save(function(folder, *args), folder / f"result{rank}.pt")
    dist.destroy_process_group()
