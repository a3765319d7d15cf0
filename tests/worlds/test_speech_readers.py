"""Users' own recordings, in the layouts of known corpora, and what is wrong with them by name."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from pared.errors import InputError
from pared.training.data import generator_for
from pared.worlds.readers.speech import read_noise_corpus, read_noises, read_speech
from pared.worlds.speech.characters import Characters
from pared.worlds.speech.data import EnhancementData, TranscriptData
from pared.worlds.speech.mixtures import Mixing

soundfile = pytest.importorskip("soundfile")


def tone(frequency=440.0, rate=16000, seconds=0.3):
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(rate * seconds)) / rate)


def put(path: Path, samples=None, rate=16000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone() if samples is None else samples, rate)
    return path


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


# LibriSpeech


@pytest.fixture
def librispeech(tmp_path):
    root = tmp_path / "LibriSpeech"
    for part, speaker, chapter, count in (
        ("train-clean-100", 19, 198, 2),
        ("train-clean-100", 26, 495, 2),
        ("test-clean", 61, 70968, 1),
    ):
        folder = root / part / str(speaker) / str(chapter)
        names = [f"{speaker}-{chapter}-{number:04}" for number in range(count)]
        for number, name in enumerate(names):
            put(folder / f"{name}.flac", tone(200 + 10 * number))
        words = [f"{name} DON'T SAY {'AB'[number]}" for number, name in enumerate(names)]
        write(folder / f"{speaker}-{chapter}.trans.txt", *words)
    write(root / "SPEAKERS.TXT", "; read by no one")
    return root


def test_librispeech(librispeech):
    corpus = read_speech(librispeech)
    assert len(corpus) == 5
    assert corpus.keys[0] == "test-clean/61/70968/61-70968-0000.flac"
    assert corpus.speakers == ["61", "19", "19", "26", "26"]
    assert corpus.transcripts[:3] == ["DON'T SAY A", "DON'T SAY A", "DON'T SAY B"]
    found = corpus.waveform(2)
    assert found.dtype == torch.float32 and found.shape == (4800,)
    assert (found - torch.from_numpy(tone(210)).float()).abs().max() < 1e-4
    train = read_speech(librispeech, split="train-clean-100")
    assert train.speakers == ["19", "19", "26", "26"]
    assert train.keys[0].startswith("train-clean-100/")
    # A part given by itself is the same.
    assert read_speech(librispeech / "train-clean-100").transcripts == train.transcripts
    with pytest.raises(
        InputError, match=r"no transcripts in a part 'dev'.*test-clean, train-clean"
    ):
        read_speech(librispeech, split="dev")


def test_librispeech_with_faults(librispeech):
    folder = librispeech / "train-clean-100" / "19" / "198"
    listing = folder / "19-198.trans.txt"
    listing.write_text(listing.read_text() + "19-198-0002 GONE\n19-198-0003\n")
    put(folder / "19-198-0003.flac")
    put(folder / "19-198-0004.flac")
    put(folder / "19-198-0001.flac", 0 * tone())
    with pytest.raises(InputError) as told:
        read_speech(librispeech)
    for expected in (
        "4 of 8 items",
        "19-198-0001.flac (is silent from beginning to end)",
        "19-198-0002.flac (doesn't exist or is no file)",
        "19-198-0003.flac (has no words in line 4 of 19-198.trans.txt)",
        "19-198-0004.flac (isn't listed in 19-198.trans.txt)",
        "mend or remove them",
    ):
        assert expected in str(told.value)
    with pytest.warns(UserWarning, match=r"4 of 8 items .*; they are skipped"):
        corpus = read_speech(librispeech, on_bad="skip")
    assert len(corpus) == 4 and len(corpus.waveform(1)) == 4800


def test_headers_alone_leave_silence_to_the_drawing(librispeech):
    silent = librispeech / "test-clean" / "61" / "70968" / "61-70968-0000.flac"
    put(silent, 0 * tone())
    corpus = read_speech(librispeech, split="test-clean", thorough=False)
    with pytest.raises(InputError, match=r"61-70968-0000\.flac in '.*' is silent.*thorough=True"):
        corpus.waveform(0)
    silent.write_bytes(b"")
    with pytest.raises(InputError, match=r"1 of 1 items .* \(is empty\)"):
        read_speech(librispeech, split="test-clean", thorough=False)


@pytest.mark.parametrize("thorough", [True, False])
def test_a_flac_from_a_pipe_is_measured(librispeech, thorough):
    """Its header doesn't tell how many samples there are."""
    before = read_speech(librispeech, split="test-clean", thorough=thorough).lengths
    path = librispeech / "test-clean" / "61" / "70968" / "61-70968-0000.flac"
    stored = bytearray(path.read_bytes())
    stored[21] &= 0xF0
    stored[22:26] = bytes(4)
    path.write_bytes(stored)
    corpus = read_speech(librispeech, split="test-clean", thorough=thorough)
    assert corpus.lengths == before == [len(corpus.waveform(0))]


# Common Voice


@pytest.fixture
def common_voice(tmp_path):
    root = tmp_path / "cv-corpus" / "en"
    for number in range(3):
        put(root / "clips" / f"clip_{number}.mp3", tone(rate=32000, seconds=0.5), rate=32000)
    columns = "client_id\tpath\tsentence_id\tsentence\tup_votes"
    rows = [
        'ab12\tclip_0.mp3\t1\tShe said "no".\t2',
        "ab12\tclip_1\t2\tHe didn\u2019t \u2014 really.\t3",
        "cd34\tclip_2.mp3\t3\tYes!\t2",
    ]
    write(root / "train.tsv", columns, *rows[:2])
    write(root / "validated.tsv", columns, *rows)
    return root


def test_common_voice(common_voice):
    corpus = read_speech(common_voice)
    assert corpus.keys == ["clips/clip_0.mp3", "clips/clip_1.mp3"]
    assert corpus.transcripts == ['She said "no".', "He didn\u2019t \u2014 really."]
    assert corpus.speakers == ["ab12", "ab12"]
    assert len(corpus.waveform(0)) == pytest.approx(8000, abs=1200)
    assert len(read_speech(common_voice, split="validated")) == 3
    data = TranscriptData(corpus)
    batch = data.batch(torch.tensor([1]), generator_for(0))
    assert Characters().decode(batch["labels"][0].tolist()) == "he didn't really"


def test_common_voice_with_faults(common_voice):
    with pytest.raises(InputError, match=r"no table 'dev\.tsv'; the splits are train, validated"):
        read_speech(common_voice, split="dev")
    write(common_voice / "dev.tsv", "client_id\tsentence", "ab12\tYes")
    with pytest.raises(InputError, match="has the columns client_id, sentence; it needs path and"):
        read_speech(common_voice, split="dev")
    write(common_voice / "dev.tsv", "path\tsentence")
    with pytest.raises(InputError, match="lists no recordings; give a corpus that holds some"):
        read_speech(common_voice, split="dev")
    write(common_voice / "dev.tsv", "path\tsentence", "clip_0.mp3\t ", "gone.mp3\tYes")
    with pytest.raises(InputError, match=r"no sentence in dev\.tsv.*gone\.mp3 \(doesn't exist"):
        read_speech(common_voice, split="dev")


# DNS challenge


def test_challenge_training_set(tmp_path):
    clean = tmp_path / "datasets_fullband" / "clean_fullband"
    for name in ("book_1_reader_06709_0_seg_1", "book_1_reader_06709_0_seg_2"):
        put(clean / "read_speech" / f"{name}.wav", tone(rate=48000), 48000)
    put(clean / "vctk_wav48_silence_trimmed" / "p225" / "p225_001.wav", tone(rate=48000), 48000)
    put(clean / "emotional" / "anna" / "happy.wav", tone(rate=48000), 48000)
    put(tmp_path / "datasets_fullband" / "noise_fullband" / "fan.wav", tone(50, 48000), 48000)
    put(tmp_path / "datasets_fullband" / "impulse_responses" / "SLR26" / "room.wav")
    corpus = read_noise_corpus(tmp_path)
    assert corpus.clean.speakers == ["anna", "reader_06709", "reader_06709", "p225"]
    assert corpus.noise.keys == ["datasets_fullband/noise_fullband/fan.wav"]
    assert corpus.noisy is None and corpus.clean.transcripts == [None] * 4
    assert len(corpus.clean.waveform(0)) == 4800


def test_challenge_pairs(tmp_path):
    """Told together by number where there is one, else by name, each within its own test set."""
    for number in (3, 12):
        put(tmp_path / "no_reverb" / "clean" / f"clean_fileid_{number}.wav", tone(100 * number))
        name = f"clnsp1_fan_1_snr5_tl-20_fileid_{number}.wav"
        put(tmp_path / "no_reverb" / "noisy" / name, tone(100 * number))
        put(tmp_path / "no_reverb" / "noise" / f"noise_fileid_{number}.wav", tone(50))
    put(tmp_path / "with_reverb" / "clean" / "anna" / "one.wav", tone(700))
    put(tmp_path / "with_reverb" / "noisy" / "anna" / "one.wav", tone(700))
    corpus = read_noise_corpus(tmp_path)
    assert len(corpus.clean) == len(corpus.noisy) == 3 and len(corpus.noise) == 2
    for index in range(3):
        torch.testing.assert_close(corpus.clean.waveform(index), corpus.noisy.waveform(index))
    assert len({corpus.clean.waveform(index)[1].item() for index in range(3)}) == 3


def test_challenge_pairs_are_left_out_together(tmp_path):
    for number in (1, 2):
        put(tmp_path / "clean" / f"clean_fileid_{number}.wav", tone(100 * number))
        put(tmp_path / "noisy" / f"mix_fileid_{number}.wav", tone(100 * number))
    put(tmp_path / "clean" / "clean_fileid_1.wav", 0 * tone())
    with pytest.warns(UserWarning) as told:
        corpus = read_noise_corpus(tmp_path, on_bad="skip")
    assert "clean_fileid_1.wav (is silent" in str(told[0].message)
    assert "mix_fileid_1.wav (its clean side is silent" in str(told[1].message)
    assert corpus.clean.keys == ["clean/clean_fileid_2.wav"]
    assert corpus.noisy.keys == ["noisy/mix_fileid_2.wav"]


def test_challenge_with_faults(tmp_path):
    with pytest.raises(InputError, match="there is no folder"):
        read_noise_corpus(tmp_path / "gone")
    put(tmp_path / "clean" / "clean_fileid_1.wav")
    with pytest.raises(InputError, match="has recordings in clean of the folders clean, noise and"):
        read_noise_corpus(tmp_path)
    put(tmp_path / "noisy" / "mix_fileid_2.wav")
    with pytest.raises(
        InputError, match=r"1 clean and 1 noisy .* \(noisy/mix_fileid_2\.wav has no"
    ):
        read_noise_corpus(tmp_path)
    put(tmp_path / "noisy" / "mix_fileid_1.wav")
    put(tmp_path / "clean" / "clean_fileid_2.wav")
    put(tmp_path / "clean" / "clean_fileid_3.wav")
    with pytest.raises(
        InputError, match=r"3 clean and 2 noisy .* \(clean/clean_fileid_3\.wav has no"
    ):
        read_noise_corpus(tmp_path)
    (tmp_path / "clean" / "clean_fileid_3.wav").unlink()
    put(tmp_path / "clean" / "again_fileid_2.wav")
    with pytest.raises(InputError, match=r"3 clean and 2 noisy files in '.*' don't pair up; give"):
        read_noise_corpus(tmp_path)


def test_noises_alone(tmp_path):
    with pytest.raises(InputError, match="there is no folder"):
        read_noises(tmp_path / "gone")
    with pytest.raises(InputError, match="holds no recordings; give a folder of noises, or one"):
        read_noises(tmp_path)
    put(tmp_path / "free" / "street" / "cars.wav", tone(50))
    put(tmp_path / "free" / "fan.wav", tone(60, 48000), 48000)
    corpus = read_noises(tmp_path / "free")
    assert corpus.keys == ["fan.wav", "street/cars.wav"] and len(corpus.waveform(0)) == 4800
    # Of the challenge's sides the noise alone, and no speech is opened.
    side = tmp_path / "challenge" / "datasets_fullband"
    (side / "clean_fullband").mkdir(parents=True)
    (side / "clean_fullband" / "anna.wav").write_bytes(b"damaged")
    with pytest.raises(InputError, match="holds clean speech alone; give a folder of noises"):
        read_noises(tmp_path / "challenge")
    put(side / "noise_fullband" / "fan.wav", tone(50))
    put(side / "impulse_responses" / "room.wav")
    corpus = read_noises(tmp_path / "challenge")
    assert corpus.keys == ["datasets_fullband/noise_fullband/fan.wav"]


# `datasets`


def stored(samples, rate=16000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV")
    return file.getvalue()


def table(tmp_path, **columns):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict(columns)
    for name in columns:
        if isinstance(columns[name][0], dict):
            made = made.cast_column(name, datasets.Audio(decode=False))
    made.save_to_disk(str(tmp_path / "table"))
    return tmp_path / "table"


def cells(*contents: bytes) -> list[dict]:
    return [{"bytes": content, "path": None} for content in contents]


def test_datasets(tmp_path):
    sounds = cells(stored(tone(300)), stored(tone(rate=8000), rate=8000))
    path = table(tmp_path, audio=sounds, text=["ONE", "TWO"], speaker_id=[7, 8], id=["a", "b"])
    corpus = read_speech(path)
    assert corpus.keys == ["row 0", "row 1"] and corpus.speakers == ["7", "8"]
    assert corpus.transcripts == ["ONE", "TWO"] and len(corpus.waveform(1)) == 4800


def test_datasets_with_faults(tmp_path):
    sounds = cells(stored(tone()), b"", stored(tone()))
    path = table(tmp_path, sound=sounds, words=["ONE", "TWO", " "], note=["", "", ""])
    with pytest.raises(
        InputError, match=r"which column .* is the transcript; .*\(sound, words, note"
    ):
        read_speech(path)
    with pytest.raises(InputError, match="has no column 'said'"):
        read_speech(path, transcript_column="said")
    with pytest.raises(InputError, match=r"row 1 \(doesn't exist.*\), row 2 \(has no words\)"):
        read_speech(path, transcript_column="words")
    with pytest.raises(InputError, match=r"no split 'test'; its splits are: none, it is one table"):
        read_speech(path, split="test", transcript_column="words")
    with pytest.warns(UserWarning, match="they are skipped"):
        corpus = read_speech(path, transcript_column="words", audio_column="sound", on_bad="skip")
    assert corpus.keys == ["row 0"] and corpus.speakers == [None]


def test_sources_that_are_none(tmp_path):
    with pytest.raises(InputError, match=r"there is no file or folder '/gone'"):
        read_speech("/gone")
    file = put(tmp_path / "one.wav")
    with pytest.raises(InputError, match=re.escape(f"the file {str(file)!r} is no corpus")):
        read_speech(file)


# Training


def test_corpora_train_as_the_world_does(librispeech):
    corpus = read_speech(librispeech, split="train-clean-100")
    mixing = Mixing(interferers=(0, 1), enrolment_seconds=(0.5, 0.5))
    batch = EnhancementData(corpus, mixing, seconds=0.25).batch(torch.arange(4), generator_for(0))
    assert batch["noisy"].shape == (4, 4000) and batch["speaker"].tolist() == [0, 0, 1, 1]
    labels = TranscriptData(corpus).batch(torch.tensor([1]), generator_for(0))["labels"]
    assert Characters().decode(labels[0].tolist()) == "don't say b"


def test_identity_changes_with_what_is_said(librispeech):
    before = read_speech(librispeech)
    assert before.identity() == read_speech(librispeech).identity()
    listing = librispeech / "test-clean" / "61" / "70968" / "61-70968.trans.txt"
    write(listing, "61-70968-0000 SAY C")
    assert read_speech(librispeech).identity() != before.identity()
    put(librispeech / "test-clean" / "61" / "70968" / "61-70968-0000.flac", tone(seconds=0.4))
    assert len({read_speech(librispeech).identity(), before.identity()}) == 2


def test_on_bad_is_checked_before_anything_is_read(librispeech):
    with pytest.raises(InputError, match="on_bad can't be 'ignore'; it is 'refuse' or 'skip'"):
        read_speech(librispeech, on_bad="ignore")
