"""Internal: figures for sentences, with as many digits as their interval bears."""

from math import floor, log10

from ildistil.study.statistics.checks import listed

__all__ = ["digits_of", "estimate", "left_out", "p_value", "unreachable"]


def digits_of(low: float, high: float) -> int:
    """Return the decimals that show two significant digits of an interval's half width.

    >>> digits_of(0.0123, 0.0345), digits_of(-12.0, 30.0)
    (3, 0)
    """
    half = (high - low) / 2
    return 4 if half == 0 else max(0, 1 - floor(log10(half)))


def estimate(value: float, low: float, high: float, level: float, signed: bool = False) -> str:
    """Return an estimate with its interval.

    >>> estimate(0.0234, 0.0123, 0.0345, 0.95, signed=True)
    '+0.023 (95 % interval +0.012 to +0.035)'
    """
    form = f"{'+' if signed else ''}.{digits_of(low, high)}f"
    return f"{value:{form}} ({100 * level:g} % interval {low:{form}} to {high:{form}})"


def p_value(p: float) -> str:
    """Return a p value for a sentence.

    >>> p_value(0.0625), p_value(0.00001)
    ('p = 0.0625', 'p < 0.0001')
    """
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.3g}"


def unreachable(smallest: float, alpha: float, given: str) -> str:
    """Return the clause for a test that can't reach its level, else nothing.

    >>> unreachable(0.0625, 0.05, "5 pairs")
    '; 5 pairs give no p below 0.0625, so 0.05 cannot be reached, whatever the differences'
    >>> unreachable(0.03125, 0.05, "6 pairs")
    ''
    """
    if smallest <= alpha:
        return ""
    return f"; {given} give no p below {smallest:.3g}, so {alpha:g} cannot be reached, whatever the differences"


def left_out(names: tuple[object, ...]) -> str:
    """Return the clause for what has no partner, else nothing.

    >>> left_out(("seed 3",)), left_out(())
    ('; left out for want of a partner: seed 3', '')
    """
    return f"; left out for want of a partner: {listed(names)}" if names else ""
