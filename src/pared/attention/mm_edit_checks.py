"""What must hold of MM-EDiT without trained weights: its paper's mathematics.

Run by `pared check mm-edit`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pared import anatomy
from pared.anatomy import presets
from pared.attention.edit import LinearCompressedAttention
from pared.attention.joint import Heads
from pared.attention.mm_edit import HybridAttention, MMEDiT, exact_share
from pared.method import convert
from pared.nn.layout import merge_heads, split_heads
from pared.nn.linear_attention import linear_attention

HEIGHT, WIDTH, PROMPT = 6, 4, 5


def _layer(settings: MMEDiT, preset: str = "toy:sd3", block: int = 0) -> tuple[Any, Tensor, Tensor]:
    """One converted joint attention in float64, and random image and prompt tokens for it."""
    torch.manual_seed(0)
    model = presets.build(preset, device="cpu").double()
    convert(model, settings)
    sites = [s for s in anatomy.of(model).sites("joint_attention") if s.block == block]
    attn: Any = sites[0].module
    attn.processor.grid.height, attn.processor.grid.width = HEIGHT, WIDTH
    width = sites[0].width
    image = torch.randn(2, HEIGHT * WIDTH, width, dtype=torch.float64)
    return attn, image, torch.randn(2, PROMPT, width, dtype=torch.float64)


def _heads(generator: torch.Generator, image: int, keys: int, prompt: int) -> tuple[Heads, Heads]:
    def draw(tokens: int) -> Tensor:
        return torch.randn(2, 3, tokens, 8, generator=generator, dtype=torch.float64)

    return Heads(draw(image), draw(keys), draw(keys)), Heads(*(draw(prompt) for _ in range(3)))


def check_split_of_the_softmax() -> None:
    """A joint softmax is its two blocks, weighed by sigmoid(LSE_image - LSE_prompt): 1e-12."""
    image, text = _heads(torch.Generator().manual_seed(0), 20, 20, PROMPT)
    scale = image.query.shape[-1] ** -0.5
    lse = [
        (image.query @ stream.key.mT * scale).logsumexp(-1, keepdim=True)
        for stream in (image, text)
    ]
    eta = torch.sigmoid(lse[0] - lse[1])
    parts = [F.scaled_dot_product_attention(image.query, s.key, s.value) for s in (image, text)]
    wanted = F.scaled_dot_product_attention(
        image.query,
        torch.cat([image.key, text.key], dim=-2),
        torch.cat([image.value, text.value], dim=-2),
    )
    got = eta * parts[0] + (1 - eta) * parts[1]
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


def check_approximate_weight() -> None:
    """With no preference among tokens the exact weight is the approximate one: 16 / 21."""
    zero, one = torch.zeros(1, 2, 16, 8), torch.full((1, 2, 16, 8), 0.125)
    # Every feature product is 1, as exp(0) is: 8 channels of 1 x 0.125.
    share = exact_share(torch.ones_like(one), one, zero, torch.randn(1, 2, 5, 8))
    torch.testing.assert_close(share, torch.full_like(share, 5 / 21))
    attn, image, prompt = _layer(MMEDiT())
    share = attn.processor._share(image, image, image, split_heads(prompt, 2))
    assert abs(float(share) - PROMPT / (HEIGHT * WIDTH + PROMPT)) < 1e-6


def check_weights_are_a_mean() -> None:
    """Values that are all alike come out unchanged in both rows, and 0 < eta < 1."""
    image, text = _heads(torch.Generator().manual_seed(1), HEIGHT * WIDTH, 6, PROMPT)
    image = Heads(image.query, image.key, torch.full_like(image.value, 0.7))
    text = Heads(text.query, text.key, torch.full_like(text.value, 0.7))
    for weight in ("approximate", "exact"):
        attn, _, _ = _layer(MMEDiT(weight=weight))
        y_image, y_text = attn.processor.mix(image, text, True)
        for y in (y_image, y_text):
            torch.testing.assert_close(y, torch.full_like(y, 0.7), rtol=0, atol=1e-6)
    eta = 1 - exact_share(image.query.relu(), image.key.relu(), image.query, text.key)
    assert ((eta > 0) & (eta < 1)).all(), f"eta runs from {eta.min()} to {eta.max()}"


def check_empty_prompt() -> None:
    """Without prompt tokens the image row is EDiT's linear attention, and a number."""
    attn, image, prompt = _layer(MMEDiT())
    y, _ = attn(image, encoder_hidden_states=prompt[:, :0])
    q, k, v = attn.processor.linear.heads(attn, image)
    wanted = attn.to_out[0](merge_heads(linear_attention(q.relu(), k.relu(), v)))
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-10)


def check_prompt_row() -> None:
    """The prompt's row is softmax over image and prompt; the prompt's order matters to no image."""
    attn, image, prompt = _layer(MMEDiT())
    y_image, y_text = attn(image, encoder_hidden_states=prompt)
    _, k, v = attn.processor.linear.heads(attn, image)
    text = attn.processor.projected(attn, prompt, None, added=True)
    rows = F.scaled_dot_product_attention(
        text.query, torch.cat([k, text.key], dim=-2), torch.cat([v, text.value], dim=-2)
    )
    torch.testing.assert_close(y_text, attn.to_add_out(merge_heads(rows)), rtol=0, atol=1e-10)
    order = torch.randperm(PROMPT, generator=torch.Generator().manual_seed(2))
    image_again, text_again = attn(image, encoder_hidden_states=prompt[:, order])
    torch.testing.assert_close(image_again, y_image, rtol=0, atol=1e-10)
    torch.testing.assert_close(text_again, y_text[:, order], rtol=0, atol=1e-10)


def check_initial_prompt_term() -> None:
    """At the start what an image token reads from the prompt is exactly the teacher's."""
    attn, image, prompt = _layer(MMEDiT())
    processor: HybridAttention = attn.processor
    of_image = processor.image_heads(attn, image, None)
    of_text = processor.projected(attn, prompt, None, added=True)
    stock = processor.projected(attn, image, None)
    got, wanted = (
        F.scaled_dot_product_attention(query, of_text.key, of_text.value)
        for query in (of_image.query, stock.query)
    )
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def check_last_block() -> None:
    """SD3's last block computes no prompt row."""
    attn, image, prompt = _layer(MMEDiT(), block=2)
    assert attn.context_pre_only
    y_image, y_text = attn(image, encoder_hidden_states=prompt)
    assert y_text is None and y_image.shape == image.shape


def check_parameters() -> None:
    """Extra parameters per attention: 5,931,648 at d = 1536, r = 4; 2,981,952 at r = 8."""
    for r, wanted in ((4, 5_931_648), (8, 2_981_952)):
        with torch.device("meta"):
            linear = LinearCompressedAttention(MMEDiT(r=r), 1536, anatomy.Grid(2))
        count = sum(p.numel() for p in linear.parameters())
        assert count == wanted, f"r={r}: {count} extra parameters, not {wanted}"


def check_rotated_keys() -> None:
    """In FLUX a compressed key turns by the angles of the token in the middle of its window."""
    attn, image, prompt = _layer(MMEDiT(), "toy:flux")
    channels = image.shape[-1] // attn.heads
    angles = torch.arange(PROMPT + HEIGHT * WIDTH, dtype=torch.float64)[:, None].expand(
        -1, channels
    )
    seen: dict[str, Heads] = {}
    mix = attn.processor.mix

    def watch(image: Heads, text: Heads, text_wanted: bool) -> tuple[Tensor, Tensor | None]:
        seen["image"] = image
        return mix(image, text, text_wanted)

    attn.processor.mix = watch
    attn(image, encoder_hidden_states=prompt, image_rotary_emb=(angles.cos(), angles.sin()))
    plain = attn.processor.linear.heads(attn, image)[1]
    # Text comes first; the window of key (1, 1) has its middle at row 2, column 2.
    key, angle = 1 * (WIDTH // 2) + 1, torch.tensor(PROMPT + 2.0 * WIDTH + 2).double()
    even, odd = plain[:, :, key].unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack(
        [even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()], dim=-1
    )
    torch.testing.assert_close(seen["image"].key[:, :, key], turned.flatten(-2))
