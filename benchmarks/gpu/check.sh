#!/usr/bin/env bash
# The check on a GPU where nothing is installed but torch, Triton and transformers, and nothing can be:
#
#   bash benchmarks/gpu/check.sh                                          all steps, under 8 minutes
#   GC_STEPS="b d" bash benchmarks/gpu/check.sh                           some steps (a b c d e f)
#   GC_DEVICE=cpu GC_TINY=1 bash benchmarks/gpu/check.sh                  a dry run without a GPU; GC_TRITON=1: interpreted
#
# Also GC_TOTAL (seconds in all), GC_ONLY (cases by name), GC_WORKERS, PYTHON, and OUT, the folder of the results.
set -eu
out=${OUT:-$PWD/results/gpu}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
options=(--out "$out" --device "${GC_DEVICE:-cuda}" --total "${GC_TOTAL:-465}")
[ -z "${GC_STEPS:-}" ] || read -ra steps <<<"$GC_STEPS"
[ -z "${GC_STEPS:-}" ] || options+=(--steps "${steps[@]}")
[ "${GC_TINY:-0}" != 1 ] || options+=(--tiny)
[ "${GC_TRITON:-0}" != 1 ] || options+=(--interpreter)
[ -z "${GC_ONLY:-}" ] || options+=("--only=$GC_ONLY")
[ -z "${GC_WORKERS:-}" ] || options+=(--workers "$GC_WORKERS")
PYTHONPATH="$PWD:$PWD/eval${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -m benchmarks.gpu "${options[@]}"
