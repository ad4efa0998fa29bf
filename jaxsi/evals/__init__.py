"""Evaluations that a judge or a checker scores: AlpacaEval 2.0 and others, and what they share."""
