"""Two processes on the CPU that run functions of the tests side by side, started once."""

import multiprocessing
import socket
from datetime import timedelta

import torch

WORLD = 2


def _work(rank, port, calls):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"tcp://localhost:{port}",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=300),
    )
    while (call := calls.recv()) is not None:
        function, arguments = call
        try:
            calls.send((True, function(rank, *arguments)))
        except Exception as error:
            calls.send((False, f"rank {rank}: {type(error).__name__}: {error}"))
    torch.distributed.destroy_process_group()


class Ranks:
    """`run(function, *arguments)` is [function(rank, *arguments) of rank 0, of rank 1]."""

    def __init__(self):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        # A server imports what is slow to import, and both processes are forks of it.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, "sharded_models"])
        self.pipes, self.processes = [], []
        for rank in range(WORLD):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(rank, port, there), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, function, *arguments):
        for pipe in self.pipes:
            pipe.send((function, arguments))
        answers = []
        for pipe in self.pipes:
            assert pipe.poll(600), "a process hangs"
            answers.append(pipe.recv())
        assert all(done for done, _ in answers), [what for done, what in answers if not done]
        return [what for _, what in answers]

    def close(self):
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(20)
            process.terminate()
