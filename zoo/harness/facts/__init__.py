"""The embedded default data set: facts of the world to know, invented facts to comprehend."""

from zoo.harness.facts.build import FactsConfig, guess_rates, make, write

__all__ = ["FactsConfig", "guess_rates", "make", "write"]
