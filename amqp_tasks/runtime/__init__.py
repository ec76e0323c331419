"""Running tasks, on AnyIO. Knows `abc` and `core`; knows no RabbitMQ and no Redis."""
