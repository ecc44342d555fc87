#!/bin/sh
# Compiles one file of each kind of llama.cpp with CUDA, with the arguments that gpu_build.sh gives on an Orin and on a
# Thor, and on this machine if it has a GPU. All of llama.cpp takes 40 minutes; this takes a few, and shows that the
# arguments, nvcc, cuBLAS and the C++ compiler fit together. Needs nvcc and PyPI. `make cuda` runs it.
#
#   sh tests/cuda/compile_one.sh PYTHON      PYTHON: of the virtual environment
set -eu

python=${1:?expected the Python of the virtual environment}
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$root/build/cuda
files="ggml/src/ggml-cuda:argmax.cu.o ggml/src/ggml-cuda:ggml-cuda.cu.o ggml/src:ggml-cpu/ops.cpp.o src:llama-batch.cpp.o"

nvcc=${CUDACXX:-$(command -v nvcc || true)}
[ -n "$nvcc" ] || nvcc=/usr/local/cuda/bin/nvcc
if ! [ -x "$nvcc" ]; then
    echo "compile_one.sh: no nvcc in PATH, CUDACXX or /usr/local/cuda: nothing can be compiled here" >&2
    exit 1
fi
release=$("$nvcc" --version | sed -n 's/.*release \([0-9]*\.[0-9]*\),.*/\1/p')
mkdir -p "$work/packages"

# llama.cpp, as pip would compile it: the pinned source distribution.
version=$(sed -n 's/^ *llama-cpp-python == //p' "$root/setup.cfg")
source=$work/llama_cpp_python-$version
if ! [ -d "$source" ]; then
    echo "== the source of llama-cpp-python $version"
    "$python" -m pip download -q --progress-bar off --no-deps --no-binary llama-cpp-python -d "$work/packages" \
        "llama-cpp-python==$version"
    tar -xf "$work/packages/llama_cpp_python-$version.tar.gz" -C "$work"
fi

# Some machines have nvcc without cuBLAS: PyPI has it for the same release.
if ! echo '#include <cublas_v2.h>' | "$nvcc" -x cu -E - -o /dev/null 2>/dev/null; then
    echo "== cuBLAS of CUDA $release, from PyPI"
    if ! [ -d "$work/cublas/nvidia" ]; then
        ls "$work"/packages/nvidia_cublas-*.whl >/dev/null 2>&1 || "$python" -m pip download -q --progress-bar off --no-deps -d "$work/packages" "nvidia-cublas==$release.*"
        "$python" -m zipfile -e "$work"/packages/nvidia_cublas-*.whl "$work/cublas"
    fi
    headers=$(dirname "$(find "$work/cublas" -name cublas_v2.h)")
    libraries=$(dirname "$(find "$work/cublas" -name 'libcublas.so.*')")
    for library in cublas cublasLt; do (cd "$libraries" && ln -sf "lib$library".so.* "lib$library.so"); done
    export NVCC_APPEND_FLAGS="-I$headers -L$libraries" CPATH="$headers" LIBRARY_PATH="$libraries"
    export CMAKE_LIBRARY_PATH="$libraries" CMAKE_INCLUDE_PATH="$headers"
fi

compile() { # NAME ROOT: with the arguments that gpu_build.sh gives there
    cmake_args=""
    eval "$(sh "$root/gpu_build.sh" "$2")"
    if [ -z "$cmake_args" ]; then
        echo "compile_one.sh: $1: gpu_build.sh chose no CUDA; it says why above" >&2
        exit 1
    fi
    echo "== $1: $cmake_args"
    # shellcheck disable=SC2086  # a list of arguments
    cmake -S "$source" -B "$work/$1" -DCMAKE_BUILD_TYPE=Release $cmake_args > "$work/$1.log" 2>&1 ||
        { tail -n 20 "$work/$1.log" >&2; exit 1; }
    for file in $files; do
        echo "   ${file#*:}"
        make -C "$work/$1/vendor/llama.cpp/${file%%:*}" "${file#*:}" > "$work/$1.log" 2>&1 ||
            { tail -n 20 "$work/$1.log" >&2; exit 1; }
    done
}

unset CMAKE_ARGS
for board in orin:tegra234 thor:tegra264; do
    mkdir -p "$work/board/${board%%:*}/proc/device-tree"
    printf 'nvidia,%s\0' "${board#*:}" > "$work/board/${board%%:*}/proc/device-tree/compatible"
    CUDACXX=$nvcc compile "${board%%:*}" "$work/board/${board%%:*}"
done
if nvidia-smi -L 2>/dev/null | grep -q GPU; then compile this-machine ""; fi
echo "ok: llama-cpp-python $version, CUDA $release"
