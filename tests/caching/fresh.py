"""What pipelines paint in processes of their own: python -m tests.caching.fresh

Reads pairs of ways' names and specs of methods as JSON from standard input, and writes a digest for
each. All is imported first; then each pair gets a process, forked off before anything has run.
"""

import hashlib
import json
import multiprocessing
import sys
import warnings
from contextlib import nullcontext

import diffusers
from diffusers.utils import logging
from torch import Tensor

import pared
from tests.caching.pipelines import WAYS

WAY = {way.name: way for way in WAYS}


def digest(pictures: Tensor) -> str:
    return hashlib.sha256(pictures.contiguous().numpy().tobytes()).hexdigest()


def painted(case: tuple[str, str]) -> str:
    """The digest of one call of a pipeline; without a spec, of the pipeline itself."""
    name, spec = case
    pipe = WAY[name].build()
    with pared.apply(pipe, pared.parse(spec)) if spec else nullcontext():
        return digest(WAY[name].paint(pipe))


def main() -> None:
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    cases = [tuple(case) for case in json.load(sys.stdin)]
    for name, spec in cases:
        getattr(diffusers, WAY[name].cls)
        if spec:
            pared.parse(spec)
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        json.dump(pool.map(painted, cases, chunksize=1), sys.stdout)


if __name__ == "__main__":
    main()
