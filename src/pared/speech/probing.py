"""What the layers of a frozen speech encoder know: small probes on a weighted sum of them.

As MP3S does it (Zaiem et al. 2023, arXiv 2306.00452), the benchmark on which SummaryMixing wav2vec
2.0 was judged: the encoder stays as it is, a softmax over one number per layer weighs what goes
into its first block and what comes out of each, and a small network on the sum learns a task.
Probes here read transcripts letter by letter, by CTC, or name a class of every utterance (who
speaks, what is meant).

Chosen here: the LSTM hears both directions; a class is decided by the mean over frames; rates fall
by a fifth (New-Bob) after an epoch that improves the validation loss by less than 0.25 %, and the
weights of the best epoch are kept.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from pared import anatomy
from pared.anatomy.speech import AudioEncoder
from pared.objectives.ctc import ctc_loss
from pared.speech.encoders import inputs_of
from pared.speech.mel_front import LogMel
from pared.training import generator_for
from pared.worlds.speech.characters import BLANK, Characters

# New-Bob: what an epoch must gain, relative to the one before, and what rates fall by otherwise.
GAIN, FALL = 0.0025, 0.8


@dataclass(frozen=True)
class Examples:
    """Utterances as a frozen encoder hears them; entry i of both lists belongs together.

    Attributes:
        features: (frames, layers, width) each.
        targets: numbers of a transcript's characters, (letters,) each; or a class, () each.
    """

    features: Sequence[Tensor]
    targets: Sequence[Tensor]

    def __len__(self) -> int:
        return len(self.features)


@torch.no_grad()
def layers_of(model: nn.Module, extractor: Any, sounds: Sequence[Tensor]) -> list[Tensor]:
    """What goes into the first block of an encoder and comes out of each, for every sound.

    Args:
        model: a transformers model that reads samples; it's put in eval mode.
        extractor: what makes its inputs.
        sounds: float (samples,) each, at the extractor's rate.

    Returns:
        (frames, 1 + blocks, width) each, float32 on the CPU.

    Raises:
        InputError: the model reads no samples.
    """
    family = anatomy.of(model)
    if not isinstance(family, AudioEncoder):
        raise family.refuse("a probe", "it reads no samples.")
    reader = model.eval().get_submodule(family.reader)
    weights = next(reader.parameters())
    found = []
    with _Layers(family) as layers:
        for sound in sounds:
            heard = inputs_of(extractor, [sound], "input_values")["input_values"]
            reader(heard.to(weights.device, weights.dtype))
            found.append(torch.stack(layers.take(), dim=2)[0].float().cpu())
    return found


class _Layers(ExitStack):
    """Within the context, collects what the blocks of an encoder get and give."""

    def __init__(self, family: AudioEncoder) -> None:
        super().__init__()
        self.heard: list[Tensor] = []
        first, *_ = self.blocks = family.blocks
        hooks = [first.module.register_forward_pre_hook(self._enter, with_kwargs=True)]
        hooks += [block.module.register_forward_hook(self._leave) for block in self.blocks]
        for hook in hooks:
            self.callback(hook.remove)

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.heard.append(self.blocks[0].tokens(args, kwargs)[0])

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        (frames,) = self.blocks[0].outputs(output)
        assert frames is not None
        self.heard.append(frames)

    def take(self) -> list[Tensor]:
        """What was collected since it was last taken."""
        heard, self.heard = self.heard, []
        return heard


@torch.no_grad()
def mel_of(sounds: Sequence[Tensor], bands: int = 80, hop: int = 320) -> list[Tensor]:
    """Log-mel frames in the place of an encoder's layers: what can be read without learning.

    Args:
        sounds: float (samples,) each, at 16 kHz.
        bands: of a frame.
        hop: samples from one frame to the next, each heard through a window of 25 ms.

    Returns:
        (frames, 1, bands) each.
    """
    mel = LogMel(bands, 400, hop)
    return [mel(sound[None, None])[0].T.unsqueeze(1) for sound in sounds]


# Probes -------------------------------------------------------------------------------------------


class LayerMix(nn.Module):
    """sum_l softmax(w)_l h_l, all layers alike at first."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(layers))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, frames, layers, width) to (batch, frames, width)."""
        return torch.einsum("l,btlc->btc", self.weights.softmax(dim=0), x)


class Probe(nn.Module):
    """Weighted layers, two layers of a bidirectional LSTM or none, and a linear map.

    Args:
        layers: of the features.
        width: of the features.
        classes: that every frame is scored for.
        hidden: units of the LSTM in each direction; None: no LSTM.
    """

    def __init__(self, layers: int, width: int, classes: int, hidden: int | None = 256) -> None:
        super().__init__()
        self.mix = LayerMix(layers)
        self.lstm = (
            None
            if hidden is None
            else nn.LSTM(width, hidden, num_layers=2, batch_first=True, bidirectional=True)
        )
        self.head = nn.Linear(width if hidden is None else 2 * hidden, classes)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Scores of all frames.

        Args:
            x: (batch, frames, layers, width), padded at the end.
            lengths: frames without the padding, (batch,), on the CPU.

        Returns:
            (batch, frames, classes).
        """
        x = self.mix(x)
        if self.lstm is not None:
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            x, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.head(x)


def named(scores: Tensor, lengths: Tensor) -> Tensor:
    """Scores of whole utterances: the mean over frames, (batch, classes)."""
    real = torch.arange(scores.shape[1]) < lengths[:, None]
    return (scores * real.unsqueeze(-1)).sum(dim=1) / lengths.unsqueeze(-1)


# Learning and reading -----------------------------------------------------------------------------


def fit(
    probe: Probe,
    train: Examples,
    validation: Examples,
    epochs: int = 20,
    batch_size: int = 4,
    rate: float = 2e-4,
    layer_rate: float = 1e-2,
    seed: int = 0,
) -> list[float]:
    """Train a probe by Adam, in place; its loss is CTC or cross-entropy, as the targets are.

    Args:
        probe: with its starting weights.
        train: what it learns from.
        validation: what tells when rates fall, and which epoch was best.
        epochs: over `train`.
        batch_size: utterances of a step.
        rate: of the network.
        layer_rate: of the layers' weights.
        seed: of the order.

    Returns:
        The validation loss after every epoch.
    """
    mix = list(probe.mix.parameters())
    rest = [p for name, p in probe.named_parameters() if not name.startswith("mix.")]
    optimizer = torch.optim.Adam(
        [{"params": rest, "lr": rate}, {"params": mix, "lr": layer_rate}], lr=rate
    )
    losses: list[float] = []
    best = copy.deepcopy(probe.state_dict())
    for epoch in range(epochs):
        order = torch.randperm(len(train), generator=generator_for(seed, epoch))
        probe.train()
        for indices in order.split(batch_size):
            optimizer.zero_grad(set_to_none=True)
            _loss(probe, train, indices.tolist()).backward()
            nn.utils.clip_grad_norm_(probe.parameters(), 5.0)
            optimizer.step()
        losses.append(_validated(probe, validation))
        if losses[-1] <= min(losses):
            best = copy.deepcopy(probe.state_dict())
        if epoch and losses[-2] - losses[-1] < GAIN * abs(losses[-2]):
            for group in optimizer.param_groups:
                group["lr"] *= FALL
    probe.load_state_dict(best)
    return losses


@torch.no_grad()
def transcripts(probe: Probe, examples: Examples, characters: Characters) -> list[str]:
    """What a probe reads, the best label of each frame, in the alphabet it was taught."""
    texts = []
    for scores, _ in _scored(probe.eval(), examples):
        labels = scores.argmax(dim=-1).unique_consecutive()
        texts.append(characters.decode(labels[labels != BLANK].tolist()))
    return texts


@torch.no_grad()
def accuracy(probe: Probe, examples: Examples) -> float:
    """Share of utterances whose class is named rightly."""
    right = [
        named(scores[None], torch.tensor([len(scores)])).argmax() == target
        for scores, target in _scored(probe.eval(), examples)
    ]
    return float(torch.stack(right).float().mean())


def _scored(probe: Probe, examples: Examples) -> Iterator[tuple[Tensor, Tensor]]:
    for features, target in zip(examples.features, examples.targets, strict=True):
        yield probe(features[None], torch.tensor([len(features)]))[0], target


@torch.no_grad()
def _validated(probe: Probe, examples: Examples) -> float:
    probe.eval()
    parts = torch.arange(len(examples)).split(16)
    losses = [float(_loss(probe, examples, part.tolist())) * len(part) for part in parts]
    return sum(losses) / len(examples)


def _loss(probe: Probe, examples: Examples, indices: list[int]) -> Tensor:
    features = [examples.features[index] for index in indices]
    targets = [examples.targets[index] for index in indices]
    lengths = torch.tensor([len(one) for one in features])
    scores = probe(pad_sequence(features, batch_first=True), lengths)
    if targets[0].ndim:
        letters = torch.tensor([len(one) for one in targets])
        return ctc_loss(scores, lengths, pad_sequence(targets, batch_first=True), letters, BLANK)
    return F.cross_entropy(named(scores, lengths), torch.stack(targets))
