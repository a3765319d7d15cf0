"""`pared methods`: the list of all methods, and what there is to know about one."""

from __future__ import annotations

import inspect
import json
import re
from typing import Any

import click

from pared import info, results
from pared.cli import common
from pared.errors import InputError
from pared.info import Info

KINDS = ("conversion", "runtime", "objective", "model")
TYPES: dict[type, str] = {bool: "boolean", int: "integer", float: "number", str: "string"}
# One argument in a docstring, with the lines that its meaning goes on in.
ARGUMENT = re.compile(r"^ {4}(\w+): (.*\n(?: {8}.*\n)*)", re.MULTILINE)


@click.command()
@click.argument("slug", required=False, type=common.MethodName())
@click.option("--kind", type=click.Choice(KINDS), help="Only methods of this kind.")
@click.option("--family", metavar="FAMILY", help="Only methods for this model family, e.g. pixart.")
@common.json_option
def command(slug: str | None, kind: str | None, family: str | None, as_json: bool) -> None:
    """List all methods, or explain one.

    The list says of each method where it works and whether its paper's claims held when they were
    measured again. With a SLUG: its settings, with their ranges and defaults, and each claim.

    \b
    Examples:
      pared methods --kind conversion --family pixart
      pared methods edit
    """
    if slug is not None:
        if kind or family:
            raise InputError(
                f"--kind and --family choose from the list; leave them out to see {slug}."
            )
        record = info.get(slug)
        details = _summary(record) | _details(record)
        common.print_json(details) if as_json else _explain(details)
        return
    records = [r for r in _of_family(family) if kind in (None, r.kind)]
    if as_json:
        common.print_json([_summary(record) for record in records])
    elif records:
        common.print_table(
            ("method", "class", "kind", "arXiv", "folder", "families", "maturity", "claims"),
            [_row(record) for record in records],
        )
    else:
        click.echo("No method is of this kind and serves this family.")


def _of_family(family: str | None) -> list[Info]:
    records = list(info.registry().values())
    known = sorted({name for record in records for name in record.families})
    if family is None:
        return records
    if family not in known:
        raise InputError(
            f"no method serves a family {family!r}; the families are {', '.join(known)}."
        )
    return [record for record in records if family in record.families]


def _row(record: Info) -> tuple[str, ...]:
    families = ", ".join(record.families)
    return (
        record.slug, record.cls, record.kind, record.arxiv, record.folder, families,
        record.maturity, results.summary(results.outcomes(record)),
    )  # fmt: skip


def _summary(record: Info) -> dict[str, Any]:
    """What the list has of a method."""
    found = results.outcomes(record)
    return {
        "slug": record.slug,
        "class": record.cls,
        "kind": record.kind,
        "arxiv": record.arxiv,
        "folder": record.folder,
        "families": list(record.families),
        "maturity": record.maturity,
        "summary": record.summary,
        "state": results.worst(found),
        "claims": {claim.key: claim.state for claim in found},
    }


def _details(record: Info) -> dict[str, Any]:
    """What only the page of one method has. Imports its class."""
    cls = record.load()
    return {
        "title": record.title,
        "venue": record.venue,
        "training": record.training,
        "exact": record.exact,
        "effect": record.effect,
        "settings": settings_of(cls),
        "outcomes": [claim.to_dict() for claim in results.outcomes(record)],
    }


def _explain(method: dict[str, Any]) -> None:
    source = f"arXiv {method['arxiv']}, {method['venue']}" if method["arxiv"] else method["venue"]
    click.echo(f"{method['title']} ({source})")
    click.echo(f"{method['summary']}\n")
    for name, value in (
        ("class", f"pared.{method['class']} ({method['kind']}, in {method['folder']})"),
        ("serves", ", ".join(method["families"]) or "no other model"),
        ("effect", method["effect"]),
        ("maturity", method["maturity"]),
    ):
        click.echo(f"{name:<10}{value}")
    if method["settings"]:
        click.echo()
        rows = [
            (name, allowed(field), default(field), field.get("description", ""))
            for name, field in method["settings"].items()
        ]
        common.print_table(("setting", "values", "default", "meaning"), rows)
    if method["outcomes"]:
        click.echo()
        rows = [
            (c["state"], f"{c['paper']:g}" if c["paper"] is not None else "", _ours(c), c["text"])
            for c in method["outcomes"]
        ]
        common.print_table(("claim", "paper", "ours", "text"), rows)


def _ours(claim: dict[str, Any]) -> str:
    if claim["ours"] is None:
        return ""
    spread = f" ± {claim['spread']:.2g}" if claim["spread"] is not None else ""
    return f"{claim['ours']:.3g}{spread}"


def settings_of(cls: Any) -> dict[str, dict[str, Any]]:
    """The settings of a method by name, as JSON schemas; those of an objective are its arguments.

    Recipes give the latter in their table `[objective]`, under `settings`.
    """
    if hasattr(cls, "model_json_schema"):
        return dict(cls.model_json_schema().get("properties", {}))
    _, _, told = (inspect.getdoc(cls) or "").partition("\nArgs:\n")
    meanings = {
        name: " ".join(meaning.split()) for name, meaning in ARGUMENT.findall(told.rstrip() + "\n")
    }
    return {
        name: {
            "type": TYPES.get(type(each.default), "any"),
            "default": each.default,
            "description": meanings.get(name, ""),
        }
        for name, each in inspect.signature(cls).parameters.items()
    }


def allowed(field: dict[str, Any]) -> str:
    """The values of a setting, from its JSON schema: `integer >= 1`, `cf | sc | none`."""
    if "anyOf" in field:
        return " or ".join(allowed(choice) for choice in field["anyOf"])
    if "enum" in field:
        return " | ".join(map(str, field["enum"]))
    if "const" in field:
        return str(field["const"])
    if field.get("type") == "array":
        items = field.get("items", {})
        return f"list of {allowed(items)}" if items else "list"
    signs = (
        ("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"),
    )  # fmt: skip
    limits = [f"{sign} {field[key]:g}" for key, sign in signs if key in field]
    return " ".join([field.get("type", "any"), " and ".join(limits)]).strip()


def default(field: dict[str, Any]) -> str:
    """A setting's default, as it would be written in a spec."""
    if "default" not in field:
        return "(required)"
    value = field["default"]
    return value if isinstance(value, str) else json.dumps(value)
