"""`lpa chat`: a base model and adapters answer side by side in the terminal."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def run(arguments: Sequence[str]) -> int:
    """The command."""
    from ..data import PLAIN_PROMPT
    from . import DTYPES, quiet_loading

    parser = argparse.ArgumentParser(prog="lpa chat", description=__doc__)
    parser.add_argument("--model", help="a folder, a hub name, or an asset's name; by default the adapters'")
    parser.add_argument("--adapter", action="extend", nargs="+", default=[], metavar="[NAME=]FOLDER")
    parser.add_argument("--prompt", action="append", default=[], help="answer this and end; may be given again")
    parser.add_argument("--system-prompt", default=PLAIN_PROMPT, help="empty for none")
    parser.add_argument("--chat-template-kwargs", metavar="JSON", help="variables for the chat template")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="of the weights")
    parser.add_argument("--device", help="by default the first GPU, else the CPU")
    options = parser.parse_args(arguments)
    import torch

    from ..config import json_object
    from ..evaluation.chat import chat
    from ..evaluation.subjects import check_adapters, named_adapters
    from ..models import base_and_adapters, load

    quiet_loading()
    base, adapters = base_and_adapters(options.model, options.adapter)
    check_adapters(named_adapters(adapters))
    model, tokenizer = load(base, dtype=options.dtype)
    model.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chat(
        model,
        tokenizer,
        adapters,
        prompts=options.prompt,
        system_prompt=options.system_prompt or None,
        max_new_tokens=options.max_new_tokens,
        chat_template_kwargs=json_object("--chat-template-kwargs", options.chat_template_kwargs),
    )
    return 0
