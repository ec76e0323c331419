"""Implementations of `abc`: each knows one server's client library, and no runtime."""
