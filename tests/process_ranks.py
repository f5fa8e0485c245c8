"""Processes that run functions of a test, with a time limit: a rank that waits for ever fails the test."""

import os
import queue
import time
import traceback

import forks
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

#: seconds that all ranks together have for one function
LIMIT = 120


def _worker(rank, world, init, backend, tasks, results):
    """A rank: runs function(rank) for each function it is sent, until it is sent None."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{init}", rank=rank, world_size=world)
    while (function := tasks.get()) is not None:
        try:
            results.put((rank, function(rank), None))
        except BaseException:
            results.put((rank, None, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """`world` processes, over "gloo" or "nccl"; `run(function)` returns function(rank) of each, in their order."""

    def __init__(self, world, init, backend="gloo"):
        context = mp.get_context("spawn") if backend == "nccl" else forks.context()  # a fork has no CUDA
        self.results, self.queues = context.Queue(), [context.Queue() for _ in range(world)]
        shared = (world, init, backend)
        arguments = [(rank, *shared, tasks, self.results) for rank, tasks in enumerate(self.queues)]
        self.workers = [context.Process(target=_worker, args=args, daemon=True) for args in arguments]
        for worker in self.workers:
            worker.start()

    def run(self, function):
        for tasks in self.queues:
            tasks.put(function)
        answers, end = [], time.monotonic() + LIMIT
        while len(answers) < len(self.queues):
            try:
                answers.append(self.results.get(timeout=1))
            except queue.Empty:
                dead = [rank for rank, worker in enumerate(self.workers) if not worker.is_alive()]
                if not dead and time.monotonic() < end:
                    continue
                errors = [error for _, _, error in answers if error] or ["none of the others failed"]
                self.end()
                pytest.fail(f"rank {dead[0]} has died; {errors[0]}" if dead else f"a rank hangs; {errors[0]}")
        answers.sort(key=lambda answer: answer[0])
        for _, _, error in answers:
            assert error is None, error
        return [value for _, value, _ in answers]

    def end(self):
        for tasks in self.queues:
            tasks.put(None)
        for worker in self.workers:
            worker.join(timeout=5)
            if worker.is_alive():
                worker.kill()


def started(world, tmp_path_factory, backend="gloo"):
    """The body of a fixture: the ranks of a module's tests, ended after the last of them."""
    ranks = Ranks(world, tmp_path_factory.mktemp(backend) / "init", backend)
    yield ranks
    ranks.end()
