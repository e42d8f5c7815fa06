"""Fakes, simulations and conformance kits: for the tests of Rushhour, and of packages that build on it."""
