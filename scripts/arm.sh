#!/bin/sh
# Builds the kernels for ARM with a cross-compiler and runs them under an emulator, beside those of this machine: all
# levels must give the same bits. Needs g++-aarch64-linux-gnu and qemu-user, Debian's names.
#
#     scripts/arm.sh [FOLDER]    what is built goes there, build/arm by default
set -eu
cd "$(dirname "$0")/.."
out=${1:-build/arm}
mkdir -p "$out"
flags='-O2 -std=c++17 -fno-math-errno -ffp-contract=off'
aarch64-linux-gnu-g++ $flags -fopenmp -fvisibility=hidden -fPIC -shared csrc/*.cpp -o "$out/kernels.so"
aarch64-linux-gnu-g++ $flags tests/native/same_bits.cpp -ldl -o "$out/same_bits"
for cpu in neoverse-n1 max; do   # with dot products; with products of bytes besides
    OMP_NUM_THREADS=2 qemu-aarch64 -cpu $cpu -L /usr/aarch64-linux-gnu "$out/same_bits" "$out/kernels.so" >"$out/$cpu.txt"
done
