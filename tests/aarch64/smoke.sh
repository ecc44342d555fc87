#!/bin/sh
# Runs smoke.py as ARM64 under qemu-user, on a Debian or Ubuntu machine that is not ARM64. Needs the package mirror and
# PyPI; installs nothing on this machine: everything is unpacked below build/aarch64. `make aarch64` runs it.
#
#   sh tests/aarch64/smoke.sh PYTHON        PYTHON: of the virtual environment; with uv, which downloads the wheels
set -eu

python=${1:?expected the Python of the virtual environment}
here=$(cd "$(dirname "$0")" && pwd)
work=$(cd "$here/../.." && pwd)/build/aarch64
host=$(dpkg --print-architecture)
mkdir -p "$work/apt/lists/partial" "$work/apt/archives/partial" "$work/debs" "$work/root" "$work/host"
: > "$work/apt/status"

apt() {
    apt-get -qq -o "Dir::State=$work/apt" -o "Dir::State::lists=$work/apt/lists" -o "Dir::State::status=$work/apt/status" \
        -o "Dir::Cache=$work/apt" -o "APT::Architecture=arm64" -o "APT::Architectures::=arm64" \
        -o "APT::Architectures::=$host" "$@"
}

if ! [ -e "$work/debs/complete" ]; then
    echo "== an ARM64 Python and qemu-user, from the package mirror"
    apt update
    # What python3 depends on, as apt would install it into an empty system. dash and others run no script here.
    names=$(apt install -s --no-install-recommends python3-minimal libpython3-stdlib libgl1 libglib2.0-0 |
        sed -n 's/^Inst \([^ ]*\) .*/\1/p')
    # shellcheck disable=SC2086  # a list of names
    (cd "$work/debs" && apt download $names "qemu-user-static:$host")
    for file in "$work"/debs/*.deb; do
        case $file in
            *qemu-user-static*) dpkg -x "$file" "$work/host" ;;
            *) dpkg -x "$file" "$work/root" ;;
        esac
    done
    : > "$work/debs/complete"
fi

arm64_python=$(cd "$work/root" && echo usr/bin/python3.[0-9]*)
version=${arm64_python#usr/bin/python}
echo "== wheels for ARM64 and Python $version"
rm -rf "$work/site"
"$python" "$here/resolve.py" --board-requirements > "$work/requirements.txt"
"$python" -m uv pip install -q --target "$work/site" --python-version "$version" --only-binary :all: \
    --python-platform aarch64-manylinux_2_35 -r "$work/requirements.txt"

echo "== the smoke test under qemu-user"
PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$work/site" "$work/host/usr/bin/qemu-aarch64-static" -L "$work/root" \
    "$work/root/$arm64_python" "$here/smoke.py"
