#!/bin/sh
# Installs the libraries that bench/ledger.py compares with into DIR, apart from the project's environment:
#   bench/rivals/setup.sh DIR && python -m bench.rivals DIR
set -eu
DIR=${1:?"usage: setup.sh DIR"}
${PYTHON:-python3} -m pip install -q --disable-pip-version-check --no-deps --target "$DIR" \
  liger-kernel==0.8.5 cut-cross-entropy==25.1.1 verl==0.9.1
