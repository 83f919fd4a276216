#!/usr/bin/env bash
# Installs the wheel and the sdist of dist/ in turn in a fresh environment, away from the clone, and
# runs the demo with each: `make release-check`, after the build and twine's check.
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
  venv/bin/plphp demo --json > demo.json
  python3 - demo.json <<'PY'
import json, sys
demo = json.load(open(sys.argv[1]))
right = sum(q["full"]["right"] for q in demo["questions"])
print(f"demo: {len(demo['questions'])} questions, {right} right with the full cache")
assert right >= len(demo["questions"]) // 2, "the embedded model no longer answers"
PY
done
