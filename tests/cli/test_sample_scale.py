"""`pared sample --scale` with run-time methods: every stage is a run of its own length."""

from pared.caching.attention_map_reuse import AttentionMapReuse
from tests.recipes.pipelines import pipeline


def test_methods_know_the_steps_of_every_stage(run, tmp_path, monkeypatch):
    pipeline("unet").save_pretrained(tmp_path / "pipe")
    reuses, seen = AttentionMapReuse.reuses, []

    def noted(self, step, steps):
        seen.append(steps)
        return reuses(self, step, steps)

    monkeypatch.setattr(AttentionMapReuse, "reuses", noted)
    words = ["--with", "attention-map-reuse:reuse=hurry", "--steps", 5, "--scale", 1.5]
    size = ["--height", 64, "--width", 64]
    result = run("sample", "pipe", "cat", *words, *size, "-o", "cat.png")
    assert result.exit_code == 0, result.output
    # Asked twice at each of the 5 steps, and at each of the 3 that a strength of 0.7 leaves.
    assert seen == [5] * 10 + [3] * 6
