"""The subcommands of `lpa`, one module each with `run(arguments) -> exit status`; `options` serves train and plan."""

from typing import Literal, get_args

Dtype = Literal["auto", "float32", "bfloat16", "float16"]  # of weights, for the option --dtype
DTYPES: tuple[str, ...] = get_args(Dtype)


def quiet_loading() -> None:
    """Turn off transformers' bars for loading weights; downloads keep theirs."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    enable_progress_bars()
