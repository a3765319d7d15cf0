"""Lumina-Next: called as its pipeline calls it, its time, its heads, its prompts."""

from contextlib import ExitStack

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LuminaPipeline
from torch import nn
from transformers import BatchEncoding

from pared import anatomy
from pared.anatomy import presets
from pared.anatomy.denoiser import ENCODED_AT_ONCE
from pared.anatomy.heads import HeadLayout
from pared.runtime import Clock


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def toy(name="toy:lumina"):
    """With gates that let the text through, which start at zero."""
    model = presets.build(name, device="cpu")
    for block in anatomy.of(model).blocks:
        if hasattr(block.module, "gate"):
            block.module.gate.fill_(0.5)
    return model


def pipeline(**parts):
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer")) | parts
    pipe = LuminaPipeline(transformer=toy(), scheduler=FlowMatchEulerDiscreteScheduler(), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def paint(pipe, steps, condition, **call):
    half = {"prompt_embeds": condition["text"], "prompt_attention_mask": condition["mask"]}
    both = half | {f"negative_{name}": torch.ones_like(part) for name, part in half.items()}
    return pipe(
        **both,
        num_inference_steps=steps,
        height=128,
        width=96,
        output_type="latent",
        **call,
    ).images


def test_denoise_is_what_the_scheduler_gets():
    pipe = pipeline()
    family = anatomy.of(pipe.transformer)
    latents, _, condition = family.example(1, 16, 12, text_tokens=5, generator=seeded())
    condition["mask"][:, 3:] = 0
    # The scale of guidance that asks for no second pass.
    end = paint(pipe, 2, condition, latents=latents.clone(), guidance_scale=1.0)
    found = latents
    for time, sigma, then in zip(
        pipe.scheduler.timesteps, pipe.scheduler.sigmas[:-1], pipe.scheduler.sigmas[1:], strict=True
    ):
        with torch.no_grad():
            velocity = family.denoise(pipe.transformer, found, time.expand(1), condition)
        found = found + (then - sigma) * velocity
    torch.testing.assert_close(found, end, rtol=1e-5, atol=1e-5)


def test_the_clock_takes_rising_times_for_steps_of_one_run():
    pipe, undo, seen = pipeline(), ExitStack(), []
    clock = Clock(pipe, undo)
    clock.on_call = lambda: seen.append((clock.step, clock.call))
    _, _, condition = anatomy.of(pipe.transformer).example(1, 16, 12, text_tokens=5)
    for steps in (3, 3, 2):
        paint(pipe, steps, condition)
    assert seen == [(0, 0), (1, 0), (2, 0)] * 2 + [(0, 0), (1, 0)]
    assert clock.stats["runs"] == 3
    undo.close()


@pytest.mark.parametrize("name", ["lumina", "sd3", "pixart"])
def test_heads_are_those_of_the_stock_attention(name):
    """What the layout projects, mixed by one softmax and put out, is what the model computes."""
    model = toy(f"toy:{name}")
    family = anatomy.of(model)
    calls = []
    for site in family.sites("self_attention"):
        site.module.register_forward_hook(lambda *call: calls.append(call), with_kwargs=True)
    with torch.no_grad():
        family.denoise(model, *family.example(2, 16, 12, text_tokens=5, generator=seeded()))
        assert len(calls) == {"lumina": 2, "sd3": 1, "pixart": 2}[name]
        for attn, args, given, wanted in calls:
            x = args[0] if args else given["hidden_states"]
            layout = family.layout
            q, k, v = layout.heads(attn, x, layout.rotary(given))
            scale = layout.scale(attn, k.shape[2], given)
            mixed = nn.functional.scaled_dot_product_attention(
                q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
            torch.testing.assert_close(layout.tokens(attn, mixed), wanted, rtol=1e-5, atol=1e-5)


def test_scores_grow_with_the_logarithm_of_the_tokens():
    family = anatomy.of(toy())
    attn = family.sites("self_attention")[0].module
    given = {"base_sequence_length": 64}
    assert family.layout.scale(attn, 4096, given) == pytest.approx(2**0.5 * attn.scale)
    assert family.layout.scale(attn, 4096, {}) == attn.scale
    assert HeadLayout().scale(attn, 4096, {}) is None


def test_branches_add_up_to_the_block():
    model = toy()
    family = anatomy.of(model)
    assert [branch.path for branch in family.branches] == [
        f"layers.{block}.{norm}" for block in (0, 1) for norm in ("norm2", "ffn_norm2")
    ]
    for branch in family.branches:
        # What feeds nothing but the branch changes nothing where the branch is zero.
        nn.init.zeros_(branch.module.weight)
    outputs = []
    for fill in (0.0, 1.0):
        for branch in family.branches:
            for feed in branch.feeds:
                for weight in model.get_submodule(feed).parameters():
                    nn.init.constant_(weight, fill)
        with torch.no_grad():
            example = family.example(1, 16, 12, text_tokens=5, generator=seeded())
            outputs.append(family.denoise(model, *example))
    assert torch.equal(*outputs)


def test_layers_of_a_feed_forward():
    model = toy()
    family = anatomy.of(model)
    site = family.sites("feed_forward")[0]
    assert family.linear_layers(site, "fc1") == tuple(
        f"layers.0.feed_forward.linear_{number}" for number in (1, 3)
    )
    assert family.linear_layers(site, "fc2") == ("layers.0.feed_forward.linear_2",)
    assert family.linear_layers(site, "q") == ()
    first, second = family.sites("self_attention")[0], family.sites("cross_attention")[0]
    assert family.linear_layers(first, "out") == ()
    assert family.linear_layers(second, "out") == ("layers.0.attn2.to_out.0",)


class Words:
    """A tokenizer that gives every word a number, and pads to eights."""

    def __call__(self, prompts, pad_to_multiple_of=1, **kwargs):
        rows = [[1 + len(word) for word in prompt.split()] for prompt in prompts]
        longest = -(-max(map(len, rows)) // pad_to_multiple_of) * pad_to_multiple_of
        ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
        for row, words in enumerate(rows):
            ids[row, : len(words)], mask[row, : len(words)] = torch.tensor(words), 1
        return BatchEncoding({"input_ids": ids, "attention_mask": mask})

    def batch_decode(self, ids):
        return [""] * len(ids)


def test_prompts_of_all_lengths_are_encoded_together():
    encoder = presets.build("toy:lumina", device="cpu", component="text_encoder")
    pipe = pipeline(text_encoder=encoder, tokenizer=Words())
    prompts = ["a fox"] * ENCODED_AT_ONCE + ["a fox in nine words that need more room"]
    found = anatomy.of(pipe.transformer).encode(pipe, prompts)
    assert found["text"].shape == (ENCODED_AT_ONCE + 1, 16, 64)
    assert found["mask"].sum(dim=1).tolist() == [2.0] * ENCODED_AT_ONCE + [9.0]
    with torch.no_grad():
        text, mask = pipe.encode_prompt(prompts[:2], do_classifier_free_guidance=False)[:2]
    assert torch.equal(found["text"][:2, :8], text) and torch.equal(found["mask"][:2, :8], mask)


def test_what_its_class_leaves_open_is_zero():
    torch.use_deterministic_algorithms(True)  # which fills what is left open with NaN
    try:
        model = presets.build("toy:lumina", device="cpu")
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(model.pad_token, torch.zeros(32))
