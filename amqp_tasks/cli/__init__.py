"""The command line: ``python -m amqp_tasks``."""

from __future__ import annotations

import click

from .errors import errors
from .worker import worker

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="amqp_tasks")
def main() -> None:
    """Run asyncio and Trio tasks from a RabbitMQ queue."""


main.add_command(worker)
main.add_command(errors)
