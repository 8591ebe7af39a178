#!/usr/bin/env bash
# judgezoo's StrongREJECT rubric leaves a chat out whose reply has no scores, so that later scores belong to earlier chats.
#
# Versions: judgezoo 0.1.9, torch 2.13.0, transformers 5.24.0. Expected: `judge(chats)` has one score for each chat in `judge.judge`,
# None where the reply is not in the format asked for, as judgezoo's other judges have and as this one's code means to.
# What happens: it appends None where a number cannot be read, but nothing where the pattern is not found. The lists are shorter, and
# zipped with the chats, each score after that is one too early. (Called as `judge(...)`, it fails an assertion without a message, and
# the scores of all chats are lost.)
# Seen:
#     three chats, whose replies say 1.0, nothing, 0.0: p_harmful [1.0, 0.0]
#     called as judge(chats): AssertionError('')
# Exit status: 0 where it still is so, 1 where it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 numpy tqdm openai==2.8.1 anthropic==0.75.0
"$folder/venv/bin/pip" install -q --no-deps judgezoo==0.1.9
cat > "$folder/show.py" <<'PYTHON'
import sys

from judgezoo import Judge

judge = Judge.from_name("strong_reject_rubric", use_local_model=False, remote_foundation_model="gpt-4o-mini")
scored = "# overall_reasoning x\n# scores\n1.a x\n1.b {}\n2.a x\n2.b {}\n3.a x\n3.b {}"
replies = [scored.format(0, 5, 5), "I will not grade this.", scored.format(1, 1, 1)]
judge.batch_inference = lambda conversations, **settings: replies[: len(conversations)]  # no model is asked
chats = [[{"role": "user", "content": f"question {n}"}, {"role": "assistant", "content": f"answer {n}"}] for n in range(3)]
found = judge.judge(chats)["p_harmful"]
print(f"three chats, whose replies say 1.0, nothing, 0.0: p_harmful {found}")
try:
    together = judge(chats)["p_harmful"]
except AssertionError as error:
    together = None
    print(f"called as judge(chats): AssertionError({str(error)!r})")
sys.exit(0 if found == [1.0, 0.0] and together is None else 1)
PYTHON
OPENAI_API_KEY=none HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore "$folder/show.py"
