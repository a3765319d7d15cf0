"""What all tests share: one thread per worker, no network, no progress bars."""

import os

# Before torch is imported. Two workers with two threads each would slow each other down tenfold.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
# By means of AMX some versions of oneDNN get bfloat16 wrong, which `pared doctor` looks for.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
