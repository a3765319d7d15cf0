"""The speech world: what is said, who says it, and that it is spoken once."""

import random
import re
import shutil
import threading
from collections import Counter
from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F

from pared.errors import InputError
from pared.training.data import Order, generator_for
from pared.worlds import speech
from pared.worlds.speech import audio, grammar, voices, world
from pared.worlds.speech.characters import Characters, normalised
from pared.worlds.speech.data import TranscriptData
from pared.worlds.speech.sources import kinds_of, utterances
from pared.worlds.speech.voices import VOICES, Request, Voice

espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng isn't installed")
flite = pytest.mark.skipif(shutil.which("flite") is None, reason="flite isn't installed")


# What is said


@pytest.mark.parametrize("kind", speech.KINDS)
def test_texts_follow_from_the_seed_and_more_begin_as_fewer(kind):
    many = grammar.texts(kind, "train", 60)
    assert grammar.texts(kind, "train", 20) == many[:20]
    assert grammar.texts(kind, "train", 20, seed=1) != many[:20]
    assert len(set(many)) == 60
    assert all(re.fullmatch("[a-z]+( [a-z]+)*", text) for text in many)


@pytest.mark.parametrize("kind", speech.KINDS)
def test_splits_share_no_text_and_held_out_words_occur_in_training(kind):
    texts = {s: grammar.texts(kind, s, speech.SIZES[kind][s]) for s in speech.SPLITS}
    assert not set.intersection(*map(set, texts.values()))
    assert len(set().union(*texts.values())) == sum(speech.SIZES[kind].values())
    said = {split: set(" ".join(texts[split]).split()) for split in texts}
    assert said["train"] <= grammar.vocabulary(kind)
    assert len(said["train"]) > 0.99 * len(grammar.vocabulary(kind))
    assert said["validation"] | said["heldout"] <= said["train"]


def test_held_out_digits_have_a_pair_that_no_training_text_has():
    pairs = {
        split: [set(pairwise(text.split())) for text in grammar.texts("digits", split, 160)]
        for split in speech.SPLITS
    }
    seen = set().union(*pairs["train"])
    assert all(one - seen for split in ("validation", "heldout") for one in pairs[split])
    assert len(seen) == 100 - sum(map(grammar.held_out, product(grammar.DIGITS, repeat=2)))
    assert 85 <= len(seen) <= 95


def test_held_out_sentences_combine_what_training_never_combines():
    """An adjective and its noun, for example, which stand side by side."""
    adjectives, nouns = (set(grammar._grammar("sentences")[1][n]) for n in ("adjective", "thing"))
    pairs = {}
    for split in ("train", "heldout"):
        said = (pair for text in grammar.texts("sentences", split, 400)
                for pair in pairwise(text.split()))  # fmt: skip
        pairs[split] = {(a, b) for a, b in said if a in adjectives and b in nouns}
    assert pairs["train"] and not any(map(grammar.held_out, pairs["train"]))
    assert any(map(grammar.held_out, pairs["heldout"]))


def test_sentences_have_a_few_thousand_words():
    words = Counter(" ".join(grammar.texts("sentences", "train", 5000)).split())
    assert len(words) > 4000
    assert sum(words.values()) / 5000 == pytest.approx(7.8, abs=0.3)


@pytest.mark.parametrize(
    "entry, plural, past, participle",
    [
        ("carry", "carries", "carried", "carrying"),
        ("take/took", "takes", "took", "taking"),
        ("drop/dropped", "drops", "dropped", "dropping"),
        ("cut/cut/cutting", "cuts", "cut", "cutting"),
        ("use", "uses", "used", "using"),
        ("enjoy", "enjoys", "enjoyed", "enjoying"),
        ("flee/fled", "flees", "fled", "fleeing"),
        ("mix", "mixes", "mixed", "mixing"),
    ],
)
def test_inflection(entry, plural, past, participle):
    assert grammar._with_s(entry.split("/")[0]) == plural
    assert (grammar.past(entry), grammar.participle(entry)) == (past, participle)


def test_plurals():
    nouns = {"mouse/mice": "mice", "witness": "witnesses", "lady": "ladies", "toy": "toys"}
    assert {noun: grammar.plural(noun) for noun in nouns} == nouns


def test_articles_follow_the_sound():
    said = " ".join(grammar.texts("sentences", "train", 5000))
    found = {article: set(re.findall(rf"\b{article} (\w+)", said)) for article in ("a", "an")}
    vowels = {word for word in found["a"] if word[0] in "aeiou"}
    assert vowels and vowels <= {"uniform", "unique", "useful", "usual"}
    consonants = {word for word in found["an"] if word[0] not in "aeiou"}
    assert consonants == {"honest"} and not found["a"] & found["an"]


def test_what_isnt_there_to_be_said():
    with pytest.raises(InputError, match="no kind 'songs'; it has digits, commands, sentences"):
        grammar.texts("songs", "train", 1)
    with pytest.raises(InputError, match="no split 'test'; it has train, validation, heldout"):
        speech.load("digits", "test")
    with pytest.raises(
        InputError, match=r"no 10000000 different commands .* ask for [0-9]+ at most"
    ):
        grammar.texts("commands", "heldout", 10_000_000)
    with pytest.raises(InputError, match="0 utterances can't be loaded"):
        speech.load("digits", count=0)
    with pytest.raises(InputError, match="no synthesizer 'festival'; known are espeak-ng, flite"):
        speech.load("digits", synthesizers=("festival",))


# What is wanted


def test_every_command_follows_one_template():
    """Whatever fills its slots; so the intent is known of what was spoken long ago, too."""
    slots, rng = grammar._grammar("commands")[1], random.Random(0)
    for template in grammar.COMMANDS:
        for _ in range(200):
            filling = [rng.choice(slots[name]) for name in re.findall(r"{(\w+)}", template)]
            text = re.sub(r"{\w+}", "{}", template).format(*filling)
            follows = [t for t, said in grammar._said().items() if said.fullmatch(text)]
            assert follows == [template] == [grammar.intent_of(text)]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_all_intents_occur(split):
    intents = map(grammar.intent_of, grammar.texts("commands", split, 160))
    assert set(intents) == set(grammar.COMMANDS)


@pytest.mark.parametrize("kind", ["digits", "sentences"])
def test_what_is_no_command_has_no_intent(kind):
    assert not any(map(grammar.intent_of, grammar.texts(kind, "train", 300)))


def test_utterances_carry_their_intents():
    said = ["call anna tomorrow", "one two", "make the opera softer", "call anna tomorrow now"]
    spoken = speech.Speech(torch.zeros(4, dtype=torch.int16), [1] * 4, said, ["someone"] * 4, "")
    wanted = ["call {contact} {day}", None, "make the {music} {loudness}", None]
    assert spoken.intents == wanted
    assert world.joined([spoken, spoken]).intents == wanted * 2


# As numbers


def test_characters_there_and_back():
    characters = Characters()
    numbers = characters.encode("Don\u2019t  stop \u2014 me, now!")
    assert characters.decode(numbers) == "don't stop me now"
    assert 0 not in numbers and max(numbers) < len(characters) == 29
    assert characters.decode([0, *numbers, 0]) == "don't stop me now"


@pytest.mark.parametrize(
    "text, spoken",
    [
        (
            "Well\u2026maybe not, she said: \u2018hello\u2019. Yes,sir",
            "well maybe not she said hello yes sir",
        ),
        ("Wait...what?No!", "wait what no"),
        ("\u201eSo\u201c, he said,\u201a\u2019tis (I know)his.\u2018", "so he said tis i know his"),
        (
            "rock 'n' roll, the boys' o'clock; \u2018don\u2019t\u2019",
            "rock n roll the boys o'clock don't",
        ),
        ("said''go''now", "said go now"),
        # Numbers stay as they are written, and what stands beside one is another word.
        ("1,000 at 10:30, or 3.5? In 1999,he", "1000 at 1030 or 35 in 1999 he"),
        ("1...2 and the '90s", "1 2 and the 90s"),
        ("a-b_c/d", "a b c d"),
    ],
)
def test_marks_part_words_and_quotation_marks_vanish(text, spoken):
    assert normalised(text) == spoken and normalised(spoken) == spoken


@pytest.mark.parametrize("kind", speech.KINDS)
def test_texts_of_the_world_are_written_as_they_are_spoken(kind):
    assert all(normalised(text) == text for text in grammar.texts(kind, "train", 60))


def test_other_alphabets_come_from_the_corpus():
    characters = Characters.of(["Größe.", "Straße!"])
    assert characters.letters == "aegrstßö"
    assert characters.decode(characters.encode("STRASSE")) == "strasse"
    assert characters.decode(characters.encode("Größe")) == "größe"


def test_what_isnt_in_the_alphabet_is_refused():
    with pytest.raises(InputError, match=r"'in 1999' has the character '1', .* as it is spoken"):
        Characters().encode("In 1999.")
    with pytest.raises(InputError, match="a transcript is empty"):
        Characters().encode(" ... ")


# Who says it


def test_held_out_voices_share_no_variant_with_training():
    for synthesizer in voices.SYNTHESIZERS:
        train, heldout = (VOICES[synthesizer][group] for group in ("train", "heldout"))
        variants = [{voice.name.split("+")[-1] for voice in group} for group in (train, heldout)]
        assert not set.intersection(*variants)
        assert len({voice.label for voice in train + heldout}) == len(train + heldout)
    assert len(VOICES["espeak-ng"]["train"]) == 56 and len(VOICES["espeak-ng"]["heldout"]) == 8


def test_every_voice_says_equally_much():
    spoken = world.requests("digits", "train", 112)
    assert set(Counter(one.voice for one in spoken).values()) == {2}
    assert all(voices.SLOWEST <= one.rate <= voices.FASTEST for one in spoken)
    assert len({one.rate for one in spoken}) > 20
    heldout = world.requests("digits", "heldout", 16)
    assert {one.voice for one in heldout} == {*VOICES["espeak-ng"]["heldout"]}


def test_names_of_files_tell_all_that_decides_the_sound(monkeypatch):
    versions = {"espeak-ng": "1.51", "flite": "2.2"}
    monkeypatch.setattr(voices, "version_of", lambda synthesizer: versions[synthesizer])
    voice = Voice("espeak-ng", "en-us+f3", 50)
    names = [
        Request("one two", voice, 160).file,
        Request("one two", voice, 161).file,
        Request("one to", voice, 160).file,
        Request("one two", Voice("espeak-ng", "en-us+f3", 51), 160).file,
        Request("one two", Voice("flite", "slt"), 160).file,
    ]
    versions["espeak-ng"] = "1.52"
    names.append(Request("one two", voice, 160).file)
    assert len(set(names)) == len({name.name for name in names}) == 6
    assert names[0].parent.as_posix() == "espeak-ng-1.51/en-us+f3-p50"


def test_a_missing_synthesizer_is_told_with_how_to_install_it(monkeypatch, tmp_path):
    voices.version_of.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"espeak-ng, which isn't installed; .*apt install espeak"):
        speech.load("digits", count=2, folder=tmp_path)
    with pytest.raises(InputError, match=r"flite, which isn't installed; .*apt install flite"):
        speech.load("digits", count=2, folder=tmp_path, synthesizers=("flite",))
    assert not list(tmp_path.iterdir())


# Spoken


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("spoken")


@pytest.fixture(scope="session")
def digits(folder):
    return speech.load("digits", count=8, folder=folder)


@espeak
def test_utterances_are_whole_and_can_be_heard(digits):
    assert len(digits) == 8 and len(set(digits.speakers)) == 8
    assert digits.transcripts == grammar.texts("digits", "train", 8)
    for index in range(len(digits)):
        waveform = digits.waveform(index)
        words = len(digits.transcripts[index].split())
        assert waveform.dtype == torch.float32 and waveform.shape == (digits.lengths[index],)
        assert 0.15 * words < len(waveform) / audio.RATE < 0.9 * words
        assert 0.1 < waveform.abs().amax() <= 1
        # Silence before and after is cut off.
        edges = torch.cat([waveform[:800], waveform[-800:]])
        assert edges.abs().amax() > 10 ** (-50 / 20) * waveform.abs().amax() / 4


@espeak
def test_what_is_spoken_is_not_spoken_again(digits, folder, monkeypatch):
    def refuse(request):
        raise AssertionError("spoken again")

    monkeypatch.setattr(voices, "speak", refuse)
    again = speech.load("digits", count=8, folder=folder)
    assert torch.equal(again.samples, digits.samples) and again.identity() == digits.identity()
    fewer = speech.load("digits", count=3, folder=folder)
    assert torch.equal(fewer.waveform(2), digits.waveform(2))
    assert fewer.identity() != digits.identity()


@espeak
def test_the_same_is_spoken_on_any_day(digits, tmp_path):
    again = speech.load("digits", count=8, folder=tmp_path)
    assert torch.equal(again.samples, digits.samples)


@espeak
def test_voices_and_rates_can_be_heard():
    def said(voice, rate):
        return audio.trimmed(voices.speak(Request("three seven one", voice, rate)))

    low, high = (Voice("espeak-ng", "en-us+m3", pitch) for pitch in (10, 90))
    assert len(said(low, 140)) > 1.2 * len(said(low, 200))
    assert _pitch(said(high, 160)) > 1.3 * _pitch(said(low, 160))


def _pitch(waveform):
    """The median over loud frames of the strongest period, in Hz."""
    frames = waveform.unfold(0, 640, 320)
    frames = frames[frames.square().mean(dim=1) > waveform.square().mean()]
    power = torch.fft.rfft(frames * torch.hann_window(640), 1280).abs().square()
    shortest, longest = audio.RATE // 300, audio.RATE // 60
    period = shortest + torch.fft.irfft(power)[:, shortest:longest].argmax(dim=1)
    return audio.RATE / period.float().median().item()


@espeak
def test_ctrl_c_keeps_what_has_been_spoken(tmp_path, monkeypatch):
    said = []
    speak = voices.speak

    def interrupted(request):
        if len(said) == 3:
            raise KeyboardInterrupt
        said.append(request)
        return speak(request)

    monkeypatch.setattr(voices, "_cores", lambda: 1)
    monkeypatch.setattr(voices, "speak", interrupted)
    with pytest.raises(KeyboardInterrupt):
        speech.load("digits", count=6, folder=tmp_path)
    assert len(list(tmp_path.rglob("*.wav"))) == 3
    monkeypatch.setattr(voices, "speak", lambda request: said.append(request) or speak(request))
    assert len(speech.load("digits", count=6, folder=tmp_path)) == 6
    assert len(said) == 6


@espeak
def test_two_may_speak_into_one_folder(tmp_path, digits):
    loaded = []
    threads = [
        threading.Thread(
            target=lambda: loaded.append(speech.load("digits", count=8, folder=tmp_path))
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one.samples, digits.samples) for one in loaded) and len(loaded) == 3
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 8 and {path.suffix for path in files} == {".wav"}


@espeak
def test_all_voices_are_there_and_others_are_refused():
    for group in VOICES["espeak-ng"].values():
        for voice in group:
            voices.check_voice(voice)
    with pytest.raises(InputError, match=r"espeak-ng .* has no voice 'f99'; install a newer"):
        voices.check_voice(Voice("espeak-ng", "en-us+f99", 50))
    with pytest.raises(InputError, match="has no voice 'en-mars'"):
        voices.check_voice(Voice("espeak-ng", "en-mars+f3", 50))
    # espeak-ng speaks like that, without the variant.
    with pytest.raises(InputError, match="has no voice 'en-gb'"):
        voices.check_voice(Voice("espeak-ng", "en-gb+f3", 50))


@espeak
def test_no_two_voices_are_one():
    everyone = [voice for group in VOICES["espeak-ng"].values() for voice in group]
    heard = {voices.speak(Request("one", voice, 160)).numpy().tobytes() for voice in everyone}
    assert len(heard) == len(everyone)


@espeak
def test_a_folder_that_cant_be_written(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InputError, match=r"utterances can't be kept in .* set HF_HOME"):
        speech.load("digits", count=2, folder=blocked)


@espeak
def test_words_of_sentences_sound_different():
    """Otherwise no recogniser could be right about them."""
    known = sorted(grammar.vocabulary("sentences"))
    printed = voices.run("espeak-ng", "-q", "-x", "-v", "en-us", "\n\n".join(known))
    sounds = [line.strip() for line in printed.splitlines() if line.strip()]
    assert len(sounds) == len(known)
    by_sound = {}
    for word, sound in zip(known, sounds, strict=True):
        by_sound.setdefault(sound, []).append(word)
    assert [words for words in by_sound.values() if len(words) > 1] == []


@flite
def test_flite_speaks_on_demand(tmp_path):
    spoken = speech.load("digits", count=4, folder=tmp_path, synthesizers=("flite",))
    assert set(spoken.speakers) == {"awb", "kal16"}
    heldout = speech.load("digits", "heldout", count=2, folder=tmp_path, synthesizers=("flite",))
    assert set(heldout.speakers) == {"slt", "rms"}
    assert all(length > 0.3 * audio.RATE for length in spoken.lengths + heldout.lengths)
    slow, fast = (voices.speak(Request("one two", Voice("flite", "slt"), r)) for r in (140, 200))
    assert len(slow) > 1.2 * len(fast)


@flite
def test_a_source_names_its_synthesizers(tmp_path, monkeypatch):
    """As recipes and benches name it; the voices of both take turns, and espeak-ng's stay alone."""
    monkeypatch.setattr(world, "_cache", lambda: tmp_path)
    by_one = utterances("speech:digits:flite", "train", {"digits": 4})
    assert set(by_one.speakers) == {"awb", "kal16"}
    assert by_one.transcripts == grammar.texts("digits", "train", 4)
    both = world.requests("digits", "train", 34, synthesizers=("espeak-ng", "flite"))
    assert len({one.voice for one in both}) == 34
    heldout = utterances("speech:digits+commands:flite", "heldout", {"digits": 2, "commands": 2})
    assert len(heldout) == 4 and set(heldout.speakers) == {"slt", "rms"}


def test_without_a_suffix_espeak_speaks(monkeypatch):
    asked = []

    def load(*given, **named):
        asked.append((given, named["synthesizers"]))
        return speech.Speech(torch.zeros(1, dtype=torch.int16), [1], ["one"], ["someone"], "")

    monkeypatch.setattr(speech, "load", load)
    utterances("speech:digits", None, {})
    utterances("speech:digits+commands:espeak-ng+flite", "heldout", {"commands": 3})
    assert asked == [
        (("digits", "train", None), ("espeak-ng",)),
        (("digits", "heldout", None), ("espeak-ng", "flite")),
        (("commands", "heldout", 3), ("espeak-ng", "flite")),
    ]


BAD = [
    ("speech:digits:festival", "no synthesizer 'festival'; known are espeak-ng, flite"),
    ("speech:digits:", "no synthesizer ''; known are"),
    ("speech:digits:flite+flite", "the synthesizer 'flite' is given twice"),
    ("speech:songs:flite", "'speech:songs:flite' names no kind of the speech world"),
]


@pytest.mark.parametrize(("source", "told"), BAD)
def test_sources_that_name_what_is_not_there(source, told):
    with pytest.raises(InputError, match=told):
        kinds_of(source)


@espeak
def test_a_source_whose_second_synthesizer_is_not_installed(monkeypatch, tmp_path):
    """The first one speaks nothing then."""
    (tmp_path / "espeak-ng").symlink_to(shutil.which("espeak-ng"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(world, "_cache", lambda: tmp_path / "spoken")
    voices.version_of.cache_clear()
    with pytest.raises(InputError, match=r"flite, which isn't installed; .*apt install flite"):
        utterances("speech:digits:espeak-ng+flite", "train", {"digits": 40})
    assert not (tmp_path / "spoken").exists()


# Learnt


@espeak
@pytest.mark.slow  # half a minute on one core
def test_a_small_recogniser_learns_digits_of_voices_it_has_never_heard(folder):
    """What is heard, said and counted belong together, and the held-out split can be done."""
    jiwer = pytest.importorskip("jiwer")
    torch.manual_seed(0)
    training = TranscriptData(speech.load("digits", folder=folder))
    heldout = TranscriptData(speech.load("digits", "heldout", folder=folder))
    model = Recogniser(len(training.characters))
    order, steps = Order(len(training), 24, seed=0), 180
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        batch = training.batch(order.indices(step), generator_for(0, step))
        scores = model(batch["waveform"]).transpose(0, 1)
        frames = batch["lengths"] // Recogniser.HOP
        loss = F.ctc_loss(scores, batch["labels"], frames, batch["label_lengths"])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5)
        optimizer.step()
        schedule.step()
    batch = heldout.batch(torch.arange(len(heldout)), generator_for(1))
    with torch.no_grad():
        best = model(batch["waveform"]).argmax(dim=-1)
    frames = (batch["lengths"] // Recogniser.HOP).tolist()
    found = [
        heldout.characters.decode(row[:length].unique_consecutive().tolist())
        for row, length in zip(best, frames, strict=True)
    ]
    assert jiwer.wer(heldout.speech.transcripts, found) < 0.25  # below 0.1 after twice as long


class Recogniser(torch.nn.Module):
    """Bands of the spectrum, convolutions over time, scores of characters for each 20 ms."""

    HOP = 320

    def __init__(self, classes, width=96):
        super().__init__()
        self.first = torch.nn.Linear(64, width)
        self.mixing = torch.nn.ModuleList(
            torch.nn.Conv1d(width, width, 9, padding=4, groups=width) for _ in range(5)
        )
        self.blocks = torch.nn.ModuleList(
            torch.nn.Sequential(
                torch.nn.LayerNorm(width),
                torch.nn.Linear(width, 2 * width),
                torch.nn.GELU(),
                torch.nn.Linear(2 * width, width),
            )
            for _ in range(5)
        )
        self.last = torch.nn.Linear(width, classes)

    def forward(self, waveform):
        window = torch.hann_window(512)
        spectrum = torch.stft(waveform, 512, self.HOP, window=window, return_complex=True).abs()
        bands = F.adaptive_avg_pool1d(spectrum.square().transpose(1, 2), 64)
        x = self.first(F.layer_norm((bands + 1e-6).log(), (64,)))
        for convolution, block in zip(self.mixing, self.blocks, strict=True):
            x = x + block(convolution(x.transpose(1, 2)).transpose(1, 2))
        return self.last(x).log_softmax(dim=-1)
