"""Attention-map reuse: its paper's checks; those that need no weights come with the package."""

import inspect
import threading

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PixArtSigmaPipeline,
    StableDiffusionPipeline,
)
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    PAGIdentitySelfAttnProcessor2_0,
)

import pared
from pared import anatomy
from pared.anatomy import presets
from pared.attention.edit import EDiT
from pared.bench.metering import flop_counter
from pared.caching import attention_map_reuse_checks
from pared.caching.attention_map_reuse import INFO, KINDS, AttentionMapReuse
from pared.caching.kept_maps import MapReuse, Memory
from pared.caching.runs import Runs, psnr, sensitivity
from pared.caching.schedules import (
    Log,
    ReuseSchedule,
    alternate,
    exhaustive,
    hurry,
    search,
    swap_search,
    with_reuse,
)
from pared.errors import InputError
from pared.worlds.house import folder_of

CHECKS = [f for n, f in inspect.getmembers(attention_map_reuse_checks) if n.startswith("check_")]
SLUG = INFO.slug


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
def test_shipped_check(check):
    check()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pixart(scheduler=None, model=None):
    pipe = PixArtSigmaPipeline(
        transformer=model or presets.build("toy:pixart", device="cpu"),
        scheduler=scheduler or DDIMScheduler(),
        **dict.fromkeys(("tokenizer", "text_encoder", "vae")),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_of(pictures=1):
    """What the toy pipeline is called with: no texts are encoded, no pictures decoded."""
    text = torch.randn(1, 4, 64, generator=seeded(7)).expand(pictures, -1, -1)
    mask = torch.ones(pictures, 4)
    return {
        "negative_prompt": None,
        "prompt_embeds": text,
        "negative_prompt_embeds": torch.zeros_like(text),
        "prompt_attention_mask": mask,
        "negative_prompt_attention_mask": mask,
        "guidance_scale": 2.0,
        "height": 64,
        "width": 64,
        "use_resolution_binning": False,
    }


def paint(pipe, steps=6, pictures=1, **call):
    settings = call_of(pictures) | {"output_type": "latent", "num_inference_steps": steps}
    return pipe(prompt=None, generator=seeded(), **settings, **call).images


# The card's numbers -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd15():
    return presets.build("sd1.5", device="meta")


def meta_call(model, time):
    """One call at 512 x 512 pixels; its time is a number, since the clock reads it."""
    latents, text = torch.empty(1, 4, 64, 64, device="meta"), model.text
    with torch.no_grad():
        return model(latents, time, encoder_hidden_states=text)


def kept_elements(model):
    processor = anatomy.of(model).sites("cross_attention")[0].module.processor
    return sum(tensor.numel() for tensor in processor.memory.clock.kept.values())


def test_multiply_adds_and_memory_of_stable_diffusion(sd15):
    sd15.text = torch.empty(1, 77, 768, device="meta")
    counts = {}
    for keep_output in (False, True):
        with pared.apply(sd15, AttentionMapReuse(reuse=(1,), keep_output=keep_output)):
            for time in (900, 800):
                with flop_counter() as counter:
                    meta_call(sd15, time)
                counts[keep_output, time] = counter.get_total_flops() / 2e9
                assert keep_output or kept_elements(sd15) == {900: 732_283_392, 800: 0}[time]
    assert counts[False, 900] == pytest.approx(401.6, rel=0.01)
    assert counts[False, 800] == pytest.approx(350.2, rel=0.01)
    # The output of a cross-attention needs no values and no products at all.
    assert counts[True, 800] < counts[False, 800] - 5


def test_maps_of_the_prompt_are_small(sd15):
    sd15.text = torch.empty(1, 77, 768, device="meta")
    method = AttentionMapReuse(reuse=(1,), sites="cross", keep_output=False)
    with pared.apply(sd15, method):
        meta_call(sd15, 900)
        assert kept_elements(sd15) == 8 * 77 * (5 * (4096 + 1024 + 256) + 64)


# The stock processor's options ------------------------------------------------------------------


class Hour:
    """A clock that stands at one call."""

    def __init__(self):
        self.plan, self.kept, self.done = None, {}, {}


def processed(attn, plan, hour, *args, **kwargs):
    hour.plan = plan
    return MapReuse(Memory(hour, "attn"), AttnProcessor(), False)(attn, *args, **kwargs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 2.0},
        {"upcast_attention": True, "upcast_softmax": True},
        {"scale_qk": False},
        {"spatial_norm_dim": 6, "norm_num_groups": 4, "residual_connection": True},
        {"cross_attention_dim": 12, "cross_attention_norm": "layer_norm"},
        {
            "cross_attention_dim": 12,
            "cross_attention_norm": "group_norm",
            "cross_attention_norm_num_groups": 4,
        },
    ],
    ids=lambda options: "-".join(options) or "plain",
)
@pytest.mark.parametrize("masked", [False, True])
def test_options_of_the_attention_are_kept(options, masked):
    torch.manual_seed(0)
    attn = Attention(32, heads=2, dim_head=16, bias=True, processor=AttnProcessor(), **options)
    shape = (2, 32, 3, 4) if attn.spatial_norm is not None else (2, 12, 32)
    x, later = torch.randn(shape), torch.randn(shape)
    prompt = torch.randn(2, 5, 12) if "cross_attention_dim" in options else None
    temb = torch.randn(2, 6, 3, 4) if attn.spatial_norm is not None else None
    mask = None
    if masked:
        mask = torch.zeros(2, 1, 12 if prompt is None else 5)
        mask[0, :, 3:] = -10000
    given = {"encoder_hidden_states": prompt, "attention_mask": mask, "temb": temb}
    hour = Hour()
    computed = processed(attn, "keep", hour, x, **given)
    torch.testing.assert_close(computed, AttnProcessor()(attn, x, **given))
    assert torch.equal(processed(attn, "reuse", hour, x, **given), computed)
    kept = hour.kept["attn"]
    torch.testing.assert_close(kept.sum(dim=-1), torch.ones(kept.shape[:-1]))
    assert not masked or kept[0, ..., 3:].abs().max() == 0
    reused = processed(attn, "last", hour, later, **given)
    assert not hour.kept
    assert not torch.allclose(reused, processed(attn, "keep", hour, later, **given))
    hour.kept["attn"] = kept
    assert torch.equal(processed(attn, "reuse", hour, later, **given), reused)


def test_maps_in_half_precision_stay_so():
    attn = Attention(16, heads=2, dim_head=8, upcast_attention=True, upcast_softmax=True)
    attn, hour = attn.to(torch.bfloat16), Hour()
    x = torch.randn(1, 12, 16, dtype=torch.bfloat16)
    assert processed(attn, "keep", hour, x).dtype == torch.bfloat16
    assert hour.kept["attn"].dtype == torch.bfloat16


# Schedules --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, steps, bits",
    [
        ({}, 7, "0101010"),
        ({"count": 2}, 7, "0000101"),
        ({"reuse": "hurry"}, 7, "0000111"),
        ({"reuse": "hurry", "count": 5}, 6, "011111"),
        ({"reuse": (4, 2, 4)}, 6, "001010"),
        ({"reuse": ()}, 3, "000"),
    ],
)
def test_schedules_of_the_settings(settings, steps, bits):
    wanted = tuple(map(int, bits))
    method = AttentionMapReuse(**settings)
    assert method.bits(steps) == wanted
    assert method.under(wanted).bits(steps) == wanted
    assert tuple(int(method.reuses(step, steps)) for step in range(steps)) == wanted
    assert not method.reuses(steps, steps)


def test_a_schedule_on_disk(tmp_path):
    schedule = ReuseSchedule((0, 0, 1, 0, 1), "house:unet", "DDIMScheduler", (30.25, 41.5))
    path = schedule.save(tmp_path / "new" / "schedule.json")
    assert ReuseSchedule.load(path) == schedule
    method = AttentionMapReuse(reuse=str(path))
    assert AttentionMapReuse(**method.model_dump(mode="json")) == method
    assert pared.parse(method.spec()) == method
    assert method.resolved().bits(5) == schedule.bits
    pipe = pixart()
    with pared.apply(pipe, method) as handle:
        paint(pipe, 5)
        with pytest.raises(InputError, match=r"is for 5 steps and the run has 6; run 5, or take"):
            paint(pipe, 6)
    assert handle.stats[SLUG]["reused"] == 2 * handle.stats[SLUG]["sites"]


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"reuse": (0, 2)}, r"reuse=\(0, 2\) doesn't work: step 0 has nothing to reuse; .*'alter"),
        ({"reuse": "hury"}, r"reuse='hury' doesn't work: there is no schedule 'hury'; give a file"),
        ({"reuse": (1,), "count": 3}, r"^attention-map-reuse: count=3 goes with hurry and alter"),
        ({"reuse": "hurry", "count": 9, "steps": 9}, r"9 of 9 steps can't reuse: .* 0 to 8\.$"),
        ({"count": 4, "steps": 7}, r"4 of 7 steps can't reuse every second .* 0 to 3\.$"),
        ({"reuse": (3, 7), "steps": 7}, r"reuse=\[3, 7\] doesn't fit a run of 7 steps; .* to 6\.$"),
        ({"sites": "joint"}, r"sites='joint' doesn't work: .*'self', 'cross' or 'both'"),
        ({"count": -1}, r"count=-1 doesn't work"),
        ({"steps": 0}, r"steps=0 doesn't work"),
    ],
)
def test_bad_settings_say_what_is_right(settings, words):
    with pytest.raises(InputError, match=words):
        AttentionMapReuse(**settings)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"bits": "012", "psnr": []}'])
def test_bad_files_say_what_is_right(tmp_path, text):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(InputError, match=r"s\.json is no schedule as `pared search` writes it"):
        AttentionMapReuse(reuse=str(tmp_path / "s.json"))


def test_schedules_that_reuse_from_the_start_are_refused():
    with pytest.raises(InputError, match="first step has nothing to reuse"):
        ReuseSchedule((1, 0))
    with pytest.raises(InputError, match="are no schedule; give a 0 or 1"):
        ReuseSchedule(())


# In pipelines -----------------------------------------------------------------------------------


def test_a_run_of_a_pipeline():
    pipe = pixart()
    base = paint(pipe)
    with pared.apply(pipe, AttentionMapReuse(reuse="hurry", count=2)) as handle:
        first, second = paint(pipe), paint(pipe)
    assert torch.equal(first, second) and not torch.equal(first, base)
    assert torch.equal(paint(pipe), base)
    stats = handle.stats[SLUG]
    assert (stats["runs"], stats["calls"], stats["sites"]) == (2, 12, 4)
    assert (stats["computed"], stats["reused"]) == (2 * 4 * 4, 2 * 2 * 4)
    # Two layers, prompt and negative prompt: maps of 16 tokens in 2 heads, outputs of width 32.
    assert stats["bytes"] == 2 * 2 * (2 * 16 * 16 + 16 * 32) * 4


def test_a_solver_of_second_order_has_a_bit_for_every_call():
    pipe = pixart(HeunDiscreteScheduler())
    with pared.apply(pipe, AttentionMapReuse(reuse="hurry", count=6)) as handle:
        paint(pipe, 4)  # 7 calls
    stats = handle.stats[SLUG]
    assert (stats["computed"], stats["reused"]) == (1 * 4, 6 * 4)
    with pared.apply(pipe, AttentionMapReuse(reuse=(7,))), pytest.raises(InputError, match="of 7"):
        paint(pipe, 4)


def test_a_bare_denoiser_must_say_how_many_steps():
    model = presets.build("toy:unet", device="cpu")
    for settings in ({"reuse": "hurry"}, {"count": 2}):
        with pytest.raises(InputError, match=r"counts steps from the end, .* give steps=N"):
            pared.apply(model, AttentionMapReuse(**settings))
        pared.apply(model, AttentionMapReuse(**settings, steps=8)).remove()
    assert "processor.memory" not in repr(model) and not model._forward_pre_hooks


@pytest.mark.parametrize("name", INFO.families)
def test_removal_puts_the_very_processors_back(name):
    model = presets.build(f"toy:{name}", device="cpu")
    sites = anatomy.of(model).sites(*KINDS["both"])
    before = [site.module.processor for site in sites]
    handle = pared.apply(model, AttentionMapReuse())
    assert all(type(site.module.processor).__name__.endswith("MapReuse") for site in sites)
    handle.remove()
    assert all(site.module.processor is own for site, own in zip(sites, before, strict=True))
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_chosen_sites_alone_are_worked_on():
    model = presets.build("toy:pixart", device="cpu")
    sites = anatomy.of(model).sites(*KINDS["both"])

    def changed(**settings):
        with pared.apply(model, AttentionMapReuse(**settings)):
            return [isinstance(site.module.processor, MapReuse) for site in sites]

    assert [site.kind[:4] for site in sites] == ["self", "cros"] * 2
    assert changed() == [True] * 4
    assert changed(sites="self") == [True, False] * 2
    assert changed(sites="cross", layers=(1,)) == [False] * 3 + [True]
    with pytest.raises(InputError, match=r"attention-map-reuse: layers=\[7\] have no self att"):
        changed(layers=(7,))


def test_refusals():
    model = presets.build("toy:dit", device="cpu")
    with pytest.raises(InputError, match=r"sites=cross can't be used on DiT.*no cross-attention"):
        pared.apply(model, AttentionMapReuse(sites="cross"))
    attn, method = model.transformer_blocks[1].attn1, AttentionMapReuse()
    own = attn.processor
    attn.set_processor(PAGIdentitySelfAttnProcessor2_0())
    with pytest.raises(InputError, match=r"1\.attn1, whose PAGIden.* isn't the model's own soft"):
        pared.apply(model, method)
    attn.set_processor(own)
    with pared.apply(model, method), pytest.raises(InputError, match=r"\.0\.attn1, which att.* a"):
        pared.apply(model, method)
    pared.convert(model, EDiT())
    with pytest.raises(
        InputError, match=r"reuses transformer_blocks\.0\.attn1, which edit already"
    ):
        pared.apply(model, AttentionMapReuse())
    flux = presets.build("toy:flux", device="cpu")
    with pared.apply(flux, AttentionMapReuse(reuse=(1,))):
        attn = anatomy.of(flux).sites("joint_attention")[0].module
        attn.processor.memory.clock.plan = "keep"
        with pytest.raises(InputError, match="takes no attention mask in a joint attention"):
            attn(torch.randn(1, 4, 32), attention_mask=torch.zeros(1, 1, 4))


@torch.no_grad()
def test_a_video_that_starts_from_a_picture_keeps_what_both_softmaxes_gave():
    torch.manual_seed(0)
    model = presets.get("toy:wan").denoiser.make(image_dim=24, added_kv_proj_dim=32).eval()
    family = anatomy.of(model)
    latents, timestep, condition = family.example(1, 8, 8, frames=1, generator=seeded())

    def outputs(latents):
        times = [torch.full_like(timestep, 900 - 100 * step) for step in range(2)]
        return [family.denoise(model, latents, time, condition) for time in times]

    plain = outputs(latents)
    with pared.apply(model, AttentionMapReuse(sites="cross")) as handle:
        first, second = outputs(latents)
    assert torch.equal(first, plain[0]) and not torch.equal(second, plain[1])
    assert handle.stats[SLUG]["reused"] == 2
    assert handle.stats[SLUG]["bytes"] == 2 * 16 * 32 * 4  # layers, tokens, width; float32
    with pytest.raises(InputError, match=r"\.attn2, which has two maps, one of the prompt and one"):
        pared.apply(model, AttentionMapReuse(sites="cross", keep_output=False))


@torch.no_grad()
def test_compiled_blocks_count_without_breaking_graphs():
    model = presets.build("toy:dit", device="cpu")
    family = anatomy.of(model)
    latents, timestep, condition = family.example(1, 8, 8, generator=seeded())

    def run():
        times = [torch.full_like(timestep, 900 - 100 * step) for step in range(6)]
        return torch.stack([family.denoise(model, latents, t, condition) for t in times])

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with pared.apply(model, AttentionMapReuse()) as handle:
        wanted = run()
        counts = dict(handle.stats[SLUG]["by_site"])
        for block in family.blocks:
            block.module.compile(backend="eager")
        torch.testing.assert_close(run(), wanted)
    torch._dynamo.reset()
    assert not torch._dynamo.utils.counters["graph_break"]
    assert counts == {f"transformer_blocks.{n}.attn1": {"computed": 6, "reused": 6} for n in (0, 1)}


def test_two_threads_share_a_model():
    model = presets.build("toy:dit", device="cpu")
    family = anatomy.of(model)
    method = AttentionMapReuse(reuse=(1, 2, 4))

    def sampled(seed, started=None):
        latents, timestep, condition = family.example(2, 16, 16, generator=seeded(seed))
        for step in range(6):
            if started is not None:
                started.wait()  # both are at the same step
            with torch.no_grad():
                time = torch.full_like(timestep, 900 - 100 * step)
                latents = latents - 0.1 * family.denoise(model, latents, time, condition)
        return latents

    with pared.apply(model, method):
        alone = [sampled(seed) for seed in range(2)]
        together, barrier = [None, None], threading.Barrier(2, timeout=60)

        def run(seed):
            together[seed] = sampled(seed, barrier)

        threads = [threading.Thread(target=run, args=(seed,)) for seed in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


# Runs and their search --------------------------------------------------------------------------


class Embedded(PixArtSigmaPipeline):
    """A pipeline whose prompts are the seeds of embeddings, since a toy encodes nothing."""

    def __call__(self, prompt=None, **call):
        texts = [torch.randn(1, 4, 64, generator=seeded(int(text))) for text in prompt]
        given = call_of(len(prompt)) | {"prompt_embeds": torch.cat(texts)}
        return super().__call__(prompt=None, **given | call)


def embedded(scheduler=None, model=None):
    parts = pixart(scheduler, model).components
    return Embedded(**parts)


def runs(pipe=None, **settings):
    settings = {"steps": 6, "seeds": (0, 1), "latents": True, "batch_size": 3} | settings
    return Runs(pipe or embedded(), AttentionMapReuse(), prompt=["1", "2"], **settings)


def test_runs_score_schedules_by_their_distance_to_the_full_run():
    scored = runs()
    assert scored.steps == 6 and scored.wanted.shape == (4, 4, 8, 8)
    assert scored((0,) * 6) == 100.0 == scored.fewer(6)
    found = scored(hurry(6, 2))
    assert 0 < found < 100
    pipe = embedded()
    with pared.apply(pipe, AttentionMapReuse(reuse=(4, 5))):
        alone = torch.cat(
            [
                pipe(
                    [prompt], generator=seeded(seed), num_inference_steps=6, output_type="latent"
                ).images
                for prompt in ("1", "2")
                for seed in (0, 1)
            ]
        )
    assert found == pytest.approx(psnr(alone, scored.wanted, scored.value_range), abs=1e-3)
    assert 0 < scored.fewer(5) < 100
    assert runs(embedded(HeunDiscreteScheduler()), steps=4).steps == 7


def test_runs_refuse_before_they_paint():
    with pytest.raises(InputError, match="there is nothing to paint; give prompt or class_labels"):
        Runs(embedded(), AttentionMapReuse(), 4)
    model = presets.build("toy:pixart", device="cpu")
    pared.convert(model, EDiT())
    with pytest.raises(InputError, match="attn1"):
        runs(embedded(model=model))


def test_a_silent_model_amplifies_nothing():
    """Where the model predicts no motion, what is added ahead of a step is there at the end."""
    model = presets.build("toy:pixart", device="cpu")
    torch.nn.init.zeros_(model.proj_out.weight)
    torch.nn.init.zeros_(model.proj_out.bias)
    scheduler = EulerDiscreteScheduler()
    scored = runs(embedded(scheduler, model), steps=4)
    assert scored.amplification() == pytest.approx((1.0, 1.0, 1.0), rel=1e-4)
    assert "step" not in vars(scheduler)
    with pytest.raises(InputError, match="make the runs with latents=True"):
        scored.latents = False
        scored.amplification()


def worth(bits):
    """A score with a best that one swap at a time finds: reuse is good at steps 2 and 4."""
    return 10.0 * (bits[2] + bits[4]) - sum(i * bit for i, bit in enumerate(bits)) / 10


@pytest.mark.parametrize("way", ["swaps", "greedy", "exhaustive"])
def test_searches_find_the_best(way):
    found = search(worth, 7, 2, way)
    assert found.bits == (0, 0, 1, 0, 1, 0, 0) and found.complete
    assert found.curve[0] == worth(hurry(7, 2)) and found.curve[-1] == worth(found.bits)
    assert list(found.curve) == sorted(set(found.curve))


def test_neighbours_alone_find_less_or_as_much():
    found = search(worth, 7, 2, "adjacent")
    assert worth(hurry(7, 2)) <= found.curve[-1] <= worth((0, 0, 1, 0, 1, 0, 0))
    assert search(worth, 7, 0).bits == (0,) * 7
    assert search(worth, 7, 6).bits == hurry(7, 6)


def test_single_steps():
    assert sensitivity(worth, 6) == tuple(worth(with_reuse(6, [i])) for i in range(1, 6))


def test_a_stopped_search_keeps_the_best_and_goes_on(tmp_path):
    asked = []

    def stopping(bits):
        asked.append(bits)
        if len(asked) == 6:
            raise KeyboardInterrupt
        return worth(bits)

    about = {"model": "toy", "steps": 7}
    found = search(stopping, 7, 2, log=Log(tmp_path / "log", about))
    assert not found.complete and found.curve[-1] == max(map(worth, asked[:5])) > found.curve[0]
    with (tmp_path / "log").open("a") as file:
        file.write('{"bits": "00')  # killed while it wrote
    again = search(stopping, 7, 2, log=Log(tmp_path / "log", about))
    assert again == search(worth, 7, 2)
    assert len(set(asked)) == len(asked) - 1  # the one that was interrupted
    with pytest.raises(InputError, match=r"another search, with another steps; move it away"):
        Log(tmp_path / "log", about | {"steps": 8})
    (tmp_path / "log").write_text("no\n")
    with pytest.raises(InputError, match="log is no log of a search"):
        Log(tmp_path / "log", about)

    def never(bits):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(never, 7, 2)


def test_the_search_reaches_the_best_on_a_toy():
    """Of all ten schedules with N = 6 and k = 2 it ends at the best or the second best."""
    scored = runs(batch_size=4)
    ranked = exhaustive(6, 2, scored)
    assert len(ranked) == 10
    *_, found = swap_search(hurry(6, 2), scored)
    assert ranked.index(found) <= 1


# On a trained model -----------------------------------------------------------------------------

SEARCHED = ["red apple", "hammer", "tiger face", "flag: Japan"]
HELD_OUT = ["sailboat", "red heart", "woman firefighter: dark skin tone", "grinning face"]


@pytest.fixture(scope="module")
def house():
    pipe = StableDiffusionPipeline.from_pretrained(folder_of("house:unet"))
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)

    def runs(prompts, steps, seed):
        call = {"prompt": prompts, "guidance_scale": 1.0}
        method = AttentionMapReuse()
        return Runs(pipe, method, steps, (seed,), latents=True, batch_size=4, **call)

    return runs


@pytest.mark.slow
def test_a_search_beats_fewer_steps_on_a_trained_model(house):
    """PHAST is nearer to the full run than HURRY by 5 dB and than fewer steps at equal time.

    Seen on prompts that the search didn't see: PHAST 37.7 dB, in turn 36.7, HURRY 25.8, 7 steps
    23.8. A single reuse harms least at steps 1 and 2 (50 dB) and most at step 8 of 9 (34), so that
    later isn't better here, and it isn't asked for.
    """
    steps, count = 10, 4
    found = search(house(SEARCHED, steps, 1), steps, count)
    assert list(found.curve) == sorted(set(found.curve))
    held_out = house(HELD_OUT, steps, 2)
    scores = {
        "PHAST": held_out(found.bits),
        "HURRY": held_out(hurry(steps, count)),
        "alternate": held_out(alternate(steps, count)),
        # A reuse step costs 0.3 of a step, as the pairing of the paper's figure has it.
        "fewer steps": held_out.fewer(round(steps - 0.7 * count)),
    }
    assert scores["PHAST"] > scores["HURRY"] + 5, scores
    assert scores["PHAST"] > scores["fewer steps"], scores


@pytest.mark.slow
def test_the_search_reaches_the_best_on_a_trained_model(house):
    scored = house(SEARCHED, 6, 1)
    ranked = exhaustive(6, 2, scored)
    *_, found = swap_search(hurry(6, 2), scored)
    assert ranked.index(found) <= 1
