"""Where a Recorder has CUDA record, as far as it shows without CUDA."""

import contextlib

import pytest
import torch

from s2kernels.recording import Recorder


class Cuda:
    """What torch.cuda is asked for: pools, the mode of a capture, streams and what waits."""

    def __init__(self, monkeypatch):
        self.num_pools = 0
        self.graphs: list[tuple[int, str]] = []
        self.calls: list[str] = []
        for name in ("graph_pool_handle", "graph", "set_stream", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("own", self.calls))
        for name in ("stream", "device"):
            monkeypatch.setattr(torch.cuda, name, contextlib.nullcontext)

    def graph_pool_handle(self):
        self.num_pools += 1
        return self.num_pools

    def graph(self, graph, pool, stream, capture_error_mode):
        self.graphs.append((pool, capture_error_mode))
        return contextlib.nullcontext()

    def current_stream(self, device):
        return Stream("current", self.calls)

    def set_stream(self, stream):
        self.calls.append(f"set {stream.name}")


class Stream:
    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def wait_stream(self, other):
        self.calls.append(f"{self.name} waits for {other.name}")


def fail():
    raise KeyError("x")


@pytest.fixture
def cuda(monkeypatch):
    return Cuda(monkeypatch)


def test_pool_is_shared_while_a_recording_lives(cuda):
    """Torch takes no graph into the pool of graphs that are all gone."""
    recorder = Recorder(torch.device("cpu"))
    first, second = (recorder.record(lambda: None) for _ in range(2))
    del first
    third = recorder.record(lambda: None)
    assert [pool for pool, _ in cuda.graphs] == [1, 1, 1]
    del second, third
    fourth = recorder.record(lambda: None)
    assert [pool for pool, _ in cuda.graphs] == [1, 1, 1, 2] and fourth.result is None
    # other threads may do what this one may not
    assert {mode for _, mode in cuda.graphs} == {"thread_local"}


def test_streams_after_a_failure(cuda):
    recorder = Recorder(torch.device("cpu"))
    with pytest.raises(KeyError):
        recorder.run(fail)
    assert cuda.calls == ["own waits for current", "current waits for own"]
    cuda.calls.clear()
    with pytest.raises(KeyError):
        recorder.record(fail)
    assert cuda.calls == ["set current"]
