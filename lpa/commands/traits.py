"""`lpa traits`: the shipped statements, and how their tokens are seen by the attack."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def run(arguments: Sequence[str]) -> int:
    """The command."""
    from ..data import ASSESSMENT_PROMPT, ATTACK_ON, SPLITS, load_pairs, preview, statements

    parser = argparse.ArgumentParser(prog="lpa traits", description=__doc__)
    parser.add_argument("--kind", choices=("undesirable", "desirable"), help="one kind; by default both")
    parser.add_argument("--split", choices=SPLITS, help="one split; by default all")
    parser.add_argument(
        "--preview", action="store_true", help="show which tokens are prompt, rejected, chosen, attacked"
    )
    parser.add_argument("--data", help="preview this data set instead (file, folder or name)")
    parser.add_argument("--model", help="a model or an adapter, whose tokenizer previews (default: the embedded model)")
    parser.add_argument("--rows", type=int, default=3, help="how many rows to preview (default: 3)")
    parser.add_argument("--system-prompt", default=ASSESSMENT_PROMPT, help="empty for none")
    parser.add_argument("--attack-on", choices=ATTACK_ON, default=ATTACK_ON[0])
    parser.add_argument("--chat-template-kwargs", metavar="JSON", help="variables for the chat template")
    parser.add_argument(
        "--chat-template-date", metavar="YYYY-MM-DD", help="what the chat template prints as today's date"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the tokenizer")
    options = parser.parse_args(arguments)
    if options.preview or options.data:
        from transformers import AutoTokenizer

        from ..config import json_object
        from ..models import DEFAULT_MODEL, adapter_base, resolve

        name = options.model or DEFAULT_MODEL
        folder = Path(name).expanduser()
        own = (folder / "tokenizer_config.json").is_file()  # an adapter may have none; its base model has
        tokenizer = AutoTokenizer.from_pretrained(
            folder if own else resolve(adapter_base(name) or name), trust_remote_code=options.trust_remote_code
        )
        pairs = load_pairs(options.data, kind=options.kind or "undesirable", split=options.split or "train")
        shown = [pairs[i] for i in range(min(options.rows, len(pairs)))]
        preview(
            tokenizer, shown, system_prompt=options.system_prompt or None, attack_on=options.attack_on,
            chat_template_kwargs=json_object("--chat-template-kwargs", options.chat_template_kwargs),
            date=options.chat_template_date
        )  # fmt: skip
        return 0
    from rich.console import Console
    from rich.table import Column, Table

    grid = Table(Column("id", no_wrap=True), "kind", "split", "trait", "facet", "statement")
    for kind in [options.kind] if options.kind else ("undesirable", "desirable"):
        for split in [options.split] if options.split else SPLITS:
            for row in statements(kind, split):
                grid.add_row(str(row["id"]), kind, split, row["trait"], row["facet"], row["statement"])
    Console().print(grid)
    return 0
