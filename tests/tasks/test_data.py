"""Data of several tasks: what a batch holds, how it is mixed, what is dropped."""

import copy

import pytest
import torch

from pared.errors import InputError
from pared.method import denoiser
from pared.objectives.denoising import Denoising
from pared.tasks.data import TaskData
from pared.training.data import generator_for
from pared.worlds.datasets import encode_latents, latents_of
from pared.worlds.tasks import TASKS, Examples
from tests.recipes.pipelines import pipeline

CONDITIONS = {"pixart": {"text", "mask"}, "unet": {"text"}, "sd3": {"text", "pooled"}}


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)


def examples(task: str, count: int = 5, seed: int = 0) -> Examples:
    """Pictures turned into the next, each with a text of its own."""
    before = list(range(count)) if TASKS[task].reads_image else []
    after = [(n + 1) % count for n in range(count)]
    return Examples(
        task, pictures(count, seed), before, after, [f"{task} {n}" for n in range(count)]
    )


@pytest.fixture(scope="module")
def unet():
    return pipeline("unet")


@pytest.fixture(scope="module")
def data(unet):
    sets = [examples("text-to-image", 3), examples("edit", 5), examples("upscale", 4, seed=1)]
    return TaskData(unet, sets, drop=False)


def batch_of(data, count=60, seed=0):
    return data.batch(torch.randperm(len(data))[:count], generator_for(seed))


@pytest.mark.parametrize("kind", CONDITIONS)
def test_batches_are_what_the_denoiser_takes(kind):
    data = TaskData(pipeline(kind), [examples("edit"), examples("text-to-image")])
    batch = data.batch(torch.arange(4), generator_for(0))
    own = {"latents", "latent_std", "source", "source_std", "task"}
    assert set(batch) == own | CONDITIONS[kind]
    assert all(len(entry) == 4 for entry in batch.values())
    shapes = {batch[name].shape for name in own - {"task"}}
    assert len(shapes) == 1 and batch["task"].tolist() == [0, 1, 0, 1]


def test_every_task_has_equally_many_rows_at_its_places(data):
    batch = batch_of(data, 15)
    assert batch["task"].tolist() == [0, 1, 2] * 5
    assert batch["task"].dtype == torch.int64


def test_rows_belong_together(unet, data):
    for n, (task, count, seed) in enumerate(
        [("text-to-image", 3, 0), ("edit", 5, 0), ("upscale", 4, 1)]
    ):
        rows = examples(task, count, seed)
        mean, std = encode_latents(unet.vae, rows.images)
        batch = data.batch(torch.arange(15), generator_for(0))
        latents, source, spread, given = (
            batch[name][n::3] for name in ("latents", "source", "latent_std", "source_std")
        )
        row = torch.arange(5) % count
        after = torch.tensor(rows.after)[row]
        torch.testing.assert_close(latents, mean[after])
        torch.testing.assert_close(spread, std[after])
        if task == "text-to-image":
            assert not source.any() and not given.any()
            continue
        torch.testing.assert_close(source, mean[row])
        torch.testing.assert_close(given, std[row])


def test_texts_belong_to_their_rows(unet, data):
    latents = latents_of(unet, pictures(3), [f"text-to-image {n}" for n in range(3)], drop=0.0)
    batch = data.batch(torch.arange(15), generator_for(0))
    row = torch.arange(5) % 3
    torch.testing.assert_close(batch["text"][::3], latents.condition["text"][row])


def test_an_epoch_covers_every_row(data):
    batch = data.batch(torch.arange(len(data)), generator_for(0))
    assert len(data) == 15
    for n, count in enumerate((3, 5, 4)):
        found = {each.numpy().tobytes() for each in batch["latents"][n::3]}
        assert len(found) == count


def test_each_picture_and_text_is_encoded_once(unet, data):
    assert len(data.latents) == 5 + 4, "text-to-image and edit share theirs"
    assert len(data.condition["text"]) == 1 + 3 + 5 + 4
    same = TaskData(unet, [examples("edit"), examples("edit")][:1])
    assert data.nbytes > same.nbytes > 0


def test_tasks_are_numbered_as_the_model_knows_them(unet):
    names = ("text-to-image", "edit", "upscale", "inpaint")
    data = TaskData(unet, [examples("inpaint"), examples("edit")], tasks=names)
    assert data.batch(torch.arange(4), generator_for(0))["task"].tolist() == [3, 1, 3, 1]


def test_text_to_image_alone_gives_plain_batches(unet):
    data = TaskData(unet, [examples("text-to-image")])
    assert set(data.batch(torch.arange(3), generator_for(0))) == {"latents", "latent_std", "text"}
    within = TaskData(unet, [examples("text-to-image")], tasks=("edit", "text-to-image"))
    batch = within.batch(torch.arange(3), generator_for(0))
    assert batch["task"].tolist() == [1, 1, 1] and not batch["source"].any()


# Dropping


@pytest.fixture(scope="module")
def dropping(unet):
    return TaskData(unet, [examples("text-to-image"), examples("edit"), examples("upscale")])


def test_texts_and_pictures_are_dropped_by_the_tasks_chances(dropping):
    count = 6000
    batch = dropping.batch(torch.arange(count), generator_for(3))
    without_text = (batch["text"] == dropping.empty["text"]).flatten(1).all(1)
    without_image = ~batch["source"].flatten(1).any(1)
    for n, name in enumerate(("text-to-image", "edit", "upscale")):
        task = TASKS[name]
        text, image = without_text[n::3], without_image[n::3]
        if not task.reads_image:
            assert image.all()
            image = torch.zeros_like(image)
        for found, chance in (
            (text & ~image, task.drop_text),
            (image & ~text, task.drop_image),
            (text & image, task.drop_both),
        ):
            assert found.float().mean().item() == pytest.approx(chance, abs=0.02)
    assert torch.equal(without_image[1::3], ~batch["source_std"][1::3].flatten(1).any(1))


def test_nothing_is_dropped_if_so_wanted(data):
    batch = batch_of(data)
    assert not (batch["text"] == data.empty["text"]).flatten(1).all(1).any()
    assert batch["source"][1::3].flatten(1).any(1).all()


def test_dropping_leaves_the_data_as_they_are(dropping):
    before = dropping.identity()
    batch_of(dropping)
    assert dropping.identity() == before


def test_batches_are_a_function_of_indices_and_generator(dropping):
    first, second = (dropping.batch(torch.arange(30), generator_for(5)) for _ in range(2))
    other = dropping.batch(torch.arange(30), generator_for(6))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


# As a data set


def test_identity_changes_with_the_data(unet):
    def identity(*sets, **more):
        return TaskData(unet, sets, **more).identity()

    edit, upscale = examples("edit"), examples("upscale")
    identities = [
        identity(edit), identity(edit, drop=False), identity(upscale), identity(edit, upscale),
        identity(upscale, edit), identity(examples("edit", seed=1)),
        identity(edit, tasks=("upscale", "edit")),
        identity(Examples("edit", edit.images, edit.after, edit.before, edit.texts)),
    ]  # fmt: skip
    assert len(set(identities)) == len(identities)
    assert identity(edit) == identities[0]


def test_moved_data_give_the_same_batches(dropping):
    moved = dropping.to(torch.device("cpu"))
    first, second = (d.batch(torch.arange(6), generator_for(0)) for d in (dropping, moved))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert moved.nbytes == dropping.nbytes
    meta = dropping.to(torch.device("meta"))
    assert meta.latents.is_meta and not dropping.latents.is_meta


def test_a_wider_denoiser_learns_from_it(unet):
    """The objective hands on `source`, and what nobody knows is left aside."""
    data = TaskData(unet, [examples("edit")])
    wide = copy.deepcopy(denoiser(unet))
    wide.conv_in = torch.nn.Conv2d(8, wide.conv_in.out_channels, 3, padding=1)
    loss = Denoising("noise")(wide, data.batch(torch.arange(2), generator_for(0)), generator_for(1))
    loss["task"].backward()
    assert wide.conv_in.weight.grad[:, 4:].abs().sum() > 0


@pytest.mark.parametrize(
    ("sets", "tasks", "message"),
    [
        ([], None, "no examples; give those of one task"),
        ([examples("edit"), examples("edit")], None, "several examples of edit"),
        ([examples("edit")], ("upscale",), "examples of edit, which is none of the tasks upscale"),
        ([Examples("edit", pictures(1), [], [], [])], None, "no examples of edit"),
        ([Examples("edit", pictures(1), [], [0], ["x"])], None, "1 examples of edit have 0 pict"),
        ([Examples("edits", pictures(1), [0], [0], ["x"])], None, "no task 'edits'; did you mean"),
        (
            [examples("edit"), Examples("upscale", pictures(1)[..., :16, :16], [0], [0], ["x"])],
            None,
            "16 x 16 and 32 x 32 pixels; make them one size",
        ),
    ],
)
def test_says_what_is_wrong(unet, sets, tasks, message):
    with pytest.raises(InputError, match=message):
        TaskData(unet, sets, tasks=tasks)


def test_batches_must_divide_over_the_tasks(data):
    with pytest.raises(InputError, match="batch of 4 doesn't divide over 3 tasks"):
        data.batch(torch.arange(4), generator_for(0))


def test_only_some_tasks_without_encoding_again(unet):
    sets = [examples("edit"), examples("upscale")]
    both = TaskData(unet, sets)
    part = both.only(["upscale"], ["text-to-image", "upscale"])
    alone = TaskData(unet, sets[1:], tasks=("text-to-image", "upscale"))
    rows = torch.arange(3)
    got, wanted = (each.batch(rows, torch.Generator().manual_seed(0)) for each in (part, alone))
    assert got.keys() == wanted.keys()
    for name, entry in wanted.items():
        torch.testing.assert_close(got[name], entry)
    assert part.latents is both.latents
    with pytest.raises(InputError, match="inpaint can't be kept: there are examples of edit, upsc"):
        both.only(["inpaint"])
