"""What methods need of a forward process, and the check that refuses a process without it."""

import enum

__all__ = ["Ability", "require"]


class Ability(enum.Enum):
    r"""Something that a forward process may have and that some method needs.

    A process lists its own in the class attribute ``abilities``; nobody above the process layer asks for a
    process's type. The value of each member says what it is.
    """

    NUMBERS = "data of real numbers (a mean of x_0 and gradients in x_t)"
    SYMBOLS = "data of finitely many symbols"
    LINEAR = "states x_t = alpha x_0 + sigma eps"
    INDEPENDENT = "noise that is independent of the data"
    STRINGS = "data of strings of variable length"
    FACTORIZED = "a likelihood q(x_t,i | x_0,i) of every coordinate"
    MARKOV = "a Markov transition q(x_t | x_s)"
    TWEEDIE = "Tweedie's formula (independent normal noise)"
    FREE_VARIANCE = "bridges of a free variance eta"
    ISOTROPIC = "one noise level for all coordinates"
    SDE = "a stochastic differential equation (states that move continuously)"
    JUMPS = "a Markov jump process in continuous time (symbols that jump)"
    MASK = "a mask that lost symbols become and stay"
    REDRAWS = "bridges that draw a share of symbols anew"
    ODE = "a probability-flow ODE (states that move continuously)"


_EXAMPLES = dict.fromkeys(
    (Ability.SYMBOLS, Ability.JUMPS, Ability.MASK, Ability.REDRAWS), "Absorbing"
) | {Ability.STRINGS: "Deletion"}


def require(
    process: object,
    *abilities: Ability,
    argument: str,
    by: object = None,
    instead: str | None = None,
) -> None:
    """Refuse a process that lacks an ability.

    Args:
        process: the process.
        abilities: what is needed of it.
        argument: the argument at fault, for the error.
        by: what was given as that argument, if not the process itself.
        instead: what to give instead under this process, if there is something.

    Raises:
        ValueError: naming the argument, the process and the ability that is missing.
    """
    own: frozenset[Ability] = getattr(process, "abilities", frozenset())
    missing = [ability for ability in abilities if ability not in own]
    if not missing:
        return
    name = type(process).__name__
    got = name if by is None else f"{by} under {'no process' if process is None else name}"
    example = f"a process such as {_EXAMPLES.get(missing[0], 'GaussianProcess')}"
    expected = example if instead is None else f"{instead} or {example}"
    raise ValueError(f"{argument}: got {got}, which lacks {missing[0].value}, expected {expected}")
