"""Distances between two sets of features: Frechet, MMD and KID, precision and recall.

All take any encoder's features (samples, dimensions), compute in float64 and return plain floats. A
value means something only beside its encoder, the sample counts and the dimensions: never
compare across encoders, and for the Frechet distance never across sample counts.

The generated set comes first and the reference second; all but `precision_recall` are symmetric.
"""

from pared.bench.distances.coverage import PrecisionRecall, precision_recall
from pared.bench.distances.gaussians import (
    FrechetSums,
    expected_frechet_bias,
    frechet,
    frechet_gaussians,
)
from pared.bench.distances.kernels import Kid, MmdTest, kid, median_bandwidth, mmd, mmd_test

__all__ = [
    "FrechetSums",
    "Kid",
    "MmdTest",
    "PrecisionRecall",
    "expected_frechet_bias",
    "frechet",
    "frechet_gaussians",
    "kid",
    "median_bandwidth",
    "mmd",
    "mmd_test",
    "precision_recall",
]
