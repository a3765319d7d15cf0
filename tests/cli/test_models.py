"""The MODEL argument: what it finds, and what it says where it finds nothing."""

import json

import pytest

from pared.anatomy import presets
from pared.cli.models import locate
from pared.errors import InputError


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def model_folder(path, name="config.json"):
    path.mkdir(parents=True)
    (path / name).write_text(json.dumps({"_class_name": "DiTTransformer2DModel"}))
    return path


def test_presets_and_house_models():
    assert locate("toy:dit").kind == "preset"
    source = locate("house:clip")
    assert source.kind == "folder" and source.place.endswith("clip")
    assert not source.is_pipeline


def test_folders(empty_folder):
    model_folder(empty_folder / "runs" / "student")
    model_folder(empty_folder / "pipe", "model_index.json")
    assert not locate("runs/student").is_pipeline
    assert locate("pipe").is_pipeline
    assert locate("./pipe/").kind == "folder"


def test_hub_ids_are_not_asked_for_yet():
    assert locate("stabilityai/stable-diffusion-3.5-medium").kind == "hub"


def test_a_published_preset_stands_for_its_hub_id():
    hub = presets.get("pixart-sigma").hub
    assert locate(hub).without_weights() == "pixart-sigma"


@pytest.mark.parametrize(
    "name, part",
    [
        ("toy:pixrt", "did you mean toy:pixart"),
        ("pixart", "did you mean "),
        ("house:unicorn", "there is no house model 'house:unicorn'; shipped are house:clip"),
        ("qqq", "give a folder, a hub id (owner/name), or one of house:clip"),
        ("runs/studnet", "did you mean runs/student or"),
        ("./owner/name/more", "there is no model './owner/name/more'"),
        ("runs", "runs is no model: it has neither a model_index.json nor a config.json."),
        ("notes.txt", "notes.txt is a file; give the folder of a model."),
    ],
)
def test_not_found(empty_folder, name, part):
    model_folder(empty_folder / "runs" / "student")
    (empty_folder / "notes.txt").write_text("")
    with pytest.raises(InputError) as refusal:
        locate(name)
    assert part in str(refusal.value)


def test_nothing_is_downloaded_for_a_bill():
    with pytest.raises(InputError, match="nothing is downloaded for a bill"):
        locate("owner/name").without_weights()


def test_offline_a_hub_id_is_refused_at_once(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        locate("owner/name").load()


def test_a_cached_hub_model_is_used_without_the_network(empty_folder, monkeypatch):
    """The hub's cache as huggingface_hub lays it out, with a model in it."""
    cache = empty_folder / "cache"
    snapshot = cache / "models--owner--name" / "snapshots" / ("0" * 40)
    model_folder(snapshot, "model_index.json")
    refs = cache / "models--owner--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    assert locate("owner/name").without_weights() == str(snapshot)


def test_of_a_single_model_no_language_more_than_needed_is_downloaded(empty_folder, monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    needed = ["config.json", "vocab.json", "model.safetensors", "tokenizer.model"]
    others = ["adapter.deu.safetensors", "adapter.fra.bin", "onnx/config.json", "pytorch_model.bin"]
    asked = []

    def download(name, **patterns):
        asked.extend(filter_repo_objects([*needed, *others], **patterns))
        return empty_folder

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert locate("a-lab/a-model").model_folder() == empty_folder
    assert asked == needed


def test_a_single_model_is_found_by_the_same_names(empty_folder):
    folder = model_folder(empty_folder / "runs" / "recogniser")
    assert locate("runs/recogniser").model_folder().samefile(folder)
    with pytest.raises(InputError, match="toy:dit is a configuration with random weights"):
        locate("toy:dit").model_folder()
    with pytest.raises(InputError, match="owner/name can't be had: it isn't in this machine's"):
        locate("owner/name").model_folder()
