"""Measures of edits by the house judge: their limits, signs and ways to fail."""

import pytest
import torch

from pared.bench.edits import average, caption_direction, closeness, diversity, target_direction
from pared.bench.judge import judge_of
from pared.errors import InputError
from pared.worlds import emoji
from pared.worlds.emoji.edits import edits

CAPTIONS = [("red heart", "green heart"), ("cat", "dog"), ("man", "woman")]


@pytest.fixture(scope="module")
def judge():
    return judge_of("house:judge")


@pytest.fixture(scope="module")
def pictures():
    """Three sets of three pictures (3, 3, 3, 64, 64)."""
    world = emoji.load("heldout", size=64)
    return world.images[::20][:9].unflatten(0, (3, 3)) / 255


def test_captions_direction_is_the_cosine_of_both_changes(judge, pictures):
    source, edited, _ = pictures
    score = caption_direction(judge, source, edited, CAPTIONS)
    moved = (judge.of_images(edited) - judge.of_images(source)).double()
    meant = judge.of_texts([after for _, after in CAPTIONS])
    meant = (meant - judge.of_texts([before for before, _ in CAPTIONS])).double()
    expected = torch.nn.functional.cosine_similarity(moved, meant)
    torch.testing.assert_close(score, expected, rtol=0, atol=1e-5)


def test_an_edit_undone_points_the_other_way(judge, pictures):
    source, edited, _ = pictures
    there = caption_direction(judge, source, edited, CAPTIONS)
    back = caption_direction(judge, edited, source, CAPTIONS)
    torch.testing.assert_close(there, -back)
    swapped = caption_direction(judge, edited, source, [(b, a) for a, b in CAPTIONS])
    torch.testing.assert_close(there, swapped)


def test_reaching_the_target_is_one_and_leaving_it_minus_one(judge, pictures):
    source, target, elsewhere = pictures
    one = torch.ones(3, dtype=torch.float64)
    torch.testing.assert_close(target_direction(judge, source, target, target), one)
    other = target_direction(judge, source, elsewhere, target)
    assert (other.abs() < 1).all()
    half = source.lerp(target, 0.7)
    assert (target_direction(judge, source, half, target) > other).all()


def test_the_judge_tells_the_wanted_edit_from_another(judge):
    made = edits(64, "heldout", 60)
    source, target = (made.images[ends].float() / 255 for ends in (made.before, made.after))
    wanted = caption_direction(judge, source, target, made.captions)
    other = caption_direction(judge, source, target.roll(1, 0), made.captions)
    assert average(wanted)[0] > average(other)[0] + 0.1


def test_no_edit_counts_as_failed(judge, pictures):
    source, edited, _ = pictures
    edited = torch.cat([source[:1], edited[1:]])
    score = caption_direction(judge, source, edited, CAPTIONS)
    assert score.isnan().tolist() == [True, False, False]
    assert target_direction(judge, source, edited, pictures[2]).isnan().tolist()[0]
    mean, missing = average(score)
    assert missing == pytest.approx(1 / 3)
    assert mean == pytest.approx((score[1] + score[2]).item() / 3)


def test_closeness_to_an_exact_target(pictures):
    target = pictures[0] / 2
    measured = closeness(target + 0.1, target)
    torch.testing.assert_close(measured["mse"], torch.full((3,), 0.01).double())
    torch.testing.assert_close(measured["psnr"], torch.full((3,), 20.0).double())
    assert ((measured["ssim"] > 0.5) & (measured["ssim"] < 1)).all()
    exact = closeness(target, target)
    assert (exact["mse"] == 0).all() and exact["psnr"].isinf().all()
    torch.testing.assert_close(exact["ssim"], torch.ones(3).double())


def test_diversity_of_equal_and_of_different_seeds(judge, pictures):
    same = diversity(judge, pictures[:1].repeat(3, 1, 1, 1, 1))
    assert (same["pixels"] == 0).all() and (same["features"] < 1e-6).all()
    apart = diversity(judge, pictures)
    assert (apart["pixels"] > 0.2).all() and (apart["features"] > 1e-3).all()
    closer = diversity(judge, pictures[:1].lerp(pictures, 0.1))
    assert all((closer[name] < apart[name]).all() for name in apart)


def test_diversity_is_the_mean_over_pairs(judge, pictures):
    flat = torch.stack([torch.full((1, 3, 8, 8), level) for level in (0.0, 0.3, 0.9)])
    assert diversity(judge, flat)["pixels"].item() == pytest.approx((0.3 + 0.9 + 0.6) / 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda j, p: caption_direction(j, p[0], p[1], CAPTIONS[:2]), "2 pairs of captions"),
        (lambda j, p: caption_direction(j, p[0], p[1], [("a", "a")] * 3), "picture 0 are 'a' both"),
        (lambda j, p: target_direction(j, p[0], p[1][:2], p[2]), "row i of each"),
        (lambda j, p: closeness(p[0], p[1][:2]), "same shape"),
        (lambda j, p: diversity(j, p[:1]), "two seeds at least"),
        (lambda j, p: diversity(j, p[0]), "two seeds at least"),
        (lambda j, p: diversity(j, 2 * p), r"lie in \[0, 1\]"),
    ],
)
def test_says_what_is_wrong(judge, pictures, call, message):
    with pytest.raises(InputError, match=message):
        call(judge, pictures)
