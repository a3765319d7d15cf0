"""The CTC loss against all paths counted one by one, and on real models with their padding."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from pared.errors import InputError
from pared.objectives.ctc import CTC, ctc_loss, frame_lengths, frames_needed
from tests.speech import recognisers
from tests.speech.recognisers import noise


def said_by(path, blank):
    """What a path says: repetitions together, then without blanks."""
    return tuple(label for label, _ in itertools.groupby(path) if label != blank)


def by_counting(logits, labels, blank):
    """-log of the summed probability of all paths that say the labels."""
    probabilities = logits.double().softmax(dim=-1)
    frames, classes = logits.shape
    total = sum(
        torch.stack([probabilities[t, label] for t, label in enumerate(path)]).prod()
        for path in itertools.product(range(classes), repeat=frames)
        if said_by(path, blank) == tuple(labels)
    )
    return -torch.log(torch.as_tensor(total))


@pytest.mark.parametrize("blank", [0, 2])
def test_it_sums_over_all_paths(blank):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 5, 4, generator=generator)
    said, frames = [[1, 3], [3, 3], [1]], torch.tensor([5, 4, 3])
    wanted = sum(
        by_counting(one[:count], labels, blank)
        for one, labels, count in zip(logits, said, frames.tolist(), strict=True)
    )
    # What labels and frames are padded with makes no difference.
    labels = torch.tensor([[1, 3], [3, 3], [1, 2]])
    logits[2, 3:] = 100.0
    found = ctc_loss(logits, frames, labels, torch.tensor([2, 2, 1]), blank)
    torch.testing.assert_close(found, (wanted / 5).float())


def test_a_transcript_without_a_path_pulls_at_nothing():
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([[1, 1, 2], [1, 2, 3]])
    assert [frames_needed(one) for one in labels] == [4, 3]
    lengths = torch.tensor([3, 3])
    loss = ctc_loss(logits, lengths, labels, lengths)
    loss.backward()
    alone = ctc_loss(logits[1:], lengths[1:], labels[1:], lengths[1:])
    torch.testing.assert_close(loss, alone / 2)
    assert not logits.grad[0].any() and logits.grad[1].any()


@pytest.mark.parametrize("samples", [4000, 16000, 16321])
@pytest.mark.parametrize("kind", recognisers.ALL)
def test_frames_are_those_that_the_model_makes(kind, samples):
    recogniser = recognisers.ALL[kind]()
    batch = recogniser.inputs([noise(samples)])
    told = frame_lengths(recogniser.model, batch.pop("input_lengths"))
    with torch.no_grad():
        made = recogniser.model(**batch).logits.shape[1]
    # Features of an odd number are padded, and the mask says so.
    assert made - told.item() in ((0, 1) if kind in ("bert", "parakeet") else (0,))


def test_a_model_that_makes_no_frames_is_refused():
    with pytest.raises(InputError, match="Linear doesn't tell how many frames"):
        frame_lengths(nn.Linear(1, 1), torch.tensor([1]))


@pytest.mark.parametrize("kind", ["conformer", "bert"])
def test_it_is_the_loss_that_the_model_itself_would_give(kind):
    """On a batch of different lengths, over waveforms and over log-mel features."""
    recogniser = recognisers.ALL[kind]()
    batch = recogniser.inputs([noise(16000), noise(12000, seed=1), noise(20000, seed=2)])
    said = [torch.tensor(ids) for ids in ([1, 2, 3, 3], [4], [5, 6, 7])]
    batch["labels"] = pad_sequence(said, batch_first=True)
    batch["label_lengths"] = torch.tensor([len(one) for one in said])
    terms = CTC()(recogniser.model, batch, torch.Generator())
    name = recogniser.model.main_input_name
    recogniser.model.config.ctc_loss_reduction = "sum"
    own = recogniser.model(
        **{name: batch[name]},
        attention_mask=batch["attention_mask"],
        labels=pad_sequence(said, batch_first=True, padding_value=-100),
    )
    assert terms.keys() == {"ctc"}
    torch.testing.assert_close(terms["ctc"], own.loss / 8)


def test_a_model_that_takes_no_mask_gets_none():
    recogniser = recognisers.wav2vec2()
    batch = recogniser.inputs([noise(16000), noise(12000)])
    assert batch.keys() == {"input_values", "input_lengths"}
    assert batch["input_lengths"].tolist() == [16000, 12000]
    batch |= {"labels": torch.tensor([[1], [2]]), "label_lengths": torch.tensor([1, 1])}
    CTC()(recogniser.model, batch, torch.Generator())["ctc"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in recogniser.model.parameters())
