"""A world of real language that a program checks: everyday requests with constraints, graded by IFEval's checkers."""
