"""What a model will need and how fast it will be, before it is exported. Imports no package of the extra "export"."""
