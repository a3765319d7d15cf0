"""Check 7 of the card evaluation-metrics, and retrieval with its ties."""

import pytest
import torch

from pared.bench.alignment import clip_score, directional_similarity, retrieval
from pared.errors import InputError


def random(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


# Retrieval


def test_retrieval_by_hand():
    texts = torch.eye(4)
    images = torch.tensor([[9.0, 1, 2, 3], [1, 2, 3, 4], [4, 3, 2, 1]])
    # The right texts come 1st, 3rd and 4th.
    accuracy = retrieval(images, texts, torch.tensor([0, 1, 3]), k=(1, 2, 3, 4))
    assert accuracy == pytest.approx({1: 1 / 3, 2: 1 / 3, 3: 2 / 3, 4: 1.0})


def test_several_images_may_share_a_text():
    accuracy = retrieval(torch.eye(2).repeat(3, 1), torch.eye(2), torch.tensor([0, 1] * 3), k=(1,))
    assert accuracy == {1: 1.0}


def test_a_collapsed_encoder_scores_chance():
    images, texts = random(1, 8, 0).repeat(6, 1), random(1, 8, 1).repeat(10, 1)
    accuracy = retrieval(images, texts, torch.arange(6))
    assert accuracy == pytest.approx({1: 0.1, 5: 0.5})


def test_ties_count_as_the_mean_over_random_orders():
    texts = torch.tensor([[1.0, 0], [0, 1], [0, 1], [0, 1], [-1, 0]])
    image = torch.tensor([[2.0, 1.0]])
    accuracy = retrieval(image, texts, torch.tensor([2]), k=(1, 2, 3, 4, 5))
    # One text is closer; then three tie for ranks 2, 3 and 4.
    assert accuracy == pytest.approx({1: 0, 2: 1 / 3, 3: 2 / 3, 4: 1, 5: 1})


def test_rounding_of_float32_does_not_break_a_tie():
    texts = random(1, 64, 0).repeat(2, 1)
    texts[1] *= 1 + 1e-7
    assert retrieval(random(1, 64, 1), texts, torch.tensor([0]), k=(1,)) == {1: 0.5}


def test_the_order_of_texts_does_not_matter():
    images, texts, target = random(20, 4, 0), random(10, 4, 1), torch.arange(20) % 10
    order = torch.randperm(10, generator=torch.Generator().manual_seed(2))
    shuffled = retrieval(images, texts[order], order.argsort()[target])
    assert shuffled == retrieval(images, texts, target)


# CLIPScore


def test_clip_score_is_a_percentage_of_the_cosine():
    images = torch.tensor([[1.0, 0], [1, 0], [1, 0], [1, 1]])
    texts = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [1, 0]])
    assert clip_score(images, texts).tolist() == pytest.approx([100, 0, 0, 100 / 2**0.5])


def test_clip_score_ignores_the_length_of_features():
    images, texts = random(5, 8, 0), random(5, 8, 1)
    # Scaling by powers of two is exact, so not a digit may move.
    assert torch.equal(clip_score(images, texts), clip_score(4 * images, texts / 8))


# Directional similarity


@pytest.mark.parametrize("sign", [1, -1])
def test_direction_along_and_against_the_text(sign):
    before, after = torch.eye(3)[:1], torch.eye(3)[1:2]
    shared = torch.eye(3)[2:]
    source, edited = before + shared, after + shared
    if sign < 0:
        source, edited = edited, source
    score = directional_similarity(source, edited, before, after)
    assert score.item() == pytest.approx(sign)


def test_direction_ignores_the_length_of_features():
    four = [random(5, 8, seed) for seed in range(4)]
    scaled = [scale * each for scale, each in zip((2, 4, 8, 0.5), four, strict=True)]
    torch.testing.assert_close(directional_similarity(*four), directional_similarity(*scaled))


def test_no_edit_has_no_direction():
    image, text = random(2, 8, 0), random(2, 8, 1)
    edited = image.clone()
    edited[1] = random(1, 8, 2)
    score = directional_similarity(image, edited, text, text.flip(0))
    assert score.isnan().tolist() == [True, False]
    assert directional_similarity(image, edited, text, text).isnan().all()
    # The same image a rounding error away is still no edit.
    assert directional_similarity(image, image * (1 + 1e-7), text, text.flip(0)).isnan().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: retrieval(random(2, 3, 0), random(2, 4, 0), torch.tensor([0, 1])), "3 and 4"),
        (lambda: retrieval(random(2, 3, 0), random(2, 3, 0), torch.tensor([0])), "2 images"),
        (lambda: retrieval(random(2, 3, 0), random(2, 3, 0), torch.tensor([0.0, 1.0])), "integer"),
        (lambda: retrieval(random(2, 3, 0), random(2, 3, 0), torch.tensor([0, 2])), "0 to 1"),
        (lambda: retrieval(random(2, 3, 0), random(2, 3, 0), torch.tensor([0, 1])), "k is 5"),
        (lambda: clip_score(random(2, 3, 0), random(1, 3, 0)), "row i of each"),
        (lambda: clip_score(torch.zeros(2, 3), random(2, 3, 0)), "row of zeros"),
        (lambda: clip_score(random(2, 3, 0) * torch.nan, random(2, 3, 0)), "NaN"),
    ],
)
def test_says_what_is_wrong(call, message):
    with pytest.raises(InputError, match=message):
        call()
