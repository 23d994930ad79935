"""``zoo bench``: our times beside those of peers and of the limit, on the same weights in one run.

One module a subject, each with ``rows(options)``, which yields a ``Row`` as soon as it is measured.
"""
