"""The subcommands: each module offers `configure(parser)` and `main(args) -> exit code`, and imports little."""
