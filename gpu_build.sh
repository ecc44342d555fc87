#!/bin/sh
# Prints how this machine installs edge-agent, as two shell variables: `extra` of setup.cfg, and `cmake_args` for
# llama.cpp; empty: CMAKE_ARGS stays as it is. The reasons go to stderr. `make venv` evaluates it; nothing is installed here.
#
#   sh gpu_build.sh [ROOT]         ROOT: where /proc and /usr/local are looked for, for tests
set -eu

root=${1:-}

say() {
    echo "== $1" >&2
}

result() { # EXTRA CMAKE_ARGS
    echo "extra=$1"
    echo "cmake_args='$2'"
    exit 0
}

tree=$root/proc/device-tree/compatible
[ -r "$tree" ] || tree=/dev/null
soc=$(tr '\0' '\n' < "$tree" | sed -n 's/^nvidia,\(tegra[0-9]*\)$/\1/p' | head -n 1)
card=no
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then card=yes; fi
if [ $card = no ] && [ -z "$soc" ]; then
    say "no NVIDIA GPU: everything for the CPU"
    result cpu ""
fi

if [ "$(uname -m)" = x86_64 ]; then
    extra=gpu
    say "NVIDIA GPU: onnxruntime-gpu"
else
    extra=cpu
    say "onnxruntime for the CPU: PyPI's onnxruntime-gpu has no code for this GPU; docs/jetson.md has the other wheel"
fi

if [ -n "${CMAKE_ARGS:-}" ]; then
    say "llama.cpp with CMAKE_ARGS of the environment: $CMAKE_ARGS"
    result "$extra" ""
fi

nvcc=${CUDACXX:-$(command -v nvcc || true)}
[ -n "$nvcc" ] || nvcc=$root/usr/local/cuda/bin/nvcc
if ! [ -x "$nvcc" ]; then
    say "llama.cpp without CUDA: no nvcc in PATH, CUDACXX or /usr/local/cuda; on JetPack: apt install nvidia-cuda-dev"
    result "$extra" ""
fi

# One architecture compiles in a fraction of the time of all. nvidia-smi of a Jetson may not know it.
architecture=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null |
    sed -n 's/^\([0-9]*\)\.\([0-9]\)$/\1\2/p' | sort -u | paste -sd ';' -)
if [ -z "$architecture" ]; then
    case $soc in
        tegra234) architecture=87 ;;   # Orin
        tegra264) architecture=110 ;;  # Thor
    esac
fi
if [ -z "$architecture" ]; then
    say "llama.cpp without CUDA: neither nvidia-smi nor the device tree names the GPU's architecture; set CMAKE_ARGS"
    result "$extra" ""
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/probe.cu" <<'END'
#include <cublas_v2.h>
__global__ void f() {}
int main() { cublasHandle_t handle; return cublasCreate(&handle); }
END
if ! "$nvcc" -arch="sm_${architecture%%;*}" -o "$work/probe" "$work/probe.cu" -lcublas > "$work/log" 2>&1; then
    reason=$(grep -m 1 -iE 'error|cannot|fatal' "$work/log" || head -n 1 "$work/log")
    say "llama.cpp without CUDA: $nvcc cannot compile and link cuBLAS: $reason"
    result "$extra" ""
fi
say "llama.cpp with CUDA for sm_$architecture, by $nvcc"
# GGML_CUDA_NO_VMM: without it the first image can fail on an Orin, where llama.cpp reserves 32 GB of addresses.
result "$extra" "-DGGML_CUDA=on -DGGML_CUDA_NO_VMM=ON -DCMAKE_CUDA_ARCHITECTURES=$architecture -DCMAKE_CUDA_COMPILER=$nvcc"
