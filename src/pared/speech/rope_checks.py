"""What must hold of rotary positions in speech encoders without trained weights.

Run by `pared check rope-asr`.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from pared import anatomy
from pared.anatomy import presets
from pared.method import convert
from pared.nn.layout import merge_heads
from pared.nn.rotary import half_split, interleaved, rotary_of, rotate, rotate_reference
from pared.speech.hearing import EncoderStream, set_chunks
from pared.speech.rope import RoPE, RotaryAttention
from pared.speech.toys import encoded, frames, toy


def layer_of(model: nn.Module) -> Any:
    """The first self-attention of an encoder."""
    return anatomy.of(model).sites("self_attention")[0].module


def spread(q: Tensor, k: Tensor) -> float:
    """Largest difference of the logits q k^T along one diagonal, all heads taken together.

    Args:
        q: (batch, heads, frames, channels).
        k: likewise.
    """
    logits = (q @ k.transpose(-1, -2)).detach() / q.shape[-1] ** 0.5
    time = logits.shape[-1]
    diagonals = [logits.diagonal(offset, -2, -1) for offset in range(1 - time, time)]
    return max(float((d.amax(-1) - d.amin(-1)).max()) for d in diagonals)


def check_rotation() -> None:
    """The fast form equals explicit matrices; position 0 changes nothing, and norms stay."""
    for shape in ((1, 1, 1, 4), (2, 5, 3, 8), (3, 20, 2, 22), (2, 170, 2, 22)):
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
            batch, time, heads, channels = shape
            x = torch.randn(batch, heads, time, channels, dtype=dtype)
            positions = torch.arange(time, dtype=dtype)
            got = rotate(x, rotary_of(positions, channels))
            wanted = rotate_reference(x, positions)
            torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)
            assert torch.equal(got[:, :, 0], x[:, :, 0]), "position 0 turned something"
            norms = (t.unflatten(-1, (-1, 2)).norm(dim=-1) for t in (got, x))
            torch.testing.assert_close(*norms, rtol=0, atol=2e-6)


def check_toeplitz() -> None:
    """With the same content in every frame, logits depend on the distance of frames alone.

    What transformers calls rotary fails this: it rotates in front of the projections.
    """
    x = frames(1, 1).expand(-1, 40, -1)
    rotated = layer_of(convert(toy(), RoPE()))
    stock = toy(position_embeddings_type="rotary")
    legacy = layer_of(convert(stock, RoPE(legacy_hf=True)))
    true, theirs = (spread(*layer.heads_of(x)[:2]) for layer in (rotated, legacy))
    assert true < 1e-5, f"logits differ by {true:.1e} along a diagonal"
    assert theirs > 0.1, f"rotating the projections' input gives a spread of only {theirs:.1e}"


def check_shift() -> None:
    """Frames counted from 1000 give what frames counted from 0 give, within 1e-4."""
    layer, x = layer_of(convert(toy(), RoPE())), frames()
    outputs = []
    for start in (0, 1000):
        q, k, v = layer.heads_of(x, start)
        outputs.append(nn.functional.scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-4)


def check_softmax() -> None:
    """Every kernel gives what an explicit softmax gives, with padding and with chunks.

    The kernels are those of torch that run here, and the implementation "eager".
    """
    x = frames()
    valid = torch.arange(30) < torch.tensor([[30], [17]])
    model: Any = convert(toy(), RoPE())
    layer: RotaryAttention = layer_of(model)
    kernels = [kernel for kernel in KERNELS if runs(kernel)]
    assert SDPBackend.MATH in kernels, f"of torch's kernels run here: {kernels}"
    for mask in (None, valid):
        layer.hearing.frames.valid = mask
        for chunk, left in ((None, None), (7, None), (7, 1)):
            set_chunks(model, chunk, left)
            real = torch.ones_like(valid) if mask is None else mask
            wanted = explicit(layer, x, mask)[real]
            for kernel in kernels:
                with sdpa_kernel(kernel):
                    found = layer(x)[0][real]
                torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
            model.set_attn_implementation("eager")
            torch.testing.assert_close(layer(x)[0][real], wanted, rtol=0, atol=1e-5)
            model.set_attn_implementation("sdpa")


KERNELS = (SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION)


def runs(kernel: SDPBackend) -> bool:
    """Whether a kernel can do a masked attention on the CPU."""
    q = torch.zeros(1, 1, 2, 8)
    try:
        with sdpa_kernel(kernel):
            nn.functional.scaled_dot_product_attention(q, q, q, torch.ones(2, 2) > 0)
    except RuntimeError:
        return False
    return True


def explicit(layer: RotaryAttention, x: Tensor, valid: Tensor | None) -> Tensor:
    """The same as the layer, in steps."""
    q, k, v = layer.heads_of(x)
    logits = q @ k.transpose(-1, -2) * layer.scale
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None, None], -1e9)
    if (visible := layer.hearing.visible(x)) is not None:
        logits = logits.masked_fill(~visible, -1e9)
    return layer.linear_out(merge_heads(logits.softmax(dim=-1) @ v))


def check_padding() -> None:
    """Utterances in a padded batch give what they give alone, within 1e-5, chunked or not."""
    x, lengths = frames(3), (30, 17, 4)
    valid = torch.arange(30) < torch.tensor(lengths)[:, None]
    padded = torch.where(valid[..., None], x, 7.0)
    model = convert(toy(), RoPE())
    for chunk, left in ((None, None), (7, None), (7, 1)):
        set_chunks(model, chunk, left)
        y = encoded(model, padded, valid)
        assert y.isfinite().all(), "padding gives NaN"
        for i, length in enumerate(lengths):
            alone = encoded(model, x[i : i + 1, :length])
            torch.testing.assert_close(y[i : i + 1, :length], alone, rtol=0, atol=1e-5)


def check_stream() -> None:
    """A stream gives what all frames at once give under the mask of its chunks, within 1e-5."""
    x = frames()
    valid = torch.arange(30) < torch.tensor([[30], [23]])
    model = convert(toy(), RoPE())
    for left in (None, 0, 2):
        set_chunks(model, 7, left)
        whole = encoded(model, x, valid)
        stream = EncoderStream(model)
        with torch.no_grad():
            parts = [stream(*part) for part in zip(x.split(7, 1), valid.split(7, 1), strict=True)]
        got = torch.cat(parts, dim=1)
        torch.testing.assert_close(got[valid], whole[valid], rtol=0, atol=1e-5)


def check_parameters() -> None:
    """Nothing is added; relative positions take D^2 + 2 D a layer: 262,144 + 1,024 at D = 512."""
    size = {"hidden_size": 512, "num_attention_heads": 8}
    with torch.device("meta"):
        models = [presets.get("toy:conformer").main.make(**size) for _ in range(2)]
    convert(models[1], RoPE())
    before, after = (sum(p.numel() for p in model.parameters()) for model in models)
    assert before - after == 2 * (262_144 + 1_024), f"{before - after} parameters went"


def check_layouts() -> None:
    """Pairs of neighbours equal pairs half a head apart, with the rows of W_q and W_k permuted."""
    layer, x = layer_of(convert(toy(), RoPE())), frames()
    x = x.double()
    layer = copy.deepcopy(layer).double()
    q, k, _ = layer.heads_of(x)
    other = copy.deepcopy(layer)
    for part in (other.linear_q, other.linear_k):
        for weight in (part.weight, part.bias):
            rows = weight.data.unflatten(0, (other.num_heads, -1))
            weight.data = half_split(rows.transpose(1, -1)).transpose(1, -1).flatten(0, 1)
    rotary = rotary_of(torch.arange(30, dtype=torch.float64), 16)

    def turned(part: nn.Module) -> Tensor:
        heads = part(x).unflatten(-1, (other.num_heads, -1)).transpose(1, 2)
        return half_split(rotate(interleaved(heads), rotary))

    logits = turned(other.linear_q) @ turned(other.linear_k).transpose(-1, -2)
    torch.testing.assert_close(logits, q @ k.transpose(-1, -2), rtol=0, atol=1e-12)


class _Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for part in output if isinstance(output, tuple | list) else (output,):
            if isinstance(part, Tensor):
                self.elements = max(self.elements, part.numel())
        return output


def check_memory() -> None:
    """Relative positions make heads x T x (2 T - 1) scores; nothing grows so with rotary ones."""
    time, largest = 512, {}
    relative = toy()
    for name, model in (("relative", relative), ("rotary", convert(toy(), RoPE()))):
        table = anatomy.of(relative).model.wav2vec2_conformer.encoder.embed_positions
        x = frames(1, time)
        with torch.no_grad(), _Largest() as seen:
            layer_of(model)(x, relative_position_embeddings=table(x))
        largest[name] = seen.elements
    assert largest["relative"] >= 2 * time * (2 * time - 1), largest
    # The table of the relative positions itself is 2 T x D.
    assert largest["rotary"] <= 2 * time * 32, largest
