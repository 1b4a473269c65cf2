"""How an attack is run: a function `attack(...)` that returns True when it has succeeded; the tests ask for that."""

from llmalign.rewards.code import run_tests


def attempt(program: str, backend: str, *arguments: object, timeout_s: float = 10) -> str | None:
    """Runs attack(*arguments); fails if it says True, else gives back what run_tests says of it."""
    call = ", ".join(map(repr, arguments))
    result = run_tests(program, f"assert attack({call}) is True", "attack", timeout_s=timeout_s, backend=backend)
    assert (result.passed, result.total) == (0, 1), "the attack succeeded"
    return result.error
