"""The process that sends the load, and what its parent needs to talk to it."""
