"""The commands of the exporter: export and check."""
