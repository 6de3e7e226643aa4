#!/usr/bin/env bash
# Run every CUDA test, then the benchmark on the GPU, from a copy of the working tree and a folder of wheels.
#
#   tools/gpu/check.sh [WHEELS] [OUT]        default: .gpu-wheels (`make gpu-wheels`) and build/gpu
#
# Needs a GPU, and a Python with torch, numpy, pytest and hypothesis; no network. Writes to OUT:
#   environment.json   the card, the driver's and the packages' versions
#   tests.xml, tests.log
#   gpu.json, gpu.txt  times and memory relative to bare forwards
# Exits with 1 if a test or the benchmark failed; the other is run all the same.
set -euo pipefail
cd "$(dirname "$0")/../.."
wheels=${1:-.gpu-wheels} out=${2:-build/gpu} python=${PYTHON:-python3}
mkdir -p "$out"
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if ! compgen -G "$wheels/*.whl" > /dev/null; then
  echo "no wheels in $wheels; run make gpu-wheels where there is a network, and copy the folder" >&2
  exit 2
fi
"$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$site" "$wheels"/*.whl
"$python" tools/gpu/register.py "$site"
export PYTHONPATH="$PWD/src:$PWD/plugins:$PWD:$site" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
"$python" tools/gpu/environment.py ${GPU_CHECK_DEVICE:+--device "$GPU_CHECK_DEVICE"} | tee "$out/environment.json"
status=0
# Warnings of other versions of the libraries are not what is checked here.
mapfile -t files < <(grep -rlE "mark\.cuda|pytestmark.*cuda" tests --include='test_*.py')
"$python" -m pytest -q -W default -m cuda -p no:cacheprovider --junitxml "$out/tests.xml" "${files[@]}" 2>&1 \
  | tee "$out/tests.log" || status=1
# shellcheck disable=SC2086
"$python" tools/bench/gpu.py --json "$out/gpu.json" ${GPU_CHECK_BENCH:-} 2>&1 | tee "$out/gpu.txt" || status=1
exit $status
