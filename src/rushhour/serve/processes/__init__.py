"""The processes of a server: the supervisor, its messages to the worker processes, signals, and memory."""
