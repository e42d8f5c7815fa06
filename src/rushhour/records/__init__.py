"""Records on disk: measurements, training curves, compressions, recorded outputs, and the inputs of a result."""
