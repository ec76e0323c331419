"""The rules: data and pure functions. No async, no clock, no random, no I/O."""
