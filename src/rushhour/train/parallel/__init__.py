"""Training on several workers: the plan, its cost, its layers, and the processes that run it."""
