"""SummaryMixing against its quadratic reference, and what its paper says must hold."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pared.errors import InputError
from pared.nn.summary_mixing import SummaryMixing, chunk_mask, summary_mixing_reference

MODES = ("full", "lite", "fast", "expdecay")
STREAMING = ("full", "lite", "fast")


def built(mode: str, width: int = 16, dtype=torch.float32, seed: int = 0, **sizes):
    """A mixer with stirred weights, so that norms and biases take part."""
    torch.manual_seed(seed)
    heads = sizes.pop("heads", 1 if mode == "fast" else 4)
    mixer = SummaryMixing(width, mode, heads, **sizes)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer.to(dtype)


def frames(batch: int = 2, time: int = 30, width: int = 16, dtype=torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, time, width, generator=generator, dtype=torch.float64).to(dtype)


# Parameters -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "width, arguments, wanted",
    [
        (512, {"layer_norm": False}, 1_575_424),
        (512, {}, 1_575_424 + 2_048),
        (512, {"heads": 4, "layer_norm": False}, 788_992),
        (512, {"heads": 8, "layer_norm": False}, 657_920),
        (512, {"mode": "lite"}, 525_312),
        (512, {"mode": "lite", "heads": 4}, 132_096),
        (512, {"mode": "fast"}, 1_050_112),
        (768, {"heads": 8}, 1_481_472),
    ],
)
def test_parameter_counts_of_the_paper(width, arguments, wanted):
    with torch.device("meta"):
        mixer = SummaryMixing(width, **arguments)
    assert sum(p.numel() for p in mixer.parameters()) == wanted


def test_start_of_the_weights():
    torch.manual_seed(0)
    mixer = SummaryMixing(64, heads=4)
    block, merge = mixer.f[0], mixer.c
    assert block.weight.shape == (4, 16, 16) and block.bias.shape == (4, 16)
    # Uniform within 1 / sqrt(inputs): 16 of each block, 128 of the merge as a whole.
    for weights, inputs in (
        (block.weight, 16), (block.bias, 16),
        (merge.of_local.weight, 128), (merge.of_summary.weight, 128),
    ):  # fmt: skip
        assert 0.8 * inputs**-0.5 < weights.abs().max() <= inputs**-0.5
    assert not merge.of_local.bias.any()
    assert not SummaryMixing(64).f[0].bias.any()


# The reference ----------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_equals_the_reference_and_its_gradients(mode, masked):
    mixer = built(mode, dtype=torch.float64, hidden=24, local=8, summary=20, output=12)
    valid = torch.arange(30) < torch.tensor([[30], [17]])
    masks = (valid, chunk_mask(torch.arange(30) // 7, left=2)) if masked else (None, None)
    outputs, gradients = [], []
    for function in (mixer, partial(summary_mixing_reference, mixer)):
        x = frames(dtype=torch.float64).requires_grad_(True)
        y = function(x, *masks)
        outputs.append(y)
        mixer.zero_grad()
        y.square().sum().backward()
        gradients.append([x.grad, *(p.grad for p in mixer.parameters())])
    assert outputs[0].shape[-1] == (20 if mode == "lite" else 12)
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)
    for ours, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-12)


def test_frames_drop_channels_of_their_own():
    mixer = built("full", dropout=0.5, dtype=torch.float64)
    x = frames(1, 1, dtype=torch.float64).expand(-1, 30, -1)
    assert len(mixer.train()(x).unique(dim=1).squeeze(0)) == 30
    mixer.c.of_local.weight.data.zero_()  # the mean's own channels too
    assert len(mixer.train()(x).unique(dim=1).squeeze(0)) == 30
    assert torch.equal(mixer.eval()(x)[:, 1:], mixer(x)[:, :-1])


@pytest.mark.parametrize("mode", MODES)
def test_start_at_zero_gives_zero_and_learns(mode):
    mixer = built(mode).start_at_zero()
    y = mixer(frames())
    assert not y.any()
    y.sum().backward()
    last = mixer.s[-2].weight if mode == "lite" else mixer.c.of_summary.weight
    assert last.grad.any()


# Masks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [None, 1, "no mask"])
@pytest.mark.parametrize("mode", MODES)
def test_padding_changes_nothing(mode, left):
    mixer, lengths = built(mode), (30, 17, 1)
    x = frames(3)
    valid = torch.arange(30) < torch.tensor(lengths)[:, None]
    padded = torch.where(valid[..., None], x, 7.0)
    visible = None if left == "no mask" else chunk_mask(torch.arange(30) // 7, left)
    y = mixer(padded, valid, visible)
    for i, length in enumerate(lengths):
        own = None if visible is None else visible[:length, :length]
        alone = mixer(x[i : i + 1, :length], None, own)
        torch.testing.assert_close(y[i : i + 1, :length], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_masks_of_any_type(dtype):
    mixer, x = built("full"), frames()
    valid, visible = torch.arange(30) < torch.tensor([[30], [9]]), chunk_mask(torch.arange(30) // 4)
    wanted = mixer(x, valid, visible)
    assert torch.equal(mixer(x, valid.to(dtype), visible.to(dtype)), wanted)
    assert torch.equal(mixer(x, valid, visible.expand(2, -1, -1)), wanted)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("windowed", [False, True])
def test_nothing_valid_gives_no_nan(mode, windowed):
    mixer, x = built(mode), frames().requires_grad_(True)
    visible = torch.eye(30) if windowed else None
    y = mixer(x, torch.zeros(2, 30), visible)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize("mode", STREAMING)
def test_permuted_frames_give_permuted_results(mode):
    mixer, x = built(mode, dtype=torch.float64), frames(dtype=torch.float64)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(mixer(x[:, order]), mixer(x)[:, order], rtol=0, atol=1e-12)


def test_lite_gives_all_frames_the_same():
    y = built("lite")(frames())
    assert torch.equal(y[:, 1:], y[:, :-1])


def test_heads_are_block_diagonal_weights():
    split, dense = built("full", dtype=torch.float64), built("full", dtype=torch.float64, heads=1)
    weights = split.state_dict()
    for name in ("f.0", "f.2", "s.0", "s.2"):
        # Linear layers hold their weights as outputs x inputs.
        weights[f"{name}.weight"] = torch.block_diag(*weights[f"{name}.weight"]).T
        weights[f"{name}.bias"] = weights[f"{name}.bias"].flatten()
    dense.load_state_dict(weights)
    x = frames(dtype=torch.float64)
    torch.testing.assert_close(split(x), dense(x), rtol=0, atol=1e-12)


# Chunks and streams -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_mask_of_ones_is_no_mask(mode):
    mixer, x = built(mode, dtype=torch.float64), frames(dtype=torch.float64)
    torch.testing.assert_close(mixer(x, None, torch.ones(30, 30)), mixer(x), rtol=0, atol=1e-12)


def test_chunks_of_one_frame_give_a_running_mean():
    mixer, x = built("lite", dtype=torch.float64), frames(dtype=torch.float64)
    running = mixer.s(x).cumsum(dim=1) / torch.arange(1, 31)[:, None]
    y = mixer(x, visible=chunk_mask(torch.arange(30)))
    torch.testing.assert_close(y, running, rtol=0, atol=1e-12)


def test_chunk_mask():
    chunks = torch.tensor([0, 0, 1, 2])
    assert chunk_mask(chunks).int().tolist() == [
        [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1],
    ]  # fmt: skip
    assert chunk_mask(chunks, left=1).int().tolist() == [
        [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 1],
    ]  # fmt: skip


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    mode=st.sampled_from(STREAMING),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_a_stream_gives_what_the_masked_whole_gives(lengths, mode, seed):
    time = sum(lengths)
    mixer, x = built(mode, seed=seed), frames(2, time, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    valid = torch.rand(2, time, generator=generator) < 0.8
    chunks = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    whole = mixer(x, valid, chunk_mask(chunks))
    past, parts = None, []
    for chunk, mask in zip(x.split(lengths, dim=1), valid.split(lengths, dim=1), strict=True):
        y, past = mixer.stream(chunk, past, mask)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-5)
    assert past.total.numel() == 2 * 16 and past.frames.flatten().tolist() == valid.sum(1).tolist()


@pytest.mark.slow
def test_it_compiles_whole():
    mixer, x, valid = built("full"), frames(), torch.ones(2, 30)
    _, past = mixer.stream(x)

    def both(x, valid, visible, past):
        return mixer(x, valid, visible), mixer.stream(x, past, valid)

    arguments = x, valid, chunk_mask(torch.arange(30) // 7), past
    torch._dynamo.reset()
    try:
        compiled = torch.compile(both, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(*arguments), both(*arguments), rtol=1e-6, atol=1e-6)
    finally:
        torch._dynamo.reset()


# Cost -------------------------------------------------------------------------------------------


class _Attention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=True, average_attn_weights=False)[0]


def _macs(layer: nn.Module, time: int, width: int) -> int:
    with FlopCounterMode(display=False) as counter:
        layer(torch.empty(1, time, width, device="meta"))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("heads", [1, 8])
def test_cost_is_linear_in_time(heads):
    with torch.device("meta"):
        mixer, attention = SummaryMixing(64, heads=heads), _Attention(64, 4, batch_first=True)
    square = 64 * 64
    for time in (500, 1000):
        # f, s and the frames' part of c once per frame, the mean's part of c once.
        assert _macs(mixer, time, 64) == time * (4 * square // heads + square) + square
    with torch.device("meta"):
        lite = SummaryMixing(64, "lite", heads)
    assert _macs(lite, 1000, 64) == 2 * _macs(lite, 500, 64)
    assert _macs(attention, 1000, 64) == 1000 * 4 * square + 2 * 1000**2 * 64


class _Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for part in output if isinstance(output, tuple | list) else (output,):
            if isinstance(part, torch.Tensor):
                self.elements = max(self.elements, part.numel())
        return output


@pytest.mark.parametrize("mode", STREAMING)
def test_nothing_grows_with_the_square_of_time(mode):
    time, width = 8192, 64
    largest = {}
    with torch.device("meta"):
        layers = SummaryMixing(width, mode), _Attention(width, 4, batch_first=True)
        x, valid = torch.empty(1, time, width), torch.ones(1, time)
    for layer, masks in zip(layers, ((valid,), ()), strict=True):
        with _Largest() as seen:
            layer(x, *masks)
        largest[type(layer).__name__] = seen.elements
    assert largest["SummaryMixing"] <= 2 * time * width  # both halves of "fast"
    assert largest["_Attention"] >= 4 * time * time


# Mixing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", STREAMING)
def test_all_other_frames_count_the_same(mode):
    mixer = built(mode, dtype=torch.float64)
    x = frames(1, dtype=torch.float64)
    x[:, 9] = x[:, 21]
    x.requires_grad_(True)
    (gradient,) = torch.autograd.grad(mixer(x)[0, 3].sum(), x)
    assert gradient[0, 9].abs().sum() > 0
    torch.testing.assert_close(gradient[0, 9], gradient[0, 21], rtol=0, atol=1e-12)


def test_decay_favours_the_near():
    mixer = built("expdecay", dtype=torch.float64)
    x = frames(1, 1, dtype=torch.float64).repeat(1, 30, 1).requires_grad_(True)
    (gradient,) = torch.autograd.grad(mixer(x)[0, 3].sum(), x)
    ratio = gradient[0, 25] / gradient[0, 5]  # 22 frames away and 2
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.995**20), rtol=1e-9, atol=0)


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("windowed", [False, True])
def test_half_precision_takes_the_mean_in_single(dtype, error, windowed):
    """1,000 frames: a sum kept in bfloat16 would stall at 256 times an element."""
    mixer, x = built("full", dtype=torch.float64), frames(1, 1000, dtype=torch.float64) + 1
    visible = chunk_mask(torch.arange(1000) // 300) if windowed else None
    with torch.no_grad():
        wanted = mixer(x, visible=visible)
        y = mixer.to(dtype)(x.to(dtype), visible=visible)
    assert y.dtype == dtype
    assert float((y.double() - wanted).norm() / wanted.norm()) < error


# What is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"heads": 3}, "heads=3 must divide .* 16 and 16"),
        ({"heads": 4, "hidden": 10}, "16 and 10"),
        ({"heads": 0}, "heads=0 must divide"),
        ({"mode": "fast", "heads": 2}, "mode fast has none"),
        ({"mode": "fast", "layer_norm": True}, "mode fast has no layer_norm"),
        ({"mode": "mean"}, "no mode 'mean'; it is full, lite, fast, expdecay"),
    ],
)
def test_bad_settings_say_what_is_right(arguments, words):
    with pytest.raises(InputError, match=words):
        SummaryMixing(16, **arguments)


def test_bad_masks_say_what_is_right():
    mixer, x = built("full"), frames()
    with pytest.raises(InputError, match=r"\(2, 1, 1, 30\).*\(2, 30\), 1 where a frame is real"):
        mixer(x, torch.ones(2, 1, 1, 30))
    with pytest.raises(InputError, match=r"\(30,\).*\(30, 30\)"):
        mixer(x, None, torch.ones(30))
    with pytest.raises(InputError, match="can't stream"):
        built("expdecay").stream(x)


# Learning ---------------------------------------------------------------------------------------


class _Residual(nn.Module):
    """Scalars in, one logit per frame out, through one mixer with a residual."""

    def __init__(self, mixer: nn.Module, width: int) -> None:
        super().__init__()
        self.first, self.mixer, self.last = nn.Linear(1, width), mixer, nn.Linear(width, 1)

    def forward(self, x, *masks):
        x = self.first(x)
        return self.last(x + self.mixer(x, *masks)).squeeze(-1)


def _task(batch: int, time: int, generator: torch.Generator):
    """x_t = z_t + m with z_t ~ N(0, 1) and m ~ N(0, 9) of the utterance; is z_t > 0?"""
    z = torch.randn(batch, time, generator=generator)
    m = 3 * torch.randn(batch, 1, generator=generator)
    return (z + m).unsqueeze(-1), (z > 0).float()


def _accuracy(mixer: nn.Module, *masks, steps: int = 120, width: int = 16, time: int = 64) -> float:
    torch.manual_seed(0)
    model = _Residual(mixer, width)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for _ in range(steps):
        x, label = _task(32, time, generator)
        loss = F.binary_cross_entropy_with_logits(model(x, *masks), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    x, label = _task(500, time, generator)
    with torch.no_grad():
        return float(((model(x, *masks) > 0) == label.bool()).float().mean())


def test_it_learns_what_needs_the_others():
    torch.manual_seed(0)
    alone = _accuracy(SummaryMixing(16), None, torch.eye(64))
    mixed = _accuracy(SummaryMixing(16))
    attended = _accuracy(_Attention(16, 2, batch_first=True))
    # A frame alone can't do better than 1/2 + asin(1/sqrt(10)) / pi = 0.602.
    assert alone < 0.62, (alone, mixed, attended)
    assert mixed > 0.9, (alone, mixed, attended)
    assert mixed > attended - 0.03, (alone, mixed, attended)
