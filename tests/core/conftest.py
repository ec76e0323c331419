"""How hypothesis runs here."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# A busy machine is no reason to fail: these tests are about rules, not about time.
settings.register_profile("rules", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("rules")
