"""Run a script's main in several processes of one machine, as torchrun would."""

import os
import socket
import traceback

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_processes(main, cfg, world=2, limit_s=120):
    """`main(cfg)` in `world` forked processes under gloo; fails where one fails or hangs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("fork")
    jobs = [
        context.Process(target=run_rank, args=(main, cfg, n, world, port)) for n in range(world)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(limit_s)
    hung = [job for job in jobs if job.is_alive()]
    for job in hung:
        job.kill()
    assert not hung, f"{len(hung)} of {world} processes hung for {limit_s} s"
    assert [job.exitcode for job in jobs] == [0] * world


def run_rank(main, cfg, rank, world, port):
    torch.set_num_threads(1)  # first of all: after threaded work in the parent the child would hang
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
    try:
        main(cfg)
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # without pytest's own cleaning up
