"""The commands of the exporter: export, sensitivity and check."""
