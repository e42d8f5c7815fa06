"""From requests to batches: admission, the queue, the batch policy, and the cell that runs them on an engine."""
