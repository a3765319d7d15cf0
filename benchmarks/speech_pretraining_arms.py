"""The attentions that are compared as learners from recordings alone."""

import argparse
from typing import Any

import record
import seeded

from pared import anatomy, recipe
from pared.speech.hearing import hearing_of, leave_out_padding
from pared.speech.pretraining import started
from pared.speech.summary_mixing import Sinusoids

SLUG = "summarymixing-ssl"
RECIPES = record.ROOT / "recipes" / SLUG
# The paper's twin: self-attention, its positions sinusoids that are added once, as SummaryMixing's.
BASE, OURS = "attention", "summarymixing-asr"
RELATIVE, ROPE = "relative", "rope-asr"
ARMS = (BASE, RELATIVE, ROPE, OURS)


def planned(options: argparse.Namespace, arm: str, seed: int) -> recipe.Recipe:
    """The recipe of one arm and seed; the mixer drops what the recipe lets attentions drop."""
    plan = recipe.read(options.recipe, options.set)
    config: dict[str, Any] = plan.model.config | {"position_embeddings_type": RELATIVE}
    if arm == BASE:
        config["position_embeddings_type"] = None
    dropout = config.get("attention_dropout", 0.1)
    methods = {ROPE: [ROPE], OURS: [f"{OURS}:dropout={dropout}"]}.get(arm, [])
    return seeded.planned(plan, seed, config=config, methods=("mel-front", *methods))


def built(table: recipe.ModelTable) -> Any:
    """The model of a recipe's table, with what only conversions bring otherwise.

    Convolutions leave padding out in all arms; attentions without positions of their own get
    sinusoids.
    """
    model = recipe.build(table)
    if table.methods == ("mel-front",):
        leave_out_padding(model)
        if table.config["position_embeddings_type"] is None:
            family: Any = anatomy.of(model)
            family.add_positions(Sinusoids(hearing_of(model)))
    return model


def fresh(options: argparse.Namespace, arm: str, seed: int = 0) -> Any:
    """A model of the recipe with random weights."""
    return started(planned(options, arm, seed).model, built)
