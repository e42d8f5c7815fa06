"""What the benchmarks are made of: servers under measurement, load, the raw engine, records and their tables."""
