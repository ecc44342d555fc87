#!/bin/sh
# Installs edge-agent as a service: program in /opt/edge-agent, unit, user, configuration, folders for keys and bundles.
#
#   sudo sh systemd/install.sh               # this machine; run it again after an update
#   sudo sh systemd/install.sh --dry-run     # prints every change and makes none
#   sudo sh systemd/install.sh --uninstall   # leaves configuration, keys and bundles
#
# Changes only what differs, so a second run changes nothing. A configuration that exists is never overwritten: the new
# example is written beside it. Does not start the service: a camera and a bundle come first.
set -eu
umask 022
export LC_ALL=C

usage() {
    cat <<'END'
usage: install.sh [--root DIR] [--csi] [--mavlink] [--dry-run] [--uninstall]
  --root DIR    install into the mounted image DIR: no virtual environment, no user (systemd makes it at the first boot)
  --csi         for a CSI camera of a Jetson: also the drop-in systemd/edge-agent-csi.conf
  --mavlink     also the bridge to an autopilot: unit, user and configuration of edge-agent-mavlink
  --dry-run     print what would be changed, and change nothing
  --uninstall   remove what this script installed; configuration, keys, bundles and the user stay
END
}

fail() {
    echo "install.sh: $1" >&2
    exit "${2:-1}"
}

root="" csi=no mavlink=no dry=no remove=no
while [ $# -gt 0 ]; do
    case $1 in
        --root)
            [ $# -gt 1 ] && [ -n "$2" ] || fail "--root: expected a folder" 2
            [ -d "$2" ] || fail "--root: $2: no such folder; mount the image first" 2
            root=$(cd "$2" && pwd -P)
            [ "$root" != / ] || root=""
            shift ;;
        --csi) csi=yes ;;
        --mavlink) mavlink=yes ;;
        --dry-run) dry=yes ;;
        --uninstall) remove=yes ;;
        -h | --help) usage; exit 0 ;;
        *) usage >&2; fail "$1: unknown option" 2 ;;
    esac
    shift
done

source=$(cd "$(dirname "$0")/.." && pwd -P)
target=$root/opt/edge-agent
units=$root/etc/systemd/system
dropin=$units/edge-agent.service.d/csi.conf
config=$root/etc/edge-agent.yaml
bridge_config=$root/etc/edge-agent-mavlink.yaml
list=$target/installed-files
command_link=$root/usr/local/bin/edge-agent
is_clone=no
if [ -d "$target" ] && [ "$(cd "$target" && pwd -P)" = "$source" ]; then is_clone=yes; fi
n_changes=0

# change WORDS COMMAND...: one change; with --dry-run only the words.
change() {
    n_changes=$((n_changes + 1))
    if [ $dry = yes ]; then
        echo "would $1"
    else
        echo "$1"
        shift
        "$@"
    fi
}

copy() { # SOURCE TARGET: never half a file
    mkdir -p "$(dirname "$2")"
    cp "$1" "$2.part"
    if [ -x "$1" ]; then chmod 0755 "$2.part"; else chmod 0644 "$2.part"; fi
    mv -f "$2.part" "$2"
}

put() { # SOURCE TARGET
    cmp -s "$1" "$2" || change "write $2" copy "$1" "$2"
}

put_unit() { # SOURCE TARGET: a changed unit is kept, because changes belong in a drop-in and somebody may not know it
    if [ -e "$2" ] && ! cmp -s "$1" "$2"; then
        change "keep the unit before as $2.old" cp "$2" "$2.old"
    fi
    put "$1" "$2"
}

folder() { # MODE FOLDER
    [ -d "$2" ] || change "make the folder $2" mkdir -p -m "$1" "$2"
}

gone() { # FILE
    if [ -e "$1" ] || [ -L "$1" ]; then change "remove $1" rm -f "$1"; fi
}

inside() { # FOLDER: a link in an image leads to this machine's own files
    case $(readlink -m "$1") in
        "$root"/*) ;;
        *) fail "$1: expected a folder inside of $root, found a link to $(readlink -m "$1")" ;;
    esac
}

is_live() {
    [ -z "$root" ]
}

program_files() { # of the project, relative
    cd "$source" && {
        printf '%s\n' setup.cfg pyproject.toml Makefile gpu_build.sh LICENSE *.md
        find edge_agent quantize systemd docs examples -type f ! -path '*/__pycache__/*' ! -name '*.pyc'
    }
}

check_machine() {
    [ "$(id -u)" = 0 ] || [ $dry = yes ] || fail "expected root: sudo sh systemd/install.sh (or --root DIR for an image)"
    command -v systemctl >/dev/null || fail "no systemctl on this machine; for an image use --root DIR"
    [ $remove = yes ] && return
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
        fail "expected python3 of version 3.10 or newer: apt install python3-venv"
    command -v make >/dev/null || fail "no make on this machine: apt install make cmake g++ python3-venv"
    for group in video render; do
        getent group $group >/dev/null || fail "no group $group, which the unit needs for cameras and the GPU: groupadd -r $group"
    done
}

install_program() {
    if [ $is_clone = no ]; then
        program_files | sort > "$work/files"
        hashes "$source" > "$work/wanted"
        hashes "$target" > "$work/found"
        comm -23 "$work/wanted" "$work/found" | sed 's/^[0-9a-f]*  //' > "$work/new"
        if [ -s "$work/new" ] || ! cmp -s "$work/files" "$list"; then
            change "write $(wc -l < "$work/new") files of the program to $target" copy_program
        fi
    fi
    [ "$(readlink "$command_link" 2>/dev/null)" = /opt/edge-agent/.venv/bin/edge-agent ] || change \
        "link $command_link to the program" link_command
    is_live || return 0
    if ! make -C "$target" -q .venv/.installed >/dev/null 2>&1; then
        change "make the virtual environment $target/.venv (minutes: llama.cpp is compiled)" make -C "$target" venv
    fi
}

hashes() { # FOLDER: of the program's files in it
    if [ -d "$1" ]; then (cd "$1" && xargs sha256sum < "$work/files" 2>/dev/null | sort) fi
}

copy_program() {
    mkdir -p "$target"
    tar -C "$source" --mode=u=rwX,go=rX -cf "$work/program.tar" -T "$work/new"
    tar -C "$target" --no-same-owner -xf "$work/program.tar"
    if [ -e "$list" ]; then # files that this version has no more
        comm -23 "$list" "$work/files" | while read -r file; do rm -f "$target/$(checked "$file")"; done
    fi
    copy "$work/files" "$list"
}

checked() { # a name of the list, which somebody may have written to
    case $1 in /* | *..*) fail "$list: expected names inside of $target, found $1" ;; esac
    echo "$1"
}

link_command() {
    mkdir -p "$(dirname "$command_link")"
    ln -sfn /opt/edge-agent/.venv/bin/edge-agent "$command_link"
}

install_files() {
    put "$source/systemd/edge-agent.sysusers.conf" "$root/etc/sysusers.d/edge-agent.conf"
    if is_live && ! getent passwd edge-agent >/dev/null; then
        change "make the user edge-agent" systemd-sysusers edge-agent.conf
    fi
    folder 0755 "$root/etc/edge-agent"                 # public keys
    folder 0750 "$root/var/lib/edge-agent"
    # Else systemd gives everything in it to the service at its first start.
    if is_live && [ "$(stat -c %U /var/lib/edge-agent 2>/dev/null)" != edge-agent ]; then
        change "give /var/lib/edge-agent to edge-agent" chown edge-agent: /var/lib/edge-agent
    fi
    folder 0755 "$root/var/lib/edge-agent/bundles"     # of root: the service may not change what it has verified
    folder 0755 "$root/var/lib/edge-agent/adapters"
    if [ ! -e "$config" ] && [ ! -L "$config" ]; then
        put "$source/systemd/edge-agent.yaml" "$config"
    elif ! cmp -s "$source/systemd/edge-agent.yaml" "$config"; then
        put "$source/systemd/edge-agent.yaml" "$config.new"
    fi
    before=$n_changes
    put_unit "$source/systemd/edge-agent.service" "$units/edge-agent.service"
    if [ $csi = yes ]; then put "$source/systemd/edge-agent-csi.conf" "$dropin"; fi
    if [ $mavlink = yes ]; then install_bridge; fi
    if is_live && [ "$n_changes" != "$before" ]; then change "load the unit" systemctl daemon-reload; fi
}

install_bridge() {
    put "$source/systemd/edge-agent-mavlink.sysusers.conf" "$root/etc/sysusers.d/edge-agent-mavlink.conf"
    if is_live && ! getent passwd edge-agent-mavlink >/dev/null; then
        change "make the user edge-agent-mavlink" systemd-sysusers edge-agent-mavlink.conf
    fi
    if [ ! -e "$bridge_config" ] && [ ! -L "$bridge_config" ]; then
        put "$source/systemd/edge-agent-mavlink.yaml" "$bridge_config"
    fi
    put_unit "$source/systemd/edge-agent-mavlink.service" "$units/edge-agent-mavlink.service"
}

remove_all() {
    if is_live && [ -e "$units/edge-agent-mavlink.service" ]; then
        change "stop and disable the bridge" systemctl disable --now edge-agent-mavlink.service
    fi
    gone "$units/edge-agent-mavlink.service"
    gone "$root/etc/sysusers.d/edge-agent-mavlink.conf"
    if is_live && [ -e "$units/edge-agent.service" ]; then
        change "stop and disable the service" systemctl disable --now edge-agent.service
    fi
    if cmp -s "$source/systemd/edge-agent-csi.conf" "$dropin"; then gone "$dropin"; fi
    gone "$units/edge-agent.service"
    gone "$root/etc/sysusers.d/edge-agent.conf"
    gone "$config.new"
    if [ -L "$command_link" ]; then gone "$command_link"; fi
    if is_live && [ "$n_changes" -gt 0 ]; then change "forget the unit" systemctl daemon-reload; fi
    if [ -e "$list" ]; then change "remove the program in $target" remove_program; fi
    for kept in "$config" "$bridge_config" "$root/etc/edge-agent" "$root/var/lib/edge-agent"; do
        if [ -e "$kept" ]; then echo "kept: $kept"; fi
    done
    if [ $is_clone = yes ]; then echo "kept: $target, because this script lies in it"; fi
}

remove_program() { # the files of the list and what was made of them; files of others stay
    while read -r file; do rm -f "$target/$(checked "$file")"; done < "$list"
    rm -rf "$target/.venv" "$target/edge_agent.egg-info" "$list"
    find "$target" -depth -type d -name __pycache__ -exec rm -rf {} +
    find "$target" -depth -type d -empty -delete
}

next_steps() {
    echo "next:"
    if ! is_live; then
        echo "  chroot $root make -C /opt/edge-agent venv     # on the board, or in the image under its own processor"
    fi
    echo "  set camera.source in /etc/edge-agent.yaml, and trusted_keys to your key in /etc/edge-agent/"
    echo "  edge-agent bundle install BUNDLE"
    echo "  runuser -u edge-agent -- edge-agent check --config /etc/edge-agent.yaml"
    echo "  systemctl enable --now edge-agent"
    if [ $mavlink = yes ]; then
        echo "  set connection and fence in /etc/edge-agent-mavlink.yaml; docs/mavlink.md has the bench checks"
        echo "  systemctl enable --now edge-agent-mavlink"
    fi
    if [ -e "$config.new" ]; then echo "  compare $config with $config.new, which has the keys of this version"; fi
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if is_live; then
    check_machine
else
    for path in etc/systemd/system etc/sysusers.d etc/edge-agent usr/local/bin var/lib/edge-agent/bundles opt/edge-agent; do
        inside "$root/$path"
    done
fi
if [ $remove = yes ]; then
    remove_all
else
    install_files
    install_program
    if is_live && [ $dry = no ] && command -v systemd-analyze >/dev/null; then
        # Its status is 0 for unknown keys, so its output counts.
        systemd-analyze verify --man=no "$units/edge-agent.service" 2>&1 | grep edge-agent >&2 || true
    fi
fi
if [ $n_changes = 0 ]; then echo "nothing to change"; elif [ $remove = no ]; then next_steps; fi
