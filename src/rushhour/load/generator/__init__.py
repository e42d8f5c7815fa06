"""The generator: the process that sends load and records every request, and what its parent needs to run it.

It is the lowest floor of `rushhour.load`: nothing in here knows models, payloads or verdicts.
"""
