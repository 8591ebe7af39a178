"""The subcommands of `lpa`, one module each with `run(arguments) -> exit status`."""
