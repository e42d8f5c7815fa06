"""What a server tells about itself: statistics, metrics, logs, single requests, and traces."""
