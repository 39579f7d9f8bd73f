# Sourced by demo and test: makes .venv once and installs the project with its pinned constraints into it.
# Usage: . scripts/_venv.sh EXTRA
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "mmcache needs Python 3.11 or newer; $python is $("$python" --version). Set PYTHON to another one." >&2
    exit 2
}
[ -x .venv/bin/python ] || "$python" -m venv .venv

# A stamp of what was asked for makes the next run quick.
stamp=$(cat pyproject.toml constraints.txt | cksum | tr -d ' ')-$1
if [ ! -e ".venv/$stamp" ]; then
    # torch first and alone: the pinned version is a CPU build, a looser range pulls gigabytes.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable ".[$1]"
    touch ".venv/$stamp"
fi
