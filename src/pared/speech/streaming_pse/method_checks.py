"""What must hold of streaming PSE without trained weights.

Run by `pared check streaming-pse`.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pared.nn.rotary import rotate
from pared.speech.streaming_pse import enrolment
from pared.speech.streaming_pse.layers import angles
from pared.speech.streaming_pse.method import SAMPLE_RATE, StreamingPSE
from pared.speech.streaming_pse.model import State, StreamingPSEModel
from pared.speech.streaming_pse.signal import COMPLEX_BOUND
from pared.speech.streaming_pse.stream import Stream

# So few frames are heard that a short recording goes round the rings several times.
TOY: dict[str, Any] = {"width": 16, "heads": 2, "layers": 2, "left_context": 5, "window": 64}


def toy(**settings: Any) -> StreamingPSEModel:
    """A small enhancer; its weights are large, so that nothing hides in rounding."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = StreamingPSE(**TOY | settings).build()
        for weight in model.parameters():
            nn.init.normal_(weight, std=0.3)
    return model


def noise(*shape: int, seed: int = 0) -> Tensor:
    """What stands in for recordings, at -20 dB."""
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def frames_of(model: StreamingPSEModel, count: int = 7) -> Tensor:
    """E, random encoded frames of an enrolment."""
    return 10 * noise(1, count, model.settings.width, seed=1)


def check_causal() -> None:
    """What comes later than the latency changes no sample, and has no gradient."""
    for lookahead in (0, 2):
        model = toy(lookahead=lookahead)
        hop, told = model.settings.hop, model.cached(frames_of(model))
        recording = noise(1, 20 * hop).requires_grad_(True)
        wanted = model.enhance(recording, told)
        for first in (4 * hop, 9 * hop, 15 * hop):
            # The frame that ends at `first` completes the hop that began a window before.
            settled = first - (1 + lookahead) * hop
            changed = recording.detach().clone()
            changed[:, first:] = noise(1, 20 * hop - first, seed=2)
            got = model.enhance(changed, told)
            assert torch.equal(got[:, :settled], wanted[:, :settled]), "a later sample was heard"
            following = slice(settled, settled + hop)
            assert not torch.equal(got[:, following], wanted[:, following]), "nothing was heard"
            (gradient,) = torch.autograd.grad(
                wanted[:, :settled].square().sum(), recording, retain_graph=True
            )
            assert not gradient[:, first:].any(), "a gradient leads to a later sample"


def check_streaming() -> None:
    """Random pieces through a stream come to what the whole comes to; the state never grows."""
    generator = torch.Generator().manual_seed(0)
    for settings in ({}, {"lookahead": 3}, {"mask": "complex", "conditioning": "static_mean"}):
        model = toy(**settings)
        told = model.cached(frames_of(model))
        recording = noise(1, 1509)
        wanted = model.enhance(recording, told)[0]
        stream = Stream(model, told)
        size = elements(stream.state)
        for longest in (1, 40, 700):
            got, rest = [], recording[0]
            while len(rest):
                length = int(torch.randint(1, longest + 1, (), generator=generator))
                got.append(stream(rest[:length]))
                rest = rest[length:]
            assert elements(stream.state) == size, "the state has grown"
            got.append(stream.flush())
            torch.testing.assert_close(torch.cat(got), wanted, rtol=0, atol=1e-5)


def elements(state: State) -> int:
    """Numbers that a state holds, with all that its tensors keep in memory."""
    return sum(t.untyped_storage().nbytes() // t.element_size() for t in state)


def check_pure() -> None:
    """A step changes nothing that it was given, and gives the same again."""
    model = toy()
    told, state = model.cached(frames_of(model)), model.state()
    chunk = noise(1, model.settings.hop)
    _, state = model.step(chunk, state, told)
    before = state.copy()
    first, second = model.step(chunk, state, told), model.step(chunk, state, told)
    for got, wanted in ((state, before), (first[1], second[1])):
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), "a state changed"
    assert torch.equal(first[0], second[0]), "the same step gave something else"


def check_one_frame() -> None:
    """With one frame of enrolment S_t = W_o W_v E_1 for every frame; repeated frames count once."""
    model = toy()
    recording = noise(1, 640)
    single = frames_of(model, 1)
    wanted = model.enhance(recording, model.cached(single))
    several = frames_of(model)
    torch.testing.assert_close(
        model.enhance(recording, model.cached(several.repeat(1, 3, 1))),
        model.enhance(recording, model.cached(several)),
        rtol=0,
        atol=1e-6,
    )
    for layer in model.layers:
        cross = layer.cross
        value = cross.to_kv(single)[..., model.settings.width :]
        layer.speaker = _always(cross.to_out(value))
    got = model.enhance(recording, {})
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


def _always(s: Tensor) -> Any:
    return lambda h, layer, told: s.expand_as(h)


def check_order_and_padding() -> None:
    """Frames encoded one by one may come in any order; padding isn't heard at all."""
    recording = noise(1, 640)
    for encoder in ("frames", "transformer"):
        model = toy(enrolment_encoder=encoder)
        features, valid = noise(1, 9, model.settings.bins, seed=3), torch.ones(1, 9).bool()

        def heard(features: Tensor, valid: Tensor, model: StreamingPSEModel = model) -> Tensor:
            told = model.cached(model.encoder(features, valid), valid)
            return model.enhance(recording, told)

        wanted = heard(features, valid)
        if encoder == "frames":
            order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
            torch.testing.assert_close(heard(features[:, order], valid), wanted, rtol=0, atol=1e-6)
        mask = nn.functional.pad(valid, (0, 4))
        padded = [nn.functional.pad(features, (0, 0, 0, 4), value=v) for v in (0.0, 100.0)]
        with_zeros, with_garbage = (heard(each, mask) for each in padded)
        assert torch.equal(with_zeros, with_garbage), "padding is heard"
        torch.testing.assert_close(with_zeros, wanted, rtol=0, atol=1e-6)


def check_reconstruction() -> None:
    """A mask of 1 gives the recording back, from the first sample to the last."""
    one = {"magnitude": 100.0, "complex": math.atanh(1 / COMPLEX_BOUND)}
    for mask, logit in one.items():
        model = toy(mask=mask, window=512)
        with torch.no_grad():
            model.head.weight.zero_()
            model.head.bias.zero_()
            model.head.bias[: model.settings.bins] = logit
        recording = noise(2, 5000)
        got = model.enhance(recording, model.cached(frames_of(model)))
        torch.testing.assert_close(got, recording, rtol=0, atol=1e-5)


def check_cached_enrolment() -> None:
    """Kept keys and values give what the recording gives; enrolling runs no noisy-side layer."""
    model = toy()
    recording, voice = noise(1, 640), noise(SAMPLE_RATE, seed=4)
    noisy_side: list[Any] = [model.embed, model.norm, model.head]
    for layer in model.layers:
        noisy_side += [layer.attention, layer.fusion, layer.feed_forward, layer.cross.to_q]
    hooks = [module.register_forward_hook(_never) for module in noisy_side]
    told = enrolment.enrol(model, voice)
    for hook in hooks:
        hook.remove()
    wanted = model(recording, voice[None])
    torch.testing.assert_close(model.enhance(recording, told), wanted, rtol=0, atol=1e-6)


def _never(module: nn.Module, *_: Any) -> None:
    raise AssertionError(f"enrolling runs a {type(module).__name__} of the noisy side")


def check_parameters() -> None:
    """Parameters as the formula has them; the static baseline lacks the cross-attention alone."""
    d, f, n = 256, 257, 4
    embed = f * d + d + 2 * d
    layer = 12 * d**2 + 9 * d + 4 * d  # attention 4 d^2, feed-forward 8 d^2, biases, two norms
    cross = 4 * d**2 + 4 * d + 2 * d
    fuse = 2 * d**2 + d
    noisy = embed + n * (layer + fuse) + 2 * d + d * f + f
    encoder = embed + 2 * layer + 2 * d
    wanted = {
        "cross": noisy + encoder + n * cross,
        "static_mean": noisy + encoder,
        "static_vector": noisy + 512 * d + d,
        "none": noisy,
    }
    for kind, count in wanted.items():
        found = StreamingPSE(conditioning=kind).build().num_parameters()
        assert found == count, f"{kind}: {found} parameters, the formula gives {count}"


def check_cost() -> None:
    """A hop costs the same whenever it comes, and more with the enrolment, in proportion."""
    model = toy(conditioned="first")
    model.set_attn_implementation("eager")  # whose products are counted
    short, middle, long = (_cost(model, frames, 0) for frames in (10, 20, 30))
    assert short == _cost(model, 10, 40), "a later hop costs more"
    # Scores and weighted values: 2 products of width x T_e, each a multiplication and an addition.
    step = 2 * 2 * 10 * model.settings.width
    assert middle - short == long - middle == step, "the enrolment doesn't cost in proportion"


def _cost(model: StreamingPSEModel, frames: int, hops: int) -> int:
    """Floating-point operations of the hop after so many."""
    told, state = model.cached(frames_of(model, frames)), model.state()
    chunk = noise(1, model.settings.hop)
    for _ in range(hops):
        _, state = model.step(chunk, state, told)
    with FlopCounterMode(display=False) as counter:
        model.step(chunk, state, told)
    return counter.get_total_flops()


def check_long_streams() -> None:
    """Rotary positions tell the same distance apart after a week as at the start."""
    q, k = noise(2, 1, 1, 1, 64, seed=5)
    week = 7 * 24 * 3600 * SAMPLE_RATE // 256
    products = []
    for frame in (9, week):
        turned = [rotate(x, angles(torch.tensor([t]), 64)) for x, t in ((q, frame), (k, frame - 7))]
        products.append((turned[0] * turned[1]).sum())
    torch.testing.assert_close(products[1], products[0], rtol=0, atol=1e-6)
