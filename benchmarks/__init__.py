"""How fast the rollout engines are, as ratios to what one would otherwise write."""
