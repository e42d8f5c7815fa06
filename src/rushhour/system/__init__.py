"""The operating system: the machine, files, signals, standard streams, and exceptions that nobody foresaw."""
