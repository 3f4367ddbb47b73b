"""How a run starts from weights: which are loaded, and that the networks compute what their source computes."""
