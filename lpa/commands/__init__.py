"""The subcommands of `lpa`, one module each with `run(arguments) -> exit status`."""

DTYPES = ("auto", "float32", "bfloat16", "float16")  # of weights, for the option --dtype
