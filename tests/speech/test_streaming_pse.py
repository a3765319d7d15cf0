"""Streaming PSE: its checks, what it learns, files, bad input, and the step in onnxruntime."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import pared
from pared.anatomy import presets
from pared.bench import host
from pared.objectives.enhancement import Enhancement, si_sdr
from pared.speech.streaming_pse import enrolment, method_checks, model, stream
from pared.speech.streaming_pse.method_checks import frames_of, noise, toy
from tests.speech.tones import Tones

CHECKS = [f for name, f in inspect.getmembers(method_checks) if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda f: f.__name__)
def test_shipped_check(check):
    check()


# The settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec, message",
    [
        ("streaming-pse:width=90", "width=90 doesn't split into 4 heads"),
        ("streaming-pse:window=511", "window=511 can't move by half"),
        ("streaming-pse:lookahead=4", "lookahead=4 doesn't work: .*default is 0"),
        ("streaming-pse:conditioning=vector", "conditioning='vector' doesn't work"),
    ],
)
def test_bad_settings(spec, message):
    with pytest.raises(pared.InputError, match=message):
        pared.parse(spec)


def test_latency_by_construction():
    assert pared.StreamingPSE().latency == 0.032
    assert pared.StreamingPSE(lookahead=2).latency == 0.064


@pytest.mark.parametrize("use", [pared.convert, pared.apply])
def test_it_changes_no_other_model(use):
    with pytest.raises(pared.InputError, match="it is a model of its own"):
        use(presets.build("toy:dit"), pared.StreamingPSE())


@pytest.mark.parametrize("conditioning", ["cross", "static_mean", "static_vector", "none"])
@pytest.mark.parametrize("fusion", ["concat", "add", "film"])
def test_every_conditioning_with_every_fusion(conditioning, fusion):
    enhancer = toy(conditioning=conditioning, fusion=fusion, vector_width=6)
    given = noise(2, 6) if conditioning == "static_vector" else noise(2, 700)
    given[1] = given[1].cumsum(0)  # another spectrum
    recordings = noise(1, 500, seed=2).expand(2, -1)
    told = enhancer.encode(given)
    enhanced = enhancer(recordings, given)
    torch.testing.assert_close(enhancer.enhance(recordings, told), enhanced)
    # Only who is told apart gets something else.
    same = torch.allclose(enhanced[0], enhanced[1], rtol=0, atol=1e-5)
    assert same == (conditioning == "none")
    enhanced.square().sum().backward()
    unused = {name for name, p in enhancer.named_parameters() if p.grad is None}
    assert not unused


def test_only_the_first_layer_is_told():
    enhancer = toy(conditioned="first")
    assert enhancer.layers[1].fusion is None and enhancer.layers[1].cross is None
    assert frames_of(enhancer).shape[1] == enhancer.cached(frames_of(enhancer))["key"].shape[3]
    assert len(enhancer.cached(frames_of(enhancer))["key"]) == 1


# The enrolment ----------------------------------------------------------------------------------


def test_pauses_and_padding_of_an_enrolment_are_left_out():
    enhancer, speech = toy(), noise(2 * 16000)
    pause = 1e-4 * noise(16000, seed=1)
    with_pause = torch.cat([speech[:16000], pause, speech[16000:]])
    kept = enrolment.enrol(enhancer, with_pause)["key"].shape[3] * enhancer.settings.hop
    assert abs(kept - len(speech)) <= 2 * enhancer.settings.window
    padded = torch.nn.functional.pad(speech[None], (0, 5000))
    told = enhancer.encode(padded, torch.tensor([len(speech)]))
    wanted = enhancer.encode(speech[None])
    recording = noise(1, 500, seed=2)
    torch.testing.assert_close(
        enhancer.enhance(recording, told), enhancer.enhance(recording, wanted), atol=1e-5, rtol=0
    )


def test_an_enrolment_may_be_loud_or_soft():
    enhancer, speech = toy(), noise(2 * 16000)
    loud, soft = (enrolment.enrol(enhancer, gain * speech)["key"] for gain in (1.0, 0.03))
    torch.testing.assert_close(soft, loud, rtol=0, atol=1e-4)


def test_what_follows_the_seconds_that_count_is_not_encoded():
    enhancer, recordings = toy(enrolment_seconds=1.5), noise(2, 500, seed=2)
    long = noise(2, 4 * 16000)
    long[1, 16000:20000] = 0  # a pause, so that the second one's seconds end later
    encoded, valid = enhancer.encoded(long)
    assert encoded.shape[:2] == valid.shape and valid[:, -1].tolist() == [False, True]
    end = 20000 + 8000 + 2 * enhancer.settings.window
    assert abs(valid.shape[1] * enhancer.settings.hop - end) < 4 * enhancer.settings.window
    wanted = enhancer(recordings, long[:, :end])
    torch.testing.assert_close(enhancer(recordings, long), wanted, rtol=0, atol=1e-6)
    # Alone, each goes no further than its own.
    alone = torch.cat([enhancer(r[None], e[None]) for r, e in zip(recordings, long, strict=True)])
    torch.testing.assert_close(alone, wanted, rtol=0, atol=1e-5)


def test_ten_minutes_of_enrolment_cost_what_ten_seconds_do():
    enhancer = toy(window=512)
    enhancer.set_attn_implementation("eager")  # whose products are counted
    long, told, cost = noise(1, 600 * 16000), [], []
    for seconds in (600, 11):
        with FlopCounterMode(display=False) as counter:
            told.append(enhancer.encode(long[:, : seconds * 16000]))
        cost.append(counter.get_total_flops())
    assert cost[0] == cost[1] > 0
    torch.testing.assert_close(*told, rtol=0, atol=1e-6)


def test_ten_seconds_count():
    enhancer = toy(enrolment_seconds=1.5)
    told = enrolment.enrol(enhancer, noise(5 * 16000))
    assert told["key"].shape[3] == int(1.5 * 16000 // enhancer.settings.hop)


def test_what_follows_the_longest_enrolment_is_not_listened_to(monkeypatch):
    monkeypatch.setattr(enrolment, "LONGEST", 2.0)
    enhancer, speech = toy(), noise(2 * 16000)
    told = enrolment.enrol(enhancer, speech)["key"]
    longer = torch.cat([speech, 100 * noise(16000, seed=1)])  # beside which all else is a pause
    assert torch.equal(enrolment.enrol(enhancer, longer)["key"], told)
    with pytest.raises(pared.InputError, match=r"the enrolment is silent in its first 2 s; record"):
        enrolment.enrol(enhancer, torch.cat([torch.zeros(32000), speech]))
    with pytest.raises(pared.InputError, match=r"has 0.25 s of speech in its first 2 s; it needs"):
        enrolment.enrol(enhancer, torch.cat([speech[:4000], torch.zeros(28000), speech]))


@pytest.mark.parametrize("offset", [0.01, 0.3])
def test_an_offset_is_no_speech(offset):
    enhancer, speech = toy(), noise(2 * 16000)
    with_pause = torch.cat([speech[:16000], 1e-5 * noise(16000, seed=1), speech[16000:]])
    kept, wanted = (
        enrolment.enrol(enhancer, one)["key"] for one in (with_pause + offset, with_pause)
    )
    torch.testing.assert_close(kept, wanted, rtol=0, atol=1e-3)
    with pytest.raises(pared.InputError, match="the enrolment is silent"):
        enrolment.enrol(enhancer, torch.full((32000,), offset))


def test_without_an_offset_a_recording_is_taken_as_it_is():
    enhancer, speech = toy(), noise(2 * 16000)
    pause = 1e-4 * noise(16000, seed=1) + 1e-4
    # A voice has a mean of its own, which its pauses haven't.
    for one in (speech + 0.01, torch.cat([speech + 0.01, pause])):
        encoded, valid = enhancer.encoded(one[None])
        told = enhancer.cached(encoded[:, valid[0]])
        assert torch.equal(enrolment.enrol(enhancer, one)["key"], told["key"])


@pytest.mark.parametrize(
    "recording, message",
    [
        (torch.zeros(0), "the enrolment has 0.00 s; it needs at least 1"),
        (noise(15000), "the enrolment has 0.94 s; it needs at least 1"),
        (torch.zeros(32000), "the enrolment is silent"),
        (
            torch.cat([noise(4000), torch.zeros(28000)]),
            r"has 0.25 s of speech; it needs at least 0",
        ),
        (torch.full((32000,), torch.nan), r"sample 0 \(0.000 s\) is NaN or infinite"),
        (noise(2, 32000), r"of shape \(2, 32000\)"),
        (torch.ones(32000, dtype=torch.int16), "the samples are torch.int16"),
    ],
)
def test_bad_enrolments(recording, message):
    with pytest.raises(pared.InputError, match=message):
        enrolment.enrol(toy(), recording)


def test_an_embedding_from_elsewhere_is_no_recording():
    with pytest.raises(pared.InputError, match="takes a speaker's embedding"):
        enrolment.enrol(toy(conditioning="static_vector"), noise(32000))


def test_enrolment_files(tmp_path):
    enhancer, path = toy(), tmp_path / "new" / "folder" / "me.safetensors"
    told = enrolment.enrol(enhancer, noise(32000))
    enrolment.save(path, enhancer, told)
    found = enrolment.load(path, enhancer)
    assert found.keys() == told.keys()
    assert all(torch.equal(found[name], told[name]) for name in told)


def test_two_at_a_time_may_write_one_enrolment_file(tmp_path, monkeypatch):
    enhancer, path, real = toy(), tmp_path / "me.safetensors", enrolment.save_file
    ours, theirs = (enrolment.enrol(enhancer, noise(32000, seed=seed)) for seed in (0, 1))

    def write(*given):
        monkeypatch.setattr(enrolment, "save_file", real)
        real(*given)
        enrolment.save(path, enhancer, theirs)  # while ours is on its way

    monkeypatch.setattr(enrolment, "save_file", write)
    enrolment.save(path, enhancer, ours)
    assert torch.equal(enrolment.load(path, enhancer)["key"], ours["key"])
    assert [one.name for one in tmp_path.iterdir()] == ["me.safetensors"]


def test_enrolment_files_that_are_refused(tmp_path):
    enhancer, path = toy(), tmp_path / "me.safetensors"
    enrolment.save(path, enhancer, enrolment.enrol(enhancer, noise(32000)))
    other = toy()
    with torch.no_grad():
        next(other.parameters())[0] += 1
    with pytest.raises(pared.InputError, match="was made by another model"):
        enrolment.load(path, other)
    (tmp_path / "cut").write_bytes(path.read_bytes()[:1000])
    save_file(load_file(path), tmp_path / "bare")
    for name, message in (("cut", "is no enrolment"), ("bare", "though a safetensors file"),
                          ("gone", "there is no enrolment")):  # fmt: skip
        with pytest.raises(pared.InputError, match=message):
            enrolment.load(tmp_path / name, enhancer)
    for place in (path / "me.safetensors", path / "new" / "me.safetensors"):
        with pytest.raises(pared.InputError, match=r"can't be written \((File exists|Not a dir)"):
            enrolment.save(place, enhancer, {})
    (tmp_path / "folder").mkdir()
    with pytest.raises(pared.InputError, match=r"can't be written \(Is a directory\)"):
        enrolment.save(tmp_path / "folder", enhancer, {})
    assert not list(tmp_path.glob(".*"))


# Learning from targets --------------------------------------------------------------------------


@pytest.mark.parametrize("conditioning", ["cross", "static_mean"])
def test_voices_are_of_the_enrolment_and_of_the_target(conditioning):
    enhancer = toy(conditioning=conditioning)
    noisy, clean, enrolments = noise(2, 500), noise(2, 600, seed=1), noise(2, 900, seed=2)
    samples = torch.tensor([900, 400])
    enhanced, voices = enhancer(noisy, enrolments, samples, clean=clean)
    enrolled, spoken = (
        model.mean_of(*enhancer.encoded(*given)) for given in ((enrolments, samples), (clean,))
    )
    torch.testing.assert_close(voices, torch.stack([enrolled, spoken]))
    assert not torch.allclose(*voices, rtol=0.1)
    # Nothing of what is to be found out is told.
    torch.testing.assert_close(enhanced, enhancer(noisy, enrolments, samples))


@pytest.mark.parametrize("conditioning", ["static_vector", "none"])
def test_what_encodes_nothing_has_no_voices(conditioning):
    enhancer = toy(conditioning=conditioning, vector_width=6)
    enhanced, voices = enhancer(noise(2, 500), noise(2, 6), clean=noise(2, 500, seed=1))
    assert voices is None
    torch.testing.assert_close(enhanced, enhancer(noise(2, 500), noise(2, 6)))


# The model --------------------------------------------------------------------------------------


def test_saved_and_loaded(tmp_path):
    enhancer = toy(mask="complex", lookahead=1)
    enhancer.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").exists()
    again = model.load(tmp_path / "model")
    assert again.settings == enhancer.settings and again.digest() == enhancer.digest()
    told, recording = enhancer.cached(frames_of(enhancer)), noise(1, 500)
    assert torch.equal(again.enhance(recording, told), enhancer.enhance(recording, told))


def test_models_that_are_refused(tmp_path):
    folder = tmp_path / "model"
    toy().save_pretrained(folder)
    # Copies, since the file that they lie in is written anew.
    weights = {k: v.clone() for k, v in load_file(folder / "model.safetensors").items()}
    whole = (folder / "model.safetensors").read_bytes()
    config = (folder / "config.json").read_text()

    def refused(message):
        with pytest.raises(pared.InputError, match=message) as error:
            model.load(folder)
        assert "\n" not in str(error.value)

    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused("can't be opened as an enhancer")
    save_file(
        {k: v for k, v in weights.items() if k != "head.bias"},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    refused("lacks the weight 'head.bias'")
    save_file(weights | {"extra": torch.ones(1)}, folder / "model.safetensors", {"format": "pt"})
    refused("has a weight 'extra' of shape")
    (folder / "model.safetensors").write_bytes(whole)
    (folder / "config.json").write_text(config.replace('"width": 16', '"width": 15'))
    refused("width=15 doesn't split")
    (folder / "config.json").write_text(config.replace("streaming-pse", "wav2vec2"))
    refused("holds a wav2vec2; the enhancer is a streaming-pse")
    (folder / "config.json").unlink()
    refused("can't be opened as an enhancer")


def test_the_reference_attention_agrees():
    enhancer, recording = toy(), noise(1, 1500)
    told = enhancer.encode(noise(1, 700, seed=1))  # with a mask
    wanted = enhancer.enhance(recording, told)
    enhancer.set_attn_implementation("eager")
    torch.testing.assert_close(enhancer.enhance(recording, told), wanted, rtol=0, atol=1e-6)


def test_a_batch_is_its_samples():
    enhancer = toy()
    recordings, lengths = noise(3, 1000), torch.tensor([1.0, 0.5, 0.131])
    told = enhancer.cached(frames_of(enhancer))
    batch = enhancer.enhance_batch(recordings, lengths, told)
    for row, recording, share in zip(batch, recordings, lengths, strict=True):
        end = round(float(share) * 1000)
        alone = enhancer.enhance(recording[None, :end], told)[0]
        torch.testing.assert_close(row[:end], alone, rtol=0, atol=1e-5)
        assert not row[end:].any()


def test_bfloat16():
    enhancer, recording = toy(), noise(1, 1000)
    told = enhancer.cached(frames_of(enhancer))
    wanted = enhancer.enhance(recording, told)
    half = toy().to(torch.bfloat16)
    got = half.enhance(recording, {k: v.bfloat16() for k, v in told.items()})
    # Three digits in the layers; the mask is between 0 and 1 whatever they say.
    assert (got - wanted).norm() < 0.05 * wanted.norm()


# Streams ----------------------------------------------------------------------------------------

SHARED = toy(width=4, heads=1, layers=1)


@settings(max_examples=25, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 4000), min_size=1, max_size=12),
    length=st.integers(0, 6000),
)
def test_any_chunks(cuts, length):
    told, recording = SHARED.cached(frames_of(SHARED)), noise(length)
    running, got, rest = stream.Stream(SHARED, told), [], recording
    for cut in cuts:
        got.append(running(rest[:cut]))
        rest = rest[cut:]
    got = torch.cat([*got, running(rest), running.flush()])
    wanted = SHARED.enhance(recording[None], told)[0] if length else recording
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


def test_a_stream_begins_again_after_its_end():
    running = stream.Stream(SHARED, SHARED.cached(frames_of(SHARED)))
    first = torch.cat([running(noise(500)), running.flush()])
    assert torch.equal(torch.cat([running(noise(500)), running.flush()]), first)


def test_the_state_is_as_large_after_a_minute():
    enhancer = toy(width=4, heads=1, layers=1, window=512)
    running = stream.Stream(enhancer, enhancer.cached(frames_of(enhancer)))
    size = method_checks.elements(running.state)
    for second in range(60):
        running(noise(16000, seed=second))
        assert method_checks.elements(running.state) == size
        assert running.pending.untyped_storage().nbytes() <= 4 * running.hop


@pytest.mark.slow
def test_an_hour_takes_no_more_memory_than_a_minute():
    enhancer = toy(width=4, heads=1, layers=1, window=512)
    running = stream.Stream(enhancer, enhancer.cached(frames_of(enhancer)))
    held = []
    for minute in range(60):
        for second in range(60):
            running(noise(16000, seed=second))
        held.append(host.resident_bytes())
        assert running.latency.report().hops == (minute + 1) * 3750
    assert held[-1] - held[0] < 2**20


def test_a_nan_leaves_the_stream_as_it_was():
    told, recording = SHARED.cached(frames_of(SHARED)), noise(1000)
    running = stream.Stream(SHARED, told)
    got = [running(recording[:300])]
    broken = recording[300:].clone()
    broken[7] = torch.nan
    with pytest.raises(pared.InputError, match=r"sample 307 \(0.019 s\) is NaN"):
        running(broken)
    got += [running(recording[300:]), running.flush()]
    wanted = SHARED.enhance(recording[None], told)[0]
    torch.testing.assert_close(torch.cat(got), wanted, rtol=0, atol=1e-5)


def test_latency_is_counted_to_two_percent():
    latency = stream.Latency(0.016)
    for milliseconds in range(1, 101):
        latency.add(milliseconds / 1000)
    report = latency.report()
    assert report.median == pytest.approx(0.050, rel=0.03)
    assert report.p99 == pytest.approx(0.099, rel=0.03)
    assert (report.hops, report.worst, report.late) == (100, 0.1, 84)
    assert report.real_time_factor == pytest.approx(5.05 / 1.6)
    assert stream.Latency(0.016).report().median == 0


# ONNX -------------------------------------------------------------------------------------------

# An enrolment of which a third is silent.
PAUSED = torch.cat([noise(1, 400), torch.zeros(1, 400), noise(1, 400, seed=1)], dim=1)


def test_an_enrolment_without_its_pauses_says_the_same():
    pytest.importorskip("onnxruntime")
    from pared.export.onnx import without_pauses

    enhancer, recording = toy(), noise(1, 500, seed=2)
    told = enhancer.encode(PAUSED)
    kept = without_pauses(told)
    assert kept.keys() == {"key", "value"}
    assert 20 < kept["key"].shape[3] < told["key"].shape[3] - 8
    wanted = enhancer.enhance(recording, told)
    torch.testing.assert_close(enhancer.enhance(recording, kept), wanted, rtol=0, atol=1e-6)
    unmasked = {name: told[name] for name in kept}
    assert not torch.allclose(enhancer.enhance(recording, unmasked), wanted, rtol=0, atol=1e-4)
    assert without_pauses(kept) is kept
    with pytest.raises(pared.InputError, match="the enrolment is silent; encode at least one sec"):
        without_pauses(enhancer.encode(torch.zeros(1, 1000)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"lookahead": 2, "mask": "complex"}, {"conditioning": "static_mean", "fusion": "film"}],
    ids=["cross", "complex", "static"],
)
def test_the_exported_step_gives_the_same(settings, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    from pared.export.onnx import OnnxStep, export_step

    enhancer = toy(**settings)
    step = OnnxStep(export_step(enhancer, tmp_path / "step.onnx"))
    assert {"chunk", "state.frame", "state.keys.0", "state.values.1"} <= step.inputs
    recording = noise(1, 3000)
    for told in (enhancer.cached(frames_of(enhancer, 31)), enhancer.encode(PAUSED)):
        running = stream.Stream(enhancer, told, step)
        got = torch.cat([running(recording[0]), running.flush()])
        torch.testing.assert_close(got, enhancer.enhance(recording, told)[0], rtol=0, atol=1e-5)
    sentence = r"holds enrolment\.key\.0, .*\.value\.2, and the exported step takes enrolment\."
    with pytest.raises(pared.InputError, match=sentence):
        stream.Stream(enhancer, toy(layers=3).encode(PAUSED), step)


def test_export_wants_float32_on_the_cpu(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    from pared.export.onnx import export_step

    with pytest.raises(pared.InputError, match=r"the model is in torch\.bfloat16"):
        export_step(toy().to(torch.bfloat16), tmp_path / "step.onnx")


# Learning ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_learns_whose_voice_to_keep():
    """Two synthetic voices at 0 dB.

    The card's gates, but for the last: these voices are told apart by their mean alone, which is
    learnt a little sooner. So attention may be a tenth behind, in the place of 0.3 dB.
    """
    none, mean, cross = (_learnt(kind) for kind in ("none", "static_mean", "cross"))
    assert cross["improvement"] > none["improvement"] + 3
    assert cross["flips"] > 0.8 and none["flips"] == 0
    assert cross["improvement"] > 0.9 * mean["improvement"]


def _learnt(conditioning: str, steps: int = 200) -> dict[str, float]:
    torch.manual_seed(0)
    enhancer = pared.StreamingPSE(
        width=48,
        layers=2,
        left_context=32,
        conditioning=conditioning,
        enrolment_encoder="frames",
    ).build()
    objective = Enhancement(sdr=0.1, magnitude=5, spectrum=0, suppression=0)
    optimizer = torch.optim.AdamW(enhancer.parameters(), lr=2e-3)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1, (s + 1) / 40) * (1 + math.cos(math.pi * s / steps)) / 2
    )
    generator, world = torch.Generator().manual_seed(0), Tones()
    for _ in range(steps):
        batch = world.batch(8, generator)
        optimizer.zero_grad()
        sum(objective(enhancer, batch, generator).values()).backward()
        torch.nn.utils.clip_grad_norm_(enhancer.parameters(), 5)
        optimizer.step()
        rate.step()
    with torch.no_grad():
        batch = world.batch(64, torch.Generator().manual_seed(1))
        target, other, mixture = batch["target"], batch["interference"], batch["noisy"]
        kept = enhancer(mixture, batch["enrolment"])
        swapped = enhancer(mixture, batch["other_enrolment"])
        right = si_sdr(kept, target) > si_sdr(kept, other)
        flipped = si_sdr(swapped, other) > si_sdr(swapped, target)
        improvement = (si_sdr(kept, target) - si_sdr(mixture, target)).mean()
    return {
        "improvement": float(improvement),
        "flips": float((right & flipped).float().mean()),
    }
