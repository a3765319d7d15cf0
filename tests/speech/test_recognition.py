"""Recognisers: their tokenizer, their first filters, and folders that any tool opens."""

import json
import shutil
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from pared.errors import InputError
from pared.objectives.ctc import frame_lengths
from pared.speech.recognition import load, transcribe
from pared.speech.recognition.data import RecognitionData
from pared.speech.recognition.filterbank import (
    PHASES,
    filters,
    frequencies,
    start_as_filterbank,
)
from pared.speech.recognition.transcription import windowed
from pared.speech.recognition.vocabulary import characters_in, tokenizer_of
from pared.worlds.speech.characters import Characters
from pared.worlds.speech.data import TranscriptData
from pared.worlds.speech.world import Speech
from tests.speech import recognisers
from tests.speech.recognisers import CHARACTERS, conformer, noise

# The vocabulary -----------------------------------------------------------------------------------


@pytest.mark.parametrize("characters", [Characters(), Characters(" äöüßabc'")])
def test_letters_keep_their_numbers(characters, tmp_path):
    from transformers import AutoTokenizer

    tokenizer_of(characters).save_pretrained(tmp_path)
    told = json.loads((tmp_path / "vocab.json").read_text())
    assert told["<pad>"] == 0 and told["|"] == 1 + characters.letters.index(" ")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "wav2vec2-conformer"}))
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "ab ba" if "b" in characters.letters else "a"
    assert again(text).input_ids == characters.encode(text)
    # Doubled letters need the blank between them.
    ids = [n for number in characters.encode("abba") for n in (number, number, 0)]
    assert again.decode(ids) == "abba"
    assert characters_in(again, len(characters)) == characters


def test_alphabets_and_tokenizers_that_do_not_fit(tmp_path):
    with pytest.raises(InputError, match=r"has '\|', which stands for the space"):
        tokenizer_of(Characters("a|"))
    with pytest.raises(InputError, match="whose first class is the blank"):
        tokenizer = tokenizer_of(Characters("ab"))
        tokenizer.pad_token = "b"
        characters_in(tokenizer, 3)


# The first filters --------------------------------------------------------------------------------


def test_bands_are_where_they_should_be():
    rate, bands = 16000, 20
    found = filters(PHASES * bands, 400, rate).view(bands, PHASES, 400)
    response = torch.fft.rfft(found, 16000).abs()  # 1 Hz apart
    peak = response.argmax(dim=-1)
    centre = frequencies(bands, rate)
    assert centre[0] == pytest.approx(60, abs=1) and centre[-1] == pytest.approx(7600, abs=1)
    # The lowest band is as wide as its frequency, and its own mirror leans on it.
    off = (peak - centre[:, None].round()).abs() / (centre[:, None] + 100)
    assert off[1:].amax() < 0.1
    mel = 2595 * torch.log10(1 + centre / 700)
    torch.testing.assert_close(mel.diff(), mel.diff().mean().expand(bands - 1))


@pytest.mark.parametrize("moment", [0, 3, 11, 40])
def test_rectified_phases_sum_up_to_the_amplitude(moment):
    found = filters(160, 256, 16000).view(40, PHASES, 256)
    band = 12
    time = (torch.arange(256) + moment) / 16000
    sine = torch.sin(2 * torch.pi * frequencies(40, 16000)[band].float() * time)
    heard = torch.relu(found @ sine).sum(dim=1)
    loudest = (found[band] @ sine).norm() / 2**0.5
    # |cos| + |sin| is between 1 and the square root of 2.
    assert 0.99 * loudest < heard[band] < 1.43 * loudest
    assert heard.argmax() in (band, band + 1)  # higher bands are amplified


def test_only_a_first_convolution_that_filters_is_set():
    model = conformer().model
    assert start_as_filterbank(model, 16000)
    first = model.wav2vec2_conformer.feature_extractor.conv_layers[0].conv.weight
    assert torch.equal(first[:, 0], filters(16, 256, 16000))
    usual = conformer(conv_kernel=[10, 80], conv_stride=[5, 64]).model
    before = {name: weight.clone() for name, weight in usual.state_dict().items()}
    assert not start_as_filterbank(usual, 16000)
    assert not start_as_filterbank(torch.nn.Linear(2, 2), 16000)
    assert all(torch.equal(weight, before[name]) for name, weight in usual.state_dict().items())


# What it learns from ------------------------------------------------------------------------------


def said(*utterances):
    """Data of texts said in noise of so many frames of 20 ms each, without silence around them."""
    texts, frames = zip(*utterances, strict=True)
    lengths = [320 * count for count in frames]
    sounds = torch.randint(-9000, 9000, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    speech = Speech(sounds.to(torch.int16), lengths, list(texts), ["one"] * len(texts), "said")
    heard = TranscriptData(speech, CHARACTERS, silence=0.0)
    return RecognitionData(heard, conformer(), lengths)


def test_only_what_can_be_said_in_its_time_is_learnt_from():
    """A doubled letter needs a frame more, for the blank in between."""
    data = said(("told not to", 9), ("alto", 4), ("allto", 5), ("talk", 30), ("took", 5), ("a", 0))
    whole = data.identity()
    told = r"3 of 6 items in 'here' can't be used: 'told not to' \(needs 11 frames and has 9\), 'al"
    with pytest.raises(InputError, match=told):
        data.leave_out_unsayable("here", "refuse")
    assert len(data) == 6 and data.identity() == whole
    with pytest.warns(UserWarning, match=told):
        data.leave_out_unsayable("here", "skip")
    assert len(data) == 3 and data.identity() != whole
    assert data.lengths == [4 * 320, 30 * 320, 5 * 320]
    batch = data.batch(torch.tensor([1, 0, 2, 1]), torch.Generator())
    texts = [
        "".join(CHARACTERS.letters[n - 1] for n in numbers[:count])
        for numbers, count in zip(batch["labels"], batch["label_lengths"], strict=True)
    ]
    assert texts == ["talk", "alto", "took", "talk"]
    # And each with its own sound.
    assert batch["input_lengths"].tolist() == [9600, 1280, 1600, 9600]


def test_nothing_that_can_be_said_is_refused_however_it_is_read():
    for on_bad in ("refuse", "skip"):
        with pytest.raises(InputError, match=r"1 of 1 items in 'here' can't be used: 'll' "):
            said(("ll", 2)).leave_out_unsayable("here", on_bad)


# Folders ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("recogniser") / "model"
    conformer().save(place)
    return place


@pytest.mark.parametrize("kind", recognisers.ALL)
def test_saved_and_loaded_it_hears_the_same(kind, tmp_path):
    recogniser, sound = recognisers.ALL[kind](), noise(20000)
    recogniser.save(tmp_path)
    again = load(tmp_path)
    assert torch.equal(again.scores(sound), recogniser.scores(sound))
    assert (again.rate, again.blank, again.hop) == (16000, 0, recogniser.hop)


def test_the_pipeline_of_transformers_opens_it_and_writes_the_same(folder):
    from transformers import pipeline

    plain = pipeline("automatic-speech-recognition", model=str(folder))
    sound = noise(48000)
    told = plain(sound.numpy(), return_timestamps="word")
    words = list(transcribe(load(folder), [sound]))
    assert words and " ".join(told["text"].split()) == " ".join(word.text for word in words)
    assert [chunk["timestamp"] for chunk in told["chunks"]] == [
        (pytest.approx(word.start), pytest.approx(word.end)) for word in words
    ]


def test_shorter_than_any_frame(folder):
    assert load(folder).scores(noise(10)).shape == (9, len(CHARACTERS))


@pytest.mark.parametrize("samples", [16160, 32000])
@pytest.mark.parametrize("kind", recognisers.ALL)
def test_no_frame_of_padding_alone_is_scored(kind, samples):
    """Features may be one more than are real; the frame that it makes is nobody's to decode."""
    recogniser, sound = recognisers.ALL[kind](), noise(samples)
    lengths = recogniser.inputs([sound])["input_lengths"]
    scores = recogniser.scores(sound)
    assert len(scores) == frame_lengths(recogniser.model, lengths)
    if (kind, samples) == ("parakeet", 32000):
        assert len(scores) == 25
        assert sum(map(len, windowed(recogniser, [noise(128_000)], 1.2, 0.4))) == 100


@pytest.mark.parametrize("positions", ["relative", "rotary"])
def test_scoring_amid_a_training_leaves_no_trace(positions):
    """Neither in what trains and what doesn't, nor in the tables that a model keeps."""
    recogniser, sound = conformer(position_embeddings_type=positions), noise(16000)
    wanted = recogniser.scores(sound)
    model = recogniser.model.train()
    model.wav2vec2_conformer.feature_extractor.eval()  # as where it's frozen
    before = {name: module.training for name, module in model.named_modules()}
    assert torch.equal(recogniser.scores(sound), wanted)
    assert {name: module.training for name, module in model.named_modules()} == before
    batch = recogniser.inputs([sound])
    logits = model(batch["input_values"], attention_mask=batch["attention_mask"]).logits
    logits.square().mean().backward()
    assert model.lm_head.weight.grad.any()


def changed(folder, tmp_path, name, change):
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / name
    change(path)
    return tmp_path / "model"


def without(ending):
    def change(path):
        tensors = load_file(path)
        kept = {name: x for name, x in tensors.items() if not name.endswith(ending)}
        assert len(kept) < len(tensors)
        save_file(kept, path, {"format": "pt"})

    return change


def other_kind(path):
    path.write_text(json.dumps({"model_type": "whisper"}))


def without_words(path):
    """A vocabulary of letters, none of which ends or begins a word."""
    path.unlink()
    letters = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1, "b": 2}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(path.parent)


@pytest.mark.parametrize(
    "name, change, told",
    [
        ("config.json", other_kind, "holds a whisper, which is no CTC model; there are"),
        ("config.json", lambda path: path.unlink(), "is no model"),
        ("model.safetensors", lambda path: path.unlink(), "can't be opened as a CTC model"),
        ("model.safetensors", lambda p: p.write_bytes(p.read_bytes()[:5000]), "can't be opened"),
        ("model.safetensors", without("lm_head.bias"), "lacks the weight 'lm_head.bias'"),
        ("vocab.json", lambda path: path.unlink(), "lacks the feature extractor or the tokenizer"),
        ("vocab.json", without_words, "tells words apart neither by"),
    ],
)
def test_folders_that_are_refused(folder, tmp_path, name, change, told):
    with pytest.raises(InputError, match=told):
        load(changed(folder, tmp_path, name, change))


def test_a_weight_that_only_training_uses_may_be_missing(folder, tmp_path):
    place = changed(folder, tmp_path, "model.safetensors", without("masked_spec_embed"))
    sound = noise(16000)
    assert torch.equal(load(place).scores(sound), load(folder).scores(sound))


@pytest.mark.skipif(find_spec("torchaudio") is not None, reason="the package is here")
def test_an_extractor_that_needs_another_package(folder, tmp_path):
    """It's told before the weights are opened, which aren't there."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "granite_speech5_ctc"}))
    kind = {"feature_extractor_type": "GraniteSpeech5FeatureExtractor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(kind))
    with pytest.raises(InputError, match=r"needs a package that isn't here \(.*torchaudio") as told:
        load(tmp_path)
    assert "\n" not in str(told.value) and ". " not in str(told.value)


def test_no_folder_at_all(tmp_path):
    with pytest.raises(InputError, match="there is no folder"):
        load(tmp_path / "nowhere")
