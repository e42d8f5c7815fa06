"""The operating system: the machine, files, signals, standard streams, and unexpected errors."""
