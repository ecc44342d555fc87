#!/bin/sh
# libzmq with its header, for the tests of examples/cpp on a Debian or Ubuntu machine that does not have libzmq3-dev. Needs
# the package mirror. Installs nothing on this machine and needs no root: it unpacks the packages into a folder.
#
#   sh tests/cpp/fetch_libzmq.sh FOLDER       FOLDER: it is made, with usr/include and usr/lib
#
# Does nothing if the machine has libzmq. Without a network it says so and does not fail: then the tests are skipped.
set -eu

out=${1:?expected a folder}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ -e "$out/usr/include/zmq.h" ] || c++ -include zmq.h -x c++ -o "$work/program" - -lzmq 2>/dev/null <<'PROGRAM'
int main() { return zmq_errno(); }
PROGRAM
then
    exit 0
fi

apt() {
    apt-get -qq -o "Dir::State=$work/apt" -o "Dir::State::status=/var/lib/dpkg/status" -o "Dir::Cache=$work/apt" \
        -o "APT::Sandbox::User=" "$@"
}
unpack() {
    for file in "$work"/debs/*.deb; do
        dpkg -x "$file" "$work/root" || return 1
    done
}

echo "== libzmq's header and library, from the package mirror"
mkdir -p "$work/apt/lists/partial" "$work/apt/archives/partial" "$work/debs" "$work/root"
# The library with what it needs and this machine does not have; the header, without what only static linking needs.
# shellcheck disable=SC2086  # a list of names
if command -v apt-get >/dev/null && apt update &&
    names=$(apt install -s --no-install-recommends libzmq5 | sed -n 's/^Inst \([^ ]*\) .*/\1/p') &&
    (cd "$work/debs" && apt download $names libzmq5 libzmq3-dev) && unpack; then
    rm -rf "$out" && mkdir -p "$(dirname "$out")"
    mv "$work/root" "$out"
else
    echo "no libzmq: the tests of examples/cpp are skipped. To run them: apt install libzmq3-dev" >&2
fi
