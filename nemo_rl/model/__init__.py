"""Everything that touches a transformers model: loading, packing, log-probabilities, sharding."""
