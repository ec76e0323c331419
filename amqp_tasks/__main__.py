"""``python -m amqp_tasks``"""

from __future__ import annotations

# Not relative: a process for tasks with process=True runs this file outside of its package.
from amqp_tasks.cli import main

if __name__ == "__main__":
    main(prog_name="python -m amqp_tasks")
