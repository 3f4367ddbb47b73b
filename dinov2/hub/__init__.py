"""Published models by name, for `torch.hub` and for import; needs nothing but torch."""
