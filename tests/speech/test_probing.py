"""Probes on frozen layers: what they are given, what they learn, and that the encoder stays."""

import pytest
import torch

from pared import anatomy
from pared.anatomy import presets
from pared.errors import InputError
from pared.method import convert, parse
from pared.speech import probing
from pared.speech.probing import Examples, LayerMix, Probe
from pared.worlds.speech.characters import Characters
from tests.speech import recognisers
from tests.speech.recognisers import noise


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("methods", [(), ("summarymixing-asr",)])
def test_layers_are_those_that_the_encoder_passes_on(methods):
    recogniser = recognisers.conformer()
    model = convert(recogniser.model, *map(parse, methods))
    sounds = [noise(8000), noise(12_000, seed=1)]
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    found = probing.layers_of(model.train(), recogniser.extractor, sounds)
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    for sound, layers in zip(sounds, found, strict=True):
        frames = int(model._get_feat_extract_output_lengths(len(sound)))
        assert layers.shape == (frames, 3, 32) and not layers.requires_grad
        # A norm behind the last block is all that is missing of the encoder's output.
        encoder = model.get_submodule(anatomy.of(model).encoder)
        inputs = recogniser.inputs([sound])["input_values"]
        whole = model.wav2vec2_conformer(inputs).last_hidden_state
        torch.testing.assert_close(encoder.layer_norm(layers[:, -1])[None], whole)
    assert not model.training
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_layers_of_an_encoder_in_half_precision():
    recogniser = recognisers.conformer()
    (wanted,) = probing.layers_of(recogniser.model, recogniser.extractor, [noise(8000)])
    half = recogniser.model.bfloat16()
    (found,) = probing.layers_of(half, recogniser.extractor, [noise(8000)])
    assert found.dtype == torch.float32 and found.shape == wanted.shape
    # Eight bits of mantissa, through two blocks.
    off = (found - wanted).norm(dim=(0, 2)) / wanted.norm(dim=(0, 2))
    assert off.max() < 0.05, off


def test_layers_of_another_model_are_refused():
    with pytest.raises(InputError, match=r"a probe can't be used on Whisper.*reads no samples"):
        probing.layers_of(presets.build("toy:whisper", device="cpu"), None, [])


def test_layers_weigh_alike_at_first():
    x = random(2, 5, 3, 4)
    torch.testing.assert_close(LayerMix(3)(x), x.mean(dim=2))


@pytest.mark.parametrize("hidden", [None, 8])
def test_padding_takes_no_part(hidden):
    torch.manual_seed(0)
    probe, x = Probe(3, 4, 5, hidden).eval(), random(2, 9, 3, 4)
    scores = probe(x, torch.tensor([9, 6]))
    alone = probe(x[1:, :6], torch.tensor([6]))
    torch.testing.assert_close(scores[1:, :6], alone)
    names = probing.named(scores, torch.tensor([9, 6]))
    torch.testing.assert_close(names[1:], alone.mean(dim=1))


def test_a_probe_finds_the_layer_that_knows():
    """Two of three layers are noise; the classes lie in the other one."""
    made = torch.Generator().manual_seed(1)

    def examples(count):
        targets = torch.randint(4, (count,), generator=made)
        features = []
        for target in targets.tolist():
            layers = torch.randn(20, 3, 4, generator=made)
            layers[:, 1] += 0.5 * torch.eye(4)[target]
            features.append(layers)
        return Examples(features, list(targets))

    torch.manual_seed(0)
    probe = Probe(3, 4, 4, hidden=None)
    losses = probing.fit(probe, examples(100), examples(40), epochs=8, rate=2e-2, layer_rate=5e-2)
    assert probe.mix.weights.argmax() == 1
    assert min(losses) < 0.7 * losses[0]
    assert probing.accuracy(probe, examples(60)) > 0.7


def test_a_probe_reads_transcripts():
    characters = Characters("abc")
    made = torch.Generator().manual_seed(2)
    codes = torch.randn(4, 6, generator=made)

    def examples(count):
        features, targets = [], []
        for _ in range(count):
            said = torch.randint(1, 4, (3,), generator=made)
            frames = torch.stack([said, torch.zeros_like(said)], dim=1).flatten()
            features.append(codes[frames.repeat_interleave(2)].unsqueeze(1))
            targets.append(said)
        return Examples(features, targets)

    torch.manual_seed(0)
    probe, heard = Probe(1, 6, len(characters), hidden=16), examples(30)
    probing.fit(probe, examples(80), examples(20), epochs=6, rate=1e-2)
    said = [characters.decode(target.tolist()) for target in heard.targets]
    right = sum(
        a == b for a, b in zip(probing.transcripts(probe, heard, characters), said, strict=True)
    )
    assert right > 24


def test_rates_fall_and_the_best_epoch_is_kept(monkeypatch):
    """Validation losses as told: rates fall after the third and fourth, the third is kept."""
    told = iter([3.0, 2.0, 1.999, 2.5])
    rates, weights = [], []
    probe = Probe(1, 2, 2, hidden=None)
    data = Examples([random(3, 1, 2)], [torch.tensor(1)])

    def validated(probe, examples):
        weights.append(probe.head.weight.detach().clone())
        return next(told)

    class Adam(torch.optim.Adam):
        def step(self, *given):
            rates.append(self.param_groups[0]["lr"])
            return super().step(*given)

    monkeypatch.setattr(probing, "_validated", validated)
    monkeypatch.setattr(torch.optim, "Adam", Adam)
    assert probing.fit(probe, data, data, epochs=4, rate=1.0) == [3.0, 2.0, 1.999, 2.5]
    assert rates == [1.0, 1.0, 1.0, 0.8]
    assert torch.equal(probe.head.weight, weights[2])


def test_mel_is_one_layer():
    (found,) = probing.mel_of([noise(16_000)])
    assert found.shape == (51, 1, 80)
