"""The subcommands of `lpa`, one module each with `run(arguments) -> exit status`; `options` serves train and plan."""

from typing import Literal, get_args

Dtype = Literal["auto", "float32", "bfloat16", "float16"]  # of weights, for the option --dtype
DTYPES: tuple[str, ...] = get_args(Dtype)
