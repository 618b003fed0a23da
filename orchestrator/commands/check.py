"""`check`: read a study strictly, build every one of its runs, and say what it holds."""

from orchestrator.commands.options import Changes, Profile, StudySpec
from orchestrator.terminal import console, say


def check(study: StudySpec, profile: Profile = "full", changes: Changes = None) -> None:
    """Check a study without running it."""
    from orchestrator.plan import planned
    from orchestrator.study import load

    loaded = load(study, profile, changes or [])
    count = len(planned(loaded))
    arms = ", ".join(arm.name for arm in loaded.arms)
    say(console(), f"{loaded.name}: {count} runs, arms {arms}; all settings are valid")
