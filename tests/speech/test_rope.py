"""Rotary positions in speech encoders: the card's checks, what they replace, learning."""

import inspect
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import pared
from pared import anatomy
from pared.anatomy.speech import NoPositions
from pared.speech import rope_checks
from pared.speech.hearing import set_chunks
from pared.speech.rope import RoPE
from pared.speech.rope_checks import layer_of, spread
from pared.speech.toys import encoded, frames, toy

CHECKS = [f for name, f in inspect.getmembers(rope_checks) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
def test_shipped_check(check):
    check()


# What transformers calls rotary -------------------------------------------------------------------


def stock_logits(layer: nn.Module, x: torch.Tensor, positions: torch.Tensor):
    """Queries and keys of the stock class, as its forward hands them to the kernel."""
    seen = {}

    def capture(module, query, key, *_, **__):
        seen["qk"] = query, key
        return torch.zeros_like(x).unflatten(-1, (2, -1)), None

    from transformers.models.wav2vec2_conformer import modeling_wav2vec2_conformer as modeling

    implementation = layer.config._attn_implementation
    layer.config._attn_implementation = "eager"
    kept, modeling.eager_attention_forward = modeling.eager_attention_forward, capture
    try:
        layer(x, relative_position_embeddings=positions)
    finally:
        modeling.eager_attention_forward = kept
        layer.config._attn_implementation = implementation
    return seen["qk"]


@torch.no_grad()
def test_the_stock_class_is_no_rope():
    """It rotates in front of the projections, so that logits depend on positions themselves.

    The card measures a spread of 3.8 along a diagonal where the mean logit is 0.8, at width 768.
    """
    model = toy(position_embeddings_type="rotary", hidden_size=64).double()
    layer, table = layer_of(model), model.wav2vec2_conformer.encoder.embed_positions
    x = frames(1, 1, 64).double().expand(-1, 40, -1).contiguous()
    theirs = stock_logits(layer, x, table(x))
    assert spread(*theirs) > 0.5
    ours = layer_of(pared.convert(model, RoPE())).heads_of(x)[:2]
    assert spread(*ours) < 1e-5


@torch.no_grad()
def test_legacy_gives_what_the_stock_class_gives():
    x = frames()
    valid = torch.arange(30) < torch.tensor([[30], [30]])
    for base in (10_000, 500):
        model = toy(position_embeddings_type="rotary", rotary_embedding_base=base)
        wanted = encoded(model, x, valid)
        legacy = encoded(pared.convert(model, RoPE(legacy_hf=True)), x, valid)
        torch.testing.assert_close(legacy, wanted, rtol=0, atol=1e-5)
        true = encoded(
            pared.convert(
                toy(position_embeddings_type="rotary", rotary_embedding_base=base), RoPE()
            ),
            x,
        )
        assert not torch.allclose(true, wanted, atol=1e-3)


# What it replaces ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["toy:wav2vec2", "toy:conformer", "toy:whisper"])
def test_without_rotation_the_attention_is_the_stock_one(name, monkeypatch):
    """All angles zero: what is left of the layer is the model's own, without positions."""
    model = toy(name, **({"position_embeddings_type": None} if name == "toy:conformer" else {}))
    family = anatomy.of(model)
    if name == "toy:whisper":
        family.drop_positions()
    example = family.example(2, **family.sizes[0], generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        if name == "toy:conformer":  # whose convolutions hear padding
            example = (example[0], None)
        wanted = family.run(model, *example)
        pared.convert(model, RoPE())
        assert not torch.allclose(family.run(model, *example), wanted, atol=1e-4)
        monkeypatch.setattr("pared.speech.rope.rotate", lambda x, rotary: x)
        found = family.run(model, *example)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["relative", "rotary", None])
def test_conformers_of_any_positions(kind):
    model = toy(position_embeddings_type=kind)
    names = {n for n in model.state_dict() if "linear_pos" in n or "pos_bias" in n or "inv" in n}
    weights = {n: w.clone() for n, w in model.state_dict().items()}
    pared.convert(model, RoPE())
    left = model.state_dict()
    assert left.keys() == weights.keys() - names
    assert all(torch.equal(left[n], weights[n]) for n in left)
    assert model.wav2vec2_conformer.encoder.embed_positions is None
    assert encoded(model, frames()).isfinite().all()


def test_positions_of_the_others():
    for settings, kept in ((RoPE(), True), (RoPE(conv_positions=False), False)):
        model = pared.convert(toy("toy:wav2vec2"), settings)
        gone = isinstance(model.wav2vec2.encoder.pos_conv_embed, NoPositions)
        assert gone != kept
    model = pared.convert(toy("toy:whisper"), RoPE())
    assert isinstance(model.model.encoder.embed_positions, NoPositions)
    assert not isinstance(model.model.decoder.embed_positions, NoPositions)
    some = pared.convert(toy("toy:whisper"), RoPE(layers=[0]))
    assert not isinstance(some.model.encoder.embed_positions, NoPositions)


def test_positions_go_once_the_last_layer_is_converted():
    halves = RoPE(layers=[0]), RoPE(layers=[1])
    for part in (True, False):
        model = toy("toy:whisper", *halves[: 1 if part else 2])
        assert isinstance(model.model.encoder.embed_positions, NoPositions) != part
    for kept in (True, False):
        one, other = RoPE(layers=[0], conv_positions=False), RoPE(layers=[1], conv_positions=kept)
        model = toy("toy:wav2vec2", one, other)
        assert isinstance(model.wav2vec2.encoder.pos_conv_embed, NoPositions) != kept
    assert toy("toy:conformer", *halves).wav2vec2_conformer.encoder.embed_positions is None


def test_the_scale_of_the_scores():
    head, model = (
        layer_of(pared.convert(toy(), RoPE(scale_dim=dim))).scale for dim in ("head", "model")
    )
    assert (head, model) == (16**-0.5, 32**-0.5)


def test_the_base_of_the_frequencies():
    assert layer_of(pared.convert(toy(), RoPE())).base == 10_000
    assert layer_of(pared.convert(toy(rotary_embedding_base=500), RoPE())).base == 500
    assert layer_of(pared.convert(toy(), RoPE(base=77))).base == 77


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_dropout_of_the_map_is_the_models_and_for_training_alone(implementation):
    model = pared.convert(toy(attention_dropout=0.5), RoPE())
    model.set_attn_implementation(implementation)
    layer = layer_of(model)
    x = frames()
    torch.manual_seed(0)
    assert not torch.equal(layer.train()(x)[0], layer(x)[0])
    assert torch.equal(layer.eval()(x)[0], layer(x)[0])


@torch.no_grad()
def test_the_model_says_how_attention_is_computed():
    """A kernel that the CPU lacks is asked for by sdpa alone."""
    model = pared.convert(toy(), RoPE())
    x, layer = frames(), layer_of(model)
    wanted = encoded(model, x)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        with pytest.raises(RuntimeError, match=r"[Nn]o (viable|available)"):
            layer(x)
        model.set_attn_implementation("eager")
        torch.testing.assert_close(encoded(model, x), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "flash_attention_2",
        "kernels-community/flash-attn2",  # what transformers takes where flash_attn isn't here
        "kernels-community/vllm-flash-attn3",
        "flex_attention",
        "paged|eager",
    ],
)
def test_implementations_with_masks_of_their_own_are_refused(name):
    model = pared.convert(toy(), RoPE())
    model.config._attn_implementation = name
    set_chunks(model, 7)
    told = re.escape(name) + " takes no mask .* call model.set"
    with pytest.raises(pared.InputError, match=told):
        layer_of(model)(frames())


def test_an_utterance_of_padding_alone_gives_no_nan():
    model = pared.convert(toy(), RoPE())
    valid = torch.tensor([[True] * 5, [False] * 5])
    assert encoded(model, frames(2, 5), valid).isfinite().all()


def test_half_precision_keeps_far_frames_apart():
    """Tables are float32 whatever the weights are: at frame 4000 bfloat16 knows steps of 16."""
    layer = layer_of(pared.convert(toy(), RoPE()))
    x = frames(1, 8)
    wanted = layer.heads_of(x, 4000)[0]
    half = layer.bfloat16().heads_of(x.bfloat16(), 4000)[0]
    assert half.dtype == torch.bfloat16
    # Eight bits of mantissa in the projection.
    torch.testing.assert_close(half.float(), wanted, rtol=2e-2, atol=2e-2)


# Settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec, words",
    [
        ("legacy_hf=true", "legacy_hf is for models whose position_embeddings_type is 'rotary'"),
        ("base=1", "greater than 1"),
        ("layers=[2]", r"layers=\[2\] have no self attention"),
    ],
)
def test_bad_settings_say_what_is_right(spec, words):
    with pytest.raises(pared.InputError, match=words):
        pared.convert(toy(), pared.parse(f"rope-asr:{spec}"))


def test_heads_of_odd_size_are_refused():
    with pytest.raises(pared.InputError, match=r"pairs of channels, and the heads .* have 3"):
        pared.convert(toy(hidden_size=12, num_attention_heads=4), RoPE())


# Learning -----------------------------------------------------------------------------------------

WORDS, BACK = 8, 3


class Recall(nn.Module):
    """One attention with a residual, which is to say what was said three frames ago.

    Args:
        kind: "rotary", "learned" for a table of absolute positions, or "none".
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        model = toy(position_embeddings_type=None, hidden_size=64)
        if kind == "rotary":
            pared.convert(model, RoPE())
        self.attention = layer_of(model)
        self.words, self.last = nn.Embedding(WORDS, 64), nn.Linear(64, WORDS)
        self.table = nn.Parameter(0.3 * torch.randn(256, 64)) if kind == "learned" else None
        for part in ("linear_q", "linear_k", "linear_v", "linear_out"):
            nn.init.xavier_uniform_(getattr(self.attention, part).weight)

    def forward(self, said: torch.Tensor) -> torch.Tensor:
        x = self.words(said)
        x = x if self.table is None else x + self.table[: x.shape[1]]
        return self.last(x + self.attention(x)[0])


def recall(kind: str, steps: int, times: tuple[int, ...]) -> list[float]:
    """Accuracy at some lengths after training on 32 to 64 frames."""
    model, generator = Recall(kind), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)

    def drawn(batch, time):
        said = torch.randint(WORDS, (batch, time), generator=generator)
        return said, said[:, :-BACK]

    for step in range(steps):
        said, wanted = drawn(32, 32 + step % 33)
        loss = F.cross_entropy(model(said)[:, BACK:].flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    found = []
    with torch.no_grad():
        for time in times:
            said, wanted = drawn(32, time)
            found.append(float((model(said)[:, BACK:].argmax(-1) == wanted).float().mean()))
    return found


def test_rotary_positions_learn_distances_and_reach_further_than_they_were_trained():
    here, far = recall("rotary", 500, (64, 256))
    assert here > 0.99 and far > 0.8, (here, far)
    assert recall("none", 150, (64,))[0] < 0.25  # a guess is right one time in eight
    learned, lost = recall("learned", 500, (64, 256))
    assert learned > 0.9 and lost < 0.5, (learned, lost)
