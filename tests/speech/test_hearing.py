"""Chunks, streams and convolutions that hear neither padding nor the future."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pared
from pared import anatomy
from pared.anatomy import presets
from pared.anatomy.speech import Frames
from pared.errors import InputError
from pared.speech.hearing import (
    EncoderStream,
    FrameConvolution,
    Hearing,
    drawn_chunks,
    hearing_of,
    leave_out_padding,
    set_chunks,
)
from pared.speech.summary_mixing_checks import converted
from pared.speech.toys import encoded, frames, toy


def convolution(hearing: Hearing, kernel: int = 5) -> tuple[nn.Conv1d, FrameConvolution]:
    torch.manual_seed(0)
    conv = nn.Conv1d(4, 4, kernel, padding=kernel // 2, groups=4).requires_grad_(False)
    return conv, FrameConvolution(conv, hearing, "conv")


def test_without_padding_or_chunks_the_convolution_is_the_stock_one():
    conv, ours = convolution(Hearing(Frames()))
    x = torch.randn(2, 4, 13)
    torch.testing.assert_close(ours(x), conv(x), rtol=0, atol=1e-6)
    assert dict(ours.named_parameters()) == dict(conv.named_parameters())


def test_it_hears_no_padding():
    hearing = Hearing(Frames())
    conv, ours = convolution(hearing)
    x = torch.randn(2, 4, 13)
    hearing.frames.valid = torch.arange(13) < torch.tensor([[13], [8]])
    alone = conv(x[1:, :, :8])
    torch.testing.assert_close(ours(x)[1:, :, :8], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 4, 13, 20])
@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_a_chunk_hears_what_was_before_and_zeros_behind(chunk, kernel):
    hearing = Hearing(Frames())
    conv, ours = convolution(hearing, kernel)
    x = torch.randn(2, 4, 13)
    hearing.chunk = chunk
    wanted = [
        conv(F.pad(x[..., : start + chunk], (0, 0)))[..., start:] for start in range(0, 13, chunk)
    ]
    whole = ours(x)
    torch.testing.assert_close(whole, torch.cat(wanted, dim=-1), rtol=0, atol=1e-6)
    hearing.kept = {}
    streamed = torch.cat([ours(part) for part in x.split(chunk, dim=-1)], dim=-1)
    torch.testing.assert_close(streamed, whole, rtol=0, atol=1e-6)


def test_chunks_are_drawn_as_in_the_paper():
    generator = torch.Generator().manual_seed(0)
    drawn = [drawn_chunks(generator) for _ in range(4000)]
    chunked = [(chunk, left) for chunk, left in drawn if chunk is not None]
    limited = [left for _, left in chunked if left is not None]
    # Four standard deviations.
    assert len(chunked) / 4000 == pytest.approx(0.6, abs=0.031)
    assert len(limited) / len(chunked) == pytest.approx(0.75, abs=0.036)
    assert {min(c for c, _ in chunked), max(c for c, _ in chunked)} == {8, 32}
    assert {min(limited), max(limited)} == {2, 32}
    assert all(left is None for chunk, left in drawn if chunk is None)


@pytest.mark.parametrize("slug", ["summarymixing-asr", "rope-asr"])
def test_streaming_draws_chunks_in_training_alone(slug):
    model = pared.convert(
        presets.build("toy:conformer", "cpu"), pared.parse(f"{slug}:streaming=true")
    )
    hearing, x = hearing_of(model), frames()
    torch.manual_seed(0)
    seen = set()
    for _ in range(30):
        encoded(model.train(), x)
        seen.add(hearing.chunk)
    assert None in seen and len(seen) > 3
    encoded(model.eval(), x)
    assert hearing.chunk is None
    # Chunks that were set are for all calls that draw none.
    set_chunks(model, 5, 1)
    seen = set()
    for _ in range(30):
        encoded(model.train(), x)
        seen.add(hearing.chunk)
    assert None in seen and 5 not in seen
    encoded(model.eval(), x)
    assert (hearing.chunk, hearing.left) == (5, 1)
    plain = pared.convert(presets.build("toy:conformer", "cpu"), pared.parse(slug)).train()
    for _ in range(10):
        encoded(plain, x)
        assert hearing_of(plain).chunk is None


@pytest.mark.parametrize("left", [None, 0, 2])
@pytest.mark.parametrize("slug", ["summarymixing-asr", "rope-asr"])
@pytest.mark.parametrize("drawing", ["", ":streaming=true"])
def test_chunks_of_random_lengths_give_what_their_mask_gives(slug, left, drawing):
    """Two streams at a time, whose chunks differ, against all frames at once."""
    model = toy("toy:conformer", pared.parse(slug + drawing))
    x, wholes = frames(2, 24), []
    splits = [random_split(24, seed) for seed in (0, 1)]
    assert splits[0] != splits[1]
    for split in splits:
        set_chunks(model, split, left)
        wholes.append(encoded(model, x))
    assert not torch.allclose(*wholes, atol=1e-4), "the chunks make no difference"
    streams = [zip(x.split(split, dim=1), strict=True) for split in splits]
    encoders = [EncoderStream(model) for _ in splits]
    found: list[list[torch.Tensor]] = [[], []]
    with torch.no_grad():
        for turn in itertools.zip_longest(*streams):
            for encoder, chunk, heard in zip(encoders, turn, found, strict=True):
                if chunk is not None:
                    heard.append(encoder(*chunk))
    for heard, whole in zip(found, wholes, strict=True):
        torch.testing.assert_close(torch.cat(heard, dim=1), whole, rtol=0, atol=1e-5)


def test_a_stream_through_an_encoder_converted_in_parts():
    methods = [pared.parse(f"summarymixing-asr:layers=[{layer}]") for layer in (0, 1)]
    model, x = toy("toy:conformer", *methods), frames(2, 24)
    set_chunks(model, [5, 9, 10])
    stream = EncoderStream(model)
    with torch.no_grad():
        heard = torch.cat([stream(part) for part in x.split([5, 9, 10], dim=1)], dim=1)
    torch.testing.assert_close(heard, encoded(model, x), rtol=0, atol=1e-5)


def random_split(total: int, seed: int) -> list[int]:
    """Random lengths from 1 frame up that make `total` together."""
    generator = torch.Generator().manual_seed(seed)
    ends = (torch.randperm(total - 1, generator=generator)[:5] + 1).sort().values.tolist()
    return [b - a for a, b in itertools.pairwise([0, *ends, total])]


def test_chunks_of_other_frames_than_there_are_say_what_is_right():
    model = toy("toy:conformer", pared.parse("rope-asr"))
    set_chunks(model, [5, 7])
    with pytest.raises(
        InputError, match=r"chunks of \(5, 7\) frames were set, 12 in all, and the e"
    ):
        encoded(model, frames(1, 13))


def test_a_stock_conformer_can_leave_padding_out_too():
    """An encoder's padded batch as its utterances alone; its attentions go on hearing all."""
    torch.manual_seed(0)
    model = presets.build("toy:conformer", "cpu").eval()
    x, valid = frames(2, 20), torch.arange(20) < torch.tensor([[20], [9]])
    stock, alone = encoded(model, x, valid)[1:, :9], encoded(model, x[1:, :9])
    assert not torch.allclose(stock, alone, atol=1e-3)
    leave_out_padding(model)
    torch.testing.assert_close(encoded(model, x, valid)[1:, :9], alone, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="hear all frames; convert it first"):
        set_chunks(model, 4)
    # Converting it afterwards finds them replaced already.
    pared.convert(model, pared.parse("rope-asr"))
    alone = encoded(model, x[1:, :9])
    torch.testing.assert_close(encoded(model, x, valid)[1:, :9], alone, rtol=0, atol=1e-5)


def test_a_stream_of_means_takes_memory_of_one_size():
    model = converted(pared.parse("summarymixing-asr"))
    sizes = []
    stream = EncoderStream(model)
    with torch.no_grad():
        for part in frames(1, 40).split(4, dim=1):
            stream(part)
            kept = stream._kept.values()
            flat = [t for k in kept for t in (k if isinstance(k, tuple) else (k,))]
            sizes.append(sum(sum(x.numel() for x in t) if isinstance(t, tuple) else t.numel()
                             for t in flat))  # fmt: skip
    assert len(set(sizes)) == 1


def test_what_can_not_stream_says_why():
    for name, words in (
        ("toy:wav2vec2", "convolution that tells positions reaches far into the future"),
        ("toy:whisper", "it reads windows of a fixed length"),
    ):
        model = pared.convert(presets.build(name, "cpu"), pared.parse("rope-asr"))
        with pytest.raises(InputError, match=words):
            EncoderStream(model)
    model = pared.convert(presets.build("toy:conformer", "cpu"), pared.parse("rope-asr:layers=[0]"))
    with pytest.raises(InputError, match=r"layers.1.self_attn hears the whole utterance; convert"):
        EncoderStream(model)
    with pytest.raises(InputError, match="it is a denoiser"):
        EncoderStream(presets.build("toy:dit"))


def test_bad_chunks_say_what_is_right():
    model = pared.convert(presets.build("toy:conformer", "cpu"), pared.parse("rope-asr"))
    with pytest.raises(InputError, match="chunks of 0 frames with None before"):
        set_chunks(model, 0)
    with pytest.raises(InputError, match=r"chunks of \[4, 0\] frames with None before"):
        set_chunks(model, [4, 0])
    with pytest.raises(InputError, match="with -1 before each can't be; give at least 1 and 0"):
        set_chunks(model, 4, -1)
    with pytest.raises(InputError, match="hear all frames; convert it first"):
        set_chunks(presets.build("toy:conformer", "cpu"), 4)
    assert anatomy.of(model).name == "conformer"


@pytest.mark.parametrize("slug", ["summarymixing-asr", "rope-asr"])
def test_whisper_still_generates(slug):
    model = pared.convert(presets.build("toy:whisper", "cpu"), pared.parse(slug)).eval()
    words = model.generate(torch.randn(2, 16, 60), max_new_tokens=3, do_sample=False)
    assert words.shape[0] == 2 and words.shape[1] >= 3


@pytest.mark.parametrize("slug", ["summarymixing-asr:mode=lite,dropout=0", "rope-asr"])
def test_gradients_with_checkpointing_are_the_same(slug):
    """Layers run again in the backward pass, and must find the padding that they had."""
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = pared.convert(presets.build("toy:conformer", "cpu"), pared.parse(slug)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        family = anatomy.of(model)
        example = family.example(2, **family.sizes[0], generator=torch.Generator().manual_seed(0))
        family.run(model, *example).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)
