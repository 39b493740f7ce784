"""Compare a module with an oracle that holds the same weights."""

import torch
from torch import Tensor, nn


def randomized(module: nn.Module) -> nn.Module:
    """Give every parameter a random value: at their start biases and norms hide mistakes."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def outputs_and_gradients(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    out = module(x)
    out = out[0] if isinstance(out, tuple) else out
    # a fixed random weight for each output, so that no two gradients cancel
    torch.sum(out * torch.linspace(-1, 2, out.numel(), device=out.device).view_as(out)).backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return {"output": out.detach(), "input's gradient": x.grad} | gradients


def assert_same(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    """Load their weights strictly into ours, then compare the output and every gradient."""
    ours.load_state_dict(randomized(theirs).state_dict(), strict=True)
    assert_close(outputs_and_gradients(ours, x), outputs_and_gradients(theirs, x))


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        # at least 1: some gradients are zero but for rounding, as that of k_norm's bias
        scale = max(1, expected[name].abs().max().item())
        torch.testing.assert_close(
            found[name],
            expected[name],
            rtol=0,
            atol=(1e-12 if expected[name].dtype == torch.float64 else 1e-5) * scale,
            msg=lambda m, n=name: f"{n}: {m}",
        )
