"""Linear attention against its quadratic reference: outputs, gradients, awkward lengths, types."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pared.nn.layout import merge_heads, split_heads, to_map, to_tokens
from pared.nn.linear_attention import linear_attention, linear_attention_reference


def features(queries: int, keys: int, dtype=torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 3, queries, 8, generator=generator, dtype=torch.float64).relu()
    k = torch.randn(2, 3, keys, 8, generator=generator, dtype=torch.float64).relu()
    v = torch.randn(2, 3, keys, 5, generator=generator, dtype=torch.float64)
    return q.to(dtype), k.to(dtype), v.to(dtype)


@given(queries=st.integers(1, 70), keys=st.integers(1, 70), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_equals_the_reference(queries, keys, seed):
    q, k, v = features(queries, keys, seed=seed)
    wanted = linear_attention_reference(q, k, v)
    torch.testing.assert_close(linear_attention(q, k, v), wanted, rtol=0, atol=1e-12)


def test_gradients_equal_the_reference():
    gradients = []
    for function in (linear_attention, linear_attention_reference):
        inputs = [x.requires_grad_(True) for x in features(63, 17)]
        function(*inputs).square().sum().backward()
        gradients.append([x.grad for x in inputs])
    for ours, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-12)


# Relative errors that one rounding of a result (fp32, fp16), of the state too (bf16), explains.
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("gradient", [True, False])
def test_lower_precision_stays_near(dtype, error, gradient):
    q, k, v = features(1000, 500, dtype)
    wanted = linear_attention_reference(q.double(), k.double(), v.double())
    y = linear_attention(q.requires_grad_(gradient), k, v)
    assert y.dtype == dtype
    assert float((y.detach().double() - wanted).norm() / wanted.norm()) < error


def test_long_half_precision_sequences_do_not_overflow():
    q, k = torch.full((1, 1, 4, 8), 200.0).half(), torch.full((1, 1, 100_000, 8), 200.0).half()
    v = torch.full((1, 1, 100_000, 3), 7.0).half()
    torch.testing.assert_close(linear_attention(q, k, v), torch.full((1, 1, 4, 3), 7.0).half())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_silent_queries_give_zero(dtype):
    q, k, v = features(4, 6, dtype)
    assert (linear_attention(torch.zeros_like(q), k, v) == 0).all()


def test_no_quadratic_memory():
    """With a million queries and keys an N x N map would need 4 TB."""
    q = torch.rand(1, 1, 1_000_000, 2)
    assert linear_attention(q, q, q).shape == q.shape


@pytest.mark.parametrize("batch", [1, 2])
def test_maps_are_channels_last_views(batch):
    tokens = torch.randn(batch, 15, 4)
    feature_map = to_map(tokens, 3, 5)
    assert feature_map.data_ptr() == tokens.data_ptr()
    assert feature_map.is_contiguous(memory_format=torch.channels_last)
    assert feature_map.stride(0) == 60  # exact, or convolutions would copy
    assert torch.equal(feature_map[:, :, 1, 2], tokens[:, 7])
    assert torch.equal(to_tokens(feature_map), tokens)


def test_heads_split_and_merge():
    x = torch.randn(2, 7, 12)
    assert torch.equal(merge_heads(split_heads(x, 3)), x)
    assert torch.equal(split_heads(x, 3)[:, 1], x[:, :, 4:8])
