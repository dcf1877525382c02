#!/bin/sh
# Create .venv with the first Python that really runs, is 3.11 or newer and can make environments.
set -eu
.venv/bin/python -m pip --version >/dev/null 2>&1 && exit 0
for p in ${PYTHON:-python3.13 python3.12 python3.11 python3}; do
    if "$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
        echo "creating .venv with $("$p" --version)"
        exec "$p" -m venv --clear .venv
    fi
done
echo "error: needs Python 3.11 or newer with the venv module (on Debian: apt install python3.11-venv);" \
     "tried: ${PYTHON:-python3.13 python3.12 python3.11 python3}. Name another with: make PYTHON=/path/to/python" >&2
exit 1
