"""checks: what makes an answer to an exercise right, one file an exercise.

A check has TITLE, VERSION (raised when the check takes or refuses other answers than before), cases() → list of Case,
and, where something must not be used, MUST_NOT_USE (see lessons/grading/cases.py).
"""
