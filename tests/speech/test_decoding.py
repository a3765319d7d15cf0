"""Decoding: against transformers' own, against all paths counted, piece by piece, and words."""

import itertools
import json
import math
from collections import defaultdict

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import ParakeetTokenizer

from pared.speech.recognition.decoding import (
    SETTLES,
    UNSETTLED,
    Beam,
    Greedy,
    Said,
    Word,
    Words,
)
from tests.speech.recognisers import CHARACTERS, conformer


def scores(frames, classes, seed=0, sharpness=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(frames, classes, generator=generator)).log_softmax(dim=-1)


def decoded(decoder, given, sizes=None):
    said = []
    for piece in given.split(sizes or len(given)):
        said += decoder(piece)
    return said + decoder.flush()


def labels(said):
    return tuple(one.label for one in said)


# Greedy -----------------------------------------------------------------------------------------


def test_greedy_is_what_the_tokenizer_of_transformers_decodes():
    tokenizer = conformer().tokenizer
    given = scores(200, len(CHARACTERS), sharpness=3)
    given[:, 0] += 2  # blanks between
    said = decoded(Greedy(), given)
    told = tokenizer.decode(
        given.argmax(dim=-1), output_char_offsets=True, output_word_offsets=True
    )
    assert [(one.start, one.end) for one in said] == [
        (offset["start_offset"], offset["end_offset"]) for offset in told.char_offsets
    ]
    words = Words(tokenizer, 1e-3)  # no pause is long enough to tell words apart
    found = words(said) + words.flush()
    assert " ".join(word.text for word in found) == " ".join(told.text.split())
    assert [(w.text, round(1e3 * w.start), round(1e3 * w.end)) for w in found] == [
        (w["word"], w["start_offset"], w["end_offset"]) for w in told.word_offsets
    ]


@pytest.mark.parametrize("decoder", [Greedy, lambda: Beam(width=4)])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_pieces_give_what_the_whole_gives(decoder, size):
    given = scores(400, 6, seed=3, sharpness=2)
    assert decoded(decoder(), given, size) == decoded(decoder(), given)


def test_repetitions_and_blanks():
    path = torch.tensor([0, 1, 1, 0, 1, 2, 2, 0, 0, 2])
    given = torch.nn.functional.one_hot(path, 3).float().mul(20).log_softmax(dim=-1)
    wanted = [Said(1, 1, 3), Said(1, 4, 5), Said(2, 5, 7), Said(2, 9, 10)]
    assert decoded(Greedy(), given) == wanted
    assert decoded(Beam(), given) == wanted


# Beam -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blank", [0, 2])
@pytest.mark.parametrize("seed", range(6))
def test_a_wide_beam_finds_the_most_probable_labels(seed, blank):
    given = scores(6, 3, seed)
    total = defaultdict(float)
    for path in itertools.product(range(3), repeat=6):
        said = tuple(label for label, _ in itertools.groupby(path) if label != blank)
        total[said] += math.exp(sum(given[t, label].item() for t, label in enumerate(path)))
    beam = Beam(blank, width=300)
    assert labels(decoded(beam, given)) == max(total, key=total.get)


def test_a_beam_hears_what_no_single_path_says_best():
    # The best path is blank, blank (0.36); but "a" has three paths (0.24 + 0.24 + 0.16).
    given = torch.tensor([[0.6, 0.4], [0.6, 0.4]]).log()
    assert labels(decoded(Greedy(), given)) == ()
    assert labels(decoded(Beam(), given)) == (1,)


def test_a_beam_tells_when_labels_were_said_by_its_best_path():
    given = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.3, 0.7, 0.0], [0.1, 0.0, 0.9]])
    assert decoded(Beam(width=50), (given + 1e-9).log()) == [Said(1, 1, 3), Said(2, 3, 4)]


def test_a_beam_holds_no_more_however_long_it_hears():
    beam = Beam(width=8)
    for seed in range(20):
        beam(scores(100, 5, seed))
        assert max(map(len, beam.beam)) <= UNSETTLED + SETTLES
        assert all(labels(paths.all.said) == prefix for prefix, paths in beam.beam.items()), (
            "what is said and its prefix belong together"
        )


# Words ------------------------------------------------------------------------------------------


def test_words_come_when_they_are_complete():
    tokenizer = conformer().tokenizer
    ids = CHARACTERS.encode("a bad  cat".replace("  ", " "))
    said = [Said(label, 2 * n, 2 * n + 1) for n, label in enumerate(ids)]
    words = Words(tokenizer, 0.02)
    assert words(said[:4]) == [Word("a", 0.0, 0.02)]
    assert words(said[4:]) == [Word("bad", pytest.approx(0.08), pytest.approx(0.18))]
    assert [word.text for word in words.flush()] == ["cat"] and words.flush() == []


def test_a_pause_ends_a_word():
    """The gap between sentences, where a model of single sentences hears no space."""
    ids = CHARACTERS.encode("ab")
    for gap, wanted in ((20, ["ab"]), (21, ["a", "b"])):
        words = Words(conformer().tokenizer, 0.02)
        found = words([Said(ids[0], 0, 2), Said(ids[1], 2 + gap, 3 + gap)]) + words.flush()
        assert [word.text for word in found] == wanted


def test_pieces_that_begin_words():
    """The vocabulary of Parakeet and its like."""
    names = ["<unk>", "\u2581he", "ar", "\u2581", "it", "<pad>"]
    backend = Tokenizer(models.Unigram([(name, -1.0) for name in names], unk_id=0))
    tokenizer = ParakeetTokenizer(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")
    said = [Said(label, n, n + 1) for n, label in enumerate([1, 2, 0, 3, 4, 1])]
    words = Words(tokenizer, 1.0)
    found = words(said) + words.flush()
    assert [(w.text, w.start, w.end) for w in found] == [
        ("hear", 0, 2), ("it", 4, 5), ("he", 5, 6),
    ]  # fmt: skip


def test_capitals_of_a_tokenizer_that_writes_small(tmp_path):
    from transformers import Wav2Vec2CTCTokenizer

    path = tmp_path / "vocab.json"
    path.write_text(json.dumps({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "A": 5}))
    for small in (False, True):
        words = Words(Wav2Vec2CTCTokenizer(str(path), do_lower_case=small), 1.0)
        found = words([Said(n, n, n + 1) for n in (1, 5, 4, 5)])
        assert [word.text for word in found] == ["a" if small else "A"]
