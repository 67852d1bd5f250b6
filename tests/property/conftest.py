"""How hard Hypothesis tries: `default` on every push, `soak` (HYPOTHESIS_PROFILE=soak) ten times as long."""

import os

from hypothesis import settings

EVERY_PUSH = settings(
    max_examples=100,
    stateful_step_count=30,
    deadline=None,  # a busy machine is not a bug
    derandomize="CI" in os.environ,  # a push is repeatable; elsewhere every run looks somewhere else
)
settings.register_profile("default", EVERY_PUSH)
settings.register_profile("soak", EVERY_PUSH, max_examples=1_000, derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
