"""Layers that run twice leave what they would have left by running once."""

import pytest
import torch

from pared.training.recomputing import recompute
from tests.speech import recognisers


def noted(compiled: bool) -> dict[str, torch.Tensor]:
    """What a step leaves in gradients and running statistics; once plain, once as is tested."""
    torch.manual_seed(0)
    model = recognisers.conformer().model.train()
    model.config.apply_spec_augment = False
    model.config.layerdrop = 0.0
    if compiled:
        recompute(model, compiled=True)
        model.compile(backend="aot_eager")
    sound = torch.randn(2, 4000, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    model(sound).logits.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients | dict(model.named_buffers())


@pytest.mark.slow  # compiles for nine seconds on one core
def test_compiled_layers_run_again_as_well():
    plain, again = noted(compiled=False), noted(compiled=True)
    assert any(name.endswith("running_var") for name in plain)
    torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-5)
