"""A process that takes itself for one of several: no threads and no network, so that nothing can wait for ever.

Threads of a real group may wait for the interpreter while it waits for them; real groups are tested in processes of their own
(test_processes.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def process(rank: int = 0, of: int = 1) -> Iterator[None]:
    """Inside, this process is number ``rank`` of ``of``; what it sends arrives nowhere."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=of)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def mesh() -> Iterator[DeviceMesh]:
    """A mesh of one process, whose tensors are nevertheless sharded tensors."""
    with process():
        yield init_device_mesh("cpu", (1,))


def parallel(model: nn.Module) -> DistributedDataParallel:
    """``model`` as one of one: the mean of its gradients over all processes is its own."""
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    wrapped.register_comm_hook(None, _own)
    return wrapped


# DDP reads these annotations as they are: this file has no "from __future__ import annotations".
def _own(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done
