"""From a plan to a smaller network: what is cut, and the ways in which the user's own module is cut by it."""
