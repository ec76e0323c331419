"""Who may look at tasks and stop them, and who may see what they were called with."""

from __future__ import annotations

from guillotina import configure

configure.permission("guillotina.ManageAMQP", "List, see, cancel and retry a container's tasks")
configure.permission("guillotina.DebugAMQP", "See the messages that a container's tasks came by")

configure.grant(permission="guillotina.ManageAMQP", role="guillotina.Manager")
configure.grant(permission="guillotina.DebugAMQP", role="guillotina.Manager")
