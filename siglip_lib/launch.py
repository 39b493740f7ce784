"""Start processes that work together on this machine, as torchrun does, and let none of them listen to the network.

    python -m siglip_lib.launch 4 -m siglip_lib.train --out run
    python -m siglip_lib.launch gpu script.py        # one for each GPU

torchrun's processes meet through stores that listen on all addresses of the machine, and unpickle what they are told:
whoever reaches such a port can run code. Here they meet in files of a private folder, and gloo and NCCL listen on the
loopback address alone. That is open to who is logged in on this machine: gloo and NCCL ask nobody for a secret.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

import torch.distributed as dist
from torch.distributed import run

_MEETING = "SIGLIP_MEETING"  # where the processes find each other


def main() -> None:
    """Start the processes that the command line names, and wait for them."""
    if len(sys.argv) < 3 or not re.fullmatch("gpu|[1-9][0-9]*", sys.argv[1]):
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory(prefix="siglip-") as folder:
        os.environ |= {
            _MEETING: str(Path(folder, "processes")),
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else torchrun serves one to the processes
            "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_SOCKET_IFNAME": "lo",
        }
        rendezvous = ["--rdzv-backend=c10d", "--rdzv-conf=store_type=file"]
        rendezvous.append(f"--rdzv-endpoint={folder}/launcher")
        run.main([*rendezvous, f"--nproc-per-node={sys.argv[1]}", *sys.argv[2:]])


def meeting() -> dict[str, object]:
    """Return what ``init_process_group`` needs in a process that was started here; in another's, nothing."""
    if _MEETING not in os.environ:
        return {}
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # a store that processes have met in is of no use to those that torchrun starts in their place
    restart = os.environ["TORCHELASTIC_RESTART_COUNT"]
    store = dist.FileStore(f"{os.environ[_MEETING]}.{restart}", world)
    return {"store": store, "rank": rank, "world_size": world}


if __name__ == "__main__":
    main()
