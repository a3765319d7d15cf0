"""Running commands in an empty folder, and what a refusal looks like."""

import functools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from diffusers import PixArtTransformer2DModel

from pared.cli import main
from tests.cli import toy_pipeline

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in a fresh folder, which is the current one."""
    monkeypatch.chdir(tmp_path)

    def invoke(*words: object) -> Result:
        return CliRunner().invoke(main, [str(word) for word in words], prog_name="pared")

    return invoke


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Commands may set the number of threads for their process; tests share one."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def refused(run: Run, tmp_path: Path) -> Callable[..., str]:
    """Runs a command that must be refused; returns the sentence that it said."""

    def invoke(*words: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        result = run(*words)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        assert re.fullmatch(r"pared: [^\n]+[.?]\n", result.stderr), result.stderr
        assert not re.search(r"[.?!] [A-Z]", result.stderr), "more than one sentence"
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        return result.stderr.removeprefix("pared: ").rstrip("\n")

    return invoke


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a toy text-to-image pipeline."""
    return toy_pipeline.write(tmp_path_factory.mktemp("models") / "pipeline")


# An enhancer -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an enhancer, a voice enrolled for it, and a recording."""
    from pared.speech.streaming_pse import enrolment
    from pared.speech.streaming_pse.method_checks import noise, toy
    from pared.worlds.speech import audio
    from tests.cli.sounds import WHOLE

    folder = tmp_path_factory.mktemp("enhancer")
    enhancer = toy(window=512)
    enhancer.save_pretrained(folder / "model")
    enrolment.save(folder / "me.safetensors", enhancer, enrolment.enrol(enhancer, noise(32000)))
    audio.write(folder / "noisy.wav", WHOLE)
    return folder


@pytest.fixture(scope="session")
def enhanced(kept: Path) -> Callable[[Path], torch.Tensor]:
    """What the library makes of a recording with that voice, offline."""
    from pared.speech.streaming_pse import enrolment
    from pared.speech.streaming_pse.method_checks import toy
    from pared.worlds.speech import audio

    enhancer = toy(window=512)
    voice = enrolment.load(kept / "me.safetensors", enhancer)

    @torch.no_grad()
    def offline(recording: Path) -> torch.Tensor:
        return enhancer.enhance(audio.read(recording)[None], voice)[0]

    return offline


@pytest.fixture(scope="session")
def wanted(kept: Path, enhanced: Callable[[Path], torch.Tensor]) -> torch.Tensor:
    """What comes of the recording in the folder."""
    return enhanced(kept / "noisy.wav")


@pytest.fixture
def enhance(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `pared enhance` in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def invoke(
        source: object, *words: object, given: bytes = b"", voice: str = "me.safetensors"
    ) -> Result:
        line = ["enhance", source, "-e", kept / voice, "--model", kept / "model", *words]
        words = [str(word) for word in line]
        return CliRunner().invoke(main, words, prog_name="pared", input=given)

    return invoke


@pytest.fixture
def in_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs a command in an empty folder as if its standard output were a terminal."""
    monkeypatch.chdir(tmp_path)

    def invoke(*words: object) -> int:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        return main([str(word) for word in words], standalone_mode=False) or 0

    return invoke


@pytest.fixture
def student_calls(run: Run, pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> list:
    """Calls of `student`, which reads the scale: samples of each, and the weight that it read."""
    run("convert", pipeline, "--with", "guidance-distillation", "-o", "student")
    forward, calls = PixArtTransformer2DModel.forward, []

    @functools.wraps(forward)  # run-time methods read its signature
    def counted(self, latents, *arguments, **call):
        calls.append((len(latents), self.pared_inputs["guidance_weight"].value.item()))
        return forward(self, latents, *arguments, **call)

    monkeypatch.setattr(PixArtTransformer2DModel, "forward", counted)
    return calls
