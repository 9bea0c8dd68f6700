#!/usr/bin/env bash
# Wheels for a GPU machine that has PyTorch but no network; `gpu_round.py --wheels FOLDER...` installs them there.
#
#   benchmarks/carry.sh OUT [PYTHON_VERSION] [MB]     default 3.12; x86-64, glibc 2.28 or later
#
#   OUT/base        DeepSpeed, tyro and what they need beside PyTorch
#   OUT/dali-1..N   NVIDIA DALI and its libraries, each folder at most MB megabytes (default 55); a file above
#                   that is cut into NAME.part-aa, .part-ab, ..., which the round joins again
#
# Runs where there is a network. With PyTorch, Triton, timm and transformers over there, base is all that the
# stages up to the rivals want; JPEG files want DALI as well.
set -euo pipefail
out=${1:?usage: carry.sh OUT [PYTHON_VERSION] [MB]}
python=${2:-3.12}
limit=$((${3:-55} * 1000000))
pins=$(dirname "$(readlink -f "$0")")/../constraints.txt
base="hjson py-cpuinfo msgpack einops psutil tqdm pydantic pydantic-core annotated-types typing-inspection
  typing-extensions tyro docstring-parser typeguard pytest iniconfig pluggy hypothesis sortedcontainers"
dali="nvidia-dali-cuda130 nvidia-nvimgcodec-cu13 nvidia-libnvcomp-cu13 nvidia-nvjpeg nvidia-nvjpeg2k-cu13
  nvidia-nvtiff-cu13 astunparse gast six optree nvtx makefun libcst"

fetch() { # FOLDER PACKAGE...
  python3 -m pip download -q --no-deps --only-binary=:all: --python-version "$python" --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_24_x86_64 \
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform manylinux1_x86_64 \
    -c "$pins" -d "$1" "${@:2}"
}

rm -rf "$out/base" "$out"/dali-*
mkdir -p "$out/base"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
fetch "$out/base" $base
python3 -m pip wheel -q --no-deps -c "$pins" -w "$out/base" deepspeed # published as source alone

fetch "$scratch/dali" $dali
for file in "$scratch"/dali/*.whl; do
  if [ "$(stat -c %s "$file")" -gt "$limit" ]; then
    split -b "$limit" "$file" "$file.part-"
    rm "$file"
  fi
done
number=1 used=0
mkdir "$out/dali-1"
while read -r size file; do
  if [ $((used + size)) -gt "$limit" ] && [ "$used" -gt 0 ]; then
    number=$((number + 1)) used=0
    mkdir "$out/dali-$number"
  fi
  mv "$file" "$out/dali-$number/"
  used=$((used + size))
done < <(stat -c '%s %n' "$scratch"/dali/* | sort -rn)
du -sh "$out"/*
