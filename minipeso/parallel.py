"""Several processes, one per GPU (or a few on a CPU), as `torchrun --nproc_per_node N train.py ...` starts them.

Each learns from its share of every batch, gradients are averaged, and each ranks its share of the users; the first
alone prints and writes. All see one file system. Without torchrun there is one process, and all this does nothing."""
import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn


@contextlib.contextmanager
def joined(device: str) -> Iterator[None]:
    """Inside, the processes that torchrun started know of each other. ValueError if there are more than GPUs."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if device == "cuda":
        place, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if place >= there:
            raise ValueError(f"more processes than GPUs\nfound {there} GPUs for process {place + 1}\n"
                             f"use torchrun --nproc_per_node {there}")
        torch.cuda.set_device(place)
    # the first may fit semantic IDs for hours before the others are needed
    distributed.init_process_group("nccl" if device == "cuda" else "gloo", timeout=timedelta(days=1))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere) if rank() else contextlib.nullcontext():
        yield
    distributed.destroy_process_group()  # after a failure torchrun ends the others


def size() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """0 for the first process, also where there is no other."""
    return distributed.get_rank() if distributed.is_initialized() else 0


@contextlib.contextmanager
def first_goes_ahead() -> Iterator[None]:
    """The first process runs what is inside, then the others, who find on the disk what it wrote."""
    if rank():
        distributed.barrier()
    yield
    if size() > 1 and not rank():
        distributed.barrier()


def share(some: Sequence) -> Sequence:
    """Every size-th of them: together the processes have each once."""
    return some[rank()::size()]


def part(batch: Sequence) -> Sequence:
    """This process's share of a batch; all take one whole that has fewer sequences than processes: the same average."""
    return share(batch) if len(batch) >= size() else batch


def total(x: Tensor) -> Tensor:
    """The sum over the processes."""
    if size() == 1:
        return x
    there = x.to("cuda" if distributed.get_backend() == "nccl" else "cpu")
    distributed.all_reduce(there)
    return there.to(x.device)


def average_gradients(parameters: Iterable[nn.Parameter], weight: int) -> None:
    """The gradient of the whole batch: the mean over the processes, each weighted by the pairs of its share."""
    if size() > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = total(torch.cat([g.flatten().float() for g in gradients] + [gradients[0].new_ones(1).float()]) * weight)
        for g, whole in zip(gradients, (flat[:-1] / flat[-1]).split([g.numel() for g in gradients])):
            g.copy_(whole.view_as(g))
