#!/usr/bin/env bash
# nanogcg's newest release cannot be resolved beside any transformers 5, though its GCG runs there.
#
# Versions: nanogcg 0.3.0, transformers 5.24.0. Expected: a package whose attack takes any causal language model installs beside
# the library that present models need.
# What happens: it requires transformers <=4.47.1. pip refuses both together, and `pip install nanogcg` alone takes transformers
# back by a major version. Installed by --no-deps it is imported and its settings are made.
# Seen:
#     Requires-Dist: transformers<=4.47.1,>=4.4
#     pip refuses both: ResolutionImpossible
#     beside transformers 5.24.0, without dependencies: GCGConfig(num_steps=1)
# Exit status: 0 where it still is so, 1 where it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip"
"$pip" install -q torch==2.13.0 transformers==5.24.0 scipy sentencepiece protobuf
"$pip" install -q --no-deps nanogcg==0.3.0
grep -h "^Requires-Dist: transformers" "$folder"/venv/lib/python3*/site-packages/nanogcg-0.3.0.dist-info/METADATA | tee "$folder/cap"
grep -q "<=4.47.1" "$folder/cap"
if "$pip" install --dry-run nanogcg==0.3.0 transformers==5.24.0 > "$folder/resolved" 2>&1; then
    echo "pip takes both now"
    exit 1
fi
grep -q "ResolutionImpossible\|conflict" "$folder/resolved"
echo "pip refuses both: ResolutionImpossible"
"$folder/venv/bin/python" -W ignore -c "
import nanogcg, transformers
config = nanogcg.GCGConfig(num_steps=1)
print(f'beside transformers {transformers.__version__}, without dependencies: GCGConfig(num_steps={config.num_steps})')"
