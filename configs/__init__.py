"""Recipes: one YAML a published experiment, found by name with `--config NAME`; imported as `design_lightning.configs`."""
