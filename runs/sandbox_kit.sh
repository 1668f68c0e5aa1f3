#!/usr/bin/env bash
# What the function substrate needs, for a machine that has no packages and no network: gather it here, install it there.
#   runs/sandbox_kit.sh gather DIRECTORY    # bwrap, libseccomp, the libraries they need, pyseccomp: under a megabyte
#   runs/sandbox_kit.sh install DIRECTORY   # as root; only what is missing; then a real sandbox must answer (exit status 1 if not)
# The Linux of both machines must be x86-64 with a C library as new as that of the first.
set -euo pipefail
verb=$1 kit=$2
python=${PYTHON:-python3}

gather() {
    mkdir -p "$kit"
    local program library
    program=$(command -v bwrap)
    cp "$program" "$kit/bwrap"
    for library in $(ldd "$program" | awk '$3 ~ /^\// && $1 !~ /^libc\./ { print $3 }') /usr/lib/x86_64-linux-gnu/libseccomp.so.2; do
        cp -L "$library" "$kit/"
    done
    cp "$("$python" -c 'import pyseccomp; print(pyseccomp.__file__)')" "$kit/pyseccomp.py"
    du -sh "$kit"
}

install() {
    local site library known
    known=$(ldconfig -p)
    command -v bwrap >/dev/null || cp "$kit/bwrap" /usr/local/bin/bwrap
    for library in "$kit"/lib*.so*; do
        [[ $known == *"$(basename "$library") "* ]] || cp "$library" /usr/local/lib/
    done
    ldconfig
    site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    "$python" -c 'import pyseccomp' 2>/dev/null || cp "$kit/pyseccomp.py" "$site/"
    mountpoint -q /sys/fs/cgroup || mount -t cgroup2 none /sys/fs/cgroup || echo "no cgroups: memory limits cannot be set here"
    examine
}

examine() { # the truth: a command in a sandbox, with limits and else without
    "$python" - <<'PY'
import sys, tempfile
from pathlib import Path
from nautile.sandbox import MIB, Limits, Sandbox, SandboxError
for enforced in (True, False):
    limits = Limits(memory=512 * MIB, pids=128, allow_unenforced=not enforced)
    try:
        with tempfile.TemporaryDirectory() as work, Sandbox.create("function", limits=limits, workspace=Path(work)) as sandbox:
            ran = sandbox.run("echo works; id -u")
        if ran.stdout.split() == ["works", "1000"]:
            print("sandbox:", "ok" if enforced else "ok, but without memory and process limits (--unenforced-limits)")
            sys.exit(0)
        print("sandbox: answered", ran)
    except SandboxError as error:
        print("sandbox:", error)
sys.exit(1)
PY
}

"$verb"
