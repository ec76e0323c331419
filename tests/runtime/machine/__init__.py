"""A state machine that drives whole workers, in memory, through whatever can befall them.

- `lines`: what lies between one program and the servers, and can fail.
- `acts`: the tasks that are run.
- `ledger`: the plain model: what was promised, and what happened.
- `programs`: the workers and producers that come and go.
- `world`: what is done to them, the moves of the machine, and how it all comes to rest.
- `test_machine`: the machine.
"""
