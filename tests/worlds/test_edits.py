"""Examples of the tasks from the emoji world: exact targets, honest splits, seeded."""

import functools

import pytest
import torch

from pared.errors import InputError
from pared.worlds import emoji
from pared.worlds.emoji import pixels
from pared.worlds.emoji.edits import VISIBLE, edits, painting, removal, upscaling
from pared.worlds.tasks import TASKS

MAKERS = {
    "edit": edits, "text-to-image": painting, "upscale": upscaling, "inpaint": removal
}  # fmt: skip
SIZE = 32


@pytest.fixture(scope="module", autouse=True)
def load_once():
    """Decoding the world takes most of the time of making examples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pared.worlds.emoji.edits.load", functools.cache(emoji.load))
        yield


@pytest.fixture(scope="module")
def world():
    return emoji.load(size=SIZE)


@pytest.fixture(scope="module")
def made():
    return {task: make(SIZE, "train", 90) for task, make in MAKERS.items()}


def difference(examples):
    before, after = (examples.images[index].float() for index in (examples.before, examples.after))
    return (after - before).abs().mean(dim=(1, 2, 3))


@pytest.mark.parametrize("task", MAKERS)
def test_rows_belong_together(made, task):
    examples = made[task]
    assert examples.task == task and len(examples) == 90
    assert examples.images.dtype == torch.uint8 and examples.images.shape[1:] == (3, SIZE, SIZE)
    assert len(examples.before) == (90 if TASKS[task].reads_image else 0)
    assert len(examples.texts) == 90 and all(text == text.strip() != "" for text in examples.texts)
    used = {*examples.before, *examples.after}
    assert used == set(range(len(examples.images))), "every picture is used"
    assert len({image.numpy().tobytes() for image in examples.images}) == len(used), "and held once"


@pytest.mark.parametrize("task", MAKERS)
def test_examples_are_a_function_of_the_seed(made, task):
    again = MAKERS[task](SIZE, "train", 90)
    assert torch.equal(again.images, made[task].images) and again.texts == made[task].texts
    assert again.before == made[task].before and again.after == made[task].after
    other = MAKERS[task](SIZE, "train", 90, seed=1)
    assert other.texts != made[task].texts


@pytest.mark.parametrize("task", MAKERS)
def test_splits_touch_held_out_rows_as_pairs_do(world, made, task):
    rows = [row for row, split in enumerate(world.splits) if split == "heldout"]
    heldout = {image.numpy().tobytes() for image in world.images[rows]}

    def touched(examples):
        ends = zip(examples.before or examples.after, examples.after, strict=True)
        return [
            any(examples.images[end].numpy().tobytes() in heldout for end in pair) for pair in ends
        ]

    assert not any(touched(made[task]))
    assert all(touched(MAKERS[task](SIZE, "heldout", 60)))


# Editing


def test_kinds_of_edit_are_as_many(made):
    texts = made["edit"].texts
    for start in ("make the skin tone", "turn the ", "make it "):
        assert sum(text.startswith(start) for text in texts) == 30


def test_the_rarest_kind_limits_all():
    texts = edits(8, "heldout", 100_000).texts
    tones, recoloured = (sum(t.startswith(s) for t in texts) for s in ("make the", "make it"))
    assert tones == recoloured == len(texts) / 3 and 50 < tones < 300


def test_examples_are_spread_over_the_concepts(world):
    examples = edits(8, "train", 60, kinds=("skin_tone",))
    bases = [world.bases[world.captions.index(before)] for before, _ in examples.captions]
    assert len(set(bases)) == 60, "there are more than 60 concepts with skin tones"


def test_siblings_are_the_worlds_own(world, made):
    examples = made["edit"]
    known = {
        (world.captions[pair.before], world.captions[pair.after]): pair
        for change in ("skin_tone", "gender")
        for pair in emoji.pairs(world, change)
    }
    for n in range(60):
        pair = known[examples.captions[n]]
        assert examples.texts[n] == pair.instruction
        assert torch.equal(examples.images[examples.before[n]], world.images[pair.before])
        assert torch.equal(examples.images[examples.after[n]], world.images[pair.after])


def test_recolouring_shows_in_picture_and_caption(made):
    examples = made["edit"]
    assert (difference(examples)[60:] >= VISIBLE).all()
    named = {text.removeprefix("make it ") for text in examples.texts[60:]}
    assert named <= set(pixels.COLOURS) and len(named) >= 6
    for n in range(60, 90):
        colour = examples.texts[n].removeprefix("make it ")
        before, after = (examples.images[of[n]] for of in (examples.before, examples.after))
        assert torch.equal(after, pixels.recolour(before[None], colour)[0])
        assert examples.captions[n][1].startswith(f"{colour} ")


@pytest.mark.parametrize("colour", pixels.COLOURS)
def test_recolouring_leaves_white_black_and_grey(colour):
    greys = torch.arange(0, 256, 5, dtype=torch.uint8).expand(1, 3, 1, -1)
    assert torch.equal(pixels.recolour(greys, colour), greys)


@pytest.mark.parametrize("colour", pixels.COLOURS)
def test_recolouring_keeps_soft_edges_without_a_fringe(colour):
    """Colour mixed with white and recoloured is the recoloured colour mixed with white."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.randint(256, (1, 3, 1, 200), generator=generator, dtype=torch.uint8)
    share = torch.rand(200, generator=generator)

    def mixed(images):
        return 255 + share * (images.float() - 255)

    first = pixels.recolour(mixed(colours).round().byte(), colour).float()
    assert (first - mixed(pixels.recolour(colours, colour))).abs().max() <= 2  # of rounding


@pytest.mark.parametrize(
    ("colour", "strongest"), [("red", 0), ("green", 1), ("blue", 2), ("orange", 0), ("purple", 2)]
)
def test_recolouring_gives_the_named_colour(colour, strongest):
    yellow = torch.tensor([255, 200, 30], dtype=torch.uint8).view(1, 3, 1, 1)
    assert pixels.recolour(yellow, colour).argmax(dim=1).item() == strongest


def test_recolouring_keeps_what_differed_in_luma():
    hearts = torch.tensor([[255, 200, 30], [230, 20, 30]], dtype=torch.uint8).view(2, 3, 1, 1)
    face, heart = pixels.recolour(hearts, "green")[:, 1].flatten().tolist()
    assert face - heart > 40


@pytest.mark.parametrize(
    ("caption", "then"),
    [("red heart", "green heart"), ("cook: dark skin tone", "green cook: dark skin tone")],
)
def test_captions_of_recoloured_pictures(caption, then):
    assert pixels.coloured_caption(caption, "green") == then


def test_far_edits_are_apart_and_undone_by_themselves():
    near = edits(SIZE, "train", 30).texts
    assert not {"mirror it", "turn it upside down", "invert the colours"} & set(near)
    far = edits(SIZE, "train", 30, kinds=("mirror", "turn", "invert"))
    undo = {"mirror it": -1, "turn it upside down": -2}
    for before, after, text in zip(far.before, far.after, far.texts, strict=True):
        after = far.images[after]
        back = after.flip(undo[text]) if text in undo else 255 - after
        assert torch.equal(back, far.images[before])
    assert (difference(far) >= VISIBLE).all()


# Restoration


def test_degraded_pictures_are_poorer_and_recognisable(made):
    examples = made["upscale"]
    before, after = (examples.images[i].float() for i in (examples.before, examples.after))
    assert ((before - after).abs().mean(dim=(1, 2, 3)) > 2).all()
    nearest = torch.cdist(before.flatten(1), after.flatten(1)).argmin(1)
    assert (nearest == torch.arange(len(before))).float().mean() > 0.6
    assert examples.texts == [before for before, _ in examples.captions]


def test_what_is_removed_lies_on_the_picture(world, made):
    examples = made["inpaint"]
    rows = [world.captions.index(after) for _, after in examples.captions]
    opacity = pixels.cut_out(world.images[rows])
    on_it = on_white = 0
    for n, (row, text) in enumerate(zip(rows, examples.texts, strict=True)):
        before, after = (examples.images[of[n]].int() for of in (examples.before, examples.after))
        assert torch.equal(after, world.images[row].int())
        changed = (before != after).any(0)
        down, right = changed.any(1).nonzero(), changed.any(0).nonzero()
        assert max(down.max() - down.min(), right.max() - right.min()) < 0.56 * SIZE
        on_it += bool((changed & (opacity[n, 0] > 0)).any())
        on_white += bool((changed & (opacity[n, 0] == 0)).any())
        removed = world.captions.index(text.removeprefix("remove the "))
        assert world.bases[removed] != world.bases[row]
        assert examples.captions[n][0] == f"{world.captions[row]} and {world.captions[removed]}"
    assert on_it > 80 and on_white > 40


def test_cutting_out_keeps_white_inside_and_drops_it_outside():
    ring = torch.full((1, 3, 9, 9), 255, dtype=torch.uint8)
    ring[..., 2:7, 2:7] = 100
    ring[..., 3:6, 3:6] = 255
    opacity = pixels.cut_out(ring)[0, 0]
    assert opacity[2:7, 2:7].all() and opacity.sum() == 25
    ring[..., 4, 2] = 255  # a way in
    assert pixels.cut_out(ring).sum() == 25 - 9 - 1


def test_pasting_mixes_by_opacity():
    below = torch.full((3, 4, 4), 200, dtype=torch.uint8)
    pasted = pixels.paste(below, torch.full((3, 2, 2), 0.2), torch.full((1, 2, 2), 0.5), 1, 2)
    assert pasted[:, 1:3, 2:4].unique().tolist() == [151]  # 0.2 x 255 + half of 200
    assert (pasted != below).sum() == 12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: edits(8, kinds=("hair", "mirror")), "can't be edited by 'hair'; the kinds are"),
        (lambda: edits(8, kinds=()), "by no kind at all"),
        (lambda: edits(8, "test"), "no split 'test'"),
        (lambda: removal(8, "test"), "no split 'test'"),
        (lambda: painting(8, count=0), "0 examples can't be made"),
        (lambda: upscaling(129), "size 129"),
        (lambda: upscaling(10, count=1), "10 x 10 can't be made 4 times smaller"),
    ],
)
def test_says_what_is_wrong(call, message):
    with pytest.raises(InputError, match=message):
        call()
