"""Attention within a disk: its forms against the whole mask, in types and at awkward sizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.exc import FailOnRecompileLimitHit

from pared.nn import local_attention as module
from pared.nn.local_attention import (
    Disk,
    flex_local_attention,
    local_attention,
    local_attention_reference,
    of_many_shapes,
    tiled_attention,
)


def heads(queries: int, keys: int, channels: int = 16, dtype=torch.float32, device="cpu"):
    """Queries, keys and values, and two shared keys and values."""
    generator = torch.Generator().manual_seed(0)

    def draw(tokens: int) -> torch.Tensor:
        return torch.randn(2, 2, tokens, channels, generator=generator).to(device, dtype)

    return draw(queries), draw(keys), draw(keys), (draw(2), draw(2))


@given(
    height=st.integers(1, 20),
    width=st.integers(1, 40),
    r=st.integers(1, 20),
    above=st.integers(0, 3),
    below=st.integers(0, 3),
    shared=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_tiles_equal_the_reference(height, width, r, above, below, shared):
    rows = above + height + below
    q, k, v, common = heads(height * width, rows * width, channels=4)
    arguments = q, k, v, Disk(width, r, above), common if shared else None, 0.7
    wanted = local_attention_reference(*arguments)
    torch.testing.assert_close(tiled_attention(*arguments), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(local_attention(*arguments), wanted, rtol=0, atol=1e-5)


def test_bfloat16_stays_near():
    q, k, v, shared = heads(18 * 23, 18 * 23)
    wanted = local_attention_reference(q, k, v, Disk(23, 5), shared)
    half = [x.bfloat16().requires_grad_(True) for x in (q, k, v)]
    y = tiled_attention(*half, Disk(23, 5), tuple(x.bfloat16() for x in shared))
    y.square().sum().backward()
    assert y.dtype == torch.bfloat16
    assert float((y.detach().float() - wanted).norm() / wanted.norm()) < 1e-2
    assert all(x.grad.isfinite().all() for x in half)


def test_a_disk_may_hold_all():
    assert Disk(5, 7).holds_all(20, 20)  # the diagonal is 5 long: 3 rows, 4 columns
    assert Disk(5, 6).holds_all(20, 20) and not Disk(5, 5).holds_all(20, 20)
    assert not Disk(5, 6, above=2).holds_all(20, 30)


def test_no_quadratic_memory():
    """With a million queries and keys a map would need a terabyte as truth values."""
    q = torch.rand(1, 1, 2**20, 1)
    assert tiled_attention(q, q, q, Disk(1024, 1)).equal(q)


def test_flex_equals_the_reference():
    q, k, v, shared = heads(9 * 21, 13 * 21)
    arguments = q, k, v, Disk(21, 4, above=2), shared
    with torch.no_grad():
        y = flex_local_attention(*arguments)
    torch.testing.assert_close(y, local_attention_reference(*arguments), rtol=0, atol=1e-5)


def test_one_block_mask_serves_all_layers():
    module._block_mask.cache_clear()
    for _ in range(3):
        with torch.no_grad():
            flex_local_attention(*heads(30, 30)[:3], Disk(6, 2))
    assert module._block_mask.cache_info().misses == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_compiled_flex_equals_the_reference_in_gradients_too():
    results = []
    for function in (flex_local_attention, local_attention_reference):
        q, k, v, shared = heads(48 * 40, 48 * 40, channels=64, device="cuda")
        inputs = [x.requires_grad_(True) for x in (q, k, v, *shared)]
        y = function(*inputs[:3], Disk(40, 8), tuple(inputs[3:]))
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for got, wanted in zip(*results, strict=True):
        # Products of float32 in TensorFloat32's precision.
        assert float((got - wanted).norm() / wanted.norm()) < 5e-3


def test_more_shapes_are_compiled_than_torch_would():
    """In one graph each, which torch refuses from the ninth on."""
    as_it_is, ours = (
        torch.compile(double, backend="eager", dynamic=False, fullgraph=True)
        for double in (lambda x: 2 * x, lambda x: x + x)
    )
    with pytest.raises(FailOnRecompileLimitHit):
        for size in range(1, 12):
            as_it_is(torch.ones(size))
    for size in range(1, 12):
        assert of_many_shapes(ours)(torch.ones(size)).sum() == 2 * size
