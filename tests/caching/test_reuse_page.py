"""The page on reuse: its table says what the methods' records say."""

import re
from pathlib import Path

from pared import info

PAGE = Path(__file__).parents[2] / "docs/reuse.md"


def test_the_table_serves_what_the_records_serve():
    rows = re.findall(r"^\| \[`(.+?)`\].*\|(.*)\|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    told = {slug: set(re.findall(r"`(\w+)`", families)) for slug, families in rows}
    records = info.registry().values()
    assert told == {r.slug: set(r.families) for r in records if r.kind == "runtime"}
