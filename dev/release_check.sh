#!/usr/bin/env bash
# Installs the wheel and the sdist of dist/ in turn in a fresh environment, away from the clone, answers
# a question with each, and makes a report: `make release-check`, after the build and twine's check.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
outside=$(mktemp -d)
trap 'rm -rf "$outside"' EXIT
export HF_HUB_OFFLINE=1

python3 -m venv "$outside/venv"
export PIP_DISABLE_PIP_VERSION_CHECK=1
pip() { "$outside/venv/bin/python" -m pip "$@"; }
# shellcheck disable=SC2086 -- no index is no word
pip install -q "$(grep '^torch==' "$root/constraints.txt")" ${TORCH_INDEX:+--index-url $TORCH_INDEX}
cd "$outside"
for file in "$root"/dist/plphp-*.whl "$root"/dist/plphp-*.tar.gz; do
  pip uninstall -q -y plphp 2> /dev/null
  pip install -q "$file" -c "$root/constraints.txt"
  echo "$(basename "$file"): $(venv/bin/plphp --version)"
  pictures=$(venv/bin/python -c "import plphp.demo as d; print(d.__path__[0] + '/pictures')")
  said=$(venv/bin/plphp generate --image "$pictures/a1.png" --prompt "what is brown in picture 1?" 2> /dev/null)
  echo "$said"
  test "$said" = "the brown object in picture 1 is the S"
done
venv/bin/plphp inspect --image "$pictures/a1.png" --prompt "what is brown in picture 1?" --out report.html > /dev/null 2>&1
test -s report.html
