"""`lpa export`: merge an adapter into its base model and save a plain model folder, checked against the adapter."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def run(arguments: Sequence[str]) -> int:
    """The command."""
    from . import DTYPES, quiet_loading

    parser = argparse.ArgumentParser(prog="lpa export", description=__doc__)
    parser.add_argument("--merge", action="store_true", required=True, help="the only kind of export there is")
    parser.add_argument("--model", help="the base: a folder, a hub name, or an asset's name; by default the adapter's")
    parser.add_argument("--adapter", metavar="FOLDER", help="may also be given as --model")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="a folder that is not there yet")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="of the weights")
    options = parser.parse_args(arguments)
    from ..evaluation.export import export_merged
    from ..evaluation.subjects import check_adapters, named_adapters
    from ..models import base_and_adapters, load

    quiet_loading()
    base, adapters = base_and_adapters(options.model, [options.adapter] if options.adapter else [])
    if len(adapters) != 1:
        parser.error(f"one adapter can be merged, and {', '.join(adapters) or 'none'} is given; use --adapter FOLDER")
    check_adapters(named_adapters(adapters))
    model, tokenizer = load(base, dtype=options.dtype)
    check = export_merged(model, tokenizer, adapters[0], options.output)
    print(
        f"{options.output}: loaded again, {check.equal} of {check.prompts} greedy answers are the adapter's, "
        f"mean KL {check.kl:.2g} nats a token"
    )
    return 0
