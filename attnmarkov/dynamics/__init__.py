"""What long rollouts should show: winners and growth exponents."""

from attnmarkov.dynamics.exponents import possible_winners, winner_exponents

__all__ = ["possible_winners", "winner_exponents"]
