"""Scores that leave the program: specs, mathematics, services, judges, the safety filter."""
