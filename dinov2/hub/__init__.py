"""Published models by name, for `torch.hub` and for import; requires only torch."""
