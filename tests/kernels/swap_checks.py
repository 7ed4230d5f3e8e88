"""What the tests of convkit.swap and convkit.fuse share: models with numbers in them, and the comparison of two."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from convkit.swap import Report, Row


def build(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model, always with the same numbers, and with batch norms that do not start as the identity."""
    torch.manual_seed(0)
    model = make().to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
    return model


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)


def images(dtype: torch.dtype = torch.float64, seed: int = 1, channels: int = 3) -> Tensor:
    return torch.randn(4, channels, 12, 12, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def assert_close(ours: Any, theirs: Any, dtype: torch.dtype = torch.float64) -> None:
    scale = dict(rtol=1e-10, atol=1e-10) if dtype == torch.float64 else dict(rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(ours, theirs, **scale)


def assert_same_behaviour(
    ours: nn.Module, theirs: nn.Module, *inputs: Tensor, dtype: torch.dtype = torch.float64
) -> None:
    """Outputs, gradients and buffers of two steps of training and an evaluation; and of one without gradients."""
    for training in (True, True, False):
        found = []
        for model in (ours, theirs):
            model.train(training)
            model.zero_grad()
            copies = [x.clone().requires_grad_() for x in inputs]
            output = model(*copies)
            output.square().sum().backward()
            parameters = {name: parameter.grad for name, parameter in model.named_parameters()}
            found.append((output, [x.grad for x in copies], parameters, dict(model.named_buffers())))
        assert_close(*found, dtype)
    with torch.no_grad():
        assert_close(*(model(*(x.clone() for x in inputs)) for model in (ours, theirs)), dtype)


def row(report: Report, name: str) -> Row:
    (found,) = (row for row in report if row.name == name)
    return found


def fused(module: nn.Module) -> list[str]:
    """Names of the batch norms that are fused in a module's own forward."""
    fusion = vars(module).get("_convkit_fusion")
    return [] if fusion is None else [site.norm for site in fusion.sites]
