#!/usr/bin/env bash
# One GPU, eight minutes: benchmarks/gpu.py in an environment that has what it needs.
#
#   benchmarks/gpu.sh [--minutes 8] [--dry-run]
#
# PYTHON names the interpreter of an environment that has torch and shearing's dependencies; without it, the checkout's
# .venv, or a fresh .venv-gpu with the wheels named in WHEELS below. Where there is no index, put those wheels and what
# they need into a folder (pip download) and name it: WHEELHOUSE=folder benchmarks/gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."

WHEELS=(torch==2.13.0 transformers==5.23.0 accelerate tokenizers safetensors datasets deepspeed)

dry=false
for argument in "$@"; do [[ $argument == --dry-run ]] && dry=true; done
if ! $dry && ! nvidia-smi --list-gpus >/dev/null 2>&1; then
    echo "no NVIDIA GPU here: nothing was measured; --dry-run walks through it on the CPU"
    exit 0
fi

python=${PYTHON:-}
if [[ -z $python && -x .venv/bin/python ]]; then python=.venv/bin/python; fi
if [[ -z $python ]]; then
    python=.venv-gpu/bin/python
    if [[ ! -x $python ]]; then
        python3 -m venv .venv-gpu
        index=()
        if [[ -n ${WHEELHOUSE:-} ]]; then index=(--no-index --find-links "$WHEELHOUSE"); fi
        # Without constraints.txt, which takes the CPU's torch.
        "$python" -m pip install --disable-pip-version-check --quiet "${index[@]}" "${WHEELS[@]}"
        "$python" -m pip install --disable-pip-version-check --quiet "${index[@]}" -e .
    fi
fi
exec "$python" benchmarks/gpu.py "$@"
