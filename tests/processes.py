"""Run a script's main in several processes of one machine, as torchrun would."""

import os
import socket
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_processes(main, cfg, world=2, limit_s=120):
    """`main(cfg)` in `world` forked processes under gloo; fails where one fails or hangs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rest, ends = (main, cfg, world, port), time.time() + limit_s
    jobs = mp.start_processes(run_rank, rest, world, join=False, start_method="fork")
    try:
        while not jobs.join(1.0):
            for job in jobs.processes if time.time() > ends else ():
                job.kill()
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        raise AssertionError(str(error)) from error


def run_rank(rank, main, cfg, world, port):
    torch.set_num_threads(1)  # first of all: after threaded work in the parent the child would hang
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
    main(cfg)
    dist.destroy_process_group()
