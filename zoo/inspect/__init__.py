"""Seeing the router: what experts get, and what for."""
