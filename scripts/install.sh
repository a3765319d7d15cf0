#!/bin/sh
# Make .venv and install pared into it with every extra that the demo and the tests use.
# Where there is no NVIDIA GPU the CPU build of torch is taken, which is ten times smaller.
set -eu

PYTHON=${PYTHON:-python3}
TORCH="torch>=2.9"

if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "pared needs Python 3.11 or newer; $PYTHON is $("$PYTHON" --version). Try: make PYTHON=python3.12" >&2
    exit 1
fi
[ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
pip install --quiet --upgrade "pip>=25.1"  # the first that reads dependency groups

if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
        pip install "$TORCH"
    # A wheel that pip's own configuration offers comes first, then uv, which knows where CPU builds are.
    elif ! pip install --quiet --only-binary torch "torch==2.13.0+cpu" 2>/dev/null; then
        pip install --quiet uv
        .venv/bin/uv pip install --python .venv/bin/python --torch-backend cpu "$TORCH" || pip install "$TORCH"
    fi
fi
pip install --quiet --editable ".[all]"
