"""Makes the site: generated pages anew, then all of it into `site/`.

python docs/build.py             # write the generated pages, build the site
python docs/build.py --check     # say which generated pages are stale, write nothing
python docs/build.py --pages     # write the generated pages only
"""

import argparse
import contextlib
import subprocess
import sys
from pathlib import Path

import generated

DOCS = Path(__file__).parent
ROOT = DOCS.parent
SITE = ROOT / "site"


def stale(docs: Path = DOCS) -> list[str]:
    """The generated pages that aren't what they would be now, missing and left-over ones included.

    Args:
        docs: folder of the pages.
    """
    wanted = generated.pages()
    differing = [name for name, text in wanted.items() if _text(docs / name) != text]
    return sorted(differing + [name for name in _generated(docs) if name not in wanted])


def write(docs: Path = DOCS) -> list[str]:
    """Bring the generated pages up to date; returns those that changed."""
    changed, wanted = stale(docs), generated.pages()
    for name in changed:
        path = docs / name
        if name in wanted:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(wanted[name], encoding="utf-8")
        else:
            path.unlink()
    return changed


def site() -> int:
    """Build the site into `site/`; returns the exit code of the builder."""
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    # The builder copies whatever lies beside the pages.
    for path in (*SITE.glob("*.py"), *SITE.glob("__pycache__/*")):
        path.unlink()
    with contextlib.suppress(OSError):
        (SITE / "__pycache__").rmdir()
    return code


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def _generated(docs: Path) -> list[str]:
    """The pages and drawings that say of themselves that they were generated."""
    files = [*docs.rglob("*.md"), *docs.rglob("*.svg")]
    marked = [path for path in files if (_text(path) or "").startswith(generated.NOTICE)]
    return [path.relative_to(docs).as_posix() for path in marked]


def main() -> int:
    """Run the command; 1 where pages are stale or the site can't be built."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--check", action="store_true", help="say which generated pages are stale")
    only.add_argument("--pages", action="store_true", help="write the generated pages only")
    asked = parser.parse_args()
    # Results in the working directory count; those of this checkout are meant.
    with contextlib.chdir(ROOT):
        if asked.check:
            for name in (found := stale()):
                print(f"stale: docs/{name} (python docs/build.py --pages writes it anew)")
            return 1 if found else 0
        for name in write():
            print(f"written: docs/{name}")
        return 0 if asked.pages else site()


if __name__ == "__main__":
    sys.exit(main())
