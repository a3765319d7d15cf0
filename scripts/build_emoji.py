"""Render the emoji world: every fully-qualified emoji that Noto Color Emoji draws, with its name.

    python scripts/build_emoji.py

Needs Pillow with raqm, pyarrow, the `emoji` package, and two Debian packages:
`fonts-noto-color-emoji` (the font) and `unicode-data` (Unicode's `emoji-test.txt`).
Writes one parquet file that `datasets.load_dataset("parquet", ...)` opens with decoded images.
"""

import argparse
import io
import json
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from emoji_names import Name, read_names
from PIL import Image, ImageDraw, ImageFont

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI_TEST = Path("/usr/share/unicode/emoji/emoji-test.txt")
OUTPUT = Path(__file__).parents[1] / "src/pared/worlds/emoji/emoji.parquet"

FONT_SIZE = 109  # the one size of the font's bitmaps
SIDE = 128
MARGIN = 4  # bitmaps are 136 x 128; the outer 4 columns are empty, so cutting them loses nothing
UNKNOWN_FLAG = "\N{REGIONAL INDICATOR SYMBOL LETTER Q}" * 2
COLUMNS = ("emoji", "caption", "group", "base", "skin_tone", "gender", "split")

# Held-out combinations: one base in `every` loses all its rows with this value.
HELD_OUT = {"skin_tone": ("dark", 3), "gender": ("woman", 6)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--font", type=Path, default=FONT)
    parser.add_argument("--emoji-test", type=Path, default=EMOJI_TEST)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()

    names = read_names(options.emoji_test)
    font = ImageFont.truetype(options.font, FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)
    drawn, skipped = render_all(names, font)
    splits = split(list(drawn))
    write(drawn, splits, options.output)

    print(f"{len(drawn)} of {len(names)} emoji, {options.output.stat().st_size / 1e6:.1f} MB")
    for reason, count in Counter(skipped.values()).items():
        print(f"skipped {count}: {reason}")
    print(f"held out: {splits.count('heldout') / len(splits):.1%} of rows")


def render_all(
    names: list[Name], font: ImageFont.FreeTypeFont
) -> tuple[dict[Name, Image.Image], dict[Name, str]]:
    """The emoji that the font draws, with their pictures, and for the others why not."""
    one_glyph = font.getlength("\N{GRINNING FACE}")
    blank = Image.new("RGB", (SIDE, SIDE), "white").tobytes()
    unknown_flag = render(UNKNOWN_FLAG, font).tobytes()
    drawn, skipped = {}, {}
    seen = set()  # (base, picture)
    for name in names:
        image = render(name.emoji, font)
        pixels = image.tobytes()
        if font.getlength(name.emoji) > one_glyph:
            skipped[name] = "the font has no single glyph for the sequence"
        elif pixels in (blank, unknown_flag):
            skipped[name] = "the font has no picture of it"
        elif (name.base, pixels) in seen:
            skipped[name] = "drawn exactly like a sibling of other skin tone or gender"
        else:
            drawn[name] = image
            seen.add((name.base, pixels))
    return drawn, skipped


def render(emoji: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """The font's own bitmap on white, 128 x 128, at its own place: siblings stay aligned."""
    image = Image.new("RGB", (SIDE, SIDE), "white")
    ImageDraw.Draw(image).text((-MARGIN, 0), emoji, font=font, embedded_color=True)
    return image


def split(names: list[Name]) -> list[str]:
    """ "train" or "heldout" for each row; whole (base, tone) and (base, gender) pairs are held out.

    Which bases is settled by a checksum of the base's name, so it does not depend on the font.
    """
    values = {column: defaultdict(set) for column in HELD_OUT}
    for name in names:
        for column in HELD_OUT:
            values[column][name.base].add(getattr(name, column))

    def held_out(name: Name) -> bool:
        return any(
            getattr(name, column) == value
            and len(values[column][name.base]) > 1
            and zlib.crc32(f"{column}: {name.base}".encode()) % every == 0
            for column, (value, every) in HELD_OUT.items()
        )

    return ["heldout" if held_out(name) else "train" for name in names]


def write(drawn: dict[Name, Image.Image], splits: list[str], output: Path) -> None:
    """Write the table, with the metadata by which `datasets` knows the image column."""
    images = [
        {"bytes": _webp(image), "path": "-".join(f"{ord(c):x}" for c in name.emoji) + ".webp"}
        for name, image in drawn.items()
    ]
    table = {"image": pa.array(images, pa.struct({"bytes": pa.binary(), "path": pa.string()}))}
    for column in COLUMNS[:-1]:
        table[column] = pa.array([getattr(name, column) for name in drawn], pa.string())
    table["split"] = pa.array(splits, pa.string())

    features = {"image": {"_type": "Image"}}
    features |= {column: {"dtype": "string", "_type": "Value"} for column in COLUMNS}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    output.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.table(table).replace_schema_metadata(metadata),
        output,
        compression="zstd",
        row_group_size=1000,
    )


def _webp(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "webp", lossless=True, quality=100, method=4)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
