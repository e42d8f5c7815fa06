"""Fakes and conformance kits, for the tests of Rushhour and of whoever builds on it."""
