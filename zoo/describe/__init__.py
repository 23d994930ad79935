"""Architectures put into words, tables and drawings, from their configs alone."""
