"""Generated tasks of the suites: a phone book to memorise, and shortest paths to find in a graph that is given.

After "Mixture of Parrots: Experts improve memorization more than reasoning" (arXiv 2410.19034, section 4). Each module
makes training text and evaluation questions from a config, as ``zoo.harness.facts`` does.
"""
