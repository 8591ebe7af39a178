"""The subcommands of `lpa`, one module each with `run(arguments) -> exit status`; `options` serves train and plan."""

from typing import Literal, get_args

Dtype = Literal["auto", "float32", "bfloat16", "float16"]  # of weights, for the option --dtype
DTYPES: tuple[str, ...] = get_args(Dtype)


def quiet_loading() -> None:
    """Turn off transformers' bars for loading weights; downloads keep theirs, where they have any."""
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    shown = not are_progress_bars_disabled()
    disable_progress_bar()  # of the hub too
    if shown:
        enable_progress_bars()
