"""Presets: counts, costs and wiring, on the meta device; what users see when they mistype."""

import inspect
import subprocess
import sys

import diffusers
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pared import anatomy
from pared.anatomy import presets
from pared.errors import InputError

# Parameters of the denoisers. The papers' cards state the same numbers, but for DiT-XL/2, of which
# only "749.8 M in diffusers' class" is on record (there, every block has its own time embedding).
DENOISERS = {
    "pixart-sigma": 610_856_096,
    "sd3.5-medium": 2_243_171_520,
    "flux.1-dev": 11_901_408_320,
    "dit-xl-2": 749_826_464,
    "sd1.5": 859_520_964,
    "sdxl": 2_567_463_684,
    "wan2.1-t2v-1.3b": 1_418_996_800,
    "wan2.1-t2v-14b": 14_288_491_584,
    "lumina-next": 1_754_898_976,
}
PIPELINES = {
    "pixart-sigma": "PixArtSigmaPipeline",
    "sd3.5-medium": "StableDiffusion3Pipeline",
    "flux.1-dev": "FluxPipeline",
    "dit-xl-2": "DiTPipeline",
    "sd1.5": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "wan2.1-t2v-1.3b": "WanPipeline",
    "wan2.1-t2v-14b": "WanPipeline",
    "lumina-next": "LuminaPipeline",
}
# Multiply-adds of one pass (1e9), where a card states them: model, latent side, prompt tokens.
COSTS = {
    ("pixart-sigma", 64, 300): 644.3,
    ("pixart-sigma", 128, 300): 3316.8,
    ("sd3.5-medium", 64, 333): 1221,
    ("sd3.5-medium", 128, 333): 5625,
    ("dit-xl-2", 32, 0): 118.7,
}


def components() -> list[tuple[str, str]]:
    return [(name, part) for name in presets.names() for part in presets.get(name).components]


def test_the_published_models_come_first():
    names = presets.names("denoiser")
    assert names[: len(DENOISERS)] == tuple(DENOISERS)
    assert all(name.startswith("toy:") for name in names[len(DENOISERS) :])


@pytest.mark.parametrize(("name", "part"), components())
def test_every_component_has_the_parameters_it_says(name, part):
    model = presets.build(name, component=part)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert not model.training
    count = sum(p.numel() for p in model.parameters())
    assert count == presets.get(name).components[part].parameters


@pytest.mark.parametrize("name", DENOISERS)
def test_denoisers_have_the_published_size(name):
    assert presets.get(name).denoiser.parameters == DENOISERS[name]


def test_rounded_sizes():
    assert round(DENOISERS["dit-xl-2"] / 1e6, 1) == 749.8
    assert round(DENOISERS["flux.1-dev"] / 1e9, 1) == 11.9


@pytest.mark.parametrize(("name", "side", "tokens"), COSTS)
def test_denoisers_cost_what_the_papers_cards_say(name, side, tokens):
    model = presets.build(name)
    family = anatomy.of(model)
    latents, timestep, condition = family.example(1, side, side, text_tokens=tokens)
    with FlopCounterMode(display=False) as counter:
        family.denoise(model, latents, timestep, condition)
    assert counter.get_total_flops() / 2e9 == pytest.approx(COSTS[name, side, tokens], rel=5e-4)


@pytest.mark.parametrize("name", presets.names("denoiser"))
def test_latents_fit_the_denoiser_and_the_autoencoder(name):
    preset = presets.get(name)
    size = (preset.height // preset.vae_scale, preset.width // preset.vae_scale)
    vae = presets.build(name, component="vae")
    frames, clip, example = (), (), {}
    if preset.frames > 1:
        count = (preset.frames - 1) // vae.config.scale_factor_temporal + 1
        frames, clip, example = (count,), (preset.frames,), {"frames": count}
    latents = (1, preset.latent_channels, *frames, *size)
    picture = torch.empty(1, 3, *clip, preset.height, preset.width, device="meta")
    assert vae.encode(picture).latent_dist.mean.shape == latents
    assert vae.decode(torch.empty(latents, device="meta")).sample.shape == picture.shape

    model = presets.build(name)
    family = anatomy.of(model)
    tokens = preset.text_tokens or None
    x, timestep, condition = family.example(1, *size, text_tokens=tokens, **example)
    assert x.shape == latents
    assert family.denoise(model, x, timestep, condition).shape == latents


@pytest.mark.parametrize("name", presets.names("denoiser"))
def test_prompts_fit_the_denoiser(name):
    """What the encoders put out, joined as the pipeline joins it, is what the denoiser takes in."""
    preset = presets.get(name)
    if not preset.text_encoders:
        assert preset.text_tokens == 0
        return
    model = presets.build(name)
    _, _, condition = anatomy.of(model).example(1, 4, 4)
    clips, pooled, t5 = [], [], None
    for number, encoder in enumerate(preset.text_encoders, start=1):
        part = "text_encoder" if number == 1 else f"text_encoder_{number}"
        ids = torch.zeros(1, encoder.tokens, dtype=torch.long, device="meta")
        output = presets.build(name, component=part)(ids)
        assert output.last_hidden_state.shape[1] == encoder.tokens
        if "T5" in encoder.cls or "Gemma" in encoder.cls:
            t5 = output.last_hidden_state.shape
        else:
            clips.append(output.last_hidden_state.shape)
            # SD3 pools both CLIP encoders, SDXL its second, FLUX its only one.
            vector = output.get("text_embeds", output.get("pooler_output"))
            if not (name.endswith("sdxl") and number == 1):
                pooled.append(vector.shape[1])
    width = t5[2] if t5 else sum(shape[2] for shape in clips)
    assert condition["text"].shape[2] == width
    if "pooled" in condition:
        assert condition["pooled"].shape[1] == sum(pooled)


@pytest.mark.parametrize("name", DENOISERS)
def test_defaults_are_those_of_the_stock_pipeline(name):
    preset = presets.get(name)
    defaults = inspect.signature(getattr(diffusers, PIPELINES[name]).__call__).parameters
    assert preset.steps == defaults["num_inference_steps"].default
    assert preset.guidance == defaults["guidance_scale"].default
    if preset.frames > 1:
        video = (preset.height, preset.width, preset.frames)
        assert video == tuple(defaults[n].default for n in ("height", "width", "num_frames"))
    if "max_sequence_length" in defaults:
        assert preset.text_encoders[-1].tokens == defaults["max_sequence_length"].default


def test_weights_are_seeded_and_typed_and_the_global_state_is_kept():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (
        presets.build("toy:sd3", device="cpu", dtype=torch.bfloat16, seed=seed)
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32
    assert {p.dtype for p in first.parameters()} == {torch.bfloat16}
    pairs = zip(first.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.proj_out.weight, other.proj_out.weight)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "text_encoder_3", "vae"])
def test_toy_components_run_on_random_weights(part):
    model = presets.build("toy:sd3", device="cpu", component=part)
    with torch.no_grad():
        if part == "vae":
            output = model(torch.randn(1, 3, 32, 48)).sample
        else:
            output = model(torch.arange(16)[None]).last_hidden_state
    assert output.isfinite().all()
    assert output.std() > 0


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("SD35", "sd3.5-medium"),
        ("sd-15", "sd1.5"),
        ("Flux", "flux.1-dev"),
        ("pixart_sigma", "pixart-sigma"),
        ("sd-xl", "sdxl"),
        ("toy:pixert", "toy:pixart"),
    ],
)
def test_a_mistyped_name_gets_a_hint(typed, meant):
    with pytest.raises(InputError, match=rf"{typed}' \(did you mean {meant}[ ?].*presets are pix"):
        presets.get(typed)


@pytest.mark.parametrize("typed", ["zzz", "", "!"])
def test_an_unknown_name_gets_the_list(typed):
    with pytest.raises(InputError, match=f"'{typed}'; the presets are pixart-sigma, .*toy:sdxl"):
        presets.build(typed)


def test_an_unknown_component_gets_the_list():
    with pytest.raises(InputError, match="no component 'text_encoder'; it has denoiser, vae"):
        presets.build("dit-xl-2", component="text_encoder")


def test_listing_needs_no_torch():
    code = (
        "import sys; from pared.anatomy import presets; presets.names(); presets.get('sdxl'); "
        "print([m for m in ('torch', 'diffusers', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
