"""Several processes on one run: who takes part, sums over all of them, and batch norm over all of their pictures."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["SyncBatchNorm", "add_up", "from_first", "process_group", "processes"]


def processes() -> tuple[int, int]:
    """(rank, number of processes) of this run: (0, 1) without torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Joins the processes that torchrun started, if it did, for the time of the context; the device of this one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def add_up(values: Tensor, device: torch.device) -> Tensor:
    """The sum over all processes of a float64 vector on the CPU."""
    if processes()[1] == 1:
        return values
    values = values.to(device)
    dist.all_reduce(values)
    return values.cpu()


def from_first(make: Callable[[], Any]) -> Any:
    """What ``make()`` gives in the first process, in every process."""
    rank, world = processes()
    values = [make() if rank == 0 else None]
    if world > 1:
        dist.broadcast_object_list(values)
    return values[0]


class _Sum(torch.autograd.Function):
    """The sum over all processes; its gradient is the sum over all processes of theirs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm of (N, C, ...) that in training takes the mean and variance of the pictures of all processes.

    torch.nn.SyncBatchNorm does so on GPUs alone. Parts of different size count by their size.
    """

    @classmethod
    def convert(cls, model: nn.Module) -> None:
        """Puts one in the place of every batch norm of torch's in ``model``, with its parameters and statistics."""
        for name, module in list(model.named_modules()):
            if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
                norm = cls(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
                norm.weight, norm.bias = module.weight, module.bias
                norm._buffers = module._buffers
                norm.train(module.training)
                model.set_submodule(name, norm)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"input must be (N, C, ...), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or processes()[1] == 1:
            return super().forward(input)
        x = input if input.dtype is torch.float64 else input.float()
        dims, shape = [0, *range(2, x.dim())], (1, -1) + (1,) * (x.dim() - 2)
        mine = torch.cat([x.sum(dims), x.new_tensor([x.numel() / x.shape[1]])])
        total = _Sum.apply(mine)
        count = total[-1].detach()
        mean = total[:-1] / count
        centred = x - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(dims)) / count
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                keep = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean, float(keep))
                self.running_var.lerp_(variance * count / (count - 1), float(keep))
        y = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(input.dtype)
