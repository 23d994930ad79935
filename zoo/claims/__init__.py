"""Claims of the literature as experiments: arms trained with several seeds, contrasts with intervals, verdicts."""
