"""Several processes that train one network together, as torch's launcher (``torchrun``) starts them.

Every process holds all data and computes its share of each batch; gradients and errors are summed over all. Loss terms
are divided by the counts of the whole batch, so that the result is that of one process but for rounding.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Workers", "launched", "local_device"]

_Item = TypeVar("_Item")
_PATIENCE = datetime.timedelta(hours=12)  # others wait while the first computes the long-range part


class Workers:
    """The processes of this run: ``size`` of them, of which this is number ``rank``."""

    def __init__(self) -> None:
        self.shared = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.shared else 0
        self.size = dist.get_world_size() if self.shared else 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks to a person."""
        return self.rank == 0

    def share(self, items: Sequence[_Item]) -> list[_Item]:
        """What of ``items`` this process computes."""
        return list(items[self.rank :: self.size])

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replaces each tensor (of one dtype) by its sum over all processes; bits are the same in every one."""
        if not self.shared or not tensors:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def largest(self, values: Sequence[float], device: torch.device) -> list[float]:
        """The largest of each value over all processes."""
        if not self.shared:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()

    def barrier(self) -> None:
        """Wait for all."""
        if self.shared:
            dist.barrier()

    @contextmanager
    def first_goes_ahead(self) -> Iterator[None]:
        """The first process does what is within alone; the others follow when it is done."""
        if not self.first:
            self.barrier()
        yield
        if self.first:
            self.barrier()


def local_device(device: str) -> str:
    """``device`` of this process: a GPU of its own where several were started on CUDA."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device.startswith("cuda") and "LOCAL_RANK" in os.environ else device


@contextmanager
def launched(device: str) -> Iterator[Workers]:
    """The processes that torch's launcher started (one, where it did not), connected for a while."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield Workers()
        return
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(local_device(device))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=_PATIENCE)
    try:
        yield Workers()
    finally:
        dist.destroy_process_group()
