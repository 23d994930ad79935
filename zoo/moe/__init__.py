"""Mixture-of-experts blocks: router, dispatch, experts, the layer that joins them, balance losses, statistics."""
