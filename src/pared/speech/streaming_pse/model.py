"""The enhancer as a transformers model.

A `PreTrainedModel`, for what speech people know: `save_pretrained` and `from_pretrained` with
safetensors and a flat config.json, and attention by name (`attn_implementation="eager"` shows which
frames of the enrolment are listened to).
"""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from pared.errors import InputError
from pared.speech.streaming_pse import signal
from pared.speech.streaming_pse.layers import (
    Embedding,
    Enrolment,
    EnrolmentEncoder,
    Hearing,
    Layer,
    angles,
)
from pared.speech.streaming_pse.method import SAMPLE_RATE, StreamingPSE

# Frames of an enrolment further below its loudest one are pauses (-40 dB, as a ratio of powers).
PAUSE = 1e-4
# What an enrolment's frames are scaled to: the mean power of a sample, -26 dB below full scale.
LEVEL = 2.5e-3


class StreamingPSEConfig(PreTrainedConfig):
    """The settings of `StreamingPSE`, one by one, as transformers saves them."""

    model_type = "streaming-pse"

    @property
    def settings(self) -> StreamingPSE:
        """The settings, validated; the defaults where config.json says nothing."""
        known = [name for name in StreamingPSE.model_fields if hasattr(self, name)]
        return StreamingPSE(**{name: getattr(self, name) for name in known})


class State(NamedTuple):
    """All that a stream carries from one hop to the next; its size never changes.

    Attributes:
        tail: the last hop of input, (batch, hop).
        overlap: what the last frame adds to the next hop of output, (batch, hop).
        keys: rotated keys of the last L_c frames, (layers, batch, heads, L_c, channels). Frame t
            is in slot t mod L_c.
        values: their values.
        waiting: spectra whose masks are still to come, (batch, A, F, 2).
        frame: number of the next frame, () int64.
    """

    tail: Tensor
    overlap: Tensor
    keys: Tensor
    values: Tensor
    waiting: Tensor
    frame: Tensor

    def copy(self) -> "State":
        """The same in memory of its own."""
        return State(*(tensor.clone() for tensor in self))


class StreamingPSEModel(PreTrainedModel):
    """Keeps the enrolled voice of a recording at 16 kHz: a whole one, or hop by hop."""

    config_class = StreamingPSEConfig
    base_model_prefix = "model"
    main_input_name = "noisy"
    _supports_sdpa = True

    def __init__(self, config: StreamingPSEConfig) -> None:
        super().__init__(config)
        settings = self.settings = config.settings
        # No buffer: it must stay float32 where the weights don't.
        self.window = signal.root_hann(settings.window)
        self.embed = Embedding(settings)
        told = [number < settings.conditioned_layers for number in range(settings.layers)]
        self.layers = nn.ModuleList(Layer(settings, config, each) for each in told)
        self.norm = nn.LayerNorm(settings.width)
        outputs = settings.bins * (2 if settings.mask == "complex" else 1)
        self.head = nn.Linear(settings.width, outputs)
        if settings.conditioning in ("cross", "static_mean"):
            self.encoder = EnrolmentEncoder(settings, config)
        if settings.conditioning == "static_vector":
            self.vector = nn.Linear(settings.vector_width, settings.width)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # Each module's own, which suits its width, in the place of transformers' fixed 0.02.
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()

    # The enrolment, once per user ---------------------------------------------------------------

    def encode(self, enrolment: Tensor | None, samples: Tensor | None = None) -> Enrolment:
        """What the noisy side needs of enrolments.

        Args:
            enrolment: recordings, (batch, samples), at least one frame long; for `static_vector`
                embeddings from elsewhere, (batch, vector_width); for `none` nothing.
            samples: how many samples of each are no padding, (batch,); by default all.

        Returns:
            For `cross` the `key` and `value` of every layer, (layers, batch, heads, T_e, channels),
            and `valid`, (batch, T_e): False for padding and pauses. For the static kinds `vector`,
            (batch, width).
        """
        if enrolment is None or self.settings.conditioning == "none":
            return {}
        if self.settings.conditioning == "static_vector":
            return {"vector": self.vector(enrolment.to(self.vector.weight.dtype))}
        return self.cached(*self.encoded(enrolment, samples))

    def encoded(self, waves: Tensor, samples: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """E (batch, T_e, width) of recordings (batch, samples), and which frames count.

        T_e goes no further than the last frame that counts in any of them, so that a long recording
        costs as much as the seconds of it that count.
        """
        hop = self.settings.hop
        hops = waves.float()[:, : waves.shape[1] // hop * hop].unflatten(1, (-1, hop))
        powers = signal.power(signal.analysis(hops, self.window))
        valid = self._speech(powers, samples)
        last = int(valid.any(dim=0).nonzero().amax()) if valid.any() else 0
        powers, valid = powers[:, : last + 1], valid[:, : last + 1]
        # By Parseval's theorem: the mean power of a windowed sample, for half of the spectrum.
        mean = (powers.mean(dim=-1) * valid).sum(dim=1) / valid.sum(dim=1).clamp(min=1) / hop
        gain = LEVEL / (mean + signal.FLOOR)
        features = signal.compressed(powers * gain[:, None, None], self.settings.compression)
        return self.encoder(features.to(self.dtype), valid), valid

    def _speech(self, powers: Tensor, samples: Tensor | None) -> Tensor:
        """Frames that are speech and within the seconds that count, (batch, frames)."""
        hop, loudness = self.settings.hop, powers.sum(dim=-1)
        if samples is not None:
            ends = hop * (torch.arange(powers.shape[1], device=powers.device) + 2)
            loudness = loudness * (ends <= samples.to(powers.device)[:, None])
        valid = loudness > PAUSE * loudness.amax(dim=1, keepdim=True)
        return valid & (valid.cumsum(dim=1) * hop <= self.settings.enrolment_seconds * SAMPLE_RATE)

    def cached(self, encoded: Tensor, valid: Tensor | None = None) -> Enrolment:
        """Keys and values of E (batch, T_e, width) for every layer; or its mean."""
        if self.settings.conditioning == "static_mean":
            return {"vector": mean_of(encoded, valid)}
        pairs = [layer.cross.cached(encoded) for layer in self.layers if layer.cross is not None]
        key, value = torch.stack(pairs, dim=1)
        return {"key": key, "value": value} | ({} if valid is None else {"valid": valid})

    # A whole recording --------------------------------------------------------------------------

    def forward(
        self,
        noisy: Tensor,
        enrolment: Tensor | None = None,
        enrolment_samples: Tensor | None = None,
        clean: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """Enhance whole recordings, (batch, samples), given enrolments as `encode` takes them.

        In training the targets may be given as well, `clean` (batch, samples): then the voices in
        enrolments and targets come back, too, (2, batch, width), each the mean of E; None where
        nothing is encoded.
        """
        if clean is None:
            return self.enhance(noisy, self.encode(enrolment, enrolment_samples))
        if enrolment is None or self.settings.conditioning not in ("cross", "static_mean"):
            return self.enhance(noisy, self.encode(enrolment, enrolment_samples)), None
        encoded = self.encoded(enrolment, enrolment_samples)
        voices = torch.stack([mean_of(*encoded), mean_of(*self.encoded(clean))])
        return self.enhance(noisy, self.cached(*encoded)), voices

    def enhance(self, noisy: Tensor, enrolment: Enrolment) -> Tensor:
        """Enhance whole recordings with encoded enrolments.

        Costs frames x frames of memory: longer ones than a minute are better streamed.

        Args:
            noisy: (batch, samples).
            enrolment: of as many users, or of one for all.

        Returns:
            (batch, samples).
        """
        hop, ahead = self.settings.hop, self.settings.lookahead
        batch, samples = noisy.shape
        padded = nn.functional.pad(noisy.float(), (hop, -samples % hop + (1 + ahead) * hop))
        spectra = signal.analysis(padded.unflatten(1, (-1, hop)), self.window)
        frames = torch.arange(spectra.shape[1], device=noisy.device)
        age = frames[:, None] - frames
        visible = (age >= 0) & (age < self.settings.left_context)
        hearing = Hearing(angles(frames, self.settings.width // self.settings.heads), visible)
        logits = self._logits(spectra, hearing, _for_batch(enrolment, batch))
        # Frame t + A tells the mask of frame t.
        masked = self._masked(logits[:, ahead:], spectra[:, : len(frames) - ahead])
        hops, _ = signal.synthesis(masked, self.window, noisy.new_zeros(batch, hop).float())
        return hops[:, 1:].flatten(1)[:, :samples].to(noisy.dtype)

    def enhance_batch(self, noisy: Tensor, lengths: Tensor, enrolment: Enrolment) -> Tensor:
        """`enhance` as SpeechBrain's enhancers are called; silence beyond the lengths.

        Args:
            noisy: (batch, samples), padded at the end.
            lengths: of each recording over that of the batch, (batch,), at most 1.
            enrolment: as in `enhance`.
        """
        ends = (lengths * noisy.shape[1]).round()
        inside = torch.arange(noisy.shape[1], device=noisy.device) < ends.to(noisy.device)[:, None]
        return self.enhance(noisy * inside, enrolment) * inside

    # Hop by hop ---------------------------------------------------------------------------------

    def state(self, batch: int = 1) -> State:
        """The state before the first hop."""
        s, device = self.settings, self.device
        ring = (s.layers, batch, s.heads, s.left_context, s.width // s.heads)
        return State(
            tail=torch.zeros(batch, s.hop, device=device),
            overlap=torch.zeros(batch, s.hop, device=device),
            keys=torch.zeros(ring, device=device, dtype=self.dtype),
            values=torch.zeros(ring, device=device, dtype=self.dtype),
            waiting=torch.zeros(batch, s.lookahead, s.bins, 2, device=device),
            frame=torch.zeros((), device=device, dtype=torch.int64),
        )

    def step(self, chunk: Tensor, state: State, enrolment: Enrolment) -> tuple[Tensor, State]:
        """Enhance one hop: a pure function.

        Args:
            chunk: (batch, hop).
            state: before it.
            enrolment: of as many users.

        Returns:
            The hop of output that is complete now, (batch, hop), 1 + A hops behind the input; and
            the state after it.
        """
        return self.step_(chunk, state.copy(), enrolment)

    def step_(self, chunk: Tensor, state: State, enrolment: Enrolment) -> tuple[Tensor, State]:
        """`step` that writes into the rings of `state`, which is spent afterwards."""
        s = self.settings
        spectra = signal.analysis(torch.stack([state.tail, chunk], dim=1), self.window)
        slots = torch.arange(s.left_context, device=chunk.device)
        frame = state.frame[None]
        hearing = Hearing(
            angles(frame, s.width // s.heads),
            # Before the first round some slots are empty; afterwards all hold the last L_c frames.
            slots[None] <= frame,
            state.keys,
            state.values,
            frame % s.left_context,
        )
        logits = self._logits(spectra, hearing, enrolment)
        if s.lookahead:
            spectra = torch.cat([state.waiting, spectra], dim=1)
        masked = self._masked(logits, spectra[:, :1])
        hops, overlap = signal.synthesis(masked, self.window, state.overlap)
        # Copies, or views would hold on to more than the state.
        after = state._replace(
            tail=chunk.clone(),
            overlap=overlap.clone(),
            waiting=spectra[:, 1:].clone(),
            frame=state.frame + 1,
        )
        return hops[:, 0], after

    # What both share ----------------------------------------------------------------------------

    def _logits(self, spectra: Tensor, hearing: Hearing, enrolment: Enrolment) -> Tensor:
        """What the masks are made of, (batch, frames, F) or (batch, frames, 2 F), float32."""
        features = signal.compressed(signal.power(spectra), self.settings.compression)
        h = self.embed(features.to(self.dtype))
        for number, layer in enumerate(self.layers):
            h = layer(h, hearing, number, enrolment)
        return self.head(self.norm(h)).float()

    def _masked(self, logits: Tensor, spectra: Tensor) -> Tensor:
        if self.settings.mask == "complex":
            return signal.complex_masked(logits, spectra)
        return signal.magnitude_masked(logits, spectra)

    def digest(self) -> str:
        """SHA-256 over settings and weights: tells what an enrolment was made with."""
        found = hashlib.sha256(self.settings.model_dump_json().encode())
        for name, weight in sorted(self.state_dict().items()):
            found.update(name.encode())
            found.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
        return found.hexdigest()


def mean_of(encoded: Tensor, valid: Tensor | None) -> Tensor:
    """The mean of E (batch, T_e, width) over the frames that count, (batch, width)."""
    weights = torch.ones_like(encoded[..., 0]) if valid is None else valid.to(encoded)
    total = (encoded * weights[..., None]).sum(dim=1)
    return total / weights.sum(dim=1, keepdim=True).clamp(min=1)


def _for_batch(enrolment: Enrolment, batch: int) -> Enrolment:
    """One user's enrolment for all recordings of a batch."""
    return {
        name: tensor.expand(*tensor.shape[:1], batch, *tensor.shape[2:])
        if name in ("key", "value")
        else tensor.expand(batch, *tensor.shape[1:])
        for name, tensor in enrolment.items()
    }


def load(folder: str | Path) -> StreamingPSEModel:
    """A saved enhancer, in eval mode.

    Not by `from_pretrained`, which fills missing weights with random ones.

    Raises:
        InputError: there is none, or it's damaged or of another kind.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise InputError(f"{folder} can't be opened as an enhancer: {reason}.") from None
    kind = config.get("model_type") or config.get("_class_name")
    if kind != StreamingPSEConfig.model_type:
        raise InputError(
            f"{folder} holds a {kind}; the enhancer is a {StreamingPSEConfig.model_type}."
        )
    model = StreamingPSEModel(StreamingPSEConfig(**config))
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name in sorted(wanted.keys() | weights.keys()):
        if name not in weights:
            raise InputError(f"{folder} lacks the weight {name!r}; copy it again.")
        if wanted.get(name) != weights[name].shape:
            raise InputError(
                f"{folder} has a weight {name!r} of shape {tuple(weights[name].shape)}, which its "
                "config.json doesn't; copy it again."
            )
    model.load_state_dict(weights)
    return model.eval()
