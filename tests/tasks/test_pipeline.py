"""Pipelines that are asked for tasks: the stock call, the given picture, masks, refusals."""

import inspect

import numpy as np
import pytest
import torch
from PIL import Image

import pared
from pared import anatomy
from pared.errors import InputError
from pared.experts.folding import fold
from pared.experts.multi_task_upcycling import MultiTaskUpcycling
from pared.experts.picture_input import PictureInput
from pared.guidance.guidance_distillation import GuidanceDistillation, one_pass
from pared.method import denoiser, replace_denoiser
from pared.objectives.guided import WEIGHT
from pared.tasks.pipeline import TaskCalls, with_tasks
from tests.recipes.pipelines import pipeline

FAMILIES = ("unet", "pixart", "sd3")


@pytest.fixture(scope="module", params=FAMILIES)
def taught(request):
    """A toy pipeline whose denoiser knows all four tasks, with weights that tell them apart."""
    pipe = with_tasks(pipeline(request.param))
    pipe.set_progress_bar_config(disable=True)
    pared.convert(pipe, MultiTaskUpcycling(experts=2))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in pared.method.denoiser(pipe).parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return pipe


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(size: tuple[int, int] = (64, 48), seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def ask(pipe, task, prompt="make it green", image=None, seed=0, **call):
    given = {"num_inference_steps": 2, "generator": noise(seed)} | call
    return pipe(prompt, task=task, image=image, **given).images


def differ(a: Image.Image, b: Image.Image) -> bool:
    return a.size != b.size or a.tobytes() != b.tobytes()


def test_a_call_without_a_task_is_the_stock_one():
    pipe = pipeline("unet")
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 2, "height": 64, "width": 64, "guidance_scale": 2.0}
    stock = pipe("a fox", generator=noise(), **call).images[0]
    cls = type(pipe)
    assert with_tasks(with_tasks(pipe)) is pipe
    assert isinstance(pipe, cls)
    assert type(pipe).__name__ == cls.__name__
    assert inspect.signature(type(pipe).__call__) == inspect.signature(cls.__call__)
    assert not differ(pipe("a fox", generator=noise(), **call).images[0], stock)
    # The task of the same name paints the same: one loop stands for the other.
    ours = ask(pipe, "text-to-image", "a fox", **call)[0]
    near = np.abs(np.asarray(ours, dtype=int) - np.asarray(stock, dtype=int))
    assert near.max() <= 1


def test_it_saves_as_what_it_is(tmp_path):
    pipe = with_tasks(pipeline("unet"))
    again = pared.load(pared.save(pipe, tmp_path / "model"))
    assert type(again).__name__ == "StableDiffusionPipeline"
    assert not isinstance(again, TaskCalls)


def test_tasks_read_the_picture_and_differ(taught):
    one, other = picture(), picture(seed=1)
    edited = ask(taught, "edit", image=one)[0]
    assert edited.size == one.size
    assert differ(edited, ask(taught, "edit", image=other)[0])
    assert differ(edited, ask(taught, "inpaint", image=one)[0])
    assert not differ(edited, ask(taught, "edit", image=one)[0])
    larger = ask(taught, "upscale", "", image=picture((16, 16)))[0]
    assert larger.size == (64, 64)


def test_a_batch_is_its_pictures(taught):
    first = picture()
    both = ask(taught, "edit", ["make it green", "make it red"], image=[first, first])
    alone = ask(taught, "edit", image=first)
    assert len(both) == 2
    near = np.abs(np.asarray(both[0], dtype=int) - np.asarray(alone[0], dtype=int))
    assert near.max() <= 2


def test_guidance_changes_pictures_and_one_is_none(taught):
    image = picture()
    plain = ask(taught, "edit", image=image)[0]
    assert differ(plain, ask(taught, "edit", image=image, guidance_scale=3.0)[0])
    assert differ(plain, ask(taught, "edit", image=image, image_guidance_scale=2.0)[0])
    assert not differ(plain, ask(taught, "edit", image=image, guidance_scale=1.0)[0])


@pytest.mark.parametrize(("scales", "passes"), [((1, 1), 1), ((3, 1), 2), ((3, 2), 3)])
def test_calls_per_step_are_those_that_guidance_needs(taught, scales, passes):
    model, calls = pared.method.denoiser(taught), []
    hook = model.register_forward_pre_hook(lambda *_: calls.append(1))
    text, image = scales
    ask(taught, "edit", image=picture(), guidance_scale=text, image_guidance_scale=image)
    hook.remove()
    assert len(calls) == 2 * passes


@pytest.fixture(params=FAMILIES)
def distilled(request):
    """A toy pipeline whose denoiser reads the weight of guidance, and heeds it."""
    pipe = with_tasks(pipeline(request.param))
    pipe.set_progress_bar_config(disable=True)
    pared.convert(pipe, GuidanceDistillation())
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in denoiser(pipe).named_parameters():
            if "guidance" in name or "cond_proj" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return pipe


def weights_read(pipe, *words, **call) -> list[list[float]]:
    """The weight of guidance that each call of the denoiser is given."""
    model, read = denoiser(pipe), []
    hook = model.register_forward_pre_hook(
        lambda *_: read.append(anatomy.of(model).input(WEIGHT).value.tolist())
    )
    ask(pipe, *words, **call)
    hook.remove()
    return read


def test_a_student_of_guidance_is_called_once_a_step_at_its_weight(distilled):
    call = {"prompt": ["a red apple", "a fox"], "height": 64, "width": 64}
    assert weights_read(distilled, "text-to-image", guidance_scale=5, **call) == [[4, 4]] * 2
    assert weights_read(distilled, "text-to-image", **call) == [[0, 0]] * 2


def test_a_student_of_guidance_paints_as_by_its_stock_pipeline(distilled):
    call = {"num_inference_steps": 2, "height": 64, "width": 64, "guidance_scale": 5.0}
    plain = ask(distilled, "text-to-image", "a fox", **call | {"guidance_scale": 1})[0]
    ours = ask(distilled, "text-to-image", "a fox", **call)[0]
    call = one_pass(distilled, **call)
    if "use_resolution_binning" in inspect.signature(type(distilled).__call__).parameters:
        call["use_resolution_binning"] = False
    stock = distilled("a fox", generator=noise(), **call).images[0]
    near = np.abs(np.asarray(ours, dtype=int) - np.asarray(stock, dtype=int))
    assert near.max() <= 1 and differ(ours, plain)


def test_a_student_of_guidance_that_knows_tasks_edits_in_one_pass(distilled):
    pared.convert(distilled, MultiTaskUpcycling(experts=2))
    call = {"image": picture(), "guidance_scale": 3.0}
    assert weights_read(distilled, "edit", **call) == [[2]] * 2
    # The picture's guidance isn't distilled: with it, without it, and without both.
    assert weights_read(distilled, "edit", image_guidance_scale=2.0, **call) == [[2]] * 6


def test_outside_of_the_mask_nothing_changes(taught):
    image, mask = picture((64, 64)), Image.new("L", (64, 64))
    mask.paste(255, (16, 16, 40, 40))
    found = np.asarray(ask(taught, "inpaint", "remove it", image=image, mask=mask)[0])
    kept = np.asarray(mask) == 0
    assert (found[kept] == np.asarray(image)[kept]).all()
    assert (found[~kept] != np.asarray(image)[~kept]).any()


def test_what_is_to_be_filled_in_is_seen_blank(taught):
    """So that what lies under the mask makes no difference."""
    marked = Image.new("L", (64, 64))
    marked.paste(255, (16, 16, 40, 40))
    one = picture((64, 64))
    other = Image.composite(picture((64, 64), seed=1), one, marked)
    call = {"prompt": "a red apple", "mask": marked}
    filled = [ask(taught, "inpaint", image=image, fill=True, **call)[0] for image in (one, other)]
    assert not differ(*filled)
    assert differ(*(ask(taught, "inpaint", image=image, **call)[0] for image in (one, other)))
    with pytest.raises(InputError, match="nothing to fill in without a mask"):
        ask(taught, "inpaint", image=one, fill=True)


def test_given_pictures_are_read_as_in_training():
    """Upright, transparency on white, and of masks on black."""
    pipe = with_tasks(pipeline("unet"))
    pared.convert(pipe, MultiTaskUpcycling(experts=2))
    plain = picture((64, 32))
    clear = plain.convert("RGBA")
    clear.putalpha(0)
    white = Image.new("RGB", (64, 32), "white")
    assert not differ(ask(pipe, "edit", image=clear)[0], ask(pipe, "edit", image=white)[0])
    turned = plain.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6
    assert not differ(ask(pipe, "edit", image=turned)[0], ask(pipe, "edit", image=plain)[0])
    strokes = Image.new("RGBA", (64, 32))
    strokes.paste("white", (8, 8, 16, 16))
    marked = Image.new("L", (64, 32))
    marked.paste(255, (8, 8, 16, 16))
    found = (ask(pipe, "inpaint", image=plain, mask=m)[0] for m in (strokes, marked))
    assert not differ(*found)


def test_a_folded_model_does_its_task():
    image = picture()
    upcycled = with_tasks(pipeline("unet"))
    upcycled.set_progress_bar_config(disable=True)
    pared.convert(upcycled, MultiTaskUpcycling(experts=2))
    wanted = ask(upcycled, "edit", image=image)[0]
    replace_denoiser(upcycled, fold(upcycled, "edit"))
    found = ask(upcycled, "edit", image=image)[0]
    assert np.abs(np.asarray(found, dtype=int) - np.asarray(wanted, dtype=int)).max() <= 1
    with pytest.raises(InputError, match=r"not taught 'text-to-image': its input layer takes only"):
        ask(upcycled, "text-to-image")


BAD = [
    ({"task": "paint"}, r"no task 'paint'; did you mean inpaint"),
    ({"task": "edit"}, r"edit needs a picture"),
    (
        {"task": "edit", "prompt": " ", "image": picture()},
        r"needs a prompt that says what to chang",
    ),
    ({"task": "edit", "prompt": []}, r"edit needs a prompt"),
    ({"task": "text-to-image", "image": picture()}, r"reads no picture"),
    ({"task": "edit", "prompt": ["a", "b"], "image": [picture()]}, r"1 images for 2 prompts"),
    (
        {"task": "edit", "prompt": ["a", "b"], "image": [picture(), picture((32, 32))]},
        r"must be of one size; these come out as \(32, 32\) and \(64, 48\)",
    ),
    (
        {"task": "inpaint", "image": picture(), "mask": Image.new("L", (8, 8), 255)},
        r"the mask is 8 x 8 pixels and its picture 64 x 48",
    ),
    ({"task": "inpaint", "image": picture(), "mask": Image.new("L", (64, 48))}, r"all black"),
    ({"task": "edit", "image": picture(), "mask": Image.new("L", (64, 48), 255)}, r"takes no mask"),
    ({"task": "edit", "image": picture(), "height": 64}, r"both height and width"),
    ({"task": "edit", "image": picture(), "height": 50, "width": 64}, r"multiples of 8"),
    (
        {"task": "text-to-image", "height": 100, "width": 100},
        r"pictures of 100 x 100 pixels don't fit the model; .* multiples of 8",
    ),
    ({"task": "text-to-image", "height": 64, "width": 0}, r"64 x 0 pixels don't fit"),
    ({"task": "edit", "image": picture(), "height": 0, "width": 64}, r"0 x 64 pixels don't fit"),
]


@pytest.mark.parametrize(("call", "words"), BAD)
def test_bad_calls_are_refused_in_a_sentence(call, words):
    pipe = with_tasks(pipeline("unet"))
    pared.convert(pipe, MultiTaskUpcycling(experts=2))
    with pytest.raises(InputError, match=words):
        ask(pipe, **call)


def test_tasks_that_a_model_was_not_taught():
    pipe = with_tasks(pipeline("unet"))
    with pytest.raises(InputError, match=r"not taught 'edit': its input layer takes text-to-image"):
        ask(pipe, "edit", image=picture())
    pared.convert(pipe, PictureInput(tasks=("text-to-image", "edit")))
    with pytest.raises(InputError, match=r"not taught 'inpaint'; it was taught text-to-image, edi"):
        ask(pipe, "inpaint", image=picture())
