"""Kept on file: measurements, curves, results of compression, recorded answers, and what a result was made of."""
