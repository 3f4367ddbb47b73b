"""Recipes and evaluation configurations: YAML data only; ``dinov2.config`` reads them."""
