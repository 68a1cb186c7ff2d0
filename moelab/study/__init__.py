"""The study: sweeps over what is kept and what happens on a miss, and what they show."""
