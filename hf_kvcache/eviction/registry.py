"""Finding policies by name: a new policy is one file in ``policies/`` whose class carries ``@register``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from hf_kvcache.eviction.base import Policy
from hf_kvcache.utils.registry import Named, Registry, registers

_POLICIES: Registry[type[Policy]] = Registry("hf_kvcache.eviction.policies")
_WRAPPERS: Registry[type[Policy]] = Registry("hf_kvcache.eviction.policies")


def register(name: str, wraps: bool = False) -> Callable[[Named], Named]:
    """Class decorator: make a policy known under ``name``, lower-case letters and digits.

    Args:
        name: the name; a policy that ``wraps`` another is written in front of it: ``"ada-snapkv"``.
        wraps: whether its constructor takes another policy first.
    """
    return registers(_WRAPPERS if wraps else _POLICIES, name)


def available() -> list[str]:
    """The names of the registered policies that stand alone, sorted."""
    return list(_POLICIES.all())


def wrappers() -> list[str]:
    """The names of the registered policies that go in front of another policy, sorted."""
    return list(_WRAPPERS.all())


def resolve(policy: str | Policy, **options: Any) -> Policy:
    """Build a policy from a name such as ``"snapkv"`` or ``"ada-snapkv"``.

    Args:
        policy: a registered name, with the names of wrappers in front of it, joined by ``-``; or a ready policy.
        **options: arguments of the policy, or of its wrappers; each goes to the first that has it, from the inside.

    Raises:
        ValueError: for an unknown name, options beside a ready policy, or a policy that asks for gate scores and
            accumulated attention.
        TypeError: for a policy that is neither a name nor a :class:`Policy`, or an option that none of them has.
    """
    if isinstance(policy, Policy):
        if options:
            raise ValueError(f"policy={policy!r} is ready-made: {', '.join(options)} cannot be given beside it")
        return _checked(policy)
    if not isinstance(policy, str):
        raise TypeError(f"policy must be a name or a Policy, got {type(policy).__name__}; accepted: {_accepted()}")
    classes = _classes(policy)
    takes = [_parameters(cls) for cls in classes]
    if unknown := sorted(set(options) - set().union(*takes)):
        accepted = ", ".join(sorted(set().union(*takes))) or "none"
        raise TypeError(f"policy {policy!r} has no option {unknown[0]!r}; accepted: {accepted}")
    built = classes[0](**_taken(options, takes[0]))
    for cls, names in zip(classes[1:], takes[1:], strict=True):
        built = cls(built, **_taken(options, names))  # type: ignore[call-arg]
    return _checked(built)


def option_names(policy: str | Policy) -> set[str]:
    """The options that :func:`resolve` takes for ``policy``; raises as it does."""
    return set() if not isinstance(policy, str) else set().union(*(_parameters(cls) for cls in _classes(policy)))


def _checked(policy: Policy) -> Policy:
    if policy.needs_hidden and policy.needs_accumulated:
        raise ValueError(
            f"policy={policy!r} has both needs_hidden and needs_accumulated, and one number is kept beside each token: "
            "its gate score or its accumulated attention; accepted: one of the two"
        )
    return policy


def _classes(policy: str) -> list[type[Policy]]:
    """The classes that a name stands for, from the inside out."""
    known, wrapping = _POLICIES.all(), _WRAPPERS.all()
    *outer, inner = policy.split("-")
    if inner not in known or any(name not in wrapping for name in outer):
        raise ValueError(f"policy={policy!r} is not known; accepted: {_accepted()}")
    return [known[inner], *(wrapping[name] for name in reversed(outer))]


def _parameters(policy: type[Policy]) -> set[str]:
    # A policy without a constructor of its own would show Python's, which takes anything.
    return set() if policy.__init__ is object.__init__ else set(inspect.signature(policy).parameters) - {"policy"}


def _taken(options: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """Take those of ``names`` out of ``options``."""
    return {name: options.pop(name) for name in names & set(options)}


def _accepted() -> str:
    return f"{', '.join(available())}, each with {' or '.join(f'{name}-' for name in wrappers())} in front"
