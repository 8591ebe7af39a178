"""The attack: pairs, sites, the inner loop and what it returns."""
