"""Private servers for the tests: own processes on free loopback ports, in temporary folders."""
